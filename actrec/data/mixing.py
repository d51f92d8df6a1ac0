"""Several recordings in one loader: the same columns of each, and the number of rows of each in an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor

from actrec._recordings.layer import Layer
from actrec.errors import AlignmentError, OptionError

from .align import Mask, Table
from .columns import Column
from .kept import Kept
from .origins import together
from .selecting import Selector


class RecordedRows(NamedTuple):
    """The rows of a recording."""

    columns: Sequence[Column]
    kept: Kept | None


def check_for_several(layers: Sequence[Selector], mask: Mask | None) -> None:
    """Check that layers and mask can apply to several recordings."""
    for one in layers:
        layer = one[0] if one and isinstance(one, tuple) else one
        if isinstance(layer, Layer):
            message = f"shuffled([...], {one!r}): a layer object belongs to one recording. Give its name, which each recording has."
            raise OptionError(message)
    if isinstance(mask, Tensor):
        message = "shuffled([...], mask=tensor): a tensor is the mask of one recording. Give the name of a mask that each of them has."
        raise OptionError(message)


def checked_weights(weights: Any, many: int) -> list[Fraction] | None:
    """Return the weights of so many recordings as exact numbers."""
    if weights is None:
        return None
    found = list(weights) if isinstance(weights, (list, tuple)) else []
    is_right = len(found) == many and all(map(_is_weight, found))
    if not is_right:
        message = f"shuffled(weights={weights!r}): expected a number greater than 0 for each of {many} recordings."
        raise OptionError(message)
    return [Fraction(one) for one in found]


def _is_weight(given: object) -> bool:
    return isinstance(given, (int, float)) and given is not True and 0 < given < math.inf


def quotas(rows: Sequence[int], weights: Sequence[Fraction] | None) -> list[int]:
    """Return how many rows of each recording an epoch has: all, or, by weight, as many as possible without repeating any.

    >>> quotas([30, 100], None), quotas([30, 100], [Fraction(1), Fraction(2)])
    ([30, 100], [30, 60])

    Raises:
        OptionError: there are weights, and a recording has no rows.
    """
    if weights is None:
        return [*rows]
    if 0 in rows:
        message = f"shuffled(weights=...): recording {rows.index(0)} has no rows, so no mixture has its share of it."
        raise OptionError(message)
    scale = min(Fraction(many) / weight for many, weight in zip(rows, weights, strict=True))
    return [int(weight * scale) for weight in weights]


def parts(tables: Sequence[Table], kept: Sequence[Kept | None]) -> list[RecordedRows]:
    """Return the rows of each recording.

    Raises:
        AlignmentError: the rows of a layer differ in shape or dtype.
    """
    for number, table in enumerate(tables):
        for one, first in zip(table.columns, tables[0].columns, strict=True):
            if (one.shape, one.dtype) != (first.shape, first.dtype):
                message = (
                    f"shuffled: {first.name} has rows of shape {first.shape} and {first.dtype} in recording 0, and of shape "
                    f"{one.shape} and {one.dtype} in recording {number}. Rows that differ cannot be batched: record "
                    "with a transform, or with dtype=."
                )
                raise AlignmentError(message)
    columns = zip(
        *(together(column) for column in zip(*(t.columns for t in tables), strict=True)),
        strict=True,
    )
    return [RecordedRows(own, mask) for own, mask in zip(columns, kept, strict=True)]
