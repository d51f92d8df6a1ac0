"""A layer as a column of rows: which row lies where, whatever calls and files it is spread over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .sources import Shape, Source

__all__ = ["Column", "Kept", "Run", "coalesced"]


class Run(NamedTuple):
    """Rows of a column that lie behind each other in a source."""

    rows: int
    source: int  # its number
    start: int  # the number of the first row in the source
    repeat: int  # so many rows of the column are one row of the source


class Column:
    """The rows of a layer.

    It is as large as the number of runs: one for each shard, however many calls there are, or one for
    each call of a recording in memory.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, shape: Shape, sources: Sequence[Source], runs: Tensor
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.width = math.prod(shape) * dtype.itemsize
        self._sources = sources
        rows, self._source, self._start, self._repeat = runs.unbind(1)
        self._ends = rows.cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def dressed(self, rows: Tensor) -> Tensor:
        """Rows of bytes as what they are."""
        if not rows.numel():
            return torch.empty((len(rows), *self.shape), dtype=self.dtype, device="cpu")
        return rows.view(self.dtype).view(len(rows), *self.shape)

    def empty(self, rows: int) -> Tensor:
        """Memory for so many rows."""
        return torch.empty((rows, self.width), dtype=torch.uint8, device="cpu")

    def read(self, first: int, out: Tensor) -> None:
        """Copy rows from number ``first`` on into ``out``, as many as it has place for."""
        for place, many, run, skip in self._pieces(first, len(out)):
            source, start, repeat = self._at(run)
            if repeat == 1:
                source.read(start + skip, out[place : place + many])
            else:
                begin, end = skip // repeat, (skip + many - 1) // repeat + 1
                few = self.empty(end - begin)
                source.read(start + begin, few)
                which = torch.arange(skip, skip + many, device="cpu") // repeat - begin
                out[place : place + many] = few[which]

    def announce(self, first: int, many: int) -> None:
        """Say that these rows will be read soon."""
        if not self.width:
            return
        for _, rows, run, skip in self._pieces(first, many):
            source, start, repeat = self._at(run)
            source.announce(
                start + skip // repeat, (skip + rows - 1) // repeat + 1 - skip // repeat
            )

    def take(self, indices: Tensor) -> Tensor:
        """Copy rows of any numbers; nothing else is read."""
        if not self.width or not len(indices):
            return self.empty(len(indices))
        runs = torch.searchsorted(self._ends, indices, right=True)
        rows = indices - self._begins(runs)
        rows = self._start[runs] + rows // self._repeat[runs]
        sources = self._source[runs]
        used, counts = torch.unique(sources, return_counts=True)
        if len(used) == 1:
            return self._sources[int(used)].rows().index_select(0, rows)
        order = sources.argsort()
        parts = torch.split(rows[order], counts.tolist())
        pairs = zip(used.tolist(), parts, strict=True)
        found = [self._sources[number].rows().index_select(0, part) for number, part in pairs]
        return torch.cat(found).index_select(0, order.argsort())

    def _at(self, run: int) -> tuple[Source, int, int]:
        source = self._sources[int(self._source[run])]
        return source, int(self._start[run]), int(self._repeat[run])

    def _begins(self, runs: Tensor) -> Tensor:
        return torch.where(runs > 0, self._ends[runs - 1], 0)

    def _pieces(self, first: int, many: int) -> Iterator[tuple[int, int, int, int]]:
        """For each run that has some of these rows: their place among them, how many, the run, and how many to skip there."""
        run = int(torch.searchsorted(self._ends, first, right=True))
        place = 0
        while place < many:
            end = int(self._ends[run])
            begin = int(self._ends[run - 1]) if run else 0
            skip = first + place - begin
            rows = min(many - place, end - begin - skip)
            if rows:
                yield place, rows, run, skip
            place, run = place + rows, run + 1


def coalesced(columns: list[Tensor]) -> list[Tensor]:
    """The runs of several columns side by side, as they lie in the files, and as few as possible.

    Where ranks took turns, say, calls that follow each other in a file are runs of their own.
    """
    first = columns[0]
    by_start = first[:, 2].argsort(stable=True)
    order = by_start[first[by_start, 1].argsort(stable=True)]
    columns = [runs[order] for runs in columns]
    if not len(order):
        return columns
    goes_on = torch.ones(len(order) - 1, dtype=torch.bool, device="cpu")
    for runs in columns:
        rows, source, start, repeat = runs.unbind(1)
        whole = rows[:-1] % repeat[:-1] == 0
        next_to = start[:-1] + rows[:-1] // repeat[:-1] == start[1:]
        goes_on &= whole & next_to & (source[:-1] == source[1:]) & (repeat[:-1] == repeat[1:])
    heads = torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), ~goes_on]).nonzero()[:, 0]
    into = torch.zeros(len(order), dtype=torch.int64, device="cpu")
    into[heads[1:]] = 1
    rows = torch.zeros(len(heads), dtype=torch.int64, device="cpu").index_add_(
        0, into.cumsum(0), columns[0][:, 0]
    )
    return [torch.cat([rows[:, None], runs[heads, 1:]], 1) for runs in columns]


#: Rows of which the mask is read at a time.
_MANY = 1 << 20


class Kept:
    """The rows that a mask keeps: how many in each block of rows. Which ones, the mask says when it is asked."""

    def __init__(self, mask: Column, block: int) -> None:
        self._mask = mask
        self._block = block
        many = max(1, _MANY // block) * block
        counts = [
            self._kept(first, min(many, len(mask) - first)) for first in range(0, len(mask), many)
        ]
        self.counts = torch.cat(
            [_sums(kept, block) for kept in counts] or [torch.zeros(0, device="cpu").long()]
        )
        self._ends = self.counts.cumsum(0)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def block(self, number: int) -> Tensor:
        """The rows that are kept of a block, counted from its first."""
        first = number * self._block
        return self._kept(first, min(self._block, len(self._mask) - first)).nonzero()[:, 0]

    def located(self, indices: Tensor) -> Tensor:
        """The numbers of kept rows, counted among all rows."""
        blocks = torch.searchsorted(self._ends, indices, right=True)
        out = torch.empty_like(indices)
        for number in torch.unique(blocks).tolist():
            here = (blocks == number).nonzero()[:, 0]
            before = int(self._ends[number] - self.counts[number])
            out[here] = self.block(number)[indices[here] - before] + number * self._block
        return out

    def _kept(self, first: int, many: int) -> Tensor:
        rows = self._mask.empty(many)
        self._mask.read(first, rows)
        return self._mask.dressed(rows) != 0


def _sums(kept: Tensor, block: int) -> Tensor:
    whole = len(kept) // block * block
    sums = kept[:whole].view(-1, block).sum(1)
    rest = kept[whole:]
    return torch.cat([sums, rest.sum(0, keepdim=True)]) if len(rest) else sums
