"""The rows that a mask keeps. Which ones these are is read from the mask, a portion at a time, when they are needed."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from .columns import Column
from .origins import Origins
from .sources import Files

#: The number of rows for which the mask is read at a time.
_MANY: Final = 1 << 20


def _answers(mask: Column, first: int, many: int, files: Files) -> Tensor:
    """Return for each row from number ``first`` on, up to ``many``, whether the mask keeps it."""
    rows = mask.rows(range(first, min(first + many, len(mask))), files)
    answers: Tensor = mask.dressed(rows)
    return answers != 0


class Kept:
    """The rows that a mask keeps, and how many of them each block of rows has."""

    def __init__(self, mask: Column, block: int, files: Files) -> None:
        self._mask = mask
        self._block = block
        counts = [torch.empty(0, dtype=torch.int64, device="cpu")]
        many = max(1, _MANY // block) * block
        for first in range(0, len(mask), many):
            kept = _answers(mask, first, many, files)
            counts.append(pad(kept, (0, -len(kept) % block)).view(-1, block).sum(1))
        self.counts = torch.cat(counts)
        self._ends = self.counts.cumsum(0)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def block(self, number: int, files: Files) -> Tensor:
        """Return the numbers of the kept rows of a block."""
        first = number * self._block
        return _answers(self._mask, first, self._block, files).nonzero()[:, 0] + first

    def located(self, indices: Tensor, files: Files) -> Tensor:
        """Return the numbers of kept rows, counted among all rows."""
        blocks = torch.searchsorted(self._ends, indices, right=True)
        within = indices - (self._ends - self.counts)[blocks]
        out = torch.empty_like(indices)
        for number in torch.unique(blocks).tolist():
            here = blocks == number
            out[here] = self.block(number, files)[within[here]]
        return out


def counts_of(rows: int, block: int) -> Tensor:
    """How many rows each block has where all of them are kept."""
    return (rows - torch.arange(0, rows, block, device="cpu")).clamp(max=block)


def last_rows(where: Origins, mask: Column | None) -> Tensor:
    """Return the last row of each sample that the mask keeps; none for a sample of which it keeps no row."""
    firsts = where.samples.cumsum(0) - where.samples
    rows = torch.full((int(where.samples.sum()),), -1, device="cpu")
    with Files() as files:
        for first in range(0, len(where), _MANY):
            numbers = torch.arange(first, min(first + _MANY, len(where)), device="cpu")
            if mask is not None:
                numbers = numbers[_answers(mask, first, _MANY, files)]
            passes, samples, _ = where.numbers(numbers)
            rows.scatter_reduce_(0, firsts[passes] + samples, numbers, "amax")
    return rows[rows >= 0]
