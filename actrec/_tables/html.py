"""The same tables for notebooks. Text is the truth, HTML its decoration.

What is made here needs nothing else: no script, no image, no file, one small style sheet. It takes its
colours from where it stands (text inherits, lines and shades are grey with transparency), so it follows
light and dark themes without knowing which one is on. Where a page takes HTML or styles away, the plain
text is left: it comes first, and only the style sheet puts the table in its place.

Everything that comes from a model or a user goes through :func:`html.escape`.
"""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from actrec._text import count, shown

from . import text as _display
from .text import Row
from .tree import Node, tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from actrec._recordings.recording import Layer, Recording

__all__ = ["layer_html", "recording_html", "rows_html"]

#: Up to so many layers a table is flat.
MOST_FLAT = 20
#: A branch with fewer layers is written out in its parent.
SMALLEST_BRANCH = 6
#: How many rows are visible before anything is unfolded, about.
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


def page(text: str, title: str, body: str) -> str:
    """Put a table and the text that it decorates together."""
    return (
        f'<div class="actrec"><style>{STYLE}</style><pre class="actrec-text">{escape(text)}</pre>'
        f'<div class="actrec-table" style="display:none"><div class="actrec-title">{escape(title)}</div>'
        f"{body}</div></div>"
    )


def layer_html(layer: Layer) -> str:
    """Return the one line about a layer."""
    return f'<pre style="white-space:pre-wrap;margin:0">{escape(_display.layer_line(layer))}</pre>'


def recording_html(recording: Recording) -> str:
    """Return the table of a recording: flat if it is small, else a tree that folds."""
    found = _display.summary(recording)
    rows = dict(zip(recording, found.rows, strict=True))
    noted = any(row.note for row in rows.values())
    columns = Row._fields if noted else Row._fields[:-1]
    sheet = Sheet(columns, list(rows.values()))
    if len(rows) <= MOST_FLAT:
        body = sheet.table([(row.layer, row) for row in rows.values()])
    else:
        body = "".join(_branch(tree(rows, SMALLEST_BRANCH), rows, sheet, 0))
    return page(_display.table(recording, found), found.title, sheet.framed(body))


def rows_html(
    text: str, title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> str:
    """Return a table of rows, the first cell of which is a name."""
    sheet = Sheet(columns, rows)
    return page(text, title, sheet.framed(sheet.table([(row[0], row) for row in rows])))


class Sheet:
    """Many small tables that look like one: folds cannot stand between the rows of a table."""

    def __init__(self, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
        self.columns = columns
        cells = [columns, *rows]
        longest = [max(len(row[place]) for row in cells) for place in range(len(columns))]
        self.widths = [
            _width(length, WIDEST if place else WIDEST_NAME) for place, length in enumerate(longest)
        ]
        if columns[-1] == "note":
            self.widths[-1] += 3  # it is bold, with a shade around it
        self.classes = [_class(column) for column in columns]
        self.open_rows = 0  # visible so far

    def framed(self, body: str) -> str:
        """Put the head above, and limit how wide and how narrow all of it can be."""
        cells = "".join(
            f"<th{kind}>{column}</th>"
            for kind, column in zip(self.classes, self.columns, strict=True)
        )
        head = f"<table>{self._widths()}<thead><tr>{cells}</tr></thead></table>"
        narrowest = sum(self.widths[1:]) + min(self.widths[0], NARROWEST_NAME)
        return f'<div style="max-width:{sum(self.widths)}ch;min-width:{narrowest}ch">{head}{body}</div>'

    def table(self, rows: Sequence[tuple[str, tuple[str, ...]]], depth: int = 0) -> str:
        """Return rows, each with its label; of very many only the first are open."""
        if not rows:
            return ""
        body = "".join(self._row(label, cells, depth) for label, cells in rows[:MOST_OPEN])
        table = f"<table>{self._widths()}<tbody>{body}</tbody></table>"
        rest = rows[MOST_OPEN:]
        if not rest:
            return table
        return table + self.fold(f"{len(rest):,} more", "", self.table(rest, depth), depth)

    def fold(self, label: str, remark: str, body: str, depth: int, *, is_open: bool = False) -> str:
        """Return what is visible as one line until it is unfolded."""
        return (
            f"<details{' open' if is_open else ''}>"
            f'<summary style="padding-left:{_indent(depth)}px">{label}{remark}</summary>{body}</details>'
        )

    def _row(self, label: str, cells: tuple[str, ...], depth: int) -> str:
        indent = f' style="padding-left:{_indent(depth)}px"' if depth else ""
        first = f'<td{indent} title="{escape(cells[0])}">{_breakable(label)}</td>'
        rest = zip(self.classes[1:], cells[1 : len(self.columns)], strict=True)
        return f"<tr>{first}{''.join(_cell(kind, cell) for kind, cell in rest)}</tr>"

    def _widths(self) -> str:
        columns = "".join(f'<col style="width:{width}ch">' for width in self.widths[1:])
        return f"<colgroup><col>{columns}</colgroup>"


_NOTE = ' class="actrec-n"'


def _width(length: int, widest: int) -> int:
    # Letters are narrower than the digit that CSS measures with; 3 are for the padding.
    return min(max(length - length // 12, NARROWEST), widest) + 3


def _indent(depth: int) -> int:
    return 7 + 16 * depth


def _class(column: str) -> str:
    if column in _display.RIGHT:
        return ' class="actrec-r"'
    return _NOTE if column == "note" else ""


def _breakable(name: str) -> str:
    """A name that is broken behind its dots and underscores, before it is broken anywhere else."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _cell(kind: str, text: str) -> str:
    text = escape(text)
    return f"<td{kind}>{f'<span>{text}</span>' if text and kind == _NOTE else text}</td>"


# --- The tree ----------------------------------------------------------------------------------------


def _branch(node: Node, rows: dict[str, Row], sheet: Sheet, depth: int) -> Iterator[str]:
    """The rows of a branch and its folds. Of branches that are alike, the first is open."""
    met: list[object] = []
    for has_children, group in groupby(node.children.values(), lambda child: bool(child.children)):
        children = list(group)
        own = [(_label(child), rows[child.prefix]) for child in children if child.is_layer]
        if not has_children:
            sheet.open_rows += min(len(own), MOST_OPEN)
            yield sheet.table(own, depth)
            continue
        for child in children:
            if child.is_layer:
                yield sheet.table([(_label(child), rows[child.prefix])], depth)
            kinds = _kinds(child, rows)
            is_open = kinds not in met and sheet.open_rows < MOST_OPEN
            met.append(kinds)
            body = "".join(_branch(child, rows, sheet, depth + 1))
            yield sheet.fold(
                escape(f"{_label(child)}.*"), _remark(child, rows), body, depth, is_open=is_open
            )


def _label(node: Node) -> str:
    return shown(node.label)


def _kinds(node: Node, rows: dict[str, Row]) -> object:
    """What branches have in common that repeat one another, if with other sizes."""
    return [(name[len(node.prefix) :], rows[name].type) for name in node.names()]


def _remark(node: Node, rows: dict[str, Row]) -> str:
    """How much is in a fold, and whether something in there needs attention."""
    inside = [rows[name] for name in node.names() if name != node.prefix]
    noted = sum(1 for row in inside if row.note)
    remark = f"<small>{count(len(inside), 'layer')}</small>"
    return remark + (
        f'<small class="actrec-n"><span>{count(noted, "note")}</span></small>' if noted else ""
    )
