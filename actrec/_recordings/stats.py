"""Statistics of a recording: a table with a row for each tensor that a layer returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from actrec._tables.drawn import Badge, Bar, Bars
from actrec._tables.rows import Rows
from actrec._tables.table import Cells, Column, Table
from actrec._text import count, shown, size
from actrec._values.histogram import Bins, Histogram
from actrec._values.moments import Moments
from actrec._values.spec import leaves
from actrec._values.summary import Summary

from .masked import left_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from .layer import Layer
    from .masked import Masks

__all__ = ["Row", "Stats", "stats"]


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
    shape: str
    histogram: Histogram
    left_out: int = 0


class Stats(Rows[Row]):
    """Statistics of a recording: a tuple of rows, in execution order, that prints as a table.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Flatten())
    >>> with record(model) as acts:
    ...     output = model(torch.tensor([[1.0, 3.0, float("nan")]]))
    >>> (row,) = acts.stats()
    >>> row.layer, row.count, row.mean, round(row.std, 2), row.nan
    ('0', 3, 2.0, 1.41, 1)

    The columns of a row:

    ==================  ===========================================================================
    ``layer``           the name of the layer
    ``leaf``            which of its tensors, as an index of ``acts[layer][i]``, such as ``[0]`` or
                        ``['hidden']``; empty if the layer returns one tensor
    ``count``           the number of elements
    ``mean``, ``std``   of the finite elements; ``std`` with Bessel's correction, as ``torch.std``
    ``min``, ``max``    of the finite elements
    ``zeros``           the share of elements that are zero, from 0 to 1
    ``nan``, ``inf``    how many elements are NaN, and how many infinite
    ``nbytes``          the bytes of the elements
    ``nonfinite_pass``  the first pass in which the layer returned a NaN or an infinity, or ``None``
    ``shape``           the shapes of the tensor, as the table of a recording has them
    ``histogram``       how many of the finite elements lie where, in bins that are at most 6.25 % of their
                        numbers wide: ``histogram.counts``, and the ends ``low`` and ``high`` of each bin;
                        ``histogram.quantile(0.5)`` and ``histogram.bars(low, high, many)`` are made of them
    ``left_out``        how many elements a mask has left out; ``count`` and what follows it do not count them
    ==================  ===========================================================================

    Statistics are computed in float64: of the moduli of complex numbers, of bools as 0 and 1, of the dequantized values
    of quantized tensors. Without finite elements they are NaN. Tensors on the meta device have 0 elements.
    """

    @property
    def first_nonfinite(self) -> Row | None:
        """The row of the layer that was the first to return a NaN or an infinity, or ``None``.

        It is the first in execution order of the earliest pass that has any.
        """
        return self._earliest("nonfinite_pass")

    @override
    def _table(self) -> Table:
        title = f"statistics of {count(len({row.layer for row in self}), 'layer')}"
        names = [row.layer + row.leaf for row in self]
        largest = max((row.nbytes for row in self), default=0)
        rows = [_cells(row, largest) for row in self]
        # Names that are not told apart would be one row where the table folds.
        return Table(
            title, _COLUMNS, rows, names if len({*names}) == len(names) else (), self._verdict()
        )

    def _verdict(self) -> str:
        """Where the first NaN or infinity is."""
        first = self.first_nonfinite
        if first is None:
            return ""
        what = " or ".join(["NaN"] * bool(first.nan) + ["infinity"] * bool(first.inf))
        return Badge(f"first {what}: {_name(first)}, pass {first.nonfinite_pass}")


_COLUMNS: Final = (
    Column("layer"),
    Column("shape"),
    Column("values, 0.5-99.5 %"),
    *(Column(name, is_number=True) for name in ("mean", "std", "min", "max", "zeros", "memory")),
    Column("note", is_note=True, usual=("",)),
)
#: So many bars has a histogram.
_BARS: Final = 40
#: The highest bar is drawn at most so many times as high as the next one.
_STICKS_OUT: Final = 1.5
#: The share of the elements below and above that is drawn as if it were at the end.
_TAIL: Final = 0.005


def _name(row: Row) -> str:
    return shown(row.layer) + shown(row.leaf) * bool(row.leaf)


def _cells(row: Row, largest: int) -> Cells:
    numbers = (row.mean, row.std, row.min, row.max)
    bad = [f"{many:,} {what}" for many, what in ((row.nan, "NaN"), (row.inf, "inf")) if many]
    left_out = [f"{row.left_out:,} left out"] * bool(row.left_out)
    return (
        _name(row),
        row.shape,
        _bars(row),
        *("" if math.isnan(number) else f"{number:.4g}" for number in numbers),
        Bar(f"{row.zeros:.0%}", row.zeros) if row.count else "",
        Bar(size(row.nbytes), row.nbytes / largest if largest else 0.0),
        Badge(", ".join(bad + left_out)) if bad else "".join(left_out),
    )


def _bars(row: Row) -> str:
    """The histogram, without the last of the tails on both sides."""
    found = row.histogram
    if not found.counts:
        return "no finite value" if row.count else ""
    low = max(found.quantile(_TAIL), row.min)
    high = min(found.quantile(1 - _TAIL), row.max)
    if low >= high:
        low, high = row.min, row.max
    label = f"{low:.3g} ... {high:.3g}" if low < high else f"{low:.3g}"
    bars = found.bars(low, high, _BARS)
    # The zeros of a ReLU would leave nothing of the others: a bar that sticks out is cut.
    most = _STICKS_OUT * sorted(bars)[-2]
    return Bars([min(bar, most) if most else bar for bar in bars], label)


def stats(layers: Iterable[Layer[Any]], masks: Masks | None = None) -> Stats:
    """Return the statistics of some layers. See :meth:`actrec.Recording.stats`."""
    found = Stats(row for layer in layers for row in _rows(layer, masks))
    if masks is not None:
        masks.check()
    return found


def _rows(layer: Layer[Any], masks: Masks | None) -> Iterator[Row]:
    found: dict[str, _Tally] = {}
    nonfinite: dict[str, int] = {}  # the first pass with any
    by_cast = {} if layer.overflows is None else layer.overflows.nonfinite()
    kept: Iterable[Mapping[str, Tensor]] = repeat({}) if masks is None else masks.of(layer)
    for value, number, counts in zip(layer, layer.passes, kept, strict=False):
        for path, tensor in leaves(value):
            bad = found.setdefault(path, _Tally()).add(tensor, counts.get(path))
            # So many come from the cast to dtype=, not from the layer.
            cast = min(bad, by_cast.get(number, 0))
            if cast:
                by_cast[number] -= cast
            if bad > cast:
                nonfinite.setdefault(path, number)
    for path, tally in (found or {"": _Tally()}).items():
        moments = tally.moments
        yield Row(
            layer.name,
            path,
            moments.count,
            moments.mean,
            moments.std,
            moments.min,
            moments.max,
            moments.zero_share,
            moments.nan,
            moments.inf,
            moments.nbytes,
            nonfinite.get(path),
            tally.looks.shape,
            tally.bins.histogram(),
            tally.left_out,
        )


class _Tally:
    """Counts one tensor of a layer, over the calls read so far."""

    def __init__(self) -> None:
        self.bins = Bins()
        self.moments = Moments(self.bins)
        self.looks = Summary()
        self.left_out = 0

    def add(self, tensor: Tensor, kept: Tensor | None) -> int:
        """Add a tensor, or the positions of it that count, and return how many of the elements are NaN or infinite."""
        self.looks.add(tensor)
        if kept is not None:
            counted = left_in(tensor, kept)
            self.left_out += tensor.numel() - counted.numel()
            tensor = counted
        return self.moments.add(tensor)
