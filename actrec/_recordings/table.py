"""The table of a recording: a row for each layer. It shows shapes and types, never data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from actrec._tables.table import Cells, Column, Table
from actrec._text import count, shown, size

from .layer import Layer
from .look import Together
from .run import State

_WORDS: Final = {"inputs": "inputs", "grads": "gradients"}

_COLUMNS: Final = (
    Column("layer"),
    Column("type"),
    Column("calls", is_number=True),
    Column("shape"),
    Column("dtype"),
    Column("device", usual=("", "cpu")),
    Column("memory", is_number=True),
    Column("note", is_note=True, usual=("",)),
)


def recording_table(
    title: str,
    layers: Sequence[Layer[Any]],
    state: State,
    *,
    passes: int,
    raised: int,
    beside: Mapping[str, Sequence[Layer[Any]]],
    together: Together,
    units: int = 0,
) -> Table:
    """Return the table of a recording, after one look at each call.

    Args:
        title: what was recorded.
        layers: one for each row.
        state: whether the block is running.
        passes: how many there were.
        raised: how many of them raised.
        beside: the layers of inputs and of gradients, if they were recorded. Those whose outputs were not recorded have
            rows of their own.
        together: adds up the memory of all layers.
        units: how many of the passes are units that have ended.
    """
    rows: list[Cells] = []
    names: list[str] = []  # of the rows
    places: list[Mapping[object, int]] = []
    outputs = {layer.name for layer in layers}
    for what, those in {"": layers, **beside}.items():
        for layer in those:
            looks, held = layer._seen()
            places.append(held)
            if what and layer.name in outputs:
                continue
            notes = (_WORDS.get(what, ""), *_notes(layer, state, passes - 1))
            names.append(layer.name)
            rows.append(
                (
                    shown(layer.name),
                    shown(layer.type),
                    f"{len(layer):,}",
                    looks.what,
                    ", ".join(looks.dtypes),
                    ", ".join(looks.devices),
                    size(sum(held.values())),
                    ", ".join(filter(None, notes)),
                )
            )
    words = " and ".join(_WORDS[what] for what in beside)
    facts = (
        count(len(set(names)), "layer"),
        count(passes, "pass") + (f" ({raised:,} raised)" if raised else ""),
        *[count(units, "unit")] * bool(units),
        size(together.nbytes(places)) + (f" with {words}" if words else ""),
    )
    return Table(f"{title}: {', '.join(facts)}", _COLUMNS, rows, names)


def _notes(layer: Layer[Any], state: State, last_pass: int) -> Iterator[str]:
    """Yield notes about the layer."""
    if not len(layer):
        yield "no call yet" if state == "recording" else "never called"
        return
    if state == "interrupted" and last_pass not in layer.passes:
        yield "not in the last pass"
    if layer.overflows is not None and (many := sum(layer.overflows.counts().values())):
        dtype = str(layer.overflows.dtype).removeprefix("torch.")
        yield f"{count(many, 'value')} too large for {dtype}"
    most, passes = layer._per_pass()
    if most > 1:
        yield f"{'' if most * passes == len(layer) else 'up to '}{most:,} per pass"
    if not layer.is_kept:
        yield "reduced"
    if layer._transform is not None:
        yield f"transform {shown(layer._transform.rpartition('.')[2])}"
