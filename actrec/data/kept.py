"""How many rows a mask keeps in each block of rows. Which rows these are is read from the mask when they are needed."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from .columns import Column
from .sources import Files

#: The number of rows for which the mask is read at a time.
_MANY: Final = 1 << 20


class Kept:
    """The rows that a mask keeps."""

    def __init__(self, mask: Column, block: int, files: Files) -> None:
        self._mask = mask
        self._block = block
        counts = [torch.empty(0, dtype=torch.int64, device="cpu")]
        many = max(1, _MANY // block) * block
        for first in range(0, len(mask), many):
            kept = self._kept(first, many, files)
            counts.append(pad(kept, (0, -len(kept) % block)).view(-1, block).sum(1))
        self.counts = torch.cat(counts)
        self._ends = self.counts.cumsum(0)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def block(self, number: int, files: Files) -> Tensor:
        """Return the kept rows of a block, counted from its first row."""
        return self._kept(number * self._block, self._block, files).nonzero()[:, 0]

    def located(self, indices: Tensor, files: Files) -> Tensor:
        """Return the numbers of kept rows, counted among all rows."""
        blocks = torch.searchsorted(self._ends, indices, right=True)
        within = indices - (self._ends - self.counts)[blocks]
        out = torch.empty_like(indices)
        for number in torch.unique(blocks).tolist():
            here = blocks == number
            out[here] = self.block(number, files)[within[here]] + number * self._block
        return out

    def _kept(self, first: int, many: int, files: Files) -> Tensor:
        rows = self._mask.empty(min(many, len(self._mask) - first))
        self._mask.read(first, rows, files)
        answers: Tensor = self._mask.dressed(rows)
        return answers != 0


def counts_of(rows: int, block: int) -> Tensor:
    """How many rows each block has where all of them are kept."""
    return (rows - torch.arange(0, rows, block, device="cpu")).clamp(max=block)
