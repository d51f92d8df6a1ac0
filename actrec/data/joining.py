"""The steps of a pass, such as a prompt and the tokens generated after it: joined along the tokens, or separate batches.

This uses only shapes, no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from actrec._recordings.masks import first_columns

from .calls import Look
from .numbering import integers
from .origins import Origins
from .positions import lead, positions
from .sources import Shape
from .steps import Steps


def leads(looks: list[list[Look]], whole: list[Sequence[bool]], *, masked: bool) -> list[Shape]:
    """Return the positions that are the rows of a step, for steps of different looks."""
    found, samples = [], []
    for one, marks in zip(looks, whole, strict=True):
        layers = [look for look, mark in zip(one, marks, strict=True) if not mark]
        own = layers[:-1] if masked and not marks[-1] and len(layers) > 1 else layers
        found.append(lead(own))
        # The mask, or a value with all tokens of the pass, also tells how many samples there are.
        beside = [one[-1].shape] if masked else []
        beside += [positions(*look) for look, mark in zip(one, marks, strict=True) if mark]
        samples.append(next((shape for shape in beside if len(shape) > 1), None))
    pairs = list(zip(found, samples, strict=True))
    # A layer is (batch * tokens, experts), in all its calls, or a vector of each sample.
    is_merged = any(_is_merged(*pair) for pair in pairs) or any(map(any, whole))
    return [
        rows if shape is None or len(rows) > 1 else _split(rows[0], shape, is_merged=is_merged)
        for rows, shape in pairs
    ]


def _is_merged(rows: Shape, shape: Shape | None) -> bool:
    if shape is None or len(rows) > 1:
        return False
    return shape[0] != 0 and rows[0] != shape[0] and rows[0] % shape[0] == 0


def _split(rows: int, shape: Shape, *, is_merged: bool) -> Shape:
    """Return the samples and tokens of a layer ``(batch * tokens, ...)``, given a value ``(batch, more tokens)``."""
    is_other = len(shape) != 2 or not is_merged or not shape[0] or rows % shape[0]  # noqa: PLR2004
    return shape if is_other else (shape[0], rows // shape[0])


def is_joined(
    steps: Steps,
    looks: list[list[Look]],
    whole: list[Sequence[bool]],
    rows: list[Shape],
    of: Tensor,
) -> bool:
    """Whether the steps of each pass continue the same samples."""
    order, firsts = steps.by_pass
    heads = order[firsts]  # of each pass, its first step
    several = torch.bincount(steps.passes)[steps.passes] > 1
    used = torch.unique(of[several]).tolist()
    if any(len(rows[look]) == 1 for look in used):
        return False
    numbers: dict[Shape, int] = {}
    beside = [numbers.setdefault((one[0], *one[2:]), len(numbers)) for one in rows]
    sizes = integers(beside)[of]
    if bool((sizes != sizes[heads][steps.passes]).any()):
        return False
    # If each of several steps has a label, they are separate batches, unless later steps have a single token.
    is_later = several.clone()
    is_later[heads] = False
    later = torch.unique(of[is_later]).tolist()
    is_labelled = any(
        look.shape == rows[at][:1] and not mark
        for at in used
        for look, mark in zip(looks[at], whole[at], strict=True)
    )
    return not (is_labelled and any(rows[look][1] > 1 for look in later))


class Lines(NamedTuple):
    """Rows that follow each other in each layer: those of a step, or of one sample of it."""

    step: Tensor
    sample: Tensor  #: the first one, in the step
    rows: Tensor


class Joint:
    """The rows of steps, and how those of a pass follow each other."""

    def __init__(self, steps: Steps, rows: list[Shape], of: Tensor, *, is_joined: bool) -> None:
        self._steps = steps
        self._rows = rows
        self._of = of  # of each step, which of the rows
        self.is_joined = is_joined
        sizes = [(one[0], math.prod(one[1:2]), math.prod(one[2:])) for one in rows]
        self.samples, self.tokens, self._inner = integers(sizes)[of].unbind(1)
        #: How many tokens of its pass come before each step, and how many samples.
        self.before = self._before(self.tokens) * is_joined
        self._first = self._before(self.samples) * (not is_joined)

    @cached_property
    def tokens_of_pass(self) -> Tensor:
        """The tokens of the pass of each step."""
        return self._of_passes(self.tokens)[self._steps.passes]

    def _positions(self) -> Shape | None:
        """The positions of a sample, if all have the same."""
        tokens = self.tokens_of_pass if self.is_joined else self.tokens
        inner = {one[2:] for one in self._rows}
        if len(torch.unique(tokens)) > 1 or len(inner) > 1:
            return None
        return (*tokens[:1].tolist(), *inner.pop()) if len(self._rows[0]) > 1 else ()

    def lines(self, is_apart: Tensor) -> Lines:
        """Cut the steps into lines: one for each sample if steps are joined or its samples are apart, else one for each step."""
        alone = is_apart
        if self.is_joined:
            alone = alone | (torch.bincount(self._steps.passes)[self._steps.passes] > 1)
            # All steps of a pass, or none.
        counts = torch.where(alone, self.samples, 1)
        step = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        sample = torch.arange(len(step), device="cpu") - (counts.cumsum(0) - counts)[step]
        if self.is_joined:
            order = sample.argsort(stable=True)
            order = order[self._steps.passes[step][order].argsort(stable=True)]
            step, sample = step[order], sample[order]
        of_sample = self.tokens * self._inner
        rows = torch.where(alone, of_sample, of_sample * self.samples)[step]
        return Lines(step, sample, rows)

    def origins(self, lines: Lines) -> Origins:
        """Return the origins of the rows of lines."""
        step = lines.step
        of_sample = (self.tokens * self._inner)[step].clamp(min=1)
        columns = [
            lines.rows,
            self._steps.passes[step],
            self._first[step] + lines.sample,
            (self.before * self._inner)[step],
            of_sample,
            lines.rows.clamp(min=1),
        ]
        order, firsts = self._steps.by_pass
        samples = self.samples[order[firsts]] if self.is_joined else self._of_passes(self.samples)
        return Origins(torch.stack(columns, 1), self._steps.names, samples, self._positions())

    def _of_passes(self, of_steps: Tensor) -> Tensor:
        """The sum over the steps of each pass."""
        sums = torch.zeros(len(self._steps.names), dtype=torch.int64, device="cpu")
        return sums.index_add_(0, self._steps.passes, of_steps)

    def _before(self, of_steps: Tensor) -> Tensor:
        """The sum over the steps of the same pass before each step."""
        if not self._steps.tells:
            return torch.zeros_like(of_steps)
        order, firsts = self._steps.by_pass
        sums = of_steps[order].cumsum(0) - of_steps[order]
        found = torch.empty_like(sums)
        found[order] = sums - sums[firsts][self._steps.passes[order]]
        return found


def covered(
    steps: Steps, joint: Joint, masks: list[Shape], of: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the columns of a mask, ``(batch, columns)`` in its call, that belong to each step.

    Returns:
        For each step, whether the mask has more columns than the step has tokens, whether all its tokens count, whatever the mask,
        and the column of its first token.
    """
    sizes = [shape if len(shape) == 2 else (-1, 0) for shape in masks]  # noqa: PLR2004
    samples, columns = integers(sizes)[of].unbind(1)
    fits, is_whole = samples == joint.samples, steps.whole[-1]
    first = columns - joint.tokens
    is_covered, is_all = fits & ~is_whole & (first > 0), torch.zeros_like(fits)
    heads = steps.of_passes() if bool(is_whole.any()) else []
    for own in heads:
        if is_whole[own[0]] and fits[own[0]]:
            firsts = first_columns([int(columns[own[0]])], joint.tokens[own].tolist())
            if firsts is not None:  # else an error is raised when the mask is cut
                is_covered[own] = True
                is_all[own] = torch.tensor([one is None for one in firsts], device="cpu")
                first[own] = integers([one or 0 for one in firsts])
    return is_covered, is_all, first
