"""Statistics of one tensor of a layer over its calls, and how its histogram is drawn."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from actrec._tables.drawn import bars
from actrec._values.histogram import Bins, Histogram
from actrec._values.shapes import Summary
from actrec._values.statistics import Statistics

#: The number of bars of a histogram, and of a narrow one.
_BARS: Final = 40
_FEW_BARS: Final = 32
#: The highest bar is drawn at most this many times as high as the next one.
_STICKS_OUT: Final = 1.5
#: The share of the elements on each side that is drawn in the first and in the last bar.
_TAIL: Final = 0.005


class Tally:
    """Counts one tensor of a layer, over the calls read so far."""

    def __init__(self) -> None:
        self.bins = Bins()
        self.statistics = Statistics(self.bins)
        self.looks = Summary()
        self.left_out = 0

    def add(self, tensor: Tensor, counted: Tensor | None = None) -> int:
        """Add a tensor, or only its elements ``counted``, and return how many are NaN or infinite."""
        self.looks.add(tensor)
        if counted is not None:
            self.left_out += tensor.numel() - counted.numel()
            tensor = counted
        return self.statistics.add(tensor)


def drawn(found: Histogram, low: float, high: float, count: int, *, below: bool = False) -> str:
    """Return a histogram as a cell, with the ends of its tails in the first and the last bar.

    Args:
        found: the histogram.
        low: the smallest finite element.
        high: the largest.
        count: how many elements there are, including those that are not finite.
        below: whether to put the range below the bars, in a narrow cell.
    """
    if not found.counts:
        return "no finite value" if count else ""
    left, right = max(found.quantile(_TAIL), low), min(found.quantile(1 - _TAIL), high)
    if left >= right:
        left, right = low, high
    label = f"{left:.3g} ... {right:.3g}" if left < right else f"{left:.3g}"
    heights = found.bars(left, right, _FEW_BARS if below else _BARS)
    # A bar that is much higher, such as that of the zeros of a ReLU, is cut: the others would not be visible.
    most = _STICKS_OUT * sorted(heights)[-2]
    return bars([min(bar, most) if most else bar for bar in heights], label, below=below)
