"""Statistics of a recording: a table with a row for each tensor that a layer returns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final

from torch import Tensor
from typing_extensions import override

from actrec._progress import Each, showing
from actrec._tables.drawn import badge, bar
from actrec._tables.rows import Rows
from actrec._tables.table import Cells, Column, Table
from actrec._text import count, listed, shown, size
from actrec._values.histogram import Histogram
from actrec._values.spec import leaves

from .layer import Layer
from .masks import Masks, left_in
from .tally import Tally, drawn
from .units import Key


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
    nonfinite_unit: Key | None = None


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
    ``histogram``       the distribution of the finite elements, in bins at most 6.25 % as wide as their
                        numbers: ``histogram.counts``, and the ends ``low`` and ``high`` of each bin;
                        ``histogram.quantile(0.5)`` and ``histogram.bars(low, high, many)`` use them
    ``left_out``        how many elements a mask has left out; they are not in the other columns
    ``nonfinite_unit``  the key of the unit that was the first such pass, or ``None``
    ==================  ===========================================================================

    Statistics are computed in float64: of the moduli of complex numbers, of bools as 0 and 1, of the dequantized values
    of quantized tensors. Without finite elements they are NaN. Tensors on the meta device have 0 elements.
    """

    #: The layers whose calls were not kept, such as reduced ones.
    without: tuple[str, ...] = ()

    @property
    def first_nonfinite(self) -> Row | None:
        """The row of the layer that was the first to return a NaN or an infinity, or ``None``.

        Of the rows with any in the earliest such pass, it is the first in execution order.
        """
        return self._earliest("nonfinite_pass")

    @override
    def _table(self) -> Table:
        title = f"statistics of {count(len({row.layer for row in self}), 'layer')}"
        if self.without:
            title += f", without those whose calls were not kept: {listed(self.without)}"
        names = [row.layer + row.leaf for row in self]
        largest = max((row.nbytes for row in self), default=0)
        rows = [_cells(row, largest) for row in self]
        # The table folds rows by name, so names must be unique.
        return Table(
            title, _COLUMNS, rows, names if len({*names}) == len(names) else (), self._verdict()
        )

    def _verdict(self) -> str:
        """Return where the first NaN or infinity is."""
        first = self.first_nonfinite
        if first is None:
            return ""
        what = " or ".join(["NaN"] * bool(first.nan) + ["infinity"] * bool(first.inf))
        where = f"{_name(first)}, pass {first.nonfinite_pass}"
        if first.nonfinite_unit is not None:
            where += f", unit {first.nonfinite_unit!r}"
        return badge(f"first {what}: {where}")


_COLUMNS: Final = (
    Column("layer"),
    Column("shape"),
    Column("values, 0.5-99.5 %"),
    *(Column(name, is_number=True) for name in ("mean", "std", "min", "max", "zeros", "memory")),
    Column("note", is_note=True, usual=("",)),
)


def _name(row: Row) -> str:
    return shown(row.layer) + shown(row.leaf) * bool(row.leaf)


def _cells(row: Row, largest: int) -> Cells:
    numbers = (row.mean, row.std, row.min, row.max)
    bad = [f"{many:,} {what}" for many, what in ((row.nan, "NaN"), (row.inf, "inf")) if many]
    left_out = [f"{row.left_out:,} left out"] * bool(row.left_out)
    return (
        _name(row),
        row.shape,
        drawn(row.histogram, row.min, row.max, row.count),
        *("" if math.isnan(number) else f"{number:.4g}" for number in numbers),
        bar(f"{row.zeros:.0%}", row.zeros) if row.count else "",
        bar(size(row.nbytes), row.nbytes / largest if largest else 0.0),
        badge(", ".join(bad + left_out)) if bad else "".join(left_out),
    )


def stats(layers: Sequence[Layer[Any]], masks: Masks | None = None, *, progress: bool) -> Stats:
    """Return the statistics of some layers. See :meth:`actrec.Recording.stats`."""
    kept = [layer for layer in layers if layer._is_kept] or layers  # if none is, reading raises
    with showing("statistics", sum(map(len, kept)), progress=progress) as each:
        found = Stats(row for layer in kept for row in _rows(layer, masks, each))
    found.without = tuple(layer.name for layer in layers if not layer._is_kept)
    if masks is not None:
        masks.check()
    return found


def _rows(layer: Layer[Any], masks: Masks | None, each: Each) -> Iterator[Row]:
    found: dict[str, Tally] = {}
    nonfinite: dict[str, tuple[int, Key | None]] = {}  # the first pass with any, and its unit
    by_cast = {} if layer._overflows is None else layer._overflows.nonfinite()
    kept: Iterable[Mapping[str, Tensor]] = repeat({}) if masks is None else masks.of(layer)
    calls = zip(each(layer), layer.passes, layer.units, kept, strict=False)
    for value, number, unit, counts in calls:
        for path, tensor in leaves(value):
            mask = counts.get(path)
            counted = None if mask is None else left_in(tensor, mask)
            bad = found.setdefault(path, Tally()).add(tensor, counted)
            # So many of them come from the cast to dtype=, not from the layer.
            cast = min(bad, by_cast.get(number, 0))
            if cast:
                by_cast[number] -= cast
            if bad > cast:
                nonfinite.setdefault(path, (number, unit))
    for path, tally in (found or {"": Tally()}).items():
        statistics = tally.statistics
        bad_pass, bad_unit = nonfinite.get(path, (None, None))
        yield Row(
            layer.name,
            path,
            statistics.count,
            statistics.mean,
            statistics.std,
            statistics.min,
            statistics.max,
            statistics.zero_share,
            statistics.nan,
            statistics.inf,
            statistics.nbytes,
            bad_pass,
            tally.looks.shape,
            tally.bins.histogram(),
            tally.left_out,
            bad_unit,
        )
