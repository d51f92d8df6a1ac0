"""Statistics of a recording, in one pass over it and in bounded memory.

Tensors are read in blocks of :data:`actrec._values.chunks.BLOCK` elements. Of each block, converted to float64 while it
is in the cache, the sum and the sum of squares are taken around the mean of all blocks before it. That is sound
where the block's own mean is close to that, by less than its deviation, as it is in nearly all blocks of a layer;
where it is not, they are taken again, around the block's own mean. They are merged into what came before after
Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
The mean is held as a sum of two floats, so that a large mean does not drown a small variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actrec._tables.rows import Rows
from actrec._text import count, shown, size
from actrec._values.chunks import blocks, dense
from actrec._values.spec import leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .recording import Layer, Recording

__all__ = ["Moments", "Row", "Stats", "stats"]


@dataclass(frozen=True, slots=True)
class Row:
    """Statistics of one tensor that a layer returns, over all calls: see :class:`Stats`."""

    layer: str
    leaf: str
    count: int
    mean: float
    std: float
    min: float
    max: float
    zeros: float
    nan: int
    inf: int
    nbytes: int
    nonfinite_pass: int | None


class Stats(Rows[Row]):
    """Statistics of a recording: a tuple of rows, in execution order, that prints as a table.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Flatten())
    >>> with record(model) as acts:
    ...     output = model(torch.tensor([[1.0, 3.0, float("nan")]]))
    >>> (row,) = acts.stats()
    >>> row.layer, row.count, row.mean, row.std, row.nan
    ('0', 3, 2.0, 1.0, 1)

    The columns of a row:

    ==================  ===========================================================================
    ``layer``           the name of the layer
    ``leaf``            which of its tensors: what one writes behind ``acts[layer][i]``, such as
                        ``[0]`` or ``['hidden']``; empty if the layer returns one tensor
    ``count``           the number of elements
    ``mean``, ``std``   of the finite elements; ``std`` is that of all of them, not of a sample
    ``min``, ``max``    of the finite elements
    ``zeros``           the share of elements that are zero, from 0 to 1
    ``nan``, ``inf``    how many elements are NaN, and how many infinite
    ``nbytes``          the bytes of the elements
    ``nonfinite_pass``  the first pass in which the layer returned a NaN or an infinity, or ``None``
    ==================  ===========================================================================

    Everything is computed in float64, to which the smaller types convert exactly. Complex numbers count
    with their modulus, bools as 0 and 1, quantized tensors with the numbers that they stand for. What
    cannot be computed, of no finite element, is NaN. Tensors without data (on the meta device) count 0.
    """

    __slots__ = ()

    @property
    def first_nonfinite(self) -> Row | None:
        """The row of the layer that was the first to return a NaN or an infinity.

        That is in the earliest pass, and there in execution order. ``None`` if there are none.
        """
        bad = [(row.nonfinite_pass, row) for row in self if row.nonfinite_pass is not None]
        return min(bad, key=lambda pair: pair[0])[1] if bad else None

    def _title(self) -> str:
        return f"statistics of {count(len({row.layer for row in self}), 'layer')}"

    def _columns(self) -> tuple[str, ...]:
        return ("layer", *(field.name for field in fields(Row)[2:-2]), "memory")

    def _cells(self, row: Row) -> tuple[str, ...]:
        numbers = (row.mean, row.std, row.min, row.max)
        return (
            shown(row.layer) + shown(row.leaf) * bool(row.leaf),
            f"{row.count:,}",
            *("" if math.isnan(number) else f"{number:.4g}" for number in numbers),
            f"{row.zeros:.0%}" if row.count else "",
            f"{row.nan:,}",
            f"{row.inf:,}",
            size(row.nbytes),
        )


def stats(recording: Recording) -> Stats:
    """Return the statistics of all layers. See :meth:`actrec.Recording.stats`."""
    names = dict.fromkeys([*recording.execution_order, *recording])
    return Stats(row for name in names for row in _rows(recording[name]))


def _rows(layer: Layer) -> Iterator[Row]:
    found: dict[str, Moments] = {}
    by_cast = {} if layer.overflows is None else layer.overflows.nonfinite()
    for value, number in zip(layer, layer.passes, strict=False):
        for path, tensor in leaves(value):
            moments = found.setdefault(path, Moments())
            bad = moments.add(tensor, number, by_cast.get(number, 0))
            if number in by_cast:
                by_cast[number] = max(0, by_cast[number] - bad)
    for path, moments in (found or {"": Moments()}).items():
        yield moments.row(layer.name, path)


class Moments:
    """The statistics of everything that was added."""

    __slots__ = (
        "_low", "_mean", "_squares", "count", "finite", "inf", "max", "min", "nan", "nbytes",
        "nonfinite_pass", "zeros",
    )  # fmt: skip

    def __init__(self) -> None:
        self.count = self.finite = self.zeros = self.nan = self.inf = self.nbytes = 0
        self._mean = self._low = self._squares = 0.0  # the mean is the sum of two
        self.min, self.max = math.inf, -math.inf
        self.nonfinite_pass: int | None = None

    @property
    def mean(self) -> float:
        """The mean of the finite elements."""
        return self._mean + self._low if self.finite else math.nan

    @property
    def std(self) -> float:
        """Their standard deviation."""
        return math.sqrt(max(self._squares, 0.0) / self.finite) if self.finite else math.nan

    @property
    def zero_share(self) -> float:
        """The share of zeros among all elements."""
        return self.zeros / self.count if self.count else math.nan

    def add(self, tensor: Tensor, number: int = 0, by_cast: int = 0) -> int:
        """Add the elements of a tensor that pass ``number`` returned. Return how many of them are not finite.

        Up to ``by_cast`` of these are the work of a cast, not of the layer.
        """
        bad = self.nan + self.inf
        for part in dense(tensor):
            self.count += part.numel()
            self.nbytes += part.numel() * part.element_size()
            for (block,) in blocks(part):
                self._add(block)
        bad = self.nan + self.inf - bad
        if self.nonfinite_pass is None and bad > by_cast:
            self.nonfinite_pass = number
        return bad

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
        self.min, self.max = min(self.min, low), max(self.max, high)
        self._merge(numbers)

    def _merge(self, numbers: Tensor) -> None:
        n, shift = numbers.numel(), self._mean
        low, squares = _around(shift, numbers)
        # Where that is far, the difference below would be left with few digits.
        if squares and n * low * low * 2 >= squares:
            shift = float(numbers.sum(dtype=torch.float64)) / n
            low, squares = _around(shift, numbers)
        squares -= n * low * low
        total = self.finite + n
        if self.finite:
            delta = (shift - self._mean) + (low - self._low)
            self._squares += squares + delta * delta * self.finite / total * n
            self._low += delta * (n / total)
            high = self._mean + self._low
            self._low -= high - self._mean
            self._mean = high
        else:
            self._mean, self._low, self._squares = shift, low, squares
        self.finite = total

    def row(self, layer: str, leaf: str) -> Row:
        """Return the row of a table."""
        nothing = not self.finite
        return Row(
            layer,
            leaf,
            self.count,
            self.mean,
            self.std,
            math.nan if nothing else self.min,
            math.nan if nothing else self.max,
            self.zero_share,
            self.nan,
            self.inf,
            self.nbytes,
            self.nonfinite_pass,
        )


def _around(shift: float, numbers: Tensor) -> tuple[float, float]:
    """How far numbers are from ``shift``: their mean, and the sum of their squares."""
    is_double = numbers.dtype is torch.float64  # what double() would not copy
    away = numbers - shift if is_double else numbers.double().sub_(shift)
    return float(away.sum()) / away.numel(), float(away.dot(away))


# The types in which a minimum is found faster than in float64, or more exactly.
_WITH_MINIMUM = frozenset(
    {torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
)
