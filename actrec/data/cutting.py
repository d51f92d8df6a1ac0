"""Cuts calls that lie side by side into rows: each layer has as many, of one shape and dtype."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actrec.errors import AlignmentError

from .calls import Look
from .columns import Runs
from .positions import MERGED, Reading, has_width, lead, read, readings
from .sources import Held

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .calls import Calls
    from .sources import Shape

__all__ = ["cut"]


def cut(
    call: str,
    layers: Sequence[Calls],
    *,
    flatten: bool,
    masked: bool,
    answers: Tensor | None,
) -> list[Runs]:
    """Cut the calls of some layers, and behind them a mask that is a tensor.

    Args:
        call: The function that was called, for messages.
        layers: The same calls of each.
        flatten: Whether each position is a row, or each sample.
        masked: Whether the last layer is a mask.
        answers: A mask that is a tensor.

    Raises:
        AlignmentError: The layers do not have the same rows, or the mask has others.
    """
    return _Cut(call, layers, flatten=flatten, masked=masked).runs(answers)


class _Cut:
    """Cuts calls by their kinds: what the layers look like beside each other. There are few, however many calls there are."""

    def __init__(self, call: str, layers: Sequence[Calls], *, flatten: bool, masked: bool) -> None:
        self._call = call
        self._layers = layers
        self._flatten = flatten
        self._masked = masked
        kinds: dict[tuple[int, ...], int] = {}
        looks = zip(*(calls.places[:, 0].tolist() for calls in layers), strict=True)
        self._kind_of = [kinds.setdefault(look, len(kinds)) for look in looks]
        #: The layers of each kind, in the order in which the kinds come. Where there are no calls, it is calls without rows.
        self._kinds = [
            [calls.looks[look] for calls, look in zip(layers, kind, strict=True)] for kind in kinds
        ] or [[Look((0,), torch.float32) for _ in layers]]

    def runs(self, answers: Tensor | None) -> list[Runs]:
        """Return the rows of each layer, and of a mask that is a tensor."""
        self._check_dimensions()
        leads = [self._lead(looks) for looks in self._kinds]
        takes = [self._taken(column, leads) for column in range(len(self._layers))]
        found = [self._readings(kind, rows, takes) for kind, rows in enumerate(leads)]
        self._check_alike(found)
        many = self._of_calls([math.prod(rows) for rows in leads])
        runs = []
        for calls, look, readings_of_kinds in zip(
            self._layers, self._kinds[0], zip(*found, strict=True), strict=True
        ):
            repeat = self._of_calls([reading.repeat for reading in readings_of_kinds])
            lines = torch.stack([many, *calls.places[:, 1:].unbind(1), repeat], 1)
            shape = readings_of_kinds[0].shape
            runs.append(Runs(calls.title, shape, look.dtype, calls.sources, lines))
        if answers is not None:
            counts = self._counts(answers, leads, many)
            begin, source = counts.cumsum(0) - counts, torch.zeros_like(counts)
            repeat = (many // counts.clamp(min=1)).clamp(min=1)
            lines = torch.stack([many, source, begin, repeat], 1)
            runs.append(Runs("mask", (), torch.bool, [Held(answers)], lines))
        return runs

    def _of_calls(self, of_kinds: list[int]) -> Tensor:
        """What each call has of what its kind has."""
        found = [of_kinds[kind] for kind in self._kind_of]
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    # --- Positions -------------------------------------------------------------------------------------

    def _lead(self, looks: list[Look]) -> Shape:
        """The dimensions whose positions are the rows."""
        if not self._flatten:
            return looks[0].shape[:1]
        if self._masked:
            return lead(looks[:-1], looks[-1].shape)
        return lead(looks, None)

    def _taken(self, column: int, leads: list[Shape]) -> int:
        """How many dimensions of a layer are positions, in all of its calls; the others make a row."""
        if not self._flatten:
            return 1
        looks = [looks[column] for looks in self._kinds]
        is_mask = self._masked and column == len(self._layers) - 1
        more = len(looks[0].shape) > len(leads[0])
        is_sure = is_mask or more or not has_width(looks[0].dtype)
        pairs = zip((look.shape for look in looks), leads, strict=True)
        found = readings(list(pairs), is_sure=is_sure)
        if not is_sure and len(found) > 1:
            raise self._ambiguous(column, leads[0], found)
        return found[0]

    def _readings(self, kind: int, rows: Shape, takes: list[int]) -> list[Reading]:
        """How each layer is cut, after a look at whether the layers have the same rows."""
        found = []
        for column, (look, taken) in enumerate(zip(self._kinds[kind], takes, strict=True)):
            reading = read(look.shape, rows, taken)
            if reading is None:
                raise self._unequal(column, kind, rows)
            found.append(reading)
        if self._masked and found[-1].shape:
            fix = "." if self._flatten else "; flatten=True makes a row of each position."
            message = (
                f"{self._at(-1, kind)} has shape {self._kinds[kind][-1].shape}, more than one number for each row, "
                f"so it is no mask. The rows are those of {rows}{fix}"
            )
            raise AlignmentError(message)
        return found

    def _counts(self, answers: Tensor, leads: list[Shape], many: Tensor) -> Tensor:
        """How many numbers each call has of a mask that is a tensor: one for each row, or for each sample."""
        samples = self._of_calls([rows[0] for rows in leads])
        total, total_samples = int(many.sum()), int(samples.sum())
        shape, inner = tuple(answers.shape), {rows[1:] for rows in leads}
        if shape == (total,) or (len(inner) == 1 and shape == (total_samples, *inner.pop())):
            return many
        if shape == (total_samples,):
            return samples
        message = (
            f"{self._call}: the mask is a tensor of shape {shape}, and there are {total} rows. It needs one number "
            "for each, in the order of the rows."
        )
        raise AlignmentError(message)

    # --- Errors ----------------------------------------------------------------------------------------

    def _at(self, column: int, kind: int) -> str:
        """The first call of a kind, in a message."""
        first = self._kind_of.index(kind)
        return f"{self._call}: {self._layers[column].at(first)}"

    def _check_dimensions(self) -> None:
        for kind, looks in enumerate(self._kinds):
            for column, look in enumerate(looks):
                if not look.shape:
                    message = (
                        f"{self._at(column, kind)} is a single number, without a dimension to cut rows from. Add values "
                        "of one number for each sample."
                    )
                    raise AlignmentError(message)

    def _check_alike(self, found: list[list[Reading]]) -> None:
        """Check that the rows of a layer are alike."""
        for kind, readings_of_kind in enumerate(found):
            for column, (reading, first) in enumerate(zip(readings_of_kind, found[0], strict=True)):
                if reading.shape != first.shape:
                    fix = "record with a transform"
                    if not self._flatten:
                        fix = f"take a row of each position, flatten=True, or {fix} that pools"
                    message = (
                        f"{self._at(column, kind)} has rows of shape {reading.shape}, and the calls before it rows of shape "
                        f"{first.shape}. Rows of different shapes make no batch: {fix}."
                    )
                    raise AlignmentError(message)
                dtype, before = self._kinds[kind][column].dtype, self._kinds[0][column].dtype
                if dtype != before:
                    message = f"{self._at(column, kind)} is of {dtype}, and the calls before it of {before}. Record with dtype=."
                    raise AlignmentError(message)

    def _ambiguous(self, column: int, rows: Shape, takes: list[int]) -> AlignmentError:
        """The shapes fit two readings, in all calls."""
        look, said = self._kinds[0][column], []
        for taken in takes:
            shape = (read(look.shape, rows, taken) or Reading((), 1)).shape
            what = f"rows of shape {shape}" if shape else "one number for each row"
            whole = rows if taken == MERGED else (*rows[:taken], *[1] * (len(rows) - taken))
            say = f" (to say so, give it the shape {(*whole, *(shape or (1,)))})"
            said.append(what + (say if len(shape) <= 1 else ""))
        message = (
            f"{self._at(column, 0)} has shape {look.shape}, and the rows are those of {rows}. In all calls that fits "
            f"{len(said)} readings: {', or '.join(said)}. Reshape it in a transform, or where it is added."
        )
        return AlignmentError(message)

    def _unequal(self, column: int, kind: int, rows: Shape) -> AlignmentError:
        """The rows of a layer are not those of the others."""
        shape, dtype = self._kinds[kind][column]
        if not self._flatten:
            fix = "Record with a transform that gives every layer one row for each sample."
        elif 1 < len(shape) <= len(rows) and not has_width(dtype):
            ones = (shape[0], *[1] * (len(rows) - 1), *shape[1:])
            fix = (
                "Integers are one number for each position, as token ids are. If they are a row for each sample, to be "
                f"repeated, give it the shape {ones}."
            )
        else:
            fix = "Its first dimensions have to be the same."
        message = (
            f"{self._at(column, kind)} has shape {shape}, and the rows are those of {rows}, as in "
            f"{self._layers[0].title} of shape {self._kinds[kind][0].shape}. {fix}"
        )
        return AlignmentError(message)
