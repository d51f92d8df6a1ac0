"""A layer as a column of rows: which row lies where, whatever calls and files it is spread over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .files import Files
    from .sources import Shape, Source

__all__ = ["Column", "coalesced"]


class Column:
    """The rows of a layer.

    It is as large as the number of *runs*, which are rows that lie behind each other: one for each shard, however many
    calls there are, or one for each call of a recording in memory. A run is a line of ``runs``: how many rows it has, the
    number of its source, where it begins there, in bytes, and how many rows of the column are one row of the source.
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

    def read(self, first: int, out: Tensor, files: Files) -> None:
        """Copy rows from number ``first`` on into ``out``, as many as it has place for."""
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
        """Say that these rows will be read soon."""
        for _, rows, run, skip in self._pieces(first, many):
            source, start, repeat = self._at(run)
            begin, end = skip // repeat, (skip + rows - 1) // repeat + 1
            source.announce(start + begin * self.width, (end - begin) * self.width, files)

    def take(self, indices: Tensor, files: Files) -> Tensor:
        """Copy rows of any numbers; little else is read."""
        if not self.width or not len(indices):
            return self.empty(len(indices))
        runs = torch.searchsorted(self._ends, indices, right=True)
        begins = (
            self._start[runs] + (indices - self._begins(runs)) // self._repeat[runs] * self.width
        )
        sources = self._source[runs]
        order = begins.argsort()
        order = order[sources[order].argsort(stable=True)]
        used, counts = torch.unique_consecutive(sources[order], return_counts=True)
        rows, many = self.empty(len(indices)), counts.tolist()
        parts = zip(torch.split(begins[order], many), torch.split(order, many), strict=True)
        for number, (some, places) in zip(used.tolist(), parts, strict=True):
            self._sources[number].take(some, rows, places, files)
        return rows

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


def coalesced(columns: list[Tensor], widths: list[int]) -> list[Tensor]:
    """Return the runs of several columns side by side, as they lie in the files, and as few as possible.

    Where ranks took turns, say, calls that follow each other in a file are runs of their own.

    Args:
        columns: the runs of each, as many: ``(N, 4)``.
        widths: the bytes of a row of each.

    Returns:
        Runs of the same rows in another order: ``(M, 4)``.
    """
    first = columns[0]
    by_start = first[:, 2].argsort(stable=True)
    order = by_start[first[by_start, 1].argsort(stable=True)]
    columns = [runs[order] for runs in columns]
    if not len(order):
        return columns
    goes_on = torch.ones(len(order) - 1, dtype=torch.bool, device="cpu")
    for runs, width in zip(columns, widths, strict=True):
        rows, source, start, repeat = runs.unbind(1)
        whole = rows[:-1] % repeat[:-1] == 0
        next_to = start[:-1] + rows[:-1] // repeat[:-1] * width == start[1:]
        goes_on &= whole & next_to & (source[:-1] == source[1:]) & (repeat[:-1] == repeat[1:])
    heads = torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), ~goes_on]).nonzero()[:, 0]
    into = torch.zeros(len(order), dtype=torch.int64, device="cpu")
    into[heads[1:]] = 1
    rows = torch.zeros(len(heads), dtype=torch.int64, device="cpu").index_add_(
        0, into.cumsum(0), columns[0][:, 0]
    )
    return [torch.cat([rows[:, None], runs[heads, 1:]], 1) for runs in columns]
