"""The steps of a pass, such as a prompt and the tokens generated after it: joined along the tokens, or separate batches.

This uses only shapes, no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
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
    samples = integers([one[0] for one in rows])[of]
    inner: dict[Shape, int] = {}
    inners = integers([inner.setdefault(one[2:], len(inner)) for one in rows])[of]
    for sizes in (samples, inners):
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
        sizes = [
            (one[0], *one[1:2], math.prod(one[2:])) if len(one) > 1 else (one[0], 1, 1)
            for one in rows
        ]
        self.samples, self.tokens, self._inner = integers(sizes)[of].unbind(1)
        self.rows = self.samples * self.tokens * self._inner  #: of each step
        none = torch.zeros_like(of)
        self.before = (
            self._before(self.tokens) if is_joined else none
        )  #: tokens of its pass, and sample
        self._first = none if is_joined else self._before(self.samples)

    def rows_of_passes(self) -> list[Shape]:
        """Return, for each step, the positions that are the rows of its pass."""
        tokens = self._of_passes(self.tokens)[self._steps.passes].tolist()
        rows = (self._rows[look] for look in self._of.tolist())
        return [(one[0], many, *one[2:]) for one, many in zip(rows, tokens, strict=True)]

    @cached_property
    def origins_samples(self) -> Tensor:
        """How many samples each pass has."""
        if not self.is_joined:
            return self._of_passes(self.samples)
        order, firsts = self._steps.by_pass
        return self.samples[order[firsts]]

    def same_rows(self) -> Shape | None:
        """The positions of a sample, if all have the same."""
        tokens = self._of_passes(self.tokens) if self.is_joined else self.tokens
        inner = {one[2:] for one in self._rows}
        if len(set(tokens.tolist())) > 1 or len(inner) > 1:
            return None
        return (*tokens[:1].tolist(), *inner.pop()) if len(self._rows[0]) > 1 else ()

    def lines(self, is_apart: Tensor) -> Lines:
        """Cut the steps into lines: one for each sample if steps are joined or samples are apart, else one for each step."""
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
        return Origins(torch.stack(columns, 1), self._steps.names, self.origins_samples)

    def answers(self, lines: Lines, is_of_samples: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001
        """Return where the numbers of a mask tensor begin for each line, and how many rows share each number."""
        if not is_of_samples:
            return lines.rows.cumsum(0) - lines.rows, torch.ones_like(lines.rows)
        first = self.origins_samples.cumsum(0) - self.origins_samples
        step = lines.step
        begin = first[self._steps.passes[step]] + self._first[step] + lines.sample
        return begin, (self.tokens * self._inner)[step].clamp(min=1)

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


class Covered(NamedTuple):
    """The columns of a mask that belong to each step."""

    is_covered: (
        Tensor  #: whether it has a column for each token of the step, or its tokens all count
    )
    is_all: Tensor  #: whether all tokens of the step count, whatever the mask
    is_apart: Tensor  #: whether the columns of the samples do not follow each other in the mask
    first: Tensor  #: the column of the first token
    columns: Tensor


def covered(steps: Steps, joint: Joint, masks: list[Shape], of: Tensor) -> Covered:
    """Find the columns of a mask, ``(batch, columns)`` in its call, that belong to each step."""
    none = torch.zeros_like(of)
    found = Covered(none.bool(), none.bool(), none.bool(), none.clone(), none)
    sizes = [shape if len(shape) == 2 else (-1, 0) for shape in masks]  # noqa: PLR2004
    if not sizes or not len(of):
        return found
    samples, columns = integers(sizes)[of].unbind(1)
    found = found._replace(columns=columns)
    is_whole = steps.whole[-1]
    asks = (samples == joint.samples) & (is_whole | (columns != joint.tokens))
    if not bool(asks.any()):
        return found
    firsts_of = cache(first_columns)
    groups = _steps_of_passes(steps) if joint.is_joined else [[step] for step in range(len(of))]
    asked, tokens, many, whole = (
        asks.tolist(),
        joint.tokens.tolist(),
        columns.tolist(),
        is_whole.tolist(),
    )
    for group in groups:
        if not any(asked[step] for step in group):
            continue
        mine = group[:1] if whole[group[0]] else group
        firsts = firsts_of(
            tuple(many[step] for step in mine), tuple(tokens[step] for step in group)
        )
        if firsts is None:
            continue  # an error is raised when the mask is cut
        for step, first in zip(group, firsts, strict=True):
            found.is_covered[step] = True
            found.is_all[step] = first is None
            found.first[step] = first or 0
    found.is_apart[:] = found.is_covered & ~found.is_all & (columns != joint.tokens)
    return found


def _steps_of_passes(steps: Steps) -> list[list[int]]:
    """Return the steps of each pass, in order."""
    order, _ = steps.by_pass
    return [part.tolist() for part in torch.split(order, torch.bincount(steps.passes).tolist())]
