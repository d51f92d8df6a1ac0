"""Batches: what windows of permuted rows are cut into."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from torch import Tensor

    from .columns import Column
    from .order import Order, Piece
    from .window import Window

__all__ = ["batches"]


def batches(
    columns: Sequence[Column], window: Window, order: Order, epoch: int, mine: range
) -> Generator[Any, None, None]:
    """Make some of the batches of an epoch.

    Args:
        columns: the layers.
        window: what holds the rows of one window after the other.
        order: how the recording is cut up.
        epoch: its number.
        mine: the numbers of the batches.

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
        window.fill(rows_of.pieces(bounds), torch.cat([rows[cut.low : cut.high] for cut in cuts]))
        del rows
        following = windows[number + 1 : number + 2]
        coming = [piece for after in following for piece in rows_of.pieces(after)]
        place = 0
        for cut, pieces in zip(cuts, _spread(coming, len(cuts)), strict=True):
            window.expect(pieces)
            begun.append(window.take(place, place + cut.high - cut.low))
            place += cut.high - cut.low
            if cut.ends:
                yield _joined(columns, begun)
                begun.clear()


def _joined(columns: Sequence[Column], parts: list[list[Tensor]]) -> Any:
    found = [part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)]
    dressed = [column.dressed(rows) for column, rows in zip(columns, found, strict=True)]
    return dressed[0] if len(dressed) == 1 else tuple(dressed)


def _spread(pieces: list[Piece], many: int) -> Iterator[list[Piece]]:
    """The pieces in so many portions, one after the other."""
    bounds = [len(pieces) * i // many for i in range(many + 1)]
    return (pieces[low:high] for low, high in pairwise(bounds))
