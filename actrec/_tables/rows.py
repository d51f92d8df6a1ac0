"""Results that are rows: a tuple for programs, a table for people."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

from . import html as _html
from . import text as _display

__all__ = ["Rows"]

R = TypeVar("R")


class Rows(tuple[R, ...], Generic[R]):
    """A tuple of rows that prints as a table."""

    __slots__ = ()

    @abstractmethod
    def _title(self) -> str: ...

    @abstractmethod
    def _columns(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _cells(self, row: R) -> tuple[str, ...]: ...

    def __repr__(self) -> str:
        cells = [self._cells(row) for row in self]
        return "\n".join([self._title(), *_display.text_table(self._columns(), cells)])

    def _repr_html_(self) -> str:
        cells = [self._cells(row) for row in self]
        return _html.rows_html(repr(self), self._title(), self._columns(), cells)
