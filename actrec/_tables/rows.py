"""Objects that print as a table, and results that are rows: a tuple for programs, a table for people."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Generic, NoReturn, Self, SupportsIndex, TypeVar, overload

from typing_extensions import override

from .html import as_html
from .table import Table
from .text import as_text

R = TypeVar("R")


class Shown:
    """Prints as a table, and shows as one in a notebook."""

    __slots__ = ()

    @abstractmethod
    def _table(self) -> Table:
        """Return the table to show."""

    @override
    def __repr__(self) -> str:
        return as_text(self._table())

    def _repr_html_(self) -> str:
        return as_html(self._table())


class Rows(Shown, tuple[R, ...], Generic[R]):
    """A tuple of rows that prints as a table. A slice of it is one, too."""

    __slots__ = ()

    def _earliest(self, column: str) -> R | None:
        """Return the row with the smallest number in a column, the first of several; ``None`` if all are ``None``."""
        found = [(number, row) for row in self if (number := getattr(row, column)) is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    if not TYPE_CHECKING:  # hidden from type checkers, which then report missing attributes

        def __getattr__(self, name: str) -> NoReturn:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if not name.startswith("_"):
                message += (
                    f". A table is a tuple of rows: [row.{name} for row in table] if that is a column, and "
                    "pandas.DataFrame(table) is a data frame"
                )
            raise AttributeError(message)

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> R: ...
    @overload
    def __getitem__(self, index: slice, /) -> Self: ...
    @override
    def __getitem__(self, index: SupportsIndex | slice, /) -> R | Self:
        given: object = index
        if isinstance(given, str):
            message = (
                f"[{given!r}]: a table is a tuple of rows. The rows of a layer: [row for row in table if row.layer == {given!r}], "
                "and as a data frame pandas.DataFrame(table)."
            )
            raise TypeError(message)
        if not isinstance(index, slice):
            return super().__getitem__(index)
        some = type(self)(super().__getitem__(index))
        vars(some).update(vars(self))
        return some
