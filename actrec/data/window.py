"""The rows of one window after the other, and the batches that are cut out of their permuted rows.

The next window is read evenly, a little with each batch: its rows replace those that were taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor

from actrec._values.memory import words

from .columns import Column
from .mixing import RecordedRows
from .row_order import Cut, Order, Piece
from .sources import Files

#: Up to this many blocks, and this many bytes, are prefetched.
_AHEAD: Final = 16, 1 << 24


class Window:
    """Memory for the wanted rows of a window, each once, and, as they are taken, for those of the next window."""

    def __init__(self, parts: Sequence[RecordedRows], block: int, files: Files, rows: int) -> None:
        self._parts = parts
        self._block = block
        self._files = files
        self._memory = [column.empty(rows) for column in parts[0].columns]
        width = sum(column.width for column in parts[0].columns)
        self._ahead = max(1, min(_AHEAD[0], _AHEAD[1] // max(1, block * width)))
        self._unused = torch.arange(rows, device="cpu")
        #: The places of the rows in memory, in the order in which they are taken: of this window, and of the next one.
        self._slots = self._next = self._unused[:0]
        self._room = 0  # for how many rows of the next window there is room so far
        self._reading: Iterator[None] = iter(())

    def begin(self, pieces: Sequence[Piece], wanted: Tensor) -> None:
        """Begin to read the next window; ``wanted`` has the numbers of its rows, in the order in which they will be taken."""
        is_wanted = torch.zeros(sum(piece.many for piece in pieces), dtype=torch.bool, device="cpu")
        is_wanted[wanted] = True
        free = torch.cat([self._unused, self._slots])  # in the order in which they become free
        self._room = len(self._unused)
        places, self._unused = free[: len(wanted)], free[len(wanted) :]
        self._next = places[(is_wanted.cumsum(0) - 1)[wanted]]
        self._reading = self._read(pieces, is_wanted, places)

    def turn(self) -> None:
        """Switch to the next window, after reading the rest of it."""
        self._room = len(self._memory[0])
        next(self._reading, None)
        self._slots = self._next

    def take(self, low: int, high: int) -> list[Tensor]:
        """Return the wanted rows from number ``low`` to ``high``, as new tensors; then read others to their places."""
        taken = [memory.index_select(0, self._slots[low:high]) for memory in self._memory]
        self._room += high - low
        next(self._reading, None)
        return taken

    def _read(self, pieces: Sequence[Piece], is_wanted: Tensor, places: Tensor) -> Iterator[None]:
        """Read one piece after the other, as far as there is room."""
        announced = self._announced(pieces, is_wanted)
        coming = deque(islice(announced, self._ahead))
        in_order = bool((places.diff() == 1).all())  # as in the first window
        done = 0
        while coming:
            columns, read, rows = coming.popleft()
            while done + len(rows) > self._room:
                yield
            here = places[done : done + len(rows)]
            if in_order and len(rows) == len(read):
                for column, memory in zip(columns, self._memory, strict=True):
                    column.read(read.start, memory[int(here[0]) :][: len(rows)], self._files)
            else:
                self._fill(columns, read, rows, here)
            done += len(rows)
            coming.extend(islice(announced, 1))

    def _announced(
        self, pieces: Sequence[Piece], is_wanted: Tensor
    ) -> Iterator[tuple[Sequence[Column], range, Tensor]]:
        """Say that rows of a block will be read soon: those between the first and the last that is wanted, here or by any worker.

        Yields:
            The columns; the rows that are read; and which of them are wanted, in ascending order.
        """
        for piece in pieces:
            columns, kept = self._parts[piece.part]
            begin = piece.block * self._block + piece.first
            if kept is None:
                every = torch.arange(begin, begin + piece.many, device="cpu")
            else:
                every = kept.block(piece.block, self._files)[piece.first :][: piece.many]
            rows = every[is_wanted[piece.place : piece.place + piece.many]]
            if len(rows):
                ends = rows if self._files.between is None else every
                read = range(int(ends[0]), int(ends[-1]) + 1)
                for column in columns:
                    column.announce(read.start, len(read), self._files)
                yield columns, read, rows

    def _fill(self, columns: Sequence[Column], read: range, rows: Tensor, places: Tensor) -> None:
        """Read rows of a block, and put those that are wanted to their places."""
        for column, memory in zip(columns, self._memory, strict=True):
            found = column.rows(read, self._files)
            if len(rows) < len(read):
                found = found.index_select(0, rows - read.start)
            words(memory).index_copy_(0, places, words(found))


def batches(
    columns: Sequence[Column], window: Window, order: Order, epoch: int, mine: range
) -> Generator[Any, None, None]:
    """Yield the batches of an epoch that have some numbers, each a tensor, or a tuple if there are several layers."""
    rows_of, windows = order.epoch(epoch), enumerate(order.windows)

    def begin() -> list[Cut]:
        """Begin the next window that has rows of the batches, and return the parts that they take."""
        for number, bounds in windows:
            cuts = order.cuts(bounds, mine)
            if cuts:
                rows = rows_of.permutation(number, bounds)
                wanted = torch.cat([rows[cut.low : cut.high] for cut in cuts])
                window.begin(rows_of.pieces(number), wanted)
                return cuts
        return []

    begun: list[list[Tensor]] = []  # parts of a batch that continues in the next window
    coming = begin()
    while coming:
        window.turn()
        cuts, coming = coming, begin()
        place = 0
        for cut in cuts:
            begun.append(window.take(place, place := place + cut.high - cut.low))
            if cut.ends:
                yield _joined(columns, begun)
                begun.clear()


def _joined(columns: Sequence[Column], parts: list[list[Tensor]]) -> Any:
    found = [part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)]
    dressed = [column.dressed(rows) for column, rows in zip(columns, found, strict=True)]
    return dressed[0] if len(dressed) == 1 else tuple(dressed)
