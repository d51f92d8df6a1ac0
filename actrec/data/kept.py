"""The rows that a mask keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .columns import Column
    from .files import Files

__all__ = ["Kept"]

#: Rows of which the mask is read at a time.
_MANY: Final = 1 << 20


class Kept:
    """The rows that a mask keeps: how many in each block of rows. Which ones, the mask says when it is asked."""

    def __init__(self, mask: Column, block: int, files: Files) -> None:
        self._mask = mask
        self._block = block
        many = max(1, _MANY // block) * block
        counts = [
            self._kept(first, min(many, len(mask) - first), files)
            for first in range(0, len(mask), many)
        ]
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.counts = torch.cat([_sums(kept, block) for kept in counts] or [none])
        self._ends = self.counts.cumsum(0)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def block(self, number: int, files: Files) -> Tensor:
        """Return the rows that are kept of a block, counted from its first."""
        first = number * self._block
        many = min(self._block, len(self._mask) - first)
        return self._kept(first, many, files).nonzero()[:, 0]

    def located(self, indices: Tensor, files: Files) -> Tensor:
        """Return the numbers of kept rows, counted among all rows."""
        blocks = torch.searchsorted(self._ends, indices, right=True)
        out = torch.empty_like(indices)
        for number in torch.unique(blocks).tolist():
            here = (blocks == number).nonzero()[:, 0]
            before = int(self._ends[number] - self.counts[number])
            rows = self.block(number, files)[indices[here] - before]
            out[here] = rows + number * self._block
        return out

    def _kept(self, first: int, many: int, files: Files) -> Tensor:
        rows = self._mask.empty(many)
        self._mask.read(first, rows, files)
        return self._mask.dressed(rows) != 0


def _sums(kept: Tensor, block: int) -> Tensor:
    whole = len(kept) // block * block
    sums = kept[:whole].view(-1, block).sum(1)
    rest = kept[whole:]
    return torch.cat([sums, rest.sum(0, keepdim=True)]) if len(rest) else sums
