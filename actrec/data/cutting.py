"""Cuts aligned calls into rows: equally many for each layer, of one shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from actrec.errors import AlignmentError

from .calls import Look
from .columns import Runs
from .joining import Joint, covered, is_joined, leads
from .numbering import integers, numbered
from .origins import Origins
from .positions import MERGED, Reading, has_width, read, readings
from .sources import Held, Shape
from .steps import Steps


def cut(
    call: str, steps: Steps, *, flatten: bool, masked: bool, answers: Tensor | None
) -> tuple[list[Runs], Origins]:
    """Cut the calls of some layers, and after them a mask that is a tensor.

    Args:
        call: the calling function, for messages.
        steps: the aligned calls of the layers.
        flatten: whether each position is a row, or each sample.
        masked: whether the last layer is a mask.
        answers: a mask that is a tensor.

    Returns:
        The rows of each layer, and of a mask that is a tensor; and where the rows come from.

    Raises:
        AlignmentError: the layers do not have the same rows, or the mask has others.
    """
    return _Cut(call, steps, flatten=flatten, masked=masked).runs(answers)


class _Place(NamedTuple):
    """Where the rows of a layer are in a step; all but ``repeat`` in bytes."""

    repeat: int  #: how many rows share one row of the call
    sample: int  #: from a sample to the next
    token: int  #: from a token to the next, if the call is that of the whole pass


class _Kind(NamedTuple):
    """The shapes of a step."""

    looks: list[Look]
    rows: Shape  #: the positions that are the rows of the step
    whole: Sequence[bool]  #: whether the call of a layer is that of the whole pass
    rows_of_pass: Shape
    is_covered: bool  #: whether the mask has a column for each token, and more


class _Cut:
    """Cuts steps by their kinds: there are few kinds, however many steps."""

    def __init__(self, call: str, steps: Steps, *, flatten: bool, masked: bool) -> None:
        self._call = call
        self._steps = steps
        self._layers = steps.layers
        self._flatten = flatten
        self._masked = masked
        # If there are no calls, take one kind of calls without rows.
        columns = [calls.places[:, 0] for calls in steps.layers]
        self._kind_of, firsts = numbered(*columns, *(steps.whole.long() if steps.has_whole else ()))
        found = [
            [calls.looks[int(calls.places[first, 0])] for calls in steps.layers]
            for first in firsts.tolist()
        ] or [[Look((0,), torch.float32)] * len(columns)]
        whole = steps.whole.T[firsts].tolist() or [[False] * len(columns)]
        self._kinds = [
            _Kind(one, (), marked, (), is_covered=False)
            for one, marked in zip(found, whole, strict=True)
        ]
        self._check_dimensions()
        rows = (
            leads(found, whole, masked=masked) if flatten else [one[0].shape[:1] for one in found]
        )
        looks = self._kind_of
        is_one = flatten and steps.tells and is_joined(steps, found, whole, rows, looks)
        self._joint = joint = Joint(steps, rows, looks, is_joined=is_one)
        if steps.has_whole and not is_one:
            raise self._not_joined()
        masks = [one[-1].shape for one in found] if flatten and masked else []
        self._covered = covered(steps, joint, masks, looks)
        of_pass = joint.rows_of_passes() if steps.has_whole else []
        shapes = {shape: number for number, shape in enumerate(dict.fromkeys(of_pass))}
        which = integers([shapes[shape] for shape in of_pass])
        keys = self._kind_of, self._covered.is_covered.long(), *([which] if of_pass else [])
        self._kind_of, firsts = numbered(*keys)
        self._kinds = [
            _Kind(
                found[int(looks[first])],
                rows[int(looks[first])],
                whole[int(looks[first])],
                of_pass[first] if of_pass else (),
                is_covered=bool(self._covered.is_covered[first]),
            )
            for first in firsts.tolist()
        ] or [_Kind(found[0], rows[0], whole[0], (), is_covered=False)]

    def runs(self, answers: Tensor | None) -> tuple[list[Runs], Origins]:
        """Return the rows of each layer, and of a mask that is a tensor; and where they come from."""
        takes = [self._taken(column) for column in range(len(self._layers))]
        found = [self._readings(kind, takes) for kind in range(len(self._kinds))]
        self._check_alike(found)
        lines = self._joint.lines(self._covered.is_apart)
        runs = []
        for column, (calls, look) in enumerate(
            zip(self._layers, self._kinds[0].looks, strict=True)
        ):
            shape = found[0][column].shape
            width = math.prod(shape) * look.dtype.itemsize
            places = [
                self._place(kind, column, readings_of_kind[column], width)
                for kind, readings_of_kind in enumerate(found)
            ]
            is_mask = self._masked and column == len(self._layers) - 1
            repeat, sample, token = self._of_steps(places).unbind(1)
            source, begin = calls.places[:, 1], calls.places[:, 2] + self._joint.before * token
            sources = calls.sources
            if is_mask:
                begin = begin + self._covered.first * width
                sample = torch.where(
                    self._covered.is_covered, self._covered.columns * width, sample
                )
            line = torch.stack(
                [
                    lines.rows,
                    source[lines.step],
                    begin[lines.step] + lines.sample * sample[lines.step],
                    repeat[lines.step],
                ],
                1,
            )
            if is_mask and bool(self._covered.is_all.any()):  # tokens that all count
                ones = torch.tensor([0, len(sources), 0, 0], device="cpu").expand_as(line).clone()
                ones[:, 0], ones[:, 3] = lines.rows, lines.rows.clamp(min=1)
                line = torch.where(self._covered.is_all[lines.step][:, None], ones, line)
                sources = [*sources, Held(torch.ones(1, dtype=look.dtype, device="cpu"))]
            runs.append(Runs(calls.title, shape, look.dtype, sources, line))
        if answers is not None:
            begin, repeat = self._joint.answers(lines, self._is_of_samples(answers))
            line = torch.stack([lines.rows, torch.zeros_like(begin), begin, repeat], 1)
            runs.append(Runs("mask", (), torch.bool, [Held(answers)], line))
        return runs, self._joint.origins(lines)

    def _of_steps(self, of_kinds: Sequence[_Place]) -> Tensor:
        """What each step has of what its kind has."""
        return integers(of_kinds).view(-1, 3)[self._kind_of]

    # --- Positions -------------------------------------------------------------------------------------

    def _shape(self, kind: _Kind, column: int) -> Shape:
        """Return the shape of a call; for a mask with more columns than the step has tokens, without the other columns."""
        is_mask = self._masked and column == len(self._layers) - 1
        return kind.rows[:2] if is_mask and kind.is_covered else kind.looks[column].shape

    def _rows(self, kind: _Kind, column: int) -> Shape:
        """Return the positions that a call must have."""
        is_mask = self._masked and column == len(self._layers) - 1
        is_whole = kind.whole[column] and not (is_mask and kind.is_covered)
        return kind.rows_of_pass if is_whole else kind.rows

    def _taken(self, column: int) -> int:
        """Return how many dimensions of a layer are positions, in all of its calls; the others are the row."""
        if not self._flatten:
            return 1
        kinds = self._kinds
        shape, dtype = kinds[0].looks[column]
        is_mask = self._masked and column == len(self._layers) - 1
        is_sure = is_mask or len(shape) > len(kinds[0].rows) or not has_width(dtype)
        pairs = dict.fromkeys(
            (self._shape(kind, column), self._rows(kind, column)) for kind in kinds
        )
        found = readings([*pairs], is_sure=is_sure)
        if not is_sure and len(found) > 1:
            raise self._ambiguous(column, self._rows(kinds[0], column), found)
        return found[0]

    def _readings(self, number: int, takes: list[int]) -> list[Reading]:
        """Return how each layer is cut, after checking that the layers have the same rows."""
        kind, found = self._kinds[number], []
        for column, taken in enumerate(takes):
            rows = self._rows(kind, column)
            reading = read(self._shape(kind, column), rows, taken)
            if reading is None:
                raise self._unequal(column, number, rows)
            found.append(reading)
        if self._masked and found[-1].shape:
            fix = "." if self._flatten else "; flatten=True makes a row of each position."
            message = (
                f"{self._at(-1, number)} has shape {kind.looks[-1].shape}, more than one number for each row, "
                f"so it is not a mask. The rows are those of {kind.rows}{fix}"
            )
            raise AlignmentError(message)
        return found

    def _place(self, number: int, column: int, reading: Reading, width: int) -> _Place:
        """Return where the rows of a layer are in the steps of a kind."""
        kind = self._kinds[number]
        of_step = math.prod(kind.rows[1:])
        rows = self._rows(kind, column)
        if rows is kind.rows:
            return _Place(reading.repeat, max(1, of_step // reading.repeat) * width, 0)
        of_pass = math.prod(rows[1:])
        if reading.repeat >= of_pass:  # one row for each sample
            return _Place(max(1, of_step), width, 0)
        of_token = math.prod(rows[2:]) // reading.repeat
        return _Place(reading.repeat, of_pass // reading.repeat * width, of_token * width)

    def _is_of_samples(self, answers: Tensor) -> bool:
        """Whether a mask that is a tensor has a number for each sample, rather than for each row."""
        joint, shape = self._joint, tuple(answers.shape)
        total, samples = int(joint.rows.sum()), int(joint.origins_samples.sum())
        if shape == (total,) or (shape == (samples, *shape[1:]) and shape[1:] == joint.same_rows()):
            return False
        if shape == (samples,):
            return True
        message = (
            f"{self._call}: the mask is a tensor of shape {shape}, and there are {total} rows. It needs one number "
            "for each, in the order of the rows."
        )
        raise AlignmentError(message)

    # --- Errors ----------------------------------------------------------------------------------------

    def _at(self, column: int, kind: int) -> str:
        """The first call of a kind, in a message."""
        first = int((self._kind_of == kind).nonzero()[0])
        return f"{self._call}: {self._layers[column].at(first)}"

    def _check_dimensions(self) -> None:
        for kind, (looks, *_) in enumerate(self._kinds):
            for column, look in enumerate(looks):
                if not look.shape:
                    message = (
                        f"{self._at(column, kind)} is a single number, without a dimension to cut rows from. Add values "
                        "of one number for each sample."
                    )
                    raise AlignmentError(message)

    def _check_alike(self, found: list[list[Reading]]) -> None:
        """Check that the rows of a layer have one shape and dtype."""
        for kind, readings_of_kind in enumerate(found):
            for column, (reading, first) in enumerate(zip(readings_of_kind, found[0], strict=True)):
                if reading.shape != first.shape:
                    fix = "record with a transform"
                    if not self._flatten:
                        fix = f"take a row of each position, flatten=True, or {fix} that pools"
                    message = (
                        f"{self._at(column, kind)} has rows of shape {reading.shape}, and the calls before it rows of shape "
                        f"{first.shape}. Rows of different shapes cannot be batched: {fix}."
                    )
                    raise AlignmentError(message)
                dtype, before = (self._kinds[at].looks[column].dtype for at in (kind, 0))
                if dtype != before:
                    message = f"{self._at(column, kind)} is of {dtype}, and the calls before it of {before}. Record with dtype=."
                    raise AlignmentError(message)

    def _ambiguous(self, column: int, rows: Shape, takes: list[int]) -> AlignmentError:
        """Return the error for shapes that fit two readings, in all calls."""
        look, said = self._kinds[0].looks[column], []
        for taken in takes:
            shape = (read(look.shape, rows, taken) or Reading((), 1)).shape
            what = f"rows of shape {shape}" if shape else "one number for each row"
            whole = rows if taken == MERGED else (*rows[:taken], *[1] * (len(rows) - taken))
            say = f" (for this reading, give it the shape {(*whole, *(shape or (1,)))})"
            said.append(what + (say if len(shape) <= 1 else ""))
        message = (
            f"{self._at(column, 0)} has shape {look.shape}, and the rows are those of {rows}. In all calls this can be read in "
            f"{len(said)} ways: {', or '.join(said)}. Reshape it in a transform, or where it is added."
        )
        return AlignmentError(message)

    def _unequal(self, column: int, number: int, rows: Shape) -> AlignmentError:
        """Return the error for a layer whose rows are not those of the others."""
        kind = self._kinds[number]
        shape, dtype = kind.looks[column]
        others = f"as in {self._layers[0].title} of shape {kind.looks[0].shape}"
        if kind.whole[column]:
            others = "those of the pass joined"
        if not self._flatten:
            fix = "Record with a transform that gives every layer one row for each sample."
        elif kind.whole[column] and shape[1:2] == (rows[1] + 1,):
            fix = "The last token that generate() returns was not run: add all but the last, for example ids[:, :-1]."
        elif shape[0] and shape[0] < rows[0] and rows[0] % shape[0] == 0:
            fix = (
                f"If each sample was run {rows[0] // shape[0]} times, as in beam search, repeat it where it is added: "
                f"repeat_interleave({rows[0] // shape[0]}, 0)."
            )
        elif 1 < len(shape) <= len(rows) and not has_width(dtype):
            ones = (shape[0], *[1] * (len(rows) - 1), *shape[1:])
            fix = (
                "Integers are one number for each position, as token ids are. If they are a row for each sample, to be "
                f"repeated, give it the shape {ones}."
            )
        else:
            fix = "Its first dimensions must be the same."
        message = f"{self._at(column, number)} has shape {shape}, and the rows are those of {rows}, {others}. {fix}"
        return AlignmentError(message)

    def _not_joined(self) -> AlignmentError:
        """Return the error for a layer with one call in a pass, while the calls of the others cannot be joined."""
        passes, whole = self._steps.passes, self._steps.whole
        step = int(whole.any(0).nonzero()[0, 0])
        column = int(whole[:, step].nonzero()[0, 0])
        other = int((~whole[:, step]).nonzero()[0, 0])
        steps = (passes == passes[step]).nonzero()[:, 0].tolist()
        calls = self._layers[other]
        shapes = [calls.looks[look].shape for look in calls.places[steps, 0].tolist()]
        message = (
            f"{self._call}: {self._layers[column].at(step)} is the only one of its pass, in which {calls.title} has calls of "
            f"the shapes {', '.join(map(str, shapes[:3]))}{', ...' * (len(shapes) > 3)}. They cannot be joined along the "  # noqa: PLR2004
            "tokens, dimension 1. Take one call of each pass (nth=0), or add a value for each call."
        )
        return AlignmentError(message)
