"""A table: a title, columns, and rows of plain cells, of which the first is a name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Final, NamedTuple

#: Runs of at least so many rows of one kind are folded.
SHORTEST_RUN: Final = 4

#: A row: one text for each column.
Cells = tuple[str, ...]


class Column(NamedTuple):
    """One column of a table."""

    name: str
    is_number: bool = False
    is_note: bool = False  #: whether its cells are remarks
    usual: Collection[str] = ()  #: if all cells are among these, the column is left out


@dataclass(frozen=True, slots=True)
class Table:
    """What :func:`~actrec._tables.text.as_text` and :func:`~actrec._tables.html.as_html` show.

    >>> from actrec._tables.text import as_text
    >>> print(as_text(Table("2 fruits", [Column("fruit"), Column("kg", is_number=True)], [("apple", "1"), ("fig", "12")])))
    2 fruits
    fruit  kg
    apple   1
    fig    12
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Cells]
    #: Names with dots, one for each row: many rows are folded along the tree of their names. Without names, nothing is.
    names: Sequence[str] = ()
    #: The most important result, next to the title: a :class:`~actrec._tables.drawn.badge`.
    verdict: str = ""
    #: The kind of each row, such as "equal": long runs of one kind are folded. Rows with ``""`` never are.
    kinds: Sequence[str] = ()

    def without_usual(self) -> Table:
        """Return the table without the columns in which all cells are usual."""
        places = [
            place
            for place, column in enumerate(self.columns)
            if not column.usual or any(row[place] not in column.usual for row in self.rows)
        ]
        columns = [self.columns[place] for place in places]
        rows = [tuple(row[place] for place in places) for row in self.rows]
        return replace(self, columns=columns, rows=rows)

    def runs(self) -> Iterator[tuple[str, Sequence[Cells]]]:
        """Yield the rows by their kinds: a long run with a text for it, other rows with ``""``."""
        for kind, group in groupby(zip(self.kinds, self.rows, strict=True), itemgetter(0)):
            rows = [row for _, row in group]
            is_long = kind and len(rows) >= SHORTEST_RUN
            yield f"{len(rows):,} {kind}: {rows[0][0]} to {rows[-1][0]}" if is_long else "", rows
