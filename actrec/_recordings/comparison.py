"""The result of comparing two recordings: a table with a row for each tensor that a layer returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from typing_extensions import override

from actrec._tables.drawn import Framed, badge
from actrec._tables.rows import Rows
from actrec._tables.table import Cells, Column, Table
from actrec._text import count, listed, shown


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
    nan: int


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
    ``note``             what does not match: numbers of calls, shapes, dtypes, structures, NaN
    ``nan``              how many elements are NaN in one of the two alone
    ===================  ==========================================================================

    ``max_rel`` is relative to the whole layer: relative errors of single elements say little near zero, where many
    elements of a ReLU are.

    NaN equals NaN, and an infinity equals an infinity of the same sign. Where only one of two elements is finite or
    NaN, ``max_abs`` is infinite. The cosine is that of the elements that are finite in both. Without elements, results are
    NaN. For complex numbers the modulus of the difference and the real part of the product are used.

    A comparison has no truth value, because true could be read as equal or as different: use :attr:`equal`, :attr:`close`
    or :attr:`different`.

    A slice has ``only_a`` and ``only_b`` too: the layers of ``a`` that ``b`` does not have, and the layers of ``b`` that
    were not compared.
    """

    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Row | None:
        """The row where the recordings first differ by more than the tolerances, or ``None``.

        Of the rows that differ in the earliest pass of ``a``, it is the first in execution order.
        """
        return self._earliest("different_pass")

    @property
    def equal(self) -> bool:
        """Whether calls, shapes, dtypes and bits of every layer are the same, and no layer is in one recording alone.

        >>> import torch
        >>> from actrec import compare, record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     output = model(torch.randn(5, 4))
        >>> found = compare(acts, acts)
        >>> found.equal, found.close, found.different
        (True, True, False)

        A comparison without rows is not equal.
        """
        return self._is_all("equal")

    @property
    def close(self) -> bool:
        """Whether all is within the tolerances, and no layer is in one recording alone."""
        return self._is_all("close")

    @property
    def different(self) -> bool:
        """Whether anything is not within the tolerances, or in one recording alone.

        It is the opposite of :attr:`close`.
        """
        return not self.close

    def _is_all(self, what: str) -> bool:
        alone = self.only_a or self.only_b
        return len(self) > 0 and not alone and all(getattr(row, what) for row in self)

    def __bool__(self) -> NoReturn:
        message = (
            "compare() returns a table, which is neither true nor false: use .equal, .close or .different. "
            "len(...) is the number of rows."
        )
        raise TypeError(message)

    def _title(self) -> str:
        verdicts = [_verdict(row) or "with nothing to compare" for row in self]
        numbers = [f"{many:,} {verdict}" for verdict, many in _counted(verdicts)]
        layers = count(len({row.layer for row in self}), "layer")
        what = f"compared {count(len(self), 'tensor')} of {layers}"
        facts = [f"{what}: {', '.join(numbers)}" if numbers else what]
        facts += [f"only in a: {listed(self.only_a)}"] * bool(self.only_a)
        facts += [f"only in b: {listed(self.only_b)}"] * bool(self.only_b)
        return "; ".join(facts)

    def _badge(self) -> str:
        """The verdict, in words."""
        first = self.first_difference
        if first is not None:
            return badge(f"different: first in {_place(first)}, pass {first.different_pass}")
        if len(self) == 0:
            return badge("no layer is in both")
        if self.only_a or self.only_b:
            return badge("layers are missing")
        return badge("equal" if self.equal else "close", "good")

    @override
    def _table(self) -> Table:
        first = self.first_difference
        rows = [_cells(row, is_first=row is first) for row in self]
        kinds = ["equal" if _verdict(row) == "equal" and not row.note else "" for row in self]
        return Table(self._title(), _COLUMNS, rows, verdict=self._badge(), kinds=kinds)


_COLUMNS = (
    Column("layer"),
    *(Column(name, is_number=True) for name in ("calls", "count", "max abs", "max rel", "cosine")),
    Column("verdict"),
    Column("note", is_note=True),
)


def _counted(verdicts: Sequence[str]) -> list[tuple[str, int]]:
    """Return each verdict with its number of rows, the better ones first."""
    order = ("equal", "close", "different", "with nothing to compare")
    return [(verdict, verdicts.count(verdict)) for verdict in order if verdict in verdicts]


def _cells(row: Row, *, is_first: bool) -> Cells:
    errors = (row.max_abs, row.max_rel)
    place, verdict = _place(row), _verdict(row)
    if verdict == "different":
        verdict = badge("different, first" if is_first else "different")
    return (
        Framed(place) if is_first else place,
        f"{row.calls:,}",
        f"{row.count:,}",
        *("" if math.isnan(error) else _error(row, error) for error in errors),
        "" if math.isnan(row.cosine) else f"{row.cosine:.6f}",
        verdict,
        row.note,
    )


def _error(row: Row, error: float) -> str:
    return "NaN" if row.nan and math.isinf(error) else f"{error:.3g}"


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
