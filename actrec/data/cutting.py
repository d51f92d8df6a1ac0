"""Cuts calls that lie side by side into rows: each layer has as many, of one shape and dtype."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actrec.errors import AlignmentError

from .columns import Column
from .positions import MERGED, Reading, Readings, has_width, lead, read
from .sources import Held

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .calls import Stretch
    from .picking import Pick
    from .sources import Shape, Source

__all__ = ["Cut"]


class Cut:
    """Cuts stretches into rows.

    Args:
        call: the function that was called, for messages.
        picks: the layers; the last one may be a mask.
        flatten: whether each position is a row, or each sample.
        masked: whether the last one is a mask.
        answers: a mask that is a tensor.
    """

    def __init__(
        self,
        call: str,
        picks: Sequence[Pick],
        *,
        flatten: bool,
        masked: bool,
        answers: Tensor | None,
    ) -> None:
        self._call = call
        self._answers = answers
        self._picks = picks
        self._flatten = flatten
        self._masked = masked
        self._shapes: list[Shape] = [()] * len(picks)
        self._dtypes: list[torch.dtype] = [torch.float32] * len(picks)
        self._sources: list[list[Source]] = [[] for _ in picks]

    def runs(self, aligned: Sequence[tuple[Stretch, ...]]) -> list[Tensor]:
        """Return for each layer its runs, as lines of a tensor, and behind them those of a mask that is a tensor."""
        starts = list(accumulate((stretches[0].calls for stretches in aligned), initial=0))
        for stretches, start in zip(aligned, starts, strict=False):
            self._check_dimensions(stretches, start)
        leads = [self._lead(stretches) for stretches in aligned]
        columns = zip(*aligned, strict=True)
        takes = [self._taken(number, column, leads) for number, column in enumerate(columns)]
        numbers: list[dict[int, int]] = [{} for _ in self._picks]
        lines: list[list[tuple[int, int, int, int]]] = [[] for _ in self._picks]
        for stretches, rows, start in zip(aligned, leads, starts, strict=False):
            readings = self._readings(stretches, rows, takes, start)
            many = math.prod(rows) * stretches[0].calls
            for column, (stretch, reading) in enumerate(zip(stretches, readings, strict=True)):
                number = self._number(column, numbers[column], stretch.source)
                lines[column].append((many, number, stretch.offset, reading.repeat))
        if self._answers is not None:
            lines.append(self._answered(self._answers, aligned, leads))
        return [
            torch.tensor(column, dtype=torch.int64, device="cpu").view(-1, 4) for column in lines
        ]

    def columns(self, runs: list[Tensor]) -> list[Column]:
        """Return the columns of these runs."""
        parts = zip(self._picks, self._dtypes, self._shapes, self._sources, runs, strict=False)
        found = [
            Column(pick.title, dtype, shape, sources, lines)
            for pick, dtype, shape, sources, lines in parts
        ]
        if self._answers is not None:
            held = [Held(self._answers)]
            found.append(Column("mask", torch.bool, (), held, runs[-1]))
        return found

    @property
    def widths(self) -> list[int]:
        """The bytes of a row of each layer, and of a mask that is a tensor."""
        pairs = zip(self._shapes, self._dtypes, strict=True)
        found = [math.prod(shape) * dtype.itemsize for shape, dtype in pairs]
        return found if self._answers is None else [*found, 1]

    def _number(self, column: int, numbers: dict[int, int], source: Source) -> int:
        """The number of a source; one that was met before keeps its number."""
        if id(source) not in numbers:
            numbers[id(source)] = len(self._sources[column])
            self._sources[column].append(source)
        return numbers[id(source)]

    # --- Positions -------------------------------------------------------------------------------------

    def _lead(self, stretches: tuple[Stretch, ...]) -> Shape:
        """The dimensions whose positions are the rows."""
        if not self._flatten:
            return stretches[0].shape[:1]
        layers = [(stretch.shape, stretch.dtype) for stretch in stretches]
        if self._masked:
            return lead(layers[:-1], layers[-1][0])
        return lead(layers, None)

    def _taken(self, column: int, stretches: tuple[Stretch, ...], leads: list[Shape]) -> int:
        """How many dimensions of a layer are positions, in all of its calls; the others make a row."""
        if not self._flatten:
            return 1
        is_mask = self._masked and column == len(self._picks) - 1
        more = len(stretches[0].shape) > len(leads[0])
        is_sure = is_mask or more or not has_width(stretches[0].dtype)
        pairs = zip((stretch.shape for stretch in stretches), leads, strict=True)
        found = Readings(list(pairs), is_sure=is_sure)
        if not is_sure and len(found.different) > 1:
            raise self._ambiguous(column, stretches[0], leads[0], found.different)
        return found.best

    def _readings(
        self, stretches: tuple[Stretch, ...], rows: Shape, takes: list[int], start: int
    ) -> list[Reading]:
        """How each layer is cut, after a look at whether the layers have the same rows."""
        found = []
        for column, (stretch, taken) in enumerate(zip(stretches, takes, strict=True)):
            reading = read(stretch.shape, rows, taken)
            if reading is None:
                raise self._unequal(stretches, column, rows, start)
            found.append(reading)
        if self._masked and found[-1].shape:
            fix = "." if self._flatten else "; flatten=True makes a row of each position."
            message = (
                f"{self._at(-1, start)} has shape {stretches[-1].shape}, more than one number for each row, "
                f"so it is no mask. The rows are those of {rows}{fix}"
            )
            raise AlignmentError(message)
        self._check_alike(stretches, [reading.shape for reading in found], start)
        return found

    def _answered(
        self, answers: Tensor, aligned: Sequence[tuple[Stretch, ...]], leads: list[Shape]
    ) -> list[tuple[int, int, int, int]]:
        """The runs of a mask that is a tensor: an answer for each row, or for each sample."""
        calls = [stretches[0].calls for stretches in aligned]
        samples = [many * rows[0] for many, rows in zip(calls, leads, strict=True)]
        rows = [many * math.prod(rows) for many, rows in zip(calls, leads, strict=True)]
        shape = tuple(answers.shape)
        inner = {rows[1:] for rows in leads}
        whole = {(sum(samples), *one) for one in inner} if len(inner) == 1 else set()
        if shape == (sum(rows),) or shape in whole:
            counts = rows
        elif shape == (sum(samples),):
            counts = samples
        else:
            message = (
                f"{self._call}: the mask is a tensor of shape {shape}, and there are {sum(rows)} rows. It needs one number "
                "for each, in the order of the rows."
            )
            raise AlignmentError(message)
        starts = accumulate(counts, initial=0)
        return [
            (many, 0, start, max(1, many // max(1, count)))
            for many, start, count in zip(rows, starts, counts, strict=False)
        ]

    # --- Errors ----------------------------------------------------------------------------------------

    def _at(self, column: int, call: int) -> str:
        return f"{self._call}: {self._picks[column].at(call)}"

    def _check_dimensions(self, stretches: tuple[Stretch, ...], start: int) -> None:
        for column, stretch in enumerate(stretches):
            if not stretch.shape:
                message = (
                    f"{self._at(column, start)} is a single number, without a dimension to cut rows from. Add values of "
                    "one number for each sample."
                )
                raise AlignmentError(message)

    def _check_alike(self, stretches: tuple[Stretch, ...], shapes: list[Shape], start: int) -> None:
        """Check that the rows are like those before."""
        dtypes = [stretch.dtype for stretch in stretches]
        if not start:
            self._shapes, self._dtypes = shapes, dtypes
        for column, (shape, before) in enumerate(zip(shapes, self._shapes, strict=True)):
            if shape != before:
                how = "flatten=True, or record with a transform that pools"
                fix = (
                    "record with a transform"
                    if self._flatten
                    else f"take a row of each position, {how}"
                )
                message = (
                    f"{self._at(column, start)} has rows of shape {shape}, and the calls before it rows of shape {before}. "
                    f"Rows of different shapes make no batch: {fix}."
                )
                raise AlignmentError(message)
        for column, (dtype, known) in enumerate(zip(dtypes, self._dtypes, strict=True)):
            if dtype != known:
                message = f"{self._at(column, start)} is of {dtype}, and the calls before it of {known}. Record with dtype=."
                raise AlignmentError(message)

    def _ambiguous(
        self, column: int, stretch: Stretch, rows: Shape, takes: list[int]
    ) -> AlignmentError:
        """The shapes fit two readings, in all calls."""
        readings = []
        for taken in takes:
            shape = (read(stretch.shape, rows, taken) or Reading((), 1)).shape
            what = f"rows of shape {shape}" if shape else "one number for each row"
            whole = rows if taken == MERGED else (*rows[:taken], *[1] * (len(rows) - taken))
            say = f" (to say so, give it the shape {(*whole, *(shape or (1,)))})"
            readings.append(what + (say if len(shape) <= 1 else ""))
        message = (
            f"{self._at(column, 0)} has shape {stretch.shape}, and the rows are those of {rows}. In all calls "
            f"that fits {len(readings)} readings: {', or '.join(readings)}. Reshape it in a transform, or where it is added."
        )
        return AlignmentError(message)

    def _unequal(
        self, stretches: tuple[Stretch, ...], column: int, rows: Shape, start: int
    ) -> AlignmentError:
        shape = stretches[column].shape
        if not self._flatten:
            fix = "Record with a transform that gives every layer one row for each sample."
        elif 1 < len(shape) <= len(rows) and not has_width(stretches[column].dtype):
            ones = (shape[0], *[1] * (len(rows) - 1), *shape[1:])
            fix = (
                "Integers are one number for each position, as token ids are. If they are a row for each sample, to be "
                f"repeated, give it the shape {ones}."
            )
        else:
            fix = "Its first dimensions have to be the same."
        message = (
            f"{self._at(column, start)} has shape {shape}, and the rows are those of {rows}, as in "
            f"{self._picks[0].title} of shape {stretches[0].shape}. {fix}"
        )
        return AlignmentError(message)
