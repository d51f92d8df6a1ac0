"""Histograms of tensors, in one pass over their elements and in bounded memory.

The bin of a number is the first 13 bits of it as a float32: sign, exponent, and 4 bits of the mantissa. So each bin is a
sixteenth of an octave wide, the bins are the same for every tensor, and counts of blocks, calls or layers can be added
up in any order.

>>> import torch
>>> bins = Bins()
>>> bins.add(torch.tensor([0.0, 1.0, 1.0, -2.0]))
>>> histogram = bins.histogram()
>>> histogram.counts, histogram.low
((1, 1, 2), (-2.125, 0.0, 1.0))
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

_SHIFT: Final = 19  # the last bits of the 32 are ignored
_HALF: Final = 1 << 12  # so many bins have one sign
_LARGEST: Final = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram of some numbers: the bins that have any, in ascending order.

    Bin ``i`` has ``counts[i]`` numbers, from ``low[i]`` to ``high[i]``. A bin is at most 6.25 % of its numbers wide.
    """

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return the number below which ``share`` of all numbers are, to the width of a bin; NaN if there are none."""
        if not self.counts:
            return float("nan")
        ends = [*accumulate(self.counts)]
        place = share * ends[-1]
        at = min(bisect_right(ends, place), len(ends) - 1)
        inside = (place - (ends[at] - self.counts[at])) / self.counts[at]
        return self.low[at] + min(inside, 1.0) * (self.high[at] - self.low[at])

    def bars(self, low: float, high: float, many: int) -> list[float]:
        """Return how many numbers are in each of ``many`` equally wide parts of the range from ``low`` to ``high``.

        Numbers below and above are in the first and the last one.
        """
        bars = [0.0] * many
        scale = many / (high - low) if high > low else 0.0
        for left, right, count in zip(self.low, self.high, self.counts, strict=True):
            begin = min(max((left - low) * scale, 0.0), many - 1e-9)
            end = min(max((right - low) * scale, begin), float(many))
            first, last = int(begin), min(int(end), many - 1)
            if first == last:
                bars[first] += count
                continue
            for at in range(first, last + 1):
                overlap = min(end, at + 1) - max(begin, at)
                bars[at] += count * overlap / (end - begin)
        return bars


class Bins:
    """Counts numbers in bins."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2 * _HALF, dtype=torch.int64, device="cpu")

    def add(self, numbers: Tensor) -> None:
        """Count the elements of a flat tensor on the CPU, all of them finite."""
        if numbers.dtype != torch.float32:
            numbers = numbers.float().clamp_(-_LARGEST, _LARGEST)
        places = (numbers.view(torch.int32) >> _SHIFT).bitwise_and_(2 * _HALF - 1)
        self._counts += torch.bincount(places, minlength=2 * _HALF)

    def histogram(self) -> Histogram:
        """Return the bins that have any numbers."""
        found = self._counts.clone()
        found[0] += found[_HALF]  # -0.0 is 0.0
        found[_HALF] = 0
        places = found.nonzero().flatten()
        places = places[torch.where(places < _HALF, places, -places).argsort()]
        counts = found[places]
        is_negative, sizes = places >= _HALF, places % _HALF
        near, far = _edge(sizes), _edge(sizes + 1)
        low, high = torch.where(is_negative, -far, near), torch.where(is_negative, -near, far)
        return Histogram(tuple(low.tolist()), tuple(high.tolist()), tuple(counts.tolist()))


def _edge(sizes: Tensor) -> Tensor:
    """Return the least magnitude in bins; the bin next to zero begins at zero."""
    sizes = torch.where(sizes == 1, 0, sizes)
    return (sizes.int() << _SHIFT).view(torch.float32).double().clamp(max=_LARGEST)
