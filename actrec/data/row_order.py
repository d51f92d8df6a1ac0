"""The order of rows in an epoch: only arithmetic, no data.

Rows are cut into *blocks*, each of which is read at once. An epoch permutes the blocks, which gives a sequence of rows,
and everything else is counted in that sequence::

    rows      |----------------------- one epoch ------------------------|
    ranks     |------- rank 0 --------|------- rank 1 --------|   ...
    windows   |-- 0 --|-- 1 --|-- 2 --|        each fits into the buffer
    batches   |---|---|---|---|---|---|        of the rows of the windows, permuted

A window is read and its rows are permuted. Batches are cut out of the permuted rows, across the ends of
windows. If there are several recordings, each has its own sequence, and every window has a share of each. So the rows of
batch 1000 depend only on the seed, the epoch and the numbers of rows, blocks and ranks, and are computed without the
batches before it: any number of workers can divide the batches among them, and resuming costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Rows of a block that are in a window."""

    part: int  # the recording
    block: int
    first: int  # of the block's rows
    many: int
    place: int  # in the window


class Cut(NamedTuple):
    """A part of a permuted window that goes to one batch."""

    low: int
    high: int
    ends: bool  # whether it completes the batch


@dataclass(frozen=True)
class Order:
    """How a recording is cut up, for all epochs."""

    counts: Sequence[Tensor]  #: of each recording, the rows in each of its blocks
    quotas: Sequence[int]  #: of each recording, the rows that an epoch has
    window: int  #: how many rows fit into the buffer
    batch_size: int
    seed: int
    rank: int
    world_size: int
    drop_last: bool

    @cached_property
    def shares(self) -> list[tuple[int, int]]:
        """The rows of this rank, in the sequence of all of each recording."""
        shares = self._shares(self.rank)
        if not self.drop_last:
            return shares
        # The same number of batches for every rank, or ranks would wait for each other.
        least = min(_sum(self._shares(rank)) for rank in range(self.world_size))
        surplus = _sum(shares) - least // self.batch_size * self.batch_size
        longest_first = sorted(range(len(shares)), key=lambda n: shares[n][0] - shares[n][1])
        for number in longest_first:
            begin, end = shares[number]
            cut = min(surplus, end - begin)
            shares[number], surplus = (begin, end - cut), surplus - cut
        return shares

    def _shares(self, rank: int) -> list[tuple[int, int]]:
        at = (rank, rank + 1)
        found = ([many * one // self.world_size for one in at] for many in self.quotas)
        return [(begin, end) for begin, end in found]

    @cached_property
    def rows(self) -> int:
        """How many rows this rank has."""
        return _sum(self.shares)

    @property
    def batches(self) -> int:
        """How many batches this rank has."""
        return -(-self.rows // self.batch_size)

    def parts(self, number: int) -> list[tuple[int, int]]:
        """Return the part of each recording's sequence in a window."""
        many = self._windows
        return [
            (begin + (end - begin) * number // many, begin + (end - begin) * (number + 1) // many)
            for begin, end in self.shares
        ]

    @property
    def windows(self) -> list[tuple[int, int]]:
        """The windows: as few as possible that fit into the buffer, and of equal size."""
        ends = [
            *accumulate((_sum(self.parts(number)) for number in range(self._windows)), initial=0)
        ]
        return [*pairwise(ends)]

    @property
    def _windows(self) -> int:
        # Each recording may have a row more in one window than in another.
        return -(-self.rows // max(1, self.window - len(self.quotas) + 1))

    def cuts(self, window: tuple[int, int], batches: range) -> list[Cut]:
        """Return the parts of a permuted window that go to some of the batches."""
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

    def most(self, step: int) -> int:
        """Return the largest number of rows that every ``step``-th batch takes from one window."""
        longest = max((end - begin for begin, end in self.windows), default=0)
        turns, rest = divmod(longest, self.batch_size * step)
        return turns * self.batch_size + min(rest, self.batch_size)

    def epoch(self, number: int) -> Epoch:
        """The order in one epoch."""
        return Epoch(self, number)


class Epoch:
    """The order of the blocks in one epoch, and of the rows in each window."""

    def __init__(self, order: Order, number: int) -> None:
        self._order = order
        self._number = number
        self._blocks = [
            _permutation(len(counts), order.seed, number, *[part] * bool(part))
            for part, counts in enumerate(order.counts)
        ]
        pairs = zip(order.counts, self._blocks, strict=True)
        self._ends = [counts[blocks].cumsum(0) for counts, blocks in pairs]

    def pieces(self, window: int) -> list[Piece]:
        """Return the pieces of blocks in a window, for each recording in the order of the disk."""
        found: list[Piece] = []
        place = 0
        for part, (begin, end) in enumerate(self._order.parts(window)):
            for block, first, many in self._of_part(part, begin, end):
                found.append(Piece(part, block, first, many, place))
                place += many
        return found

    def _of_part(self, part: int, begin: int, end: int) -> list[list[int]]:
        """Return the blocks with rows in a part of a recording's sequence, each with the first such row and how many."""
        counts, all_ends = self._order.counts[part], self._ends[part]
        low = int(torch.searchsorted(all_ends, begin, right=True))
        high = int(torch.searchsorted(all_ends, end)) + 1
        blocks, ends = self._blocks[part][low:high], all_ends[low:high]
        starts = ends - counts[blocks]
        first = (begin - starts).clamp(min=0)
        many = ends.clamp(max=end) - starts - first
        lines = torch.stack([blocks, first, many], 1)[blocks.argsort()]
        return lines[lines[:, 2] > 0].tolist()

    def permutation(self, number: int, window: tuple[int, int]) -> Tensor:
        """For each place in the permuted window, the row of the window that goes there."""
        order = self._order
        numbers = order.seed, self._number, order.world_size, order.rank, number
        return _permutation(window[1] - window[0], *numbers)


def _sum(parts: Sequence[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in parts)


def _permutation(many: int, *numbers: int) -> Tensor:
    """Return a permutation that depends only on these numbers: the same in every process."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(many, generator=generator, device="cpu")
