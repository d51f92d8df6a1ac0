"""Text for people: one line for a layer, a table for a recording. Shapes and types only, never data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from actrec._text import count, shown, size

from .tree import Node, tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from actrec._recordings.recording import Layer, Recording
    from actrec._values.summary import Summary as Looks

__all__ = [
    "Row",
    "State",
    "Summary",
    "layer_line",
    "summary",
    "table",
    "text_table",
]

#: Whether the block runs, has ended, or was ended by an exception.
State: TypeAlias = Literal["recording", "recorded", "interrupted"]

MOST_ROWS = 60


def shown_shape(looks: Looks) -> str:
    """The shapes of the calls; or what they are, if they are no tensors."""
    if any(looks.kinds):
        return " | ".join(shown(kind or "Tensor") for kind in looks.kinds)
    return looks.shape


def layer_line(layer: Layer) -> str:
    """Return the one-line ``repr`` of a layer."""
    looks, held = layer._seen()
    facts = [count(len(layer), "call"), f"{shown_shape(looks)} {', '.join(looks.dtypes)}".strip()]
    facts = [fact for fact in facts if fact]
    return f"Layer {layer.name!r} ({shown(layer.type)}): {', '.join(facts)}, {size(_nbytes(held))}"


def _nbytes(held: Mapping[object, int] | int) -> int:
    return held if isinstance(held, int) else sum(held.values())


# --- A recording -------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a table says about one layer."""

    layer: str
    type: str
    calls: str
    shape: str
    dtype: str
    device: str
    memory: str
    note: str


#: Columns of numbers.
RIGHT: Final = frozenset(
    {
        "calls",
        "count",
        "memory",
        "mean",
        "std",
        "min",
        "max",
        "zeros",
        "nan",
        "inf",
        "max abs",
        "max rel",
        "cosine",
    }
)


class Summary(NamedTuple):
    """What a table says about a recording."""

    title: str  #: what was recorded, whether it is whole, and how much it is
    rows: list[Row]


def summary(recording: Recording) -> Summary:
    """Return what a table says, after one look at each call."""
    last = recording.num_passes - 1
    state = recording._state()
    rows: list[Row] = []
    places: dict[object, int] = {}
    is_complete = True
    for layer in recording.values():
        looks, held = layer._seen()
        rows.append(_row(layer, looks, _nbytes(held), _note(layer, state, last)))
        if isinstance(held, int):
            is_complete = False
        else:
            places.update(held)
    failed = recording.failed_passes
    more = {"inputs": recording._inputs, "gradients": recording._grads}
    beside = " and ".join(name for name, one in more.items() if one is not None)
    for one in more.values() if is_complete else ():
        for layer in (one or {}).values():
            places.update(layer._places())
    facts = (
        count(len(rows), "layer"),
        count(last + 1, "pass") + (f" ({len(failed):,} raised)" if failed else ""),
        size(_nbytes(places) if is_complete else recording.nbytes)
        + (f" with {beside}" if beside else ""),
    )
    return Summary(f"{recording._title()}: {', '.join(facts)}", rows)


def _row(layer: Layer, looks: Looks, nbytes: int, note: str) -> Row:
    return Row(
        shown(layer.name),
        shown(layer.type),
        f"{len(layer):,}",
        shown_shape(looks),
        ", ".join(looks.dtypes),
        ", ".join(looks.devices),
        size(nbytes),
        note,
    )


def _note(layer: Layer, state: State, last_pass: int) -> str:
    """What needs attention, if anything does."""
    if not len(layer):
        return "no call yet" if state == "recording" else "never called"
    if state == "interrupted" and last_pass not in layer.passes:
        return "not in the last pass"
    if layer.overflows is not None and (many := sum(layer.overflows.counts().values())):
        return f"{count(many, 'value')} too large for {str(layer.overflows.dtype).removeprefix('torch.')}"
    most, passes = layer._per_pass()
    if most > 1:
        return f"{'' if most * passes == len(layer) else 'up to '}{most:,} per pass"
    return ""


def table(recording: Recording, found: Summary | None = None) -> str:
    """Return the ``repr`` of a recording: a line about it, and a row for each layer.

    The note column is there if something needs attention, the device column if not all is on the CPU.
    Of many layers, blocks that are alike are shown once; of more still, the first and the last.
    """
    title, all_rows = found or summary(recording)
    hidden = {
        *(() if any(row.note for row in all_rows) else ("note",)),
        *(() if any(row.device not in {"", "cpu"} for row in all_rows) else ("device",)),
    }
    columns = [name for name in Row._fields if name not in hidden]
    lines: list[tuple[str, ...] | str] = [
        line.text if isinstance(line, _Fold) else tuple(getattr(line, name) for name in columns)
        for line in _folded(list(recording), all_rows)
    ]
    return "\n".join([title, *text_table(columns, lines)])


def text_table(columns: Sequence[str], lines: Iterable[tuple[str, ...] | str]) -> list[str]:
    """Align cells under ``columns``; a line that is a string stands for itself."""
    lines = list(lines)
    cells = [tuple(columns), *(line for line in lines if not isinstance(line, str))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [name in RIGHT for name in columns]
    return [
        line if isinstance(line, str) else _aligned(line, widths, right)
        for line in [tuple(columns), *lines]
    ]


def _aligned(cells: tuple[str, ...], widths: list[int], right: list[bool]) -> str:
    places = zip(cells, widths, right, strict=True)
    return "  ".join(c.rjust(w) if to_right else c.ljust(w) for c, w, to_right in places).rstrip()


# --- Many layers -------------------------------------------------------------------------------------


class _Fold(NamedTuple):
    """Stands for rows that are not shown."""

    layers: int
    text: str


def _folded(names: list[str], all_rows: list[Row]) -> list[Row | _Fold]:
    """The rows to show, and what stands for the others."""
    if len(all_rows) <= MOST_ROWS:
        return [*all_rows]
    lines = list(_branch(tree(names), dict(zip(names, all_rows, strict=True))))
    if len(lines) <= MOST_ROWS:
        return lines
    cut = slice(MOST_ROWS - 10, -10)
    skipped = sum(line.layers if isinstance(line, _Fold) else 1 for line in lines[cut])
    lines[cut] = [_Fold(skipped, f"... {skipped:,} more layers ...")]
    return lines


def _branch(node: Node, by_name: dict[str, Row]) -> Iterator[Row | _Fold]:
    """The rows of a branch; of neighbours that are alike only the first."""
    if node.is_layer:
        yield by_name[node.prefix]
    alike: list[Node] = []
    before: object = None
    for child in node.children.values():
        signature = _signature(child, by_name) if child.children else None
        if signature is not None and signature == before:
            alike.append(child)
            continue
        yield from _as_before(alike)
        alike, before = [], signature
        yield from _branch(child, by_name)
    yield from _as_before(alike)


def _signature(node: Node, by_name: dict[str, Row]) -> object:
    """What two branches have in common that differ in nothing but their names."""
    return [(name[len(node.prefix) :], by_name[name][1:]) for name in node.names()]


def _as_before(alike: list[Node]) -> Iterator[_Fold]:
    if alike:
        layers = sum(1 for node in alike for _ in node.names())
        which = shown(alike[0].prefix) + (f" to {shown(alike[-1].prefix)}" if alike[1:] else "")
        yield _Fold(
            layers, f"... {which}: {count(layers, 'more layer')}, as in the block before ..."
        )
