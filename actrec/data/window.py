"""Rows of one window after the other, and the batches that are cut out of their permuted rows.

The next window is read evenly, a little with each batch: its rows come to the places of those that were taken.
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
from .epochs import Cut, Order, Piece
from .mixing import Part
from .sources import Files

#: So many blocks are announced before the first of them is read, and so many bytes.
_AHEAD: Final = 16, 1 << 24


class Window:
    """Memory that holds the rows of a window that are wanted, each of them once, and ever more of the next window.

    Args:
        parts: the rows of each recording.
        block: how many rows a block has.
        files: those that are open.
        rows: for how many there is room.
    """

    def __init__(self, parts: Sequence[Part], block: int, files: Files, rows: int) -> None:
        self._parts = parts
        self._block = block
        self._files = files
        self._memory = [column.empty(rows) for column in parts[0].columns]
        width = sum(column.width for column in parts[0].columns)
        self._ahead = max(1, min(_AHEAD[0], _AHEAD[1] // max(1, block * width)))
        many = min(block, max(len(part.columns[0]) for part in parts))
        self._scratch = [column.empty(many) for column in parts[0].columns]
        self._unused = torch.arange(rows, device="cpu")
        #: Where the rows are, in the order in which they are taken: those of this window, and of the next one.
        self._slots = self._next = self._unused[:0]
        self._room = 0  # for so many rows of the next window
        self._reading: Iterator[None] = iter(())

    def begin(self, pieces: Sequence[Piece], wanted: Tensor) -> None:
        """Begin to read the next window; ``wanted`` has the numbers of its rows, each once, in the order in which they are taken."""
        is_wanted = torch.zeros(sum(piece.many for piece in pieces), dtype=torch.bool, device="cpu")
        is_wanted[wanted] = True
        free = torch.cat([self._unused, self._slots])  # in the order in which they become so
        self._room = len(self._unused)
        places, self._unused = free[: len(wanted)], free[len(wanted) :]
        self._next = places[(is_wanted.cumsum(0) - 1)[wanted]]
        self._reading = self._read(pieces, is_wanted, places)

    def turn(self) -> None:
        """Go on to the next window, the rest of which is read now."""
        self._room = len(self._memory[0])
        next(self._reading, None)
        self._slots = self._next

    def take(self, low: int, high: int) -> list[Tensor]:
        """The rows that were wanted from number ``low`` to ``high``, as new tensors; then others are read to their places."""
        taken = [memory.index_select(0, self._slots[low:high]) for memory in self._memory]
        self._room += high - low
        next(self._reading, None)
        return taken

    def _read(self, pieces: Sequence[Piece], is_wanted: Tensor, places: Tensor) -> Iterator[None]:
        """Read one piece after the other, in the order in which they lie, as far as there is room."""
        announced = self._announced(pieces, is_wanted)
        coming = deque(islice(announced, self._ahead))
        done = 0
        while coming:
            columns, rows, read = coming.popleft()
            while done + len(rows) > self._room:
                yield
            self._fill(columns, rows, read, places[done : done + len(rows)])
            done += len(rows)
            coming.extend(islice(announced, 1))

    def _announced(
        self, pieces: Sequence[Piece], is_wanted: Tensor
    ) -> Iterator[tuple[Sequence[Column], Tensor, range]]:
        """Say that rows of a block will be read soon: those between the first and the last that is wanted, here or by any worker.

        Yields:
            The columns; the rows that are wanted, in ascending order; and those that are read.
        """
        for piece in pieces:
            wanted = is_wanted[piece.place : piece.place + piece.many]
            if not bool(wanted.any()):
                continue
            columns, kept = self._parts[piece.part]
            every = torch.arange(piece.first, piece.first + piece.many, device="cpu")
            every = every if kept is None else kept.block(piece.block, self._files)[every]
            every += piece.block * self._block
            rows = every[wanted]
            first, last = (rows if self._files.between is None else every)[[0, -1]].tolist()
            for column in columns:
                column.announce(first, last - first + 1, self._files)
            yield columns, rows, range(first, last + 1)

    def _fill(self, columns: Sequence[Column], rows: Tensor, read: range, places: Tensor) -> None:
        """Read rows of a block, and put those that are wanted to their places."""
        first, many = read.start, len(read)
        in_place = many == len(rows) and bool((places.diff() == 1).all())  # as in the first window
        for column, memory, scratch in zip(columns, self._memory, self._scratch, strict=True):
            place = int(places[0])
            found = memory[place : place + many] if in_place else scratch[:many]
            column.read(first, found, self._files)
            if not in_place:
                found = found if many == len(rows) else found.index_select(0, rows - first)
                words(memory).index_copy_(0, places, words(found))


def batches(
    columns: Sequence[Column], window: Window, order: Order, epoch: int, mine: range
) -> Generator[Any, None, None]:
    """Make some of the batches of an epoch.

    Args:
        columns: The layers.
        window: What holds the rows of one window after the other.
        order: How the recording is cut up.
        epoch: Its number.
        mine: The numbers of the batches.

    Yields:
        A tensor, or a tuple of tensors where there are several layers.
    """
    rows_of, windows = order.epoch(epoch), enumerate(order.windows)

    def begin() -> list[Cut]:
        """Begin the next window that has any of the batches, and return what they have of it."""
        for number, bounds in windows:
            cuts = order.cuts(bounds, mine)
            if cuts:
                rows = rows_of.permutation(number, bounds)
                wanted = torch.cat([rows[cut.low : cut.high] for cut in cuts])
                window.begin(rows_of.pieces(number), wanted)
                return cuts
        return []

    begun: list[list[Tensor]] = []  # parts of a batch that goes on in the next window
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
