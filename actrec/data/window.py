"""Windows of rows, read into memory one after the other, and the batches that are cut out of their permuted rows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .columns import Column
from .mixing import Part
from .order import Order, Piece
from .sources import Files

__all__ = ["Window", "batches"]

#: So many blocks are announced to the system before one is read.
_AHEAD: Final = 16


class Window:
    """Memory that holds rows of one window after the other: those that are wanted, each of them once."""

    def __init__(self, parts: Sequence[Part], block: int, files: Files) -> None:
        self._parts = parts
        self._block = block
        self._files = files
        self._memory = [column.empty(0) for column in parts[0].columns]
        rows = min(block, max(len(part.columns[0]) for part in parts))
        self._scratch = [column.empty(rows) for column in parts[0].columns]
        self._slots = torch.empty(0, dtype=torch.int64, device="cpu")
        self._announced = 0

    def fill(self, pieces: Sequence[Piece], wanted: Tensor) -> None:
        """Read rows, in the order in which they lie; ``wanted`` has their numbers in any order, each once."""
        is_wanted = torch.zeros(sum(piece.many for piece in pieces), dtype=torch.bool, device="cpu")
        is_wanted[wanted] = True
        self._slots = (is_wanted.cumsum(0) - 1)[wanted]
        self._make_room(len(wanted))
        at = 0
        for number, piece in enumerate(pieces):
            self.announce(pieces, number + _AHEAD)
            rows = is_wanted[piece.place : piece.place + piece.many].nonzero()[:, 0] + piece.first
            if len(rows):
                self._read(piece, rows, at)
            at += len(rows)
        self._announced = 0

    def announce(self, pieces: Sequence[Piece], until: int) -> None:
        """Say that the blocks up to number ``until`` of the window that is filled next, or now, will be read soon."""
        for piece in pieces[self._announced : until]:
            first = piece.block * self._block
            for column in self._parts[piece.part].columns:
                column.announce(first, min(self._block, len(column) - first), self._files)
        self._announced = max(self._announced, until)

    def take(self, low: int, high: int) -> list[Tensor]:
        """The rows that were wanted from number ``low`` to ``high``, as new tensors."""
        return [memory.index_select(0, self._slots[low:high]) for memory in self._memory]

    def _read(self, piece: Piece, rows: Tensor, at: int) -> None:
        """Read rows of a block, in ascending order, to their place."""
        columns, kept = self._parts[piece.part]
        if kept is not None:
            rows = kept.block(piece.block, self._files)[rows]
        first, many = int(rows[0]), int(rows[-1] - rows[0]) + 1
        start = piece.block * self._block + first
        for column, memory, scratch in zip(columns, self._memory, self._scratch, strict=True):
            out = memory[at : at + len(rows)]
            if many == len(rows):
                column.read(start, out, self._files)
            else:
                column.read(start, scratch[:many], self._files)
                torch.index_select(scratch, 0, rows - first, out=out)

    def _make_room(self, rows: int) -> None:
        for number, column in enumerate(self._parts[0].columns):
            if len(self._memory[number]) < rows:
                self._memory[number] = column.empty(0)  # before there is more
                self._memory[number] = column.empty(rows)


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
    rows_of, windows = order.epoch(epoch), order.windows
    begun: list[list[Tensor]] = []  # parts of a batch that goes on in the next window
    for number, bounds in enumerate(windows):
        cuts = order.cuts(bounds, mine)
        if not cuts:
            continue
        rows = rows_of.permutation(number, bounds)
        window.fill(rows_of.pieces(number), torch.cat([rows[cut.low : cut.high] for cut in cuts]))
        del rows
        coming = rows_of.pieces(number + 1) if number + 1 < len(windows) else []
        place = 0
        for had, cut in enumerate(cuts, start=1):
            # The disk works on the next window meanwhile, evenly.
            window.announce(coming, len(coming) * had // len(cuts))
            begun.append(window.take(place, place + cut.high - cut.low))
            place += cut.high - cut.low
            if cut.ends:
                yield _joined(columns, begun)
                begun.clear()


def _joined(columns: Sequence[Column], parts: list[list[Tensor]]) -> Any:
    found = [part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)]
    dressed = [column.dressed(rows) for column, rows in zip(columns, found, strict=True)]
    return dressed[0] if len(dressed) == 1 else tuple(dressed)
