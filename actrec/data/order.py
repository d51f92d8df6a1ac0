"""In which order rows come: arithmetic alone, no data.

Rows are cut into *blocks*, which are read in one go. An epoch permutes the blocks, and all that follows
is counted in the sequence of rows that comes of it::

    rows      |----------------------- one epoch ------------------------|
    ranks     |------- rank 0 --------|------- rank 1 --------|   ...
    windows   |-- 0 --|-- 1 --|-- 2 --|        each fits into the buffer
    batches   |---|---|---|---|---|---|        of the rows of the windows, permuted

A window is read and its rows are permuted. Batches are cut out of the permuted rows, across the ends of
windows. So which rows batch 1000 has depends on the seed, the epoch and the numbers of rows, blocks and ranks,
and is computed without the batches before it: any number of workers can make the batches between them,
and resuming costs nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cut", "Epoch", "Order", "Piece"]


class Piece(NamedTuple):
    """Rows of a block that are in a window."""

    block: int
    first: int  # of the block's rows
    many: int
    place: int  # in the window


class Cut(NamedTuple):
    """A part of a permuted window that goes to one batch."""

    low: int
    high: int
    ends: bool  # the batch


@dataclass(frozen=True)
class Order:
    """How a recording is cut up, for all epochs."""

    counts: Tensor  #: the rows in each block
    window: int  #: how many rows fit into the buffer
    batch_size: int
    seed: int
    rank: int
    world_size: int
    drop_last: bool

    @property
    def share(self) -> tuple[int, int]:
        """The rows of this rank, in the sequence of all."""
        total = int(self.counts.sum())
        begin, end = (total * rank // self.world_size for rank in (self.rank, self.rank + 1))
        if self.drop_last:  # as many batches for every rank, or they would wait for each other
            end = begin + total // self.world_size // self.batch_size * self.batch_size
        return begin, end

    @property
    def rows(self) -> int:
        """How many rows this rank has."""
        begin, end = self.share
        return end - begin

    @property
    def batches(self) -> int:
        """How many batches this rank has."""
        return -(-self.rows // self.batch_size)

    @property
    def windows(self) -> list[tuple[int, int]]:
        """The windows: as few as fit into the buffer, and of the same size."""
        many = -(-self.rows // self.window)
        return [(self.rows * i // many, self.rows * (i + 1) // many) for i in range(many)]

    def cuts(self, window: tuple[int, int], batches: range) -> list[Cut]:
        """What some of the batches have of a permuted window."""
        (begin, end), size = window, self.batch_size
        before = max(0, begin // size - batches.start)
        first = batches.start + -(-before // batches.step) * batches.step
        last = min(batches.stop, -(-end // size))
        found = []
        for number in range(first, last, batches.step):
            stop = min((number + 1) * size, self.rows)
            low, high = max(number * size, begin), min(stop, end)
            found.append(Cut(low - begin, high - begin, high == stop))
        return found

    def epoch(self, number: int) -> Epoch:
        """The order in one epoch."""
        return Epoch(self, number)


class Epoch:
    """The order of the blocks in one epoch, and of the rows in each window."""

    def __init__(self, order: Order, number: int) -> None:
        self._order = order
        self._number = number
        self._blocks = _permutation(len(order.counts), order.seed, number)
        self._ends = order.counts[self._blocks].cumsum(0)

    def pieces(self, window: tuple[int, int]) -> list[Piece]:
        """What a window has of which blocks, in the order in which they lie on the disk."""
        begin, end = (self._order.share[0] + at for at in window)
        low = int(torch.searchsorted(self._ends, begin, right=True))
        high = int(torch.searchsorted(self._ends, end)) + 1
        blocks, ends = self._blocks[low:high], self._ends[low:high]
        starts = ends - self._order.counts[blocks]
        first = (begin - starts).clamp(min=0)
        many = ends.clamp(max=end) - starts - first
        order = blocks.argsort()
        lines = torch.stack([blocks, first, many], 1)[order]
        places = (lines[:, 2].cumsum(0) - lines[:, 2]).tolist()
        return [
            Piece(block, first, many, place)
            for (block, first, many), place in zip(lines.tolist(), places, strict=True)
            if many
        ]

    def permutation(self, number: int, window: tuple[int, int]) -> Tensor:
        """For each place in the permuted window, the row of the window that goes there."""
        order = self._order
        numbers = order.seed, self._number, order.world_size, order.rank, number
        return _permutation(window[1] - window[0], *numbers)


def _permutation(many: int, *numbers: int) -> Tensor:
    """A permutation that depends on these numbers and nothing else: the same in every process."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(many, generator=generator, device="cpu")
