"""Which dimensions of a layer are positions, each of them a row, and which of them make a row. Shapes alone, no data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Final, NamedTuple

import torch

from .calls import Look
from .sources import Shape

#: Reads a layer whose first dimension is all positions, as mixtures of experts have it: ``(batch * tokens, experts)``.
MERGED: Final = 0


class Reading(NamedTuple):
    """How the rows of a call are cut."""

    shape: Shape  #: of a row
    repeat: int  #: so many rows of the dataset are one row of the call


def has_width(dtype: torch.dtype) -> bool:
    """Whether the last dimension of a tensor may be a vector: integers are ids or answers, each a number of its own."""
    return dtype.is_floating_point or dtype.is_complex


def lead(layers: Sequence[Look]) -> Shape:
    """Return the dimensions whose positions are the rows: those of the layer that has most."""
    found = [positions(*layer) for layer in layers]
    most = max(map(len, found))
    sizes = zip(*(shape for shape in found if len(shape) == most), strict=True)
    return tuple(next((size for size in column if size != 1), 1) for column in sizes)


def positions(shape: Shape, dtype: torch.dtype) -> Shape:
    """Return the dimensions of a layer that are positions if it is flattened."""
    alone = len(shape) == 1 or (len(shape) == 2 and not has_width(dtype))  # noqa: PLR2004
    return shape if alone else shape[:-1]


def read(shape: Shape, rows: Shape, taken: int) -> Reading | None:
    """Read a call, where the rows are those of the positions ``rows``, and its first ``taken`` dimensions are positions.

    ``None`` if they are not. In a tensor that has all dimensions of the positions and one more, a dimension of size 1
    stands for all its positions, where those after it do so too.
    """
    if taken == MERGED:
        return Reading(shape[1:], 1) if shape[0] == math.prod(rows) else None
    front = shape[:taken]
    if front == rows[:taken]:
        return Reading(shape[taken:], max(1, math.prod(rows[taken:])))
    pairs = zip(front, rows, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if not same or taken != len(rows) or len(shape) <= taken or set(front[same:]) != {1}:
        return None
    return Reading(shape[taken:], max(1, math.prod(rows[same:])))


def readings(calls: Sequence[tuple[Shape, Shape]], *, is_sure: bool) -> list[int]:
    """Return the ways to read a layer that fit all of its calls and differ, the most likely first.

    Args:
        calls: The shape of each call, and the positions that are the rows beside it.
        is_sure: Whether as many dimensions are positions as there are, so that fewer are not tried.

    Returns:
        How many dimensions are positions. Where no way fits, the one that goes furthest: where it ends, the error is.
    """
    dims, positions = len(calls[0][0]), len(calls[0][1])
    choices = [min(dims, positions), *([] if is_sure else range(dims - 1, 0, -1)), MERGED]
    found = {taken: [read(*pair, taken) for pair in calls] for taken in choices}
    fitting = {taken: reads for taken, reads in found.items() if None not in reads}
    if not fitting:
        return [max(choices, key=lambda taken: found[taken].index(None))]
    one_shape = {
        t: reads for t, reads in fitting.items() if len({r and r.shape for r in reads}) == 1
    }
    rows = [number for number, (_, rows) in enumerate(calls) if math.prod(rows)]
    ways: dict[object, int] = {}
    for taken, reads in (one_shape or fitting).items():
        ways.setdefault(tuple(reads[number] for number in rows), taken)
    return [*ways.values()]
