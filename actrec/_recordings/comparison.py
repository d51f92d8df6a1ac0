"""The result of comparing two recordings: a table with a row for each tensor that a layer returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import override

from actrec._tables.rows import Rows
from actrec._tables.table import Cells, Column, Table
from actrec._text import count, listed, shown

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor that a layer returns, over all calls: see :class:`Comparison`."""

    layer: str
    leaf: str
    other: str
    calls: int
    count: int
    max_abs: float
    max_rel: float
    cosine: float
    equal: bool
    close: bool
    different_pass: int | None
    note: str


class Comparison(Rows[Row]):
    """The result of :func:`compare`: a tuple of rows in execution order, which prints as a table.

    >>> import torch
    >>> from actrec import compare, record
    >>> model = torch.nn.Linear(4, 3)
    >>> with record(model, "") as acts:
    ...     output = model(torch.randn(5, 4))
    >>> [row.equal for row in compare(acts, acts)]
    [True]

    ===================  ==========================================================================
    ``layer``            the name of the layer in the first recording, ``a``
    ``leaf``             which of its tensors, as an index of ``a[layer][i]``, such as ``[0]`` or
                         ``['hidden']``; empty if the layer returns one tensor
    ``other``            the name of the layer in the second recording, ``b``
    ``calls``            the number of calls that were compared
    ``count``            the number of elements in them
    ``max_abs``          the largest absolute difference, ``max |a - b|``
    ``max_rel``          ``max_abs`` divided by the largest finite magnitude in ``b``, ``max |b|``
    ``cosine``           the cosine similarity of all of ``a`` and all of ``b``, as two vectors
    ``equal``            same calls, shapes, dtypes and bits
    ``close``            within the tolerances, in every element of every call
    ``different_pass``   the first pass of ``a`` that is not close, or ``None``
    ``note``             what does not match: numbers of calls, shapes, dtypes, structures
    ===================  ==========================================================================

    ``max_rel`` is relative to the whole layer: relative errors of single elements say little near zero, where many
    elements of a ReLU are.

    NaN equals NaN, and an infinity equals an infinity of the same sign. Where only one of two elements is finite or
    NaN, ``max_abs`` is infinite. The cosine is that of the elements that are finite in both. Results of no elements are
    NaN. For complex numbers the modulus of the difference and the real part of the product are used.

    Slices keep the rest of the table. ``only_a`` are the layers of ``a`` that ``b`` does not have, ``only_b`` those of ``b``
    that were not compared.
    """

    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Row | None:
        """The row where the recordings first differ by more than the tolerances, or ``None``.

        It is the first in execution order of the earliest pass of ``a`` that differs.
        """
        return self._earliest("different_pass")

    def _title(self) -> str:
        verdicts = [_verdict(row) for row in self if row.calls or not row.close]
        numbers = [
            f"{verdicts.count(verdict):,} {verdict}"
            for verdict in ("equal", "close", "different")
            if verdict in verdicts
        ]
        layers = count(len({row.layer for row in self}), "layer")
        what = f"compared {count(len(self), 'tensor')} of {layers}"
        facts = [f"{what}: {', '.join(numbers)}" if numbers else what]
        if (first := self.first_difference) is not None:
            facts.append(f"first difference in {_place(first)}, pass {first.different_pass}")
        facts += [f"only in a: {listed(self.only_a)}"] * bool(self.only_a)
        facts += [f"only in b: {listed(self.only_b)}"] * bool(self.only_b)
        return "; ".join(facts)

    @override
    def _table(self) -> Table:
        return Table(self._title(), _COLUMNS, [_cells(row) for row in self])


_COLUMNS = (
    Column("layer"),
    *(Column(name, is_number=True) for name in ("calls", "count", "max abs", "max rel", "cosine")),
    Column("verdict"),
    Column("note", is_note=True),
)


def _cells(row: Row) -> Cells:
    errors = (row.max_abs, row.max_rel)
    return (
        _place(row),
        f"{row.calls:,}",
        f"{row.count:,}",
        *("" if math.isnan(error) else f"{error:.3g}" for error in errors),
        "" if math.isnan(row.cosine) else f"{row.cosine:.6f}",
        _verdict(row),
        row.note,
    )


def _place(row: Row) -> str:
    name, other = shown(row.layer), shown(row.other)
    leaf = shown(row.leaf) if row.leaf else ""
    return name + leaf + (f" -> {other}" if other != name else "")


def _verdict(row: Row) -> str:
    if not row.calls and row.close:
        return ""
    if row.equal:
        return "equal"
    return "close" if row.close else "different"
