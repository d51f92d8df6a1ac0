"""The mean, the standard deviation and the share of zeros of a layer, call by call."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from actrec._progress import Each
from actrec._values.spec import leaves
from actrec._values.statistics import Statistics

from .layer import Layer

#: If a layer has more calls, only so many of them are read.
MOST_CALLS: Final = 256


class Point(NamedTuple):
    """Statistics of one call."""

    number: int  #: of its pass
    mean: float
    std: float
    zeros: float


def course(layer: Layer[Any], each: Each, most: int = MOST_CALLS) -> list[Point]:
    """Return the statistics of up to ``most`` calls of a layer, evenly spread."""
    passes, points = layer.passes, []
    for call in each(spread(len(layer), most)):
        statistics = Statistics()
        for _, tensor in leaves(layer[call]):
            statistics.add(tensor)
        points.append(Point(passes[call], statistics.mean, statistics.std, statistics.zero_share))
    return points


def spread(number: int, most: int) -> list[int]:
    """Return up to ``most`` of ``number`` indices, evenly spread, including the first and the last."""
    if number <= most:
        return list(range(number))
    if most == 1:
        return [0]
    return [round(index * (number - 1) / (most - 1)) for index in range(most)]
