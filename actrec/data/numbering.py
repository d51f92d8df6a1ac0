"""Numbers for what is different, by runs: of a million calls that follow each other alike, one is looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def numbered(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """Number the different lines of some columns, in the order in which they come first.

    >>> numbered(torch.tensor([5, 5, 2, 5]), torch.tensor([0, 0, 0, 1]))
    (tensor([0, 0, 1, 2]), tensor([0, 2, 3]))

    Args:
        *columns: integers, ``(lines,)`` each.

    Returns:
        The number of each line, and of each number the first line that has it.
    """
    lines = torch.stack(columns, 1)
    starts = torch.cat([lines.new_ones(min(1, len(lines))) > 0, (lines[1:] != lines[:-1]).any(1)])
    heads = starts.nonzero()[:, 0]
    found = torch.zeros_like(heads)
    for column in lines[heads].unbind(1):
        _, own = torch.unique(column, return_inverse=True)
        _, found = torch.unique(found * len(heads) + own, return_inverse=True)
    places = torch.arange(len(heads), device="cpu")
    many = len(torch.unique(found))
    firsts = torch.full((many,), len(heads), device="cpu").scatter_reduce_(0, found, places, "amin")
    order = firsts.argsort()
    numbers = torch.empty_like(order).index_copy_(0, order, places[:many])
    return numbers[found][starts.cumsum(0) - 1], heads[firsts[order]]
