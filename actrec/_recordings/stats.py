"""Statistics of a recording: a table with a row for each tensor that a layer returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from actrec._tables.rows import Rows
from actrec._tables.table import Cells, Column, Table
from actrec._text import count, shown, size
from actrec._values.moments import Moments
from actrec._values.spec import leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .layer import Layer

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
        names = [*(field.name for field in fields(Row)[2:-2]), "memory"]
        columns = [Column("layer"), *(Column(name, is_number=True) for name in names)]
        return Table(title, columns, [_cells(row) for row in self])


def _cells(row: Row) -> Cells:
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


def stats(layers: Iterable[Layer[Any]]) -> Stats:
    """Return the statistics of some layers. See :meth:`actrec.Recording.stats`."""
    return Stats(row for layer in layers for row in _rows(layer))


def _rows(layer: Layer[Any]) -> Iterator[Row]:
    found: dict[str, Moments] = {}
    nonfinite: dict[str, int] = {}  # the first pass with any
    by_cast = {} if layer.overflows is None else layer.overflows.nonfinite()
    for value, number in zip(layer, layer.passes, strict=False):
        for path, tensor in leaves(value):
            bad = found.setdefault(path, Moments()).add(tensor)
            # So many come from the cast to dtype=, not from the layer.
            cast = min(bad, by_cast.get(number, 0))
            if cast:
                by_cast[number] -= cast
            if bad > cast:
                nonfinite.setdefault(path, number)
    for path, moments in (found or {"": Moments()}).items():
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
        )
