"""Text for people: one line for a layer, a table for a recording. Shapes and types only, never data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._nested import Opaque, Value, tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ._recording import Layer, Recording

__all__ = ["layer_line", "table"]

MOST_ROWS = 60
KILO = 1000
UNITS = ("kB", "MB", "GB", "TB", "PB")


def size(nbytes: int) -> str:
    """``4.9 MB``: powers of 1,000, as disks and torch's own messages about files count.

    >>> size(120), size(4_900_000)
    ('120 B', '4.9 MB')
    """
    if nbytes < KILO:
        return f"{nbytes} B"
    amount, units = nbytes / KILO, iter(UNITS)
    unit = next(units)
    while round(amount, 1) >= KILO and unit != UNITS[-1]:
        amount, unit = amount / KILO, next(units)
    return f"{amount:.1f} {unit}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _shape_of(tensor: Tensor) -> tuple[int | str, ...]:
    # A strided nested tensor has no shape to ask for.
    if tensor.is_nested and tensor.layout is torch.strided:
        return ("nested",)
    return tuple(tensor.shape)


def _ranges(shapes: set[tuple[int | str, ...]]) -> str:
    """One shape for many calls; a dimension that varies shows its range.

    >>> _ranges({(3, 4, 16), (3, 1, 16)})
    '(3, 1-4, 16)'
    """
    if len({len(shape) for shape in shapes}) > 1 or (("nested",) in shapes and len(shapes) > 1):
        return f"{len(shapes)} different shapes"
    columns = [sorted(set(column)) for column in zip(*shapes, strict=True)]
    texts = [str(c[0]) if len(c) == 1 else f"{c[0]}-{c[-1]}" for c in columns]
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def _kind(value: Value) -> str:
    match value:
        case Opaque():
            return value.type.rpartition(".")[2]
        case tuple() | list():
            return f"{type(value).__name__} of {len(value)}"
        case dict():
            return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _shape(values: Sequence[Value]) -> str:
    if not values:
        return ""
    if all(isinstance(value, Tensor) for value in values):
        return _ranges({_shape_of(value) for value in values})
    return " | ".join(dict.fromkeys(_kind(value) for value in values))


def _one_or_more(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _dtype(values: Sequence[Value]) -> str:
    return _one_or_more(
        str(t.dtype).removeprefix("torch.") for value in values for t in tensors(value)
    )


def layer_line(layer: Layer) -> str:
    """Return the one-line ``repr`` of a layer."""
    values = layer.outline()
    facts = [_count(len(layer), "call"), f"{_shape(values)} {_dtype(values)}".strip()]
    facts = [fact for fact in facts if fact]
    return f"Layer {layer.name!r} ({layer.type}): {', '.join(facts)}, {size(layer.nbytes)}"


def table(recording: Recording, title: str) -> str:
    """Return the ``repr`` of a recording: a line about it, and a row for each layer."""
    layers = list(recording.values())
    shown = layers if len(layers) <= MOST_ROWS else [*layers[: MOST_ROWS - 10], *layers[-10:]]
    rows = [("layer", "type", "calls", "shape", "dtype", "memory")]
    for layer in shown:
        values = layer.outline()
        cells = (f"{len(layer):,}", _shape(values), _dtype(values), size(layer.nbytes))
        rows.append((layer.name or "''", layer.type, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_padded(row, widths)).rstrip() for row in rows]
    if len(shown) < len(layers):
        lines.insert(MOST_ROWS - 9, f"... {len(layers) - len(shown):,} more layers ...")
    facts = (
        _count(len(layers), "layer"),
        _count(recording.num_passes, "pass"),
        size(recording.nbytes),
    )
    return "\n".join([f"{title}: {', '.join(facts)}", *lines])


def _padded(row: tuple[str, ...], widths: list[int]) -> Iterable[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if column in {2, 5} else cell.ljust(width)
