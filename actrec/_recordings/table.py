"""The table of a recording: a row for each layer. It shows shapes and types, never data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from actrec._tables.table import Cells, Column, Table
from actrec._text import count, shown, size
from actrec._values.shapes import dtype_name

from .layer import Layer
from .look import Together
from .run import Run

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
    title: str, run: Run, layers: Mapping[str, Sequence[Layer[Any]]], together: Together
) -> Table:
    """Return the table of a recording, after one look at each call.

    Args:
        title: what was recorded.
        run: its passes and units.
        layers: the layers by what their values are, outputs first. Those of inputs and gradients have rows of their own if
            their outputs were not recorded.
        together: adds up the memory of all layers.
    """
    rows: list[Cells] = []
    names: list[str] = []  # of the rows
    places: list[Mapping[object, int]] = []
    first, *beside = layers
    outputs = {layer.name for layer in layers[first]}
    for role, those in layers.items():
        for layer in those:
            looks, held = layer._seen()
            places.append(held)
            if role != first and layer.name in outputs:
                continue
            notes = (role if role != first else "", *_notes(layer, run))
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
    raised, units = len(run.failed()), len(run.units)
    facts = (
        count(len(set(names)), "layer"),
        count(run.passes.count, "pass") + (f" ({raised:,} raised)" if raised else ""),
        *[count(units, "unit")] * bool(units),
        size(together.nbytes(places)) + (f" with {' and '.join(beside)}" if beside else ""),
    )
    return Table(f"{title}: {', '.join(facts)}", _COLUMNS, rows, names)


def _notes(layer: Layer[Any], run: Run) -> Iterator[str]:
    """Yield notes about the layer."""
    if not len(layer):
        yield "no call yet" if run.state() == "recording" else "never called"
        return
    if run.state() == "interrupted" and run.passes.count - 1 not in layer.passes:
        yield "not in the last pass"
    if layer._overflows is not None and (many := sum(layer._overflows.counts().values())):
        dtype = dtype_name(layer._overflows.dtype)
        yield f"{count(many, 'value')} too large for {dtype}"
    most, passes = layer._per_pass()
    if most > 1:
        yield f"{'' if most * passes == len(layer) else 'up to '}{most:,} per pass"
    if not layer._is_kept:
        yield "reduced"
    if layer._transform is not None:
        yield f"transform {shown(layer._transform.rpartition('.')[2])}"
