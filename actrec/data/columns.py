"""A layer as a column of rows: where each row is, in whichever call and file."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from .sources import Files, Shape, Source

#: If more runs than this have rows of a block, the rows of each file are read together.
_MANY: Final = 16


@dataclass(frozen=True)
class Runs:
    """Rows of a layer in runs of consecutive rows, one for each call."""

    name: str
    shape: Shape  #: of a row
    dtype: torch.dtype
    sources: Sequence[Source]
    #: (runs, 4): how many rows, the number of the source, the first byte there, and how often each row of the source is
    #: repeated.
    lines: Tensor

    @property
    def width(self) -> int:
        """The bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def ordered(self, order: Tensor) -> Runs:
        """Return the same runs in another order."""
        return replace(self, lines=self.lines[order])

    def coalesced(self) -> Tensor:
        """Join runs whose rows follow each other in the same source."""
        rows, source, begin, repeat = self.lines.unbind(1)
        whole = rows[:-1] % repeat[:-1] == 0
        next_to = begin[:-1] + rows[:-1] // repeat[:-1] * self.width == begin[1:]
        same = (source.diff() == 0) & (repeat.diff() == 0)
        return coalesced(self.lines, whole & next_to & same)


class Column:
    """The rows of a layer.

    Its memory is proportional to the number of its runs: about one for each shard, however many calls there are, or one for
    each call of a recording in memory.
    """

    def __init__(self, runs: Runs) -> None:
        self.name = runs.name
        self.dtype = runs.dtype
        self.shape = runs.shape
        self.width = runs.width
        self._sources = runs.sources
        rows, self._source, self._start, self._repeat = runs.coalesced().unbind(1)
        self._ends = rows.cumsum(0)
        #: The same as arrays, to look at one run after the other.
        self._runs = [
            array("q", of_runs.tolist())
            for of_runs in (self._ends, self._source, self._start, self._repeat)
        ]
        #: Whether a source may have many runs in a row.
        self._scatters = len(rows) > _MANY * (1 + int((self._source.diff() != 0).sum()))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def look(self) -> str:
        """The shape and dtype of a row, as text."""
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"

    def dressed(self, rows: Tensor) -> Any:
        """Return rows of bytes in the shape and dtype of the column."""
        if not rows.numel():
            return torch.empty((len(rows), *self.shape), dtype=self.dtype, device="cpu")
        return rows.view(self.dtype).view(len(rows), *self.shape)

    def empty(self, rows: int) -> Tensor:
        """Return memory for so many rows."""
        return torch.empty((rows, self.width), dtype=torch.uint8, device="cpu")

    def read(self, first: int, out: Tensor, files: Files) -> None:
        """Fill ``out`` with the rows from number ``first`` on."""
        if self._is_scattered(first, len(out)):
            out.copy_(self.take(torch.arange(first, first + len(out), device="cpu"), files))
            return
        for place, many, run, skip in self._pieces(first, len(out)):
            source, start, repeat = self._at(run)
            if repeat == 1:
                source.read(start + skip * self.width, out[place : place + many], files)
            else:
                begin, end = skip // repeat, (skip + many - 1) // repeat + 1
                few = self.empty(end - begin)
                source.read(start + begin * self.width, few, files)
                which = torch.arange(skip, skip + many, device="cpu") // repeat - begin
                out[place : place + many] = few[which]

    def announce(self, first: int, many: int, files: Files) -> None:
        """Prefetch these rows, which will be read soon."""
        if self._is_scattered(first, many):
            return  # prefetched when they are read
        for _, rows, run, skip in self._pieces(first, many):
            source, start, repeat = self._at(run)
            begin, end = skip // repeat, (skip + rows - 1) // repeat + 1
            source.announce(start + begin * self.width, (end - begin) * self.width, files)

    def take(self, indices: Tensor, files: Files) -> Tensor:
        """Return a copy of rows with any numbers; little else is read."""
        if not self.width or not len(indices):
            return self.empty(len(indices))
        runs = torch.searchsorted(self._ends, indices, right=True)
        begins = self._starts(runs, indices)
        sources = self._source[runs]
        order = begins.argsort()
        order = order[sources[order].argsort(stable=True)]
        used, counts = torch.unique_consecutive(sources[order], return_counts=True)
        rows, many = self.empty(len(indices)), counts.tolist()
        parts = zip(torch.split(begins[order], many), torch.split(order, many), strict=True)
        for number, (some, places) in zip(used.tolist(), parts, strict=True):
            self._sources[number].take(some, rows, places, files)
        return rows

    def picked(self, rows: Tensor) -> Column:
        """Return a column of some of the rows."""
        runs = torch.searchsorted(self._ends, rows, right=True)
        starts = self._starts(runs, rows)
        ones = torch.ones_like(rows)
        lines = torch.stack([ones, self._source[runs], starts, ones], 1)
        return Column(Runs(self.name, self.shape, self.dtype, self._sources, lines))

    def _is_scattered(self, first: int, many: int) -> bool:
        """Whether these rows are in many runs of few sources."""
        if not many or not self._scatters:
            return False
        ends = torch.tensor([first, first + many - 1], device="cpu")
        low, high = torch.searchsorted(self._ends, ends, right=True).tolist()
        sources = len(torch.unique_consecutive(self._source[low : high + 1]))
        return bool(sources * _MANY < high - low)

    def _at(self, run: int) -> tuple[Source, int, int]:
        _, source, start, repeat = self._runs
        return self._sources[source[run]], start[run], repeat[run]

    def _starts(self, runs: Tensor, rows: Tensor) -> Tensor:
        """Return the first byte of each row in its source."""
        return self._start[runs] + (rows - self._begins(runs)) // self._repeat[runs] * self.width

    def _begins(self, runs: Tensor) -> Tensor:
        return torch.where(runs > 0, self._ends[runs - 1], 0)

    def _pieces(self, first: int, many: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield, for each run with some of these rows: their place among them, how many, the run, and how many to skip there."""
        ends = self._runs[0]
        run = bisect_right(ends, first)
        place = 0
        while place < many:
            end = ends[run]
            begin = ends[run - 1] if run else 0
            skip = first + place - begin
            rows = min(many - place, end - begin - skip)
            if rows:
                yield place, rows, run, skip
            place, run = place + rows, run + 1


def place_order(lines: Tensor) -> Tensor:
    """Return the order of the lines in their sources."""
    _, source, begin, _ = lines.unbind(1)
    order = begin.argsort(stable=True)
    return order[source[order].argsort(stable=True)]


def coalesced(lines: Tensor, goes_on: Tensor) -> Tensor:
    """Join lines, whose first column is their number of rows, where ``goes_on`` says that the next one continues a line."""
    heads = torch.cat([goes_on.new_ones(min(1, len(lines))), ~goes_on])
    into = heads.cumsum(0) - 1
    sums = lines.new_zeros(int(heads.sum())).index_add_(0, into, lines[:, 0])
    return torch.cat([sums[:, None], lines[heads, 1:]], 1)
