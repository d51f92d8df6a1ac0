"""The rows of one window, read into memory: those that one worker needs, and each of them once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .columns import Column
    from .files import Files
    from .kept import Kept
    from .order import Piece

__all__ = ["Window"]

#: So many blocks are announced to the system before one is read.
_AHEAD = 16


class Window:
    """Memory that holds the rows of one window after the other."""

    def __init__(
        self, columns: Sequence[Column], kept: Kept | None, block: int, files: Files
    ) -> None:
        self._columns = columns
        self._files = files
        self._kept = kept
        self._block = block
        self._memory = [column.empty(0) for column in columns]
        self._scratch = [column.empty(0) for column in columns]
        self._slots = torch.empty(0, dtype=torch.int64, device="cpu")
        self._announced = 0

    def fill(self, pieces: Sequence[Piece], wanted: Tensor) -> None:
        """Read rows, in the order in which they lie; ``wanted`` has their numbers in any order, each once.

        What was not announced before is announced a few blocks ahead.
        """
        rows = sum(piece.many for piece in pieces)
        if len(wanted) == rows:
            ordered, self._slots = None, wanted
            bounds = [piece.place for piece in pieces] + [rows]
        else:
            ordered, order = wanted.sort()
            self._slots = torch.empty_like(order)
            self._slots[order] = torch.arange(len(order), device="cpu")
            places = torch.tensor([piece.place for piece in pieces], device="cpu")
            bounds = [*torch.searchsorted(ordered, places).tolist(), len(ordered)]
        self._make_room(len(wanted))
        for number, piece in enumerate(pieces):
            if number + _AHEAD > self._announced:
                self.expect(pieces[self._announced : number + 2 * _AHEAD])
            low, high = bounds[number : number + 2]
            if high > low:
                some = None if ordered is None else ordered[low:high] - piece.place
                self._read(piece, some, low, high)
        self._announced = 0

    def take(self, low: int, high: int) -> list[Tensor]:
        """The rows that were wanted from number ``low`` to ``high``, as new tensors."""
        return [memory.index_select(0, self._slots[low:high]) for memory in self._memory]

    def expect(self, pieces: Sequence[Piece]) -> None:
        """Announce pieces of the window that is filled next, those that follow what was announced so far."""
        for piece in pieces:
            self.announce(piece)
        self._announced += len(pieces)

    def announce(self, piece: Piece) -> None:
        """Say that a piece will be read soon."""
        for column in self._columns:
            first, many = piece.block * self._block, piece.many
            if self._kept is None:
                first += piece.first
            else:
                many = min(self._block, len(column) - first)
            column.announce(first, many, self._files)

    def _read(self, piece: Piece, some: Tensor | None, low: int, high: int) -> None:
        """Read rows of a piece to their place."""
        start = piece.block * self._block
        if self._kept is not None:
            rows = self._kept.block(piece.block, self._files)[
                piece.first : piece.first + piece.many
            ]
            rows = rows if some is None else rows[some]
        elif some is not None:
            rows = some + piece.first
        else:
            for column, memory in zip(self._columns, self._memory, strict=True):
                column.read(start + piece.first, memory[low:high], self._files)
            return
        first, last = int(rows[0]), int(rows[-1])
        for number, column in enumerate(self._columns):
            scratch = self._scratch[number][: last - first + 1]
            column.read(start + first, scratch, self._files)
            torch.index_select(scratch, 0, rows - first, out=self._memory[number][low:high])

    def _make_room(self, rows: int) -> None:
        for number, column in enumerate(self._columns):
            if len(self._memory[number]) < rows:
                self._memory[number] = column.empty(0)  # before there is more
                self._memory[number] = column.empty(rows)
            if not len(self._scratch[number]):
                self._scratch[number] = column.empty(min(self._block, len(column)))
