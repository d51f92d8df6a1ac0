"""Tables as text, with aligned columns. In long tables, a branch that repeats the one before is folded into one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from actrec._text import count, shown

from .table import Cells, Column, Table
from .tree import Node, tree

#: A table with more rows is folded.
MOST_ROWS: Final = 60
#: If there are still too many lines, so many rows are shown at the end.
LAST_ROWS: Final = 10


class _Fold(NamedTuple):
    """A line in place of rows that are not shown."""

    rows: int
    text: str


def as_text(table: Table) -> str:
    """Return a table as lines: the title, the head and the rows.

    If there are more than ``MOST_ROWS`` rows with names, branches of the tree of names that repeat the one before are
    one line. If there are still more lines, those in the middle are one line.
    """
    table = table.without_usual()
    title = "; ".join(filter(None, (table.title, table.verdict)))
    return "\n".join([title, *_aligned(table.columns, _folded(table))])


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
    """Return the rows to show, and a fold in place of the others."""
    noun = f"more {table.columns[0].name}"
    if table.kinds:
        lines = list(_runs(table))
    elif len(table.rows) <= MOST_ROWS or not table.names:
        return [*table.rows]
    else:
        by_name = dict(zip(table.names, table.rows, strict=True))
        lines = list(_branch(tree(table.names), by_name, noun))
    if len(lines) <= MOST_ROWS:
        return lines
    cut = slice(MOST_ROWS - LAST_ROWS, -LAST_ROWS)
    skipped = sum(line.rows if isinstance(line, _Fold) else 1 for line in lines[cut])
    lines[cut] = [_Fold(skipped, f"... {count(skipped, noun)} ...")]
    return lines


def _runs(table: Table) -> Iterator[Cells | _Fold]:
    """Yield the rows, with a line for each long run of one kind."""
    for text, rows in table.runs():
        yield from [_Fold(len(rows), f"... {text} ...")] if text else rows


def _branch(node: Node, by_name: Mapping[str, Cells], noun: str) -> Iterator[Cells | _Fold]:
    """Yield the rows of a branch; of adjacent equal branches only the first."""
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
    """Return an object that is equal for two branches that differ only in their prefix."""
    return [(name[len(node.prefix) :], by_name[name][1:]) for name in node.names()]


def _as_before(alike: list[Node], noun: str) -> Iterator[_Fold]:
    if alike:
        rows = sum(1 for node in alike for _ in node.names())
        which = shown(alike[0].prefix) + (f" to {shown(alike[-1].prefix)}" if alike[1:] else "")
        yield _Fold(rows, f"... {which}: {count(rows, noun)}, as in the block before ...")
