"""Tables as HTML, for notebooks.

The HTML is self-contained: no script, no image, no file, one small style sheet. Text inherits its colour, lines and shades
are transparent grey, so it fits light and dark themes. The plain text comes first and is hidden by the style sheet alone:
where a page strips HTML or styles, it is shown.

Everything that comes from a model or a user is escaped with :func:`html.escape`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from actrec._text import count, shown

from .drawn import STYLE as DRAWN
from .drawn import Drawn, Framed
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


def as_html(table: Table) -> str:
    """Return a table: flat if it is small or its rows have no names, else a tree that folds."""
    return (
        f'<div class="actrec"><style>{STYLE}{_drawn(table)}</style><pre class="actrec-text">{escape(as_text(table))}</pre>'
        f'<div class="actrec-table" style="display:none"><div class="actrec-title">{escape(table.title)} {_markup(table.verdict)}</div>'
        f"{_body(table.without_usual())}</div></div>"
    )


def _drawn(table: Table) -> str:
    """The style of drawn cells, where there are any."""
    cells = (table.verdict, *(cell for row in table.rows for cell in row))
    return DRAWN if any(isinstance(cell, (Drawn, Framed)) for cell in cells) else ""


def _markup(text: str) -> str:
    return text.html if isinstance(text, Drawn) else escape(text)


def _body(table: Table) -> str:
    sheet = _Sheet(table.columns, table.rows)
    if table.kinds:
        return sheet.framed("".join(_runs(table, sheet)))
    if len(table.rows) <= MOST_FLAT or not table.names:
        return sheet.framed(sheet.table([(row[0], row) for row in table.rows]))
    rows = dict(zip(table.names, table.rows, strict=True))
    return sheet.framed("".join(_branch(tree(rows, SMALLEST_BRANCH), rows, sheet, 0)))


def _runs(table: Table, sheet: _Sheet) -> Iterator[str]:
    """Yield the rows, of which long runs of one kind are folded."""
    for text, rows in table.runs():
        labelled = [(row[0], row) for row in rows]
        yield (
            sheet.fold(escape(text), "", sheet.table(labelled, 1), 0)
            if text
            else sheet.table(labelled)
        )


class _Sheet:
    """Makes many small tables with the same columns, since a fold cannot be inside a table."""

    def __init__(self, columns: Sequence[Column], rows: Sequence[Cells]) -> None:
        self.names = [column.name for column in columns]
        cells = [self.names, *rows]
        self.widths = [
            _width(column, WIDEST if place else WIDEST_NAME) + 3 * columns[place].is_note
            for place, column in enumerate(zip(*cells, strict=True))
        ]
        self.notes = [place for place, column in enumerate(columns) if column.is_note]
        self.classes = [_class(column) for column in columns]

    def framed(self, body: str) -> str:
        """Return the head and a body, with a largest and a smallest width."""
        cells = "".join(
            f"<th{kind}>{column}</th>"
            for kind, column in zip(self.classes, self.names, strict=True)
        )
        head = f"<table>{self._widths()}<thead><tr>{cells}</tr></thead></table>"
        narrowest = sum(self.widths[1:]) + min(self.widths[0], NARROWEST_NAME)
        return f'<div style="max-width:{sum(self.widths)}ch;min-width:{narrowest}ch">{head}{body}</div>'

    def table(self, rows: Sequence[tuple[str, Cells]], depth: int = 0) -> str:
        """Return rows, each with its label; those after the first ``MOST_OPEN`` are folded."""
        if not rows:
            return ""
        body = "".join(self._row(label, cells, depth) for label, cells in rows[:MOST_OPEN])
        table = f"<table>{self._widths()}<tbody>{body}</tbody></table>"
        rest = rows[MOST_OPEN:]
        if not rest:
            return table
        return table + self.fold(f"{len(rest):,} more", "", self.table(rest, depth), depth)

    def fold(self, label: str, remark: str, body: str, depth: int, *, is_open: bool = False) -> str:
        """Return a fold: one line, until it is unfolded."""
        return (
            f"<details{' open' if is_open else ''}>"
            f'<summary style="padding-left:{_indent(depth)}px">{label}{remark}</summary>{body}</details>'
        )

    def _row(self, label: str, cells: Cells, depth: int) -> str:
        indent = f' style="padding-left:{_indent(depth)}px"' if depth else ""
        first = f'<td{indent} title="{escape(cells[0])}">{_breakable(label)}</td>'
        rest = zip(self.classes[1:], cells[1:], strict=True)
        frame = ' class="actrec-first"' if isinstance(cells[0], Framed) else ""
        return f"<tr{frame}>{first}{''.join(_cell(kind, cell) for kind, cell in rest)}</tr>"

    def _widths(self) -> str:
        columns = "".join(f'<col style="width:{width}ch">' for width in self.widths[1:])
        return f"<colgroup><col>{columns}</colgroup>"


_NOTE = ' class="actrec-n"'


def _width(cells: Sequence[str], widest: int) -> int:
    if drawn := max((cell.width for cell in cells if isinstance(cell, Drawn)), default=0):
        return max(drawn, NARROWEST) + 3
    length = max(map(len, cells))
    # Letters are narrower than the digit that is the unit "ch" of CSS; 3 are for the padding.
    return min(max(length - length // 12, NARROWEST), widest) + 3


def _indent(depth: int) -> int:
    return 7 + 16 * depth


def _class(column: Column) -> str:
    if column.is_number:
        return ' class="actrec-r"'
    return _NOTE if column.is_note else ""


def _breakable(name: str) -> str:
    """Return a name that lines preferably break after dots and underscores."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _cell(kind: str, text: str) -> str:
    plain = not isinstance(text, Drawn)
    text = _markup(text)
    return f"<td{kind}>{f'<span>{text}</span>' if text and plain and kind == _NOTE else text}</td>"


# --- The tree ----------------------------------------------------------------------------------------


def _branch(node: Node, rows: dict[str, Cells], sheet: _Sheet, depth: int) -> Iterator[str]:
    """Yield the rows of a branch and a fold for each branch in it, of which the first is open."""
    is_first = True
    for has_children, group in groupby(node.children.values(), lambda child: bool(child.children)):
        children = list(group)
        if not has_children:
            yield sheet.table([(_label(child), rows[child.prefix]) for child in children], depth)
            continue
        for child in children:
            if child.is_row:
                yield sheet.table([(_label(child), rows[child.prefix])], depth)
            label = escape(f"{_label(child)}.*")
            body = "".join(_branch(child, rows, sheet, depth + 1))
            yield sheet.fold(label, _remark(child, rows, sheet), body, depth, is_open=is_first)
            is_first = False


def _label(node: Node) -> str:
    return shown(node.label)


def _remark(node: Node, rows: dict[str, Cells], sheet: _Sheet) -> str:
    """Return how many rows and notes a fold has."""
    inside = [rows[name] for name in node.names() if name != node.prefix]
    noted = sum(1 for row in inside if any(row[place] for place in sheet.notes))
    remark = f"<small>{count(len(inside), sheet.names[0])}</small>"
    return remark + (
        f'<small class="actrec-n"><span>{count(noted, "note")}</span></small>' if noted else ""
    )
