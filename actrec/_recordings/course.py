"""How the mean, the standard deviation and the share of zeros of a layer go over its calls."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from actrec._progress import Each
from actrec._values.spec import leaves
from actrec._values.statistics import Statistics

from .layer import Layer

#: Of more calls of a layer, so many are looked at.
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
    """Up to ``most`` of ``number`` places, evenly spread, the first and the last among them."""
    if number <= most:
        return list(range(number))
    if most == 1:
        return [0]
    return [round(index * (number - 1) / (most - 1)) for index in range(most)]
