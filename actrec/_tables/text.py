"""Tables as text: columns are aligned, and of many rows those that repeat others stand for one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from actrec._text import count, shown

from .tree import Node, tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .table import Cells, Column, Table

__all__ = ["as_text"]

#: Of more rows, those that fold are folded.
MOST_ROWS: Final = 60
#: Where that is not enough, so many are shown at the end.
LAST_ROWS: Final = 10


class _Fold(NamedTuple):
    """A line that stands for rows that are not shown."""

    rows: int
    text: str


def as_text(table: Table) -> str:
    """Return a table as lines: the title, the head and the rows.

    A column that says nothing but the usual is left out. Where the rows have names and are many, branches of the tree
    of names that are alike are shown once; of more still, the first and the last rows.
    """
    lines = _folded(table)
    columns = enumerate(table.columns)
    places = [
        place
        for place, column in columns
        if not column.usual or table.cells(place).difference(column.usual)
    ]
    lines = [
        line if isinstance(line, _Fold) else tuple(line[place] for place in places)
        for line in lines
    ]
    return "\n".join([table.title, *_aligned([table.columns[place] for place in places], lines)])


def _aligned(columns: Sequence[Column], lines: Iterable[Cells | _Fold]) -> Iterator[str]:
    lines = [tuple(column.name for column in columns), *lines]
    cells = [line for line in lines if not isinstance(line, _Fold)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in lines:
        if isinstance(line, _Fold):
            yield line.text
        else:
            places = zip(line, widths, columns, strict=True)
            texts = [c.rjust(w) if column.is_number else c.ljust(w) for c, w, column in places]
            yield "  ".join(texts).rstrip()


# --- Many rows ---------------------------------------------------------------------------------------


def _folded(table: Table) -> list[Cells | _Fold]:
    """The rows to show, and what stands for the others."""
    if len(table.rows) <= MOST_ROWS or not table.names:
        return [*table.rows]
    noun = f"more {table.columns[0].name}"
    by_name = dict(zip(table.names, table.rows, strict=True))
    lines = list(_branch(tree(table.names), by_name, noun))
    if len(lines) <= MOST_ROWS:
        return lines
    cut = slice(MOST_ROWS - LAST_ROWS, -LAST_ROWS)
    skipped = sum(line.rows if isinstance(line, _Fold) else 1 for line in lines[cut])
    lines[cut] = [_Fold(skipped, f"... {count(skipped, noun)} ...")]
    return lines


def _branch(node: Node, by_name: Mapping[str, Cells], noun: str) -> Iterator[Cells | _Fold]:
    """The rows of a branch; of neighbours that are alike only the first."""
    if node.is_row:
        yield by_name[node.prefix]
    alike: list[Node] = []
    before: object = None
    for child in node.children.values():
        signature = _signature(child, by_name) if child.children else None
        if signature is not None and signature == before:
            alike.append(child)
            continue
        yield from _as_before(alike, noun)
        alike, before = [], signature
        yield from _branch(child, by_name, noun)
    yield from _as_before(alike, noun)


def _signature(node: Node, by_name: Mapping[str, Cells]) -> object:
    """What two branches have in common that differ in nothing but their names."""
    return [(name[len(node.prefix) :], by_name[name][1:]) for name in node.names()]


def _as_before(alike: list[Node], noun: str) -> Iterator[_Fold]:
    if alike:
        rows = sum(1 for node in alike for _ in node.names())
        which = shown(alike[0].prefix) + (f" to {shown(alike[-1].prefix)}" if alike[1:] else "")
        yield _Fold(rows, f"... {which}: {count(rows, noun)}, as in the block before ...")
