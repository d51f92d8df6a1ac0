"""The last row of each sample that a mask keeps."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .columns import Column
from .origins import Origins
from .sources import Files

#: Rows that are processed at a time.
_MANY: Final = 1 << 20


def last_rows(where: Origins, mask: Column | None, *, as_stored: bool) -> Tensor:
    """Return the numbers of these rows, by sample or in stored order. A sample without a kept row has none."""
    firsts = where.samples.cumsum(0) - where.samples
    positions = torch.full((int(where.samples.sum()),), -1, device="cpu")
    rows, total = positions.clone(), int(where.lines[:, 0].sum())
    with Files() as files:
        for first in range(0, total, _MANY):
            numbers = torch.arange(first, min(first + _MANY, total), device="cpu")
            if mask is not None:
                answers = mask.empty(len(numbers))
                mask.read(first, answers, files)
                numbers = numbers[mask.dressed(answers) != 0]
            passes, samples, position = where.of(numbers)
            samples = firsts[passes] + samples
            positions.scatter_reduce_(0, samples, position, "amax")
            is_last = position == positions[samples]
            rows[samples[is_last]] = numbers[is_last]
    rows = rows[rows >= 0]
    return rows.sort()[0] if as_stored else rows
