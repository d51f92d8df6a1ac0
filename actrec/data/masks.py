"""Masks that are not recorded: a tensor, or what a function computes from the stored values of each pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from actrec._recordings.masks import MissingError, PassValues, Stored
from actrec._recordings.recording import Recording
from actrec.errors import AlignmentError, OptionError

from .calls import Calls, Look
from .columns import Column
from .numbering import integers, numbered
from .origins import Origins
from .selecting import is_plain, kind
from .sources import Held

#: Makes a mask of the values of a pass, by their names.
Function: TypeAlias = Callable[[Mapping[str, Any]], Tensor]


def computed(call: str, recording: Recording[Any], function: Function, beside: Calls) -> Calls:
    """Call the function for each pass in which a layer has calls. Return the masks as calls of a layer.

    A pass without a value that the function needs has no call.

    Raises:
        OptionError: the function does not return a tensor.
    """
    stored = Stored(recording)
    _, firsts = numbered(*beside.moments.unbind(1))
    kept: list[int] = []
    found: list[Tensor] = []
    for number, (rank, of) in zip(firsts.tolist(), beside.moments[firsts].tolist(), strict=True):
        try:
            answers = function(PassValues(stored, (None if rank < 0 else rank, of)))
        except MissingError:
            continue
        if not is_plain(answers):
            message = (
                f"{call}(mask={function!r}): for pass {of} it has returned {kind(answers)}. Return a tensor with one number "
                "for each position, (batch, tokens)."
            )
            raise OptionError(message)
        kept.append(number)
        found.append((answers.detach() != 0).cpu())
    looks: dict[Look, int] = {}
    which = [looks.setdefault(Look(tuple(one.shape), one.dtype), len(looks)) for one in found]
    begins = accumulate((one.numel() for one in found), initial=0)
    places = [(look, 0, begin) for look, begin in zip(which, begins, strict=False)]
    flat = torch.cat(
        [torch.empty(0, dtype=torch.bool, device="cpu"), *(one.reshape(-1) for one in found)]
    )
    calls = beside.of(integers(kept))
    return replace(
        calls,
        title="the mask",
        numbers=torch.arange(len(kept), device="cpu"),
        places=integers(places).view(-1, 3),
        looks=[*looks],
        sources=[Held(flat)],
    )


def checked(call: str, mask: Tensor) -> Tensor:
    """Return a mask that is a tensor as a new bool tensor: the user may write to theirs."""
    if not is_plain(mask):
        message = (
            f"{call}(mask={kind(mask)}): expected a plain tensor with one number for each row."
        )
        raise OptionError(message)
    return (mask.detach() != 0).cpu().contiguous()


def of_rows(call: str, answers: Tensor, where: Origins) -> Column:
    """Return a mask with a number for each row, or for each sample, as a column.

    Raises:
        AlignmentError: it has others.
    """
    rows, number, sample, _, of_sample, _ = where.lines.unbind(1)
    total, samples, shape = len(where), int(where.samples.sum()), tuple(answers.shape)
    if shape == (total,) or (where.positions is not None and shape == (samples, *where.positions)):
        begin, repeat = rows.cumsum(0) - rows, torch.ones_like(rows)
    elif shape == (samples,):
        firsts = where.samples.cumsum(0) - where.samples
        begin, repeat = firsts[number] + sample, of_sample
    else:
        message = (
            f"{call}: the mask is a tensor of shape {shape}, and there are {total} rows. It needs one number "
            "for each, in the order of the rows."
        )
        raise AlignmentError(message)
    lines = torch.stack([rows, torch.zeros_like(rows), begin, repeat], 1)
    return Column(lines, "mask", (), torch.bool, [Held(answers)])
