"""Charts as HTML and inline SVG: as wide as the page, with text of constant size, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from actrec._tables.markup import Html, tag, together

STYLE: Final = """
.chart { overflow-x: auto; }
.chart table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: 12px; }
.chart th { font-weight: 400; text-align: right; padding: 1px 8px 1px 0; width: 34%; max-width: 320px; overflow-wrap: anywhere; }
.chart td { padding: 0; }
.chart svg { display: block; width: 100%; overflow: visible; }
.chart rect { shape-rendering: crispEdges; }
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
#: If the extents of layers differ by more than this factor, the scale is linear only around zero.
_APART: Final = 30


def _text(number: float) -> str:
    return f"{number:.3g}"


# --- Boxes -------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """The distribution of numbers: five percentiles, in ascending order."""

    name: str
    marks: tuple[float, float, float, float, float]


class _Scale(NamedTuple):
    """A scale of an axis: linear up to a distance from zero, and logarithmic beyond."""

    low: float
    high: float
    linear: float  #: infinite if all of it is linear

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
        """Return the place of a number, from 0 to ``_WIDTH``."""
        low, high = self.bend(self.low), self.bend(self.high)
        return round((self.bend(number) - low) / (high - low) * _WIDTH, 1)


def boxes(found: Sequence[Box]) -> Html:
    """Return a row for each box: a thin line over all of it, a thick one over the middle half, a dot for the median."""
    scale = _Scale.of(found)
    has_zero = scale.low <= 0 <= scale.high
    zero = [tag("path", class_="zero", d=f"M{scale.place(0)} 0V20")] * has_zero
    rows = []
    for name, marks in found:
        low, lower, median, upper, high = map(scale.place, marks)
        label = f"{name}: median {_text(marks[2])}, 1 % {_text(marks[0])}, 99 % {_text(marks[4])}"
        marked = {
            "thin": f"{low} 10H{high}",
            "thick": f"{lower} 10H{upper}",
            "dot": f"{median} 10h0",
        }
        paths = (tag("path", class_=kind, d=f"M{path}") for kind, path in marked.items())
        picture = _svg([tag("title", label), *zero, *paths], label, (_WIDTH, 20), 18)
        rows.append(_row(name, picture))
    rows.append(_row("", _axis(_text(scale.low), _text(scale.high))))
    chart = tag("div", tag("table", *rows), class_="chart")
    if math.isinf(scale.linear):
        return chart
    linear = _text(scale.linear)
    bent = f"The axis is linear from -{linear} to {linear}, and logarithmic beyond."
    return together(chart, tag("p", bent))


def _row(name: str, cell: Html) -> Html:
    return tag("tr", tag("th", name, scope="row"), tag("td", cell))


def _svg(inside: Iterable[Html], label: str, size: tuple[int, int], height: int) -> Html:
    """Return a picture that fills the width, and is ``height`` pixels high."""
    view = {"viewBox": "0 0 {} {}".format(*size), "height": height, "preserveAspectRatio": "none"}
    return tag("svg", *inside, **view, role="img", aria_label=label)


def _axis(*ends: str) -> Html:
    return tag("div", *(tag("span", end) for end in ends), class_="axis")


# --- Lines -------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line through points, interrupted where a number is NaN."""

    name: str
    points: Sequence[tuple[float, float]]


def lines(title: str, found: Sequence[Line]) -> Html:
    """Return a chart of lines over one axis."""
    points = [point for line in found for point in line.points if math.isfinite(point[1])]
    if not points:
        return Html()
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    wide, tall = (right - left) or 1.0, (high - low) or 1.0

    def drawn(line: Line, colour: str) -> Html:
        parts = groupby(line.points, lambda point: math.isfinite(point[1]))
        path = "".join(
            "M" + "L".join(
                f"{(x - left) / wide * _WIDTH:.0f} {(high - y) / tall * _HEIGHT:.1f}" for x, y in part
            ) + "h0"
            for is_finite, part in parts
            if is_finite
        )  # fmt: skip
        return tag("path", tag("title", line.name), class_="line", stroke=colour, d=path)

    paths = map(drawn, found, _colours(len(found)))
    label = f"{title} of {len(found)} layers, from {_text(low)} to {_text(high)}"
    return tag(
        "div",
        tag("h3", title),
        _axis(_text(high)),
        tag("div", _svg(paths, label, (_WIDTH, _HEIGHT), _HEIGHT), class_="frame"),
        _axis(f"{_text(low)}, pass {left:.0f}", f"pass {right:.0f}"),
        class_="chart",
    )


def key(names: Sequence[str]) -> Html:
    """Return the legend of the colours of lines."""
    items = (
        tag("li", tag("i", style=f"background:{colour}"), name)
        for name, colour in zip(names, _colours(len(names)), strict=True)
    )
    return tag("ul", *items, class_="key")


def _colours(number: int) -> list[str]:
    """Return colours from blue over green to red that are visible on white and on black."""
    return [f"hsl({220 - 220 * at / max(number - 1, 1):.0f} 65% 48%)" for at in range(number)]


# --- Heat --------------------------------------------------------------------------------------------

#: From 0 to 1: dark blue, green, yellow.
_STOPS: Final = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def heat(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> Html:
    """Return a row for each name, with a cell for each column: numbers from 0 to 1, NaN left empty."""
    height = max(16, min(40, 480 // max(len(names), 1)))
    rows = [
        _row(f"{at}: {name}", _svg(_cells(names, name, row), name, (len(row), 1), height))
        for at, (name, row) in enumerate(zip(names, matrix, strict=True))
    ]
    colours = ",".join(_heat(step / 4) for step in range(5))
    background = f"linear-gradient(90deg,{colours})"
    gradient = tag("span", style=f"flex:1;margin:0 8px;background:{background}")
    scale = tag("div", tag("span", "0"), gradient, tag("span", "1"), class_="axis")
    return tag("div", tag("table", *rows, _row("", scale)), class_="chart")


def _cells(names: Sequence[str], name: str, row: Iterable[float]) -> Iterator[Html]:
    for at, share in enumerate(row):
        if not math.isnan(share):
            title = tag("title", f"{name}, {names[at]}: {share:.2f}")
            yield tag("rect", title, x=at, width=1, height=1, fill=_heat(share))


def _heat(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    at = min(int(place), len(_STOPS) - 2)
    mixed = (a + (b - a) * (place - at) for a, b in zip(_STOPS[at], _STOPS[at + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
