"""What is counted of one tensor of a layer over its calls, and how its histogram is drawn."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from actrec._tables.drawn import Bars
from actrec._values.histogram import Bins, Histogram
from actrec._values.shapes import Summary
from actrec._values.statistics import Statistics

#: So many bars has a histogram, and a narrow one.
_BARS: Final = 40
_FEW_BARS: Final = 32
#: The highest bar is drawn at most so many times as high as the next one.
_STICKS_OUT: Final = 1.5
#: The share of the elements below and above that is drawn as if it were at the end.
_TAIL: Final = 0.005


class Tally:
    """Counts one tensor of a layer, over the calls read so far."""

    def __init__(self) -> None:
        self.bins = Bins()
        self.statistics = Statistics(self.bins)
        self.looks = Summary()
        self.left_out = 0

    def add(self, tensor: Tensor, counted: Tensor | None = None) -> int:
        """Add a tensor, or those of its elements that are counted, and return how many are NaN or infinite."""
        self.looks.add(tensor)
        if counted is not None:
            self.left_out += tensor.numel() - counted.numel()
            tensor = counted
        return self.statistics.add(tensor)


def drawn(found: Histogram, low: float, high: float, count: int, *, below: bool = False) -> str:
    """Return a histogram as a cell, without the last of the tails on both sides.

    Args:
        found: the histogram.
        low: the smallest of its numbers.
        high: the largest.
        count: how many there are, those included that are not finite.
        below: whether the range stands below the bars, which makes a narrow cell.
    """
    if not found.counts:
        return "no finite value" if count else ""
    left, right = max(found.quantile(_TAIL), low), min(found.quantile(1 - _TAIL), high)
    if left >= right:
        left, right = low, high
    label = f"{left:.3g} ... {right:.3g}" if left < right else f"{left:.3g}"
    bars = found.bars(left, right, _FEW_BARS if below else _BARS)
    # The zeros of a ReLU would leave nothing of the others: a bar that sticks out is cut.
    most = _STICKS_OUT * sorted(bars)[-2]
    return Bars([min(bar, most) if most else bar for bar in bars], label, below=below)
