"""Cuts aligned calls into rows: equally many for each layer, of one shape and dtype."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from actrec.errors import AlignmentError

from .calls import Look
from .columns import Column
from .joining import Joint, covered, is_joined, leads
from .numbering import integers, numbered
from .origins import Origins
from .positions import MERGED, Reading, has_width, read, readings
from .sources import Held, Shape
from .steps import Steps


def cut(call: str, steps: Steps, *, flatten: bool, masked: bool) -> tuple[list[Column], Origins]:
    """Return the rows of each layer, of which the last may be a mask, and where the rows come from.

    Raises:
        AlignmentError: the layers do not have the same rows.
    """
    return _Cut(call, steps, flatten=flatten, masked=masked).columns()


class _Kind(NamedTuple):
    """The shapes of a step."""

    first: int  #: the first step that has them
    looks: list[Look]
    rows: Shape  #: the positions that are the rows of the step
    #: The positions of the call of each layer: the same, or with more tokens, of which those of the step are a part.
    own: list[Shape]


class _Cut:
    """Cuts steps by their kinds: there are few kinds, however many steps."""

    def __init__(self, call: str, steps: Steps, *, flatten: bool, masked: bool) -> None:
        self._call = call
        self._steps = steps
        self._layers = steps.layers
        self._flatten = flatten
        self._masked = masked
        columns = [calls.places[:, 0] for calls in steps.layers]
        of, firsts = numbered(*columns, *steps.whole.long())
        # If there are no calls, take one kind of calls without rows.
        looks = [
            [calls.looks[int(calls.places[first, 0])] for calls in steps.layers]
            for first in firsts.tolist()
        ] or [[Look((0,), torch.float32)] * len(columns)]
        whole = steps.whole.T[firsts].tolist() or [[False] * len(columns)]
        self._check_dimensions(looks, firsts)
        rows = (
            leads(looks, whole, masked=masked) if flatten else [one[0].shape[:1] for one in looks]
        )
        is_one = flatten and steps.tells and is_joined(steps, looks, whole, rows, of)
        self._joint = joint = Joint(steps, rows, of, is_joined=is_one)
        if steps.has_whole and not is_one:
            raise self._not_joined()
        #: The token of its call that each step begins with, for each layer.
        self._begins = joint.before * steps.whole
        self._is_covered = self._is_all = torch.zeros_like(of).bool()
        if flatten and masked:
            masks = [one[-1].shape for one in looks]
            self._is_covered, self._is_all, begins = covered(steps, joint, masks, of)
            self._begins[-1] = torch.where(self._is_covered, begins, self._begins[-1])
        keys = [of, self._is_covered.long(), joint.tokens_of_pass * steps.whole.any(0)]
        self._kind_of, firsts = numbered(*keys)
        lines = torch.stack([firsts, *(key[firsts] for key in keys)], 1).tolist()
        self._kinds = []
        for first, number, is_covered, tokens in lines or [(0, 0, 0, 0)]:
            lead = rows[number]
            own = [(lead[0], tokens, *lead[2:]) if mark else lead for mark in whole[number]]
            if is_covered:
                own[-1] = (*looks[number][-1].shape, *lead[2:])
            self._kinds.append(_Kind(first, looks[number], lead, own))

    def columns(self) -> tuple[list[Column], Origins]:
        """Return the rows of each layer, and where they come from."""
        takes = [self._taken(column) for column in range(len(self._layers))]
        found = [self._readings(kind, takes) for kind in self._kinds]
        self._check_alike(found)
        lines = self._joint.lines(self._is_covered)
        columns = []
        for number, (calls, look) in enumerate(
            zip(self._layers, self._kinds[0].looks, strict=True)
        ):
            shape = found[0][number].shape
            width = math.prod(shape) * look.dtype.itemsize
            places = [
                _place(kind.rows, kind.own[number], of_kind[number].repeat)
                for kind, of_kind in zip(self._kinds, found, strict=True)
            ]
            repeat, sample, token = integers(places)[self._kind_of].unbind(1)
            own = (self._begins[number] * token)[lines.step] + lines.sample * sample[lines.step]
            source, begin = calls.places[lines.step, 1:].unbind(1)
            line = torch.stack([lines.rows, source, begin + own * width, repeat[lines.step]], 1)
            columns.append(Column(line, calls.title, shape, look.dtype, calls.sources))
        if bool(self._is_all.any()):
            columns[-1] = self._all_counting(columns[-1], self._is_all[lines.step])
        return columns, self._joint.origins(lines)

    def _all_counting(self, mask: Column, which: Tensor) -> Column:
        """Return a mask that keeps all rows of some runs."""
        lines, one = mask.lines.clone(), torch.ones(1, dtype=mask.dtype, device="cpu")
        lines[which, 1], lines[which, 2] = len(mask.sources), 0
        lines[which, 3] = lines[which, 0].clamp(min=1)
        return replace(mask, lines=lines, sources=[*mask.sources, Held(one)])

    # --- Positions -------------------------------------------------------------------------------------

    def _taken(self, column: int) -> int:
        """Return how many dimensions of a layer are positions, in all of its calls; the others are the row."""
        if not self._flatten:
            return 1
        kinds = self._kinds
        shape, dtype = kinds[0].looks[column]
        is_mask = self._masked and column == len(self._layers) - 1
        is_sure = is_mask or len(shape) > len(kinds[0].rows) or not has_width(dtype)
        pairs = dict.fromkeys((kind.looks[column].shape, kind.own[column]) for kind in kinds)
        found = readings([*pairs], is_sure=is_sure)
        if not is_sure and len(found) > 1:
            raise self._ambiguous(column, kinds[0].own[column], found)
        return found[0]

    def _readings(self, kind: _Kind, takes: list[int]) -> list[Reading]:
        """Return how each layer is cut, after checking that the layers have the same rows."""
        found = []
        for column, taken in enumerate(takes):
            reading = read(kind.looks[column].shape, kind.own[column], taken)
            if reading is None:
                raise self._unequal(column, kind)
            found.append(reading)
        if self._masked and found[-1].shape:
            fix = "." if self._flatten else "; flatten=True makes a row of each position."
            message = (
                f"{self._at(-1, kind.first)} has shape {kind.looks[-1].shape}, more than one number for each row, "
                f"so it is not a mask. The rows are those of {kind.rows}{fix}"
            )
            raise AlignmentError(message)
        return found

    # --- Errors ----------------------------------------------------------------------------------------

    def _at(self, column: int, step: int) -> str:
        """Name the call of a step, in a message."""
        return f"{self._call}: {self._layers[column].at(step)}"

    def _check_dimensions(self, looks: list[list[Look]], firsts: Tensor) -> None:
        for first, own in zip(firsts.tolist(), looks, strict=False):
            for column, look in enumerate(own):
                if not look.shape:
                    message = (
                        f"{self._at(column, first)} is a single number, without a dimension to cut rows from. Add values "
                        "of one number for each sample."
                    )
                    raise AlignmentError(message)

    def _check_alike(self, found: list[list[Reading]]) -> None:
        """Check that the rows of a layer have one shape and dtype."""
        for kind, of_kind in zip(self._kinds, found, strict=True):
            for column, (reading, first) in enumerate(zip(of_kind, found[0], strict=True)):
                if reading.shape != first.shape:
                    fix = "record with a transform"
                    if not self._flatten:
                        fix = f"take a row of each position, flatten=True, or {fix} that pools"
                    message = (
                        f"{self._at(column, kind.first)} has rows of shape {reading.shape}, and the calls before it rows of shape "
                        f"{first.shape}. Rows of different shapes cannot be batched: {fix}."
                    )
                    raise AlignmentError(message)
                dtype, before = (one.looks[column].dtype for one in (kind, self._kinds[0]))
                if dtype != before:
                    message = (
                        f"{self._at(column, kind.first)} is of {dtype}, and the calls before it of {before}. Record with "
                        "dtype=."
                    )
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
            f"{self._at(column, self._kinds[0].first)} has shape {look.shape}, and the rows are those of {rows}. In all calls this can be read in "
            f"{len(said)} ways: {', or '.join(said)}. Reshape it in a transform, or where it is added."
        )
        return AlignmentError(message)

    def _unequal(self, column: int, kind: _Kind) -> AlignmentError:
        """Return the error for a layer whose rows are not those of the others."""
        (shape, dtype), rows = kind.looks[column], kind.own[column]
        others = f"as in {self._layers[0].title} of shape {kind.looks[0].shape}"
        if rows != kind.rows:
            others = "those of the pass joined"
        if not self._flatten:
            fix = "Record with a transform that gives every layer one row for each sample."
        elif rows != kind.rows and shape[1:2] == (rows[1] + 1,):
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
        message = f"{self._at(column, kind.first)} has shape {shape}, and the rows are those of {rows}, {others}. {fix}"
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


def _place(rows: Shape, own: Shape, repeat: int) -> tuple[int, int, int]:
    """Return where the rows of a step are in a call, ``repeat`` of whose rows share one row that is stored.

    Returns:
        How many rows of the step share one; and how many are stored from a sample to the next, and from a token to the next.
    """
    of_step, of_sample, of_token = (math.prod(sizes) for sizes in (rows[1:], own[1:], own[2:]))
    return max(1, min(repeat, of_step)), max(1, of_sample // repeat), of_token // repeat
