"""Rows in runs: a table of integers with a line for each run of rows that follow each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """Rows, some of which follow each other in their file, or come from one sample."""

    lines: Tensor  #: (runs, n): how many rows, and what the subclass says of the first of them

    def __len__(self) -> int:
        return int(self.lines[:, 0].sum())

    def ordered(self, order: Tensor) -> Self:
        """Return the same runs in another order."""
        return replace(self, lines=self.lines[order])

    def coalesced(self, goes_on: Tensor) -> Self:
        """Join runs, where ``goes_on`` says that the next one continues a run."""
        heads = torch.cat([goes_on.new_ones(min(1, len(self.lines))), ~goes_on])
        into = heads.cumsum(0) - 1
        sums = self.lines.new_zeros(int(heads.sum())).index_add_(0, into, self.lines[:, 0])
        return replace(self, lines=torch.cat([sums[:, None], self.lines[heads, 1:]], 1))

    @cached_property
    def ends(self) -> Tensor:
        """The number of the row after each run."""
        return self.lines[:, 0].cumsum(0)

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the line of the run of each row, and the index of the row in that run."""
        run = torch.searchsorted(self.ends, rows, right=True)
        lines = self.lines[run]
        return lines, rows - (self.ends[run] - lines[:, 0])
