"""Staging: the little pinned memory through which everything passes, within a budget of bytes.

Memory that a device can write to is locked, and slow to get. So it is got in blocks, up to a budget, and
used again and again: a block takes pieces one behind the other, and is empty when all have left it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["BLOCK", "BUDGET", "Piece", "Staging"]

BUDGET: Final = 512 << 20
BLOCK: Final = 32 << 20  # PyTorch gives pinned memory in powers of two: this one has no waste
_ALIGN: Final = 64


class _Block:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.used = 0  # up to where pieces have been given out
        self.pieces = 0


class Piece(NamedTuple):
    """A part of a block, until it is given back."""

    memory: Tensor
    block: _Block

    def give_back(self) -> None:
        """Nobody writes to or reads from it any more."""
        self.block.pieces -= 1
        if not self.block.pieces:
            self.block.used = 0


class Staging:
    """Gives out pieces of pinned memory."""

    def __init__(self, pinned: Callable[[int], Tensor], budget: int) -> None:
        self._pinned = pinned
        self._size = max(1, min(BLOCK, budget // 16))
        self._most = budget // self._size
        self._blocks: list[_Block] = []

    def take(self, nbytes: int) -> Piece | None:
        """Return a piece of ``nbytes``, or a whole block if that is less; ``None`` if all are in use."""
        nbytes = min(nbytes, self._size)
        block = next((b for b in self._blocks if b.used + nbytes <= self._size), None)
        block = block or self._another()
        if block is None:
            return None
        piece = Piece(block.memory[block.used : block.used + nbytes], block)
        block.used += -(-nbytes // _ALIGN) * _ALIGN
        block.pieces += 1
        return piece

    def _another(self) -> _Block | None:
        if len(self._blocks) >= self._most:
            return None
        try:
            block = _Block(self._pinned(self._size))
        except RuntimeError:  # the system locks no more: make do with what there is
            self._most = len(self._blocks)
            return None
        self._blocks.append(block)
        return block
