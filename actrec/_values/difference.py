"""Differences of pairs of tensors, in one pass over their elements and in bounded memory.

>>> import torch
>>> difference = Difference()
>>> difference.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
False
>>> difference.count, difference.max_abs, difference.equal
(2, 0.5, False)
"""

from __future__ import annotations

import math
from typing import Final, TypeAlias

import torch
from torch import Tensor

from .chunks import blocks, dense
from .shapes import shape_of

#: Relative and absolute; ``None`` for that of ``torch.testing.assert_close``.
Tolerances: TypeAlias = tuple[float | None, float | None]


class Mismatch(Exception):  # noqa: N818  # caught, and shown in a table
    """Two tensors that cannot be compared element by element; the message says why."""


class Difference:
    """How far the tensors of all pairs that were added are apart."""

    def __init__(self) -> None:
        self.count = 0  #: of elements
        self.equal = True  #: whether all dtypes and bits are the same
        #: How many elements are NaN only in the first, and only in the second tensors.
        self.nan = [0, 0]
        self._max_abs = self._largest = 0.0
        self._ab = self._aa = self._bb = 0.0  # sums of products

    def add(self, x: Tensor, y: Tensor, tolerances: Tolerances = (None, None)) -> bool:
        """Add a pair of tensors of any kind.

        Returns:
            Whether ``|x - y| <= atol + rtol * |y|`` holds for all elements.

        Raises:
            Mismatch: they differ in shape, or in how they are nested. Nothing was added.
        """
        if shape_of(x) != shape_of(y):
            message = f"{shape_of(x)} and {shape_of(y)}"
            raise Mismatch(message)
        parts, others = list(dense(x)), list(dense(y))
        if [part.shape for part in parts] != [part.shape for part in others]:
            message = "nested in different ways, or only one has data"
            raise Mismatch(message)
        self.equal &= x.dtype == y.dtype
        limits = _limits(x.dtype, y.dtype, tolerances)
        far = False
        for part, other in zip(parts, others, strict=True):
            self.count += part.numel()
            for one, two in blocks(part, other):
                far = self._add(one, two, limits, known=far) or far
        return not far

    @property
    def max_abs(self) -> float:
        """The largest absolute difference; NaN if there are no elements."""
        return self._max_abs if self.count else math.nan

    @property
    def max_rel(self) -> float:
        """``max_abs``, divided by the largest finite magnitude of the second tensors."""
        if not self.count:
            return math.nan
        if self._max_abs == 0:
            return 0.0
        return self._max_abs / self._largest if self._largest else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between all first and all second tensors, each seen as one vector."""
        if not self.count:
            return math.nan
        if self._aa == self._bb == self._ab:  # equal, or both zero, or no element is finite in both
            return math.nan if not self._aa and math.isinf(self._max_abs) else 1.0
        lengths = math.sqrt(self._aa) * math.sqrt(self._bb)
        return max(-1.0, min(1.0, self._ab / lengths)) if lengths else 0.0

    def _add(self, x: Tensor, y: Tensor, limits: tuple[float, float], *, known: bool) -> bool:
        """Compare two blocks. Return whether they differ by more than the limits; skip the check if that is ``known``."""
        if x.dtype == y.dtype and _same_bits(x, y):
            y = _wide(y, y)
            self._sum(y, y, finite=math.isfinite(_magnitude(y)))
            return False
        self.equal = False
        # float64 cannot show all differences of integers beyond 2**53.
        exact = x.dtype == y.dtype and not (
            x.dtype.is_floating_point or x.dtype.is_complex or any(limits)
        )
        x, y = _wide(x, y), _wide(y, x)
        error = (x - y).abs()
        largest = error.max().item()
        finite = math.isfinite(largest)
        if not finite:
            for which, (one, other) in enumerate(((x, y), (y, x))):
                self.nan[which] += int((one.isnan() & ~other.isnan()).sum())
            error.masked_fill_((x == y) | (x.isnan() & y.isnan()), 0.0)
            largest = error.nan_to_num_(nan=math.inf, posinf=math.inf).max().item()
        self._max_abs = max(self._max_abs, largest)
        self._sum(x, y, finite=finite)
        if math.isinf(largest) or exact:
            return True
        rtol, atol = limits
        return not known and largest > atol and bool((error > y.abs() * rtol + atol).any())

    def _sum(self, x: Tensor, y: Tensor, *, finite: bool) -> None:
        same = x is y
        if not finite:
            both = x.isfinite() & y.isfinite()
            x, y = x[both], y[both]
        if not y.numel():
            return
        self._largest = max(self._largest, _magnitude(y))
        if x.is_complex():
            x, y = torch.view_as_real(x).flatten(), torch.view_as_real(y).flatten()
        squares = y.dot(y).item()
        self._bb += squares
        self._aa += squares if same else x.dot(x).item()
        self._ab += squares if same else x.dot(y).item()


def _wide(block: Tensor, other: Tensor) -> Tensor:
    """Return a block in float64, or in complex128 if it or the other block is complex."""
    is_complex = block.is_complex() or other.is_complex()
    return block.to(torch.complex128) if is_complex else block.double()


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two blocks of one dtype have the same bits, compared as integers that are as large as possible."""
    size = x.element_size()
    offsets = (size * x.numel(), size * x.storage_offset(), size * y.storage_offset())
    step = torch.int64 if math.gcd(8, *offsets) == 8 else _INTEGERS[size]  # noqa: PLR2004  # bytes
    # A contiguous tensor with a single element may have any stride.
    x, y = (block.contiguous().as_strided(block.shape, (1,)) for block in (x, y))
    return torch.equal(x.view(step), y.view(step))


_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _magnitude(block: Tensor) -> float:
    """Return the largest absolute value: infinite, or NaN, if an element is."""
    if block.is_complex():
        return float(block.abs().max())
    low, high = block.aminmax()
    return max(-low.item(), high.item())


# Those of torch.testing.assert_close. Other types, of 8 bits and less, get those of bfloat16.
_DEFAULTS: Final = {
    torch.float64: (1e-7, 1e-7), torch.complex128: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5), torch.complex64: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5), torch.complex32: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}  # fmt: skip
_COARSE: Final = (1.6e-2, 1e-5)


def _limits(one: torch.dtype, two: torch.dtype, given: Tolerances) -> tuple[float, float]:
    """Return the tolerances for elements of two dtypes, relative and absolute."""
    defaults = [_default(one), _default(two)]
    rtol, atol = (max(values) for values in zip(*defaults, strict=True))
    return rtol if given[0] is None else given[0], atol if given[1] is None else given[1]


def _default(dtype: torch.dtype) -> tuple[float, float]:
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0, 0.0
    return _DEFAULTS.get(dtype, _COARSE)
