"""Tables as HTML, for notebooks.

The HTML is self-contained: no script, no image, no file, one small style sheet. Text inherits its colour, lines and shades
are transparent grey, so it fits light and dark themes. The plain text comes first and is only hidden by the style sheet:
if a page strips HTML or styles, the text is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from actrec._text import count, shown

from .drawn import STYLE as DRAWN
from .drawn import Drawn, Framed
from .markup import Html, escaped, tag
from .table import Cells, Column, Table
from .text import as_text
from .tree import Node, tree

#: A table with more rows folds along the tree of its names.
MOST_FLAT = 20
#: A branch with fewer rows is part of its parent.
SMALLEST_BRANCH = 6
#: So many rows of a branch are visible at once.
MOST_OPEN = 60
#: The columns are as wide as their widest cell, in characters, within these limits.
NARROWEST, WIDEST = 5, 26
NARROWEST_NAME, WIDEST_NAME = 20, 56

STYLE = """
.actrec > pre.actrec-text { display: none; }
.actrec > .actrec-table { display: block !important; overflow-x: auto; max-width: 100%;
  font-size: 13px; line-height: 1.45; text-align: left; }
.actrec > .actrec-table > .actrec-title { font-weight: 600; padding: 2px 7px 6px; overflow-wrap: anywhere; }
.actrec > .actrec-table table { table-layout: fixed; width: 100%; border-collapse: collapse; border: 0;
  margin: 0; font-size: inherit; color: inherit; display: table; }
.actrec > .actrec-table tr, .actrec > .actrec-table tbody tr:nth-child(n) { background: transparent !important; }
.actrec > .actrec-table tbody tr:hover { background: rgba(128, 128, 128, .16) !important; }
.actrec > .actrec-table th, .actrec > .actrec-table td { padding: 2px 7px; border: 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; white-space: normal; max-width: none;
  font-variant-numeric: tabular-nums; color: inherit; background: transparent; }
.actrec > .actrec-table thead th { font-weight: 600; opacity: .75; border-bottom: 1px solid rgba(128, 128, 128, .5); }
.actrec > .actrec-table tbody td { border-bottom: 1px solid rgba(128, 128, 128, .18); }
.actrec > .actrec-table .actrec-r { text-align: right; }
.actrec > .actrec-table .actrec-n span { font-weight: 600; padding: 0 5px; border-radius: 3px;
  background: rgba(255, 160, 0, .28); }
.actrec > .actrec-table details { margin: 0; padding: 0; border: 0; background: transparent; }
.actrec > .actrec-table summary { cursor: pointer; padding: 3px 7px; font-weight: 600; overflow-wrap: anywhere;
  border-bottom: 1px solid rgba(128, 128, 128, .18); background: rgba(128, 128, 128, .09); }
