"""A layer as a column of rows: where each row is, in whichever call and file."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from actrec._values.shapes import dtype_name

from .numbering import integers
from .runs import Runs
from .sources import Files, Shape, Source

#: If this many times more runs than sources have rows of a block, the rows of each source are read together.
_MANY: Final = 16


class _Piece(NamedTuple):
    """Rows that follow each other in a source."""

    source: Source
    begin: int  # byte of the first one
    many: int  # rows of the source
    repeat: int  # how many rows of the column share one of them
    skip: int  # rows of the column to leave out at the beginning
    rows: int  # of the column


@dataclass(frozen=True, eq=False)
class Column(Runs):
    """The rows of a layer, with a line for each call.

    A line has how many rows, the number of the source, the first byte there, and how many rows share each row of the source.
    Its memory is proportional to the number of its runs: about one for each shard, however many calls there are, or one for
    each call of a recording in memory.
    """

    name: str
    shape: Shape  #: of a row
    dtype: torch.dtype
    sources: Sequence[Source]
    keys: Tensor | list[Any] | None = None  #: if the rows are numbers of keys, these keys

    @cached_property
    def width(self) -> int:
        """The bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def look(self) -> str:
        """The shape and dtype of a row, as text."""
        if isinstance(self.keys, list):
            return "key"
        return f"{self.shape} {dtype_name(self.dtype)}"

    def dressed(self, rows: Tensor) -> Any:
        """Return rows of bytes in the shape and dtype of the column, or as keys."""
        if not rows.numel():
            found = torch.empty((len(rows), *self.shape), dtype=self.dtype, device="cpu")
        else:
            found = rows.view(self.dtype).view(len(rows), *self.shape)
        return found if self.keys is None else named(self.keys, found)

    def empty(self, rows: int) -> Tensor:
        """Return memory for so many rows."""
        return torch.empty((rows, self.width), dtype=torch.uint8, device="cpu")

    # --- Reading ---------------------------------------------------------------------------------------

    def rows(self, wanted: range | Tensor, files: Files) -> Tensor:
        """Return a copy of the rows with these numbers."""
        if not isinstance(wanted, range) or wanted.step != 1:
            return self.take(integers(wanted), files)
        found = self.empty(len(wanted))
        self.read(wanted.start, found, files)
        return found

    def read(self, first: int, out: Tensor, files: Files) -> None:
        """Fill ``out`` with the rows from number ``first`` on."""
        if self._is_scattered(first, len(out)):
            out.copy_(self.take(torch.arange(first, first + len(out), device="cpu"), files))
            return
        place = 0
        for piece in self._pieces(first, len(out)):
            part = out[place : (place := place + piece.rows)]
            if piece.repeat == 1:
                piece.source.read(piece.begin, part, files)
            else:
                few = self.empty(piece.many)
                piece.source.read(piece.begin, few, files)
                which = torch.arange(piece.skip, piece.skip + piece.rows, device="cpu")
                part.copy_(few[which // piece.repeat])

    def announce(self, first: int, many: int, files: Files) -> None:
        """Prefetch these rows, which will be read soon; those of many runs are prefetched when they are read."""
        if not self._is_scattered(first, many):
            for piece in self._pieces(first, many):
                piece.source.announce(piece.begin, piece.many * self.width, files)

    def take(self, rows: Tensor, files: Files) -> Tensor:
        """Return a copy of rows with any numbers; little else is read."""
        found = self.empty(len(rows))
        if not found.numel():
            return found
        sources, begins = self._places(rows)
        order = _by_place(sources, begins)
        used, counts = torch.unique_consecutive(sources[order], return_counts=True)
        parts = (torch.split(one, counts.tolist()) for one in (begins[order], order))
        for number, some, places in zip(used.tolist(), *parts, strict=True):
            self.sources[number].take(some, found, places, files)
        return found

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of the source of each row, and the first byte there."""
        lines, skip = self.of(rows)
        _, source, begin, repeat = lines.unbind(1)
        return source, begin + skip // repeat * self.width

    @cached_property
    def _arrays(self) -> list[array[int]]:
        """The ends and the columns of the lines, to look at one run after the other without operations on tensors."""
        return [array("q", column.tolist()) for column in (self.ends, *self.lines.unbind(1))]

    def _runs(self, first: int, many: int) -> range:
        """Return the numbers of the runs with some of these rows."""
        ends = self._arrays[0]
        last = bisect_left(ends, first + many)
        return range(bisect_right(ends, first), min(last + 1, len(ends)))

    def _is_scattered(self, first: int, many: int) -> bool:
        """Whether these rows are in many runs of few sources."""
        runs = self._runs(first, many)
        if len(runs) <= _MANY:
            return False
        sources = torch.unique(self.lines[runs.start : runs.stop, 1])
        return len(runs) > _MANY * len(sources)

    def _pieces(self, first: int, many: int) -> Iterator[_Piece]:
        """Yield where these rows are."""
        ends, counts, sources, begins, repeats = self._arrays
        for run in self._runs(first, many):
            begin, repeat = ends[run] - counts[run], repeats[run]
            skip = max(first - begin, 0)
            rows = min(counts[run], first + many - begin) - skip
            if rows > 0:
                shared, own = divmod(skip, repeat)
                yield _Piece(
                    self.sources[sources[run]],
                    begins[run] + shared * self.width,
                    -(-(own + rows) // repeat),
                    repeat,
                    own,
                    rows,
                )

    # --- Other runs --------------------------------------------------------------------------------------

    def place_order(self) -> Tensor:
        """Return the order of the runs in their sources."""
        return _by_place(self.lines[:, 1], self.lines[:, 2])

    def joined(self) -> Column:
        """Join runs whose rows follow each other in the same source."""
        rows, source, begin, repeat = self.lines.unbind(1)
        whole = rows[:-1] % repeat[:-1] == 0
        next_to = begin[:-1] + rows[:-1] // repeat[:-1] * self.width == begin[1:]
        return self.coalesced(whole & next_to & (source.diff() == 0) & (repeat.diff() == 0))

    def picked(self, rows: Tensor) -> Column:
        """Return a column of some of the rows."""
        ones = torch.ones_like(rows)
        return replace(self, lines=torch.stack([ones, *self._places(rows), ones], 1))


def _by_place(sources: Tensor, begins: Tensor) -> Tensor:
    order = begins.argsort(stable=True)
    return order[sources[order].argsort(stable=True)]


def named(keys: Tensor | list[Any], numbers: Tensor) -> Any:
    """Return the keys that have these numbers: a tensor if keys are integers, else a list."""
    return keys[numbers] if isinstance(keys, Tensor) else [keys[at] for at in numbers.tolist()]
