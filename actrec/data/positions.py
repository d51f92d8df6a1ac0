"""Which dimensions of a layer are positions, each of which is a row, and which are the row itself. Only shapes, no data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Final, NamedTuple

import torch

from .calls import Look
from .sources import Shape

#: A way to read a layer: its first dimension has all positions, as in mixtures of experts: ``(batch * tokens, experts)``.
MERGED: Final = 0


class Reading(NamedTuple):
    """How the rows of a call are cut."""

    shape: Shape  #: of a row
    repeat: int  #: how many rows of the dataset share one row of the call


def has_width(dtype: torch.dtype) -> bool:
    """Whether the last dimension of a tensor may be a vector. Integers are ids or masks: separate numbers."""
    return dtype.is_floating_point or dtype.is_complex


def lead(layers: Sequence[Look]) -> Shape:
    """Return the dimensions whose positions are the rows: those of the layer with the most."""
    found = [positions(*layer) for layer in layers]
    most = max(map(len, found))
    sizes = zip(*(shape for shape in found if len(shape) == most), strict=True)
    return tuple(next((size for size in column if size != 1), 1) for column in sizes)


def positions(shape: Shape, dtype: torch.dtype) -> Shape:
    """Return the dimensions of a layer that are positions if it is flattened."""
    alone = len(shape) == 1 or (len(shape) == 2 and not has_width(dtype))  # noqa: PLR2004
    return shape if alone else shape[:-1]


def read(shape: Shape, rows: Shape, taken: int) -> Reading | None:
    """Return how a call is cut into rows, if its first ``taken`` dimensions are positions, and the rows have positions ``rows``.

    ``None`` if it cannot be. In a tensor that has all dimensions of the positions and one more, a dimension of size 1
    is repeated for all its positions, if those after it are too.
    """
    if taken == MERGED:
        return Reading(shape[1:], 1) if shape[0] == math.prod(rows) else None
    front = shape[:taken]
    pairs = zip(front, rows, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    is_repeated = same and taken == len(rows) < len(shape) and set(front[same:]) == {1}
    if front != rows[:taken] and not is_repeated:
        return None
    return Reading(shape[taken:], max(1, math.prod(rows[same:])))


def readings(calls: Sequence[tuple[Shape, Shape]], *, is_sure: bool) -> list[int]:
    """Return the ways to read a layer that fit all of its calls and differ, the most likely first.

    A call is its shape, and the positions that are its rows; a way is how many dimensions are positions, which are as many as
    possible if that ``is_sure``. If no way fits, the one that fits the most calls is returned, for the error.
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
