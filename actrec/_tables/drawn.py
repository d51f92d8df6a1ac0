"""Cells with a drawing in HTML: histograms, bars and badges. In text, only their text is shown."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from itertools import chain
from typing import Final, Self

from .markup import Html, tag, together

STYLE: Final = """
.actrec > .actrec-table svg { display: inline-block; vertical-align: middle; margin-right: 5px; overflow: visible; }
.actrec > .actrec-table svg path { fill: rgb(47, 111, 176); stroke: none; }
.actrec > .actrec-table svg path.actrec-rest { fill: rgba(128, 128, 128, .3); }
.actrec > .actrec-table td small { font-size: 11px; opacity: .8; white-space: nowrap; }
.actrec > .actrec-table .actrec-title span, .actrec > .actrec-table td span.actrec-bad { font-weight: 600; padding: 0 6px;
  border-radius: 3px; color: rgb(255, 255, 255); background: rgb(184, 50, 38); }
.actrec > .actrec-table td span.actrec-bad { white-space: nowrap; }
.actrec > .actrec-table .actrec-title span.actrec-good { background: rgb(26, 122, 70); }
.actrec > .actrec-table tr.actrec-first td { border-top: 2px solid rgb(184, 50, 38);
  border-bottom: 2px solid rgb(184, 50, 38); }
.actrec > .actrec-table tr.actrec-first td:first-child { border-left: 2px solid rgb(184, 50, 38); }
.actrec > .actrec-table tr.actrec-first td:last-child { border-right: 2px solid rgb(184, 50, 38); }
"""

#: From empty to full, in one line of text.
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_HEIGHT: Final = 20
#: The width in pixels of a bar, and about that of a character.
_STEP: Final = 4
_CHARACTER: Final = 8


class Drawn(str):
    """A cell: a text, and the HTML that is shown in its place."""

    __slots__ = ("html", "width")

    html: Html
    width: int  #: in characters

    def __new__(cls, text: str, html: Html, width: int) -> Self:
        """Make a cell."""
        cell = super().__new__(cls, text)
        cell.html, cell.width = html, width
        return cell


class Framed(str):
    """The first cell of a row that has a frame in HTML."""

    __slots__ = ()


def bars(heights: Sequence[float], label: str, *, below: bool = False) -> Drawn:
    """Return a histogram: in HTML an SVG with the range after it or below it; in text a block character for every two bars.

    >>> bars([1, 1, 4, 4, 2, 1], "0 ... 3")
    '▃█▄'
    """
    pairs = [sum(heights[at : at + 2]) for at in range(0, len(heights), 2)]
    text = "".join(_BLOCKS[round(share * (len(_BLOCKS) - 1))] for share in _shares(pairs))
    path = "".join(
        f"M{at * _STEP} {_HEIGHT}v-{max(share * _HEIGHT, 0.8):.1f}h{_STEP - 1}V{_HEIGHT}z"
        for at, share in enumerate(_shares(heights))
        if share
    )
    picture = _svg(path, _STEP * len(heights), label)
    widths = _STEP * len(heights) // _CHARACTER, len(label) * 3 // 4
    html = together(picture, *[tag("br")] * below, tag("small", label))
    return Drawn(text, html, max(widths) if below else sum(widths))


def _shares(heights: Sequence[float]) -> list[float]:
    most = max(heights, default=0.0)
    return [height / most if most else 0.0 for height in heights]


def bar(text: str, share: float) -> Drawn:
    """Return a number with a bar for its share of the largest, from 0 to 1.

    >>> bar("50%", 0.5)
    '50%'
    """
    path = f"M0 12V18H{50 * min(share, 1.0):.1f}V12z"
    rest = tag("path", class_="actrec-rest", d="M0 12V18H50V12z")
    width = 50 // _CHARACTER + 1 + len(text)
    return Drawn(text, together(_svg(path, 50, text, rest), text), width)


def badge(text: str, tone: str = "bad") -> Drawn:
    """Return a highlighted remark, for something ``"bad"`` or ``"good"``.

    >>> badge("3 NaN").html
    '<span class="actrec-bad">3 NaN</span>'
    """
    return Drawn(text, tag("span", text, class_=f"actrec-{tone}"), len(text))


def pictures(maps: Sequence[Sequence[Sequence[int]]], label: str) -> Drawn:
    """Return small grey pictures of one size side by side, as one PNG; their pixels are from 0 to 255. In text it is their label."""
    rows = [[*chain.from_iterable((*row, 255) for row in rows)] for rows in zip(*maps, strict=True)]
    data = f"data:image/png;base64,{b64encode(_png(rows)).decode()}"
    width = len(rows[0])
    picture = tag("img", alt=label, title=label, width=width, height=len(rows), src=data)
    return Drawn(label, picture, width // _CHARACTER + 1)


def _png(rows: Sequence[Sequence[int]]) -> bytes:
    """Return an image of grey pixels as a PNG file."""
    lines = b"".join(b"\0" + bytes(row) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _svg(path: str, width: int, label: str, *before: Html) -> Html:
    inside = (*before, tag("path", d=path))
    view = f"0 0 {width} {_HEIGHT}"
    return tag(
        "svg", *inside, width=width, height=_HEIGHT, viewBox=view, role="img", aria_label=label
    )
