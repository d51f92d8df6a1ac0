"""Charts as HTML and inline SVG: as wide as the page, with text that stays as large as it is, in the colours of the page.

Everything that comes from a recording is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Final, NamedTuple

STYLE: Final = """
.chart { overflow-x: auto; }
.chart table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: 12px; }
.chart th { font-weight: 400; text-align: right; padding: 1px 8px 1px 0; width: 34%; max-width: 320px; overflow-wrap: anywhere; }
.chart td { padding: 0; }
.chart svg { display: block; width: 100%; overflow: visible; }
.chart .thin { stroke: var(--blue); stroke-width: 1.5; opacity: .75; vector-effect: non-scaling-stroke; }
.chart .thick { stroke: var(--blue); stroke-width: 8; vector-effect: non-scaling-stroke; }
.chart .dot { stroke: var(--back); stroke-width: 5; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.chart .zero { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.chart .line { fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke; stroke-linecap: round; }
.chart .axis { display: flex; justify-content: space-between; font-size: 12px; opacity: .8; }
.chart .frame { border-left: 1px solid var(--line); border-bottom: 1px solid var(--line); padding: 3px 0; }
.key { font-size: 12px; columns: 200px; padding: 0; list-style: none; overflow-wrap: anywhere; }
.key i { display: inline-block; width: 14px; height: 4px; margin-right: 6px; vertical-align: middle; }
"""

_WIDTH: Final = 1000  # of a chart, in its own units
_HEIGHT: Final = 120
#: Layers whose extents differ by more than so much are drawn on a scale that is linear around zero alone.
_APART: Final = 30


def _text(number: float) -> str:
    return f"{number:.3g}"


# --- Boxes -------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """Where numbers lie: five of their percentiles, in ascending order."""

    name: str
    marks: tuple[float, float, float, float, float]


class _Scale(NamedTuple):
    """Places on an axis: linear up to a distance from zero, and logarithmic beyond."""

    low: float
    high: float
    linear: float  #: infinite where all of it is

    @classmethod
    def of(cls, found: Sequence[Box]) -> _Scale:
        extents = sorted(max(abs(box.marks[0]), abs(box.marks[-1])) for box in found)
        typical = extents[len(extents) // 2]
        linear = typical if 0 < _APART * typical < extents[-1] else math.inf
        low, high = min(box.marks[0] for box in found), max(box.marks[-1] for box in found)
        return cls(low, high if high > low else low + 1.0, linear)

    def bend(self, number: float) -> float:
        size = abs(number)
        if size <= self.linear:
            return number
        return math.copysign(self.linear * (1 + math.log10(size / self.linear)), number)

    def place(self, number: float) -> float:
        """Where a number is, from 0 to ``_WIDTH``."""
        low, high = self.bend(self.low), self.bend(self.high)
        return round((self.bend(number) - low) / (high - low) * _WIDTH, 1)


def boxes(found: Sequence[Box]) -> str:
    """Return a row for each box: a thin line over all of it, a thick one over the middle half, a dot for the median."""
    scale = _Scale.of(found)
    has_zero = scale.low <= 0 <= scale.high
    zero = f'<path class="zero" d="M{scale.place(0)} 0V20"/>' if has_zero else ""
    rows = []
    for name, marks in found:
        low, lower, median, upper, high = map(scale.place, marks)
        label = escape(
            f"{name}: median {_text(marks[2])}, 1 % {_text(marks[0])}, 99 % {_text(marks[4])}"
        )
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td><svg viewBox="0 0 {_WIDTH} 20" height="18" preserveAspectRatio="none" '
            f'role="img" aria-label="{label}"><title>{label}</title>{zero}<path class="thin" d="M{low} 10H{high}"/>'
            f'<path class="thick" d="M{lower} 10H{upper}"/><path class="dot" d="M{median} 10h0"/></svg></td></tr>'
        )
    ends = f"<span>{_text(scale.low)}</span><span>{_text(scale.high)}</span>"
    axis = f'<tr><th></th><td><div class="axis">{ends}</div></td></tr>'
    bent = "" if math.isinf(scale.linear) else _bent(scale.linear)
    return f'<div class="chart"><table>{"".join(rows)}{axis}</table></div>{bent}'


def _bent(linear: float) -> str:
    return f"<p>The axis is linear from -{_text(linear)} to {_text(linear)}, and logarithmic beyond.</p>"


# --- Lines -------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line through points; where a number is NaN it is broken."""

    name: str
    points: Sequence[tuple[float, float]]


def lines(title: str, found: Sequence[Line]) -> str:
    """Return a chart of lines over one axis."""
    points = [point for line in found for point in line.points if math.isfinite(point[1])]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    wide, tall = (right - left) or 1.0, (high - low) or 1.0

    def drawn(line: Line, colour: str) -> str:
        parts = groupby(line.points, lambda point: math.isfinite(point[1]))
        path = "".join(
            "M" + "L".join(
                f"{(x - left) / wide * _WIDTH:.0f} {(high - y) / tall * _HEIGHT:.1f}" for x, y in part
            ) + "h0"
            for is_finite, part in parts
            if is_finite
        )  # fmt: skip
        return f'<path class="line" stroke="{colour}" d="{path}"><title>{escape(line.name)}</title></path>'

    paths = "".join(map(drawn, found, _colours(len(found))))
    return (
        f'<div class="chart"><h3>{escape(title)}</h3><div class="axis"><span>{_text(high)}</span></div>'
        f'<div class="frame"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" height="{_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)} of {len(found)} layers, from {_text(low)} to {_text(high)}">{paths}</svg></div>'
        f'<div class="axis"><span>{_text(low)}, pass {left:.0f}</span><span>pass {right:.0f}</span></div></div>'
    )


def key(names: Sequence[str]) -> str:
    """Return what the colours of lines mean."""
    items = (
        f'<li><i style="background:{colour}"></i>{escape(name)}</li>'
        for name, colour in zip(names, _colours(len(names)), strict=True)
    )
    return f'<ul class="key">{"".join(items)}</ul>'


def _colours(number: int) -> list[str]:
    """Colours from blue over green to red, that are seen on white and on black."""
    return [f"hsl({220 - 220 * at / max(number - 1, 1):.0f} 65% 48%)" for at in range(number)]


# --- Heat --------------------------------------------------------------------------------------------

#: From nothing to everything: dark blue, green, yellow.
_STOPS: Final = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def heat(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Return a row for each name, with a cell for each column: numbers from 0 to 1, NaN left empty."""
    rows = (
        f'<tr><th scope="row">{at}: {escape(name)}</th><td><svg viewBox="0 0 {len(row)} 1" height="{_tall(len(row))}" '
        f'preserveAspectRatio="none" shape-rendering="crispEdges" role="img" aria-label="{escape(name)}">{_cells(names, at, row)}</svg></td></tr>'
        for at, (name, row) in enumerate(zip(names, matrix, strict=True))
    )
    scale = f'<div class="axis"><span>0</span><span style="flex:1;margin:0 8px;background:{_gradient()}"></span><span>1</span></div>'
    return (
        f'<div class="chart"><table>{"".join(rows)}<tr><th></th><td>{scale}</td></tr></table></div>'
    )


def _tall(rows: int) -> int:
    return max(16, min(40, 480 // rows))


def _cells(names: Sequence[str], at: int, row: Iterable[float]) -> str:
    return "".join(
        f'<rect x="{other}" width="1" height="1" fill="{_heat(share)}"><title>{escape(names[at])}, {escape(names[other])}: '
        f"{share:.2f}</title></rect>"
        for other, share in enumerate(row)
        if not math.isnan(share)
    )


def _heat(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    at = min(int(place), len(_STOPS) - 2)
    mixed = (a + (b - a) * (place - at) for a, b in zip(_STOPS[at], _STOPS[at + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _gradient() -> str:
    colours = ",".join(_heat(step / 4) for step in range(5))
    return f"linear-gradient(90deg,{colours})"