.actrec > .actrec-table summary small { font-size: 12px; font-weight: 400; opacity: .75; padding-left: 8px; }
"""


def as_html(table: Table) -> Html:
    """Return a table: flat if it is small or its rows have no names, else a tree that folds."""
    title = tag("div", f"{table.title} ", _markup(table.verdict), class_="actrec-title")
    body = _body(table.without_usual())
    return tag(
        "div",
        tag("style", Html(STYLE + _drawn(table))),
        tag("pre", as_text(table), class_="actrec-text"),
        tag("div", title, body, class_="actrec-table", style="display:none"),
        class_="actrec",
    )


def _drawn(table: Table) -> str:
    """Return the style of drawn cells, if there are any."""
    cells = (table.verdict, *(cell for row in table.rows for cell in row))
    return DRAWN if any(isinstance(cell, (Drawn, Framed)) for cell in cells) else ""


def _markup(text: str) -> str:
    return text.html if isinstance(text, Drawn) else text


def _body(table: Table) -> Html:
    sheet = _Sheet(table.columns, table.rows)
    if table.kinds:
        return sheet.framed(_runs(table, sheet))
    if len(table.rows) <= MOST_FLAT or not table.names:
        return sheet.framed(sheet.table([(row[0], row) for row in table.rows]))
    rows = dict(zip(table.names, table.rows, strict=True))
    return sheet.framed(_branch(tree(rows, SMALLEST_BRANCH), rows, sheet, 0))


def _runs(table: Table, sheet: _Sheet) -> Iterator[Html]:
    """Yield the rows, with long runs of one kind folded."""
    for text, rows in table.runs():
        labelled = [(row[0], row) for row in rows]
        if text:
            yield sheet.fold(text, sheet.table(labelled, 1), 0)
        else:
            yield from sheet.table(labelled)


class _Sheet:
    """Makes many small tables with the same columns, because a fold cannot be inside a table."""

    def __init__(self, columns: Sequence[Column], rows: Sequence[Cells]) -> None:
        self.names = [column.name for column in columns]
        cells = [self.names, *rows]
        widths = [
            _width(column, WIDEST if place else WIDEST_NAME) + 3 * columns[place].is_note
            for place, column in enumerate(zip(*cells, strict=True))
        ]
        self.notes = [place for place, column in enumerate(columns) if column.is_note]
        self.classes = [_class(column) for column in columns]
        rest = (tag("col", style=f"width:{width}ch") for width in widths[1:])
        self._columns = tag("colgroup", tag("col"), *rest)
        narrowest = sum(widths[1:]) + min(widths[0], NARROWEST_NAME)
        self._style = f"max-width:{sum(widths)}ch;min-width:{narrowest}ch"

    def framed(self, body: Iterable[Html]) -> Html:
        """Return the head and a body, with a largest and a smallest width."""
        names = zip(self.classes, self.names, strict=True)
        cells = (tag("th", column, class_=kind) for kind, column in names)
        head = tag("table", self._columns, tag("thead", tag("tr", *cells)))
        return tag("div", head, *body, style=self._style)

    def table(self, rows: Sequence[tuple[str, Cells]], depth: int = 0) -> Iterator[Html]:
        """Yield rows, each with its label; those after the first ``MOST_OPEN`` are folded."""
        if rows:
            body = (self._row(label, cells, depth) for label, cells in rows[:MOST_OPEN])
            yield tag("table", self._columns, tag("tbody", *body))
        if rest := rows[MOST_OPEN:]:
            yield self.fold(f"{len(rest):,} more", self.table(rest, depth), depth)

    def fold(
        self, label: str, body: Iterable[Html], depth: int, *remarks: Html, is_open: bool = False
    ) -> Html:
        """Return a fold: one line, until it is unfolded."""
        line = tag("summary", label, *remarks, style=f"padding-left:{_indent(depth)}px")
        return tag("details", line, *body, open=is_open)

    def _row(self, label: str, cells: Cells, depth: int) -> Html:
        indent = f"padding-left:{_indent(depth)}px" if depth else None
        first = tag("td", _breakable(label), style=indent, title=cells[0])
        rest = map(_cell, self.classes[1:], cells[1:])
        kind = "actrec-first" if isinstance(cells[0], Framed) else None
        return tag("tr", first, *rest, class_=kind)


_NOTE = "actrec-n"


def _width(cells: Sequence[str], widest: int) -> int:
    if drawn := max((cell.width for cell in cells if isinstance(cell, Drawn)), default=0):
        return max(drawn, NARROWEST) + 3
    length = max(map(len, cells))
    # Letters are narrower than the digit that is the unit "ch" of CSS; 3 are for the padding.
    return min(max(length - length // 12, NARROWEST), widest) + 3


def _indent(depth: int) -> int:
    return 7 + 16 * depth


def _class(column: Column) -> str | None:
    return "actrec-r" if column.is_number else _NOTE if column.is_note else None


def _breakable(name: str) -> Html:
    """Return a name that lines preferably break after dots and underscores."""
    return Html("<wbr>".join(map(escaped, re.split("(?<=[._])", name))))


def _cell(kind: str | None, text: str) -> Html:
    is_marked = text and kind == _NOTE and not isinstance(text, Drawn)
    return tag("td", tag("span", text) if is_marked else _markup(text), class_=kind)


# --- The tree ----------------------------------------------------------------------------------------


def _branch(node: Node, rows: dict[str, Cells], sheet: _Sheet, depth: int) -> Iterator[Html]:
    """Yield the rows of a branch and a fold for each branch in it; the first one is open."""
    is_first = True
    for has_children, group in groupby(node.children.values(), lambda child: bool(child.children)):
        children = list(group)
        if not has_children:
            labelled = [(_label(child), rows[child.prefix]) for child in children]
            yield from sheet.table(labelled, depth)
            continue
        for child in children:
            if child.is_row:
                yield from sheet.table([(_label(child), rows[child.prefix])], depth)
            body = _branch(child, rows, sheet, depth + 1)
            remarks = _remarks(child, rows, sheet)
            yield sheet.fold(f"{_label(child)}.*", body, depth, *remarks, is_open=is_first)
            is_first = False


def _label(node: Node) -> str:
    return shown(node.label)


def _remarks(node: Node, rows: dict[str, Cells], sheet: _Sheet) -> Iterator[Html]:
    """Yield how many rows and notes a fold has."""
    inside = [rows[name] for name in node.names() if name != node.prefix]
    noted = sum(1 for row in inside if any(row[place] for place in sheet.notes))
    yield tag("small", count(len(inside), sheet.names[0]))
    if noted:
        yield tag("small", tag("span", count(noted, "note")), class_=_NOTE)
