"""Statistics of tensors, in one pass over their elements and in bounded memory.

Tensors are read in blocks of :data:`actrec._values.chunks.BLOCK` elements. Each block is converted to float64 while it
is in the cache, and the sum and the sum of squares are taken around the mean of all blocks before it. That is accurate
if the block's own mean differs from that by less than its deviation, as in nearly all blocks of a layer;
if not, they are taken again, around the block's own mean. They are merged with the earlier ones as in
Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
The mean is kept as a sum of two floats, so that a small variance is accurate beside a large mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .chunks import blocks, dense
from .histogram import Bins


class Statistics:
    """The statistics of all elements that were added. Without elements, statistics are NaN.

    >>> statistics = Statistics()
    >>> statistics.add(torch.tensor([1.0, 3.0, float("nan")]))
    1
    >>> statistics.count, statistics.mean, round(statistics.std, 3)
    (3, 2.0, 1.414)
    """

    def __init__(self, bins: Bins | None = None) -> None:
        self._bins = bins  # finite elements are counted in them, too
        self.count = self.zeros = self.nan = self.inf = self.nbytes = 0
        self._finite = 0
        self._mean = self._low = self._squares = 0.0  # the mean is the sum of two
        self._min, self._max = math.inf, -math.inf

    @property
    def mean(self) -> float:
        """The mean of the finite elements."""
        return self._mean + self._low if self._finite else math.nan

    @property
    def std(self) -> float:
        """The sample standard deviation of the finite elements, as in ``torch.std``; NaN for one element."""
        if self._finite <= 1:
            return math.nan
        return math.sqrt(max(self._squares, 0.0) / (self._finite - 1))

    @property
    def min(self) -> float:
        """The smallest finite element."""
        return self._min if self._finite else math.nan

    @property
    def max(self) -> float:
        """The largest finite element."""
        return self._max if self._finite else math.nan

    @property
    def zero_share(self) -> float:
        """The share of zeros among all elements."""
        return self.zeros / self.count if self.count else math.nan

    def add(self, tensor: Tensor) -> int:
        """Add the elements of a tensor of any kind.

        Returns:
            How many of them are NaN or infinite.
        """
        before = self.nan + self.inf
        for part in dense(tensor):
            self.count += part.numel()
            self.nbytes += part.numel() * part.element_size()
            for (block,) in blocks(part):
                self._add(block)
        return self.nan + self.inf - before

    def _add(self, block: Tensor) -> None:
        numbers = block.to(torch.complex128).abs() if block.is_complex() else block
        if numbers.dtype not in _WITH_MINIMUM:
            numbers = numbers.double()
        low, high = (bound.item() for bound in numbers.aminmax())
        if not (low > 0 or high < 0):
            self.zeros += numbers.numel() - int(numbers.count_nonzero())
        if not (math.isfinite(low) and math.isfinite(high)):
            self.nan += int(numbers.isnan().sum())
            self.inf += int(numbers.isinf().sum())
            numbers = numbers[numbers.isfinite()]
            if not numbers.numel():
                return
            low, high = (bound.item() for bound in numbers.aminmax())
        self._min, self._max = min(self._min, low), max(self._max, high)
        if self._bins is not None:
            self._bins.add(numbers)
        self._merge(numbers)

    def _merge(self, numbers: Tensor) -> None:
        n, shift = numbers.numel(), self._mean
        low, squares = _around(shift, numbers)
        # If the mean is far from the shift, the subtraction below would lose digits.
        if squares and n * low * low * 2 >= squares:
            shift = float(numbers.sum(dtype=torch.float64)) / n
            low, squares = _around(shift, numbers)
        squares -= n * low * low
        total = self._finite + n
        if self._finite:
            delta = (shift - self._mean) + (low - self._low)
            self._squares += squares + delta * delta * self._finite / total * n
            self._low += delta * (n / total)
            high = self._mean + self._low
            self._low -= high - self._mean
            self._mean = high
        else:
            self._mean, self._low, self._squares = shift, low, squares
        self._finite = total


def _around(shift: float, numbers: Tensor) -> tuple[float, float]:
    """Return the mean of ``numbers - shift``, and the sum of the squares."""
    is_double = numbers.dtype is torch.float64  # double() would not copy them
    away = numbers - shift if is_double else numbers.double().sub_(shift)
    return float(away.sum()) / away.numel(), float(away.dot(away))


# The dtypes in which the minimum is found faster than in float64, or more exactly.
_WITH_MINIMUM = frozenset(
    {torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
)
