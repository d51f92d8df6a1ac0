"""Tensors of any kind, read in small blocks: the way through a recording in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BLOCK", "blocks", "dense"]

#: Elements read at a time: 250 kB of float64. They stay in the cache, and PyTorch starts no threads for so
#: few, which would spend more time waiting for each other than working. It would from 32,768 on.
BLOCK = 32_000


def dense(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor of any kind, as plain tensors; none if it has no data."""
    tensor = tensor.detach()
    if tensor.is_meta:
        return
    if tensor.is_nested:
        for part in tensor.unbind():
            yield from dense(part)
    elif tensor.is_quantized:
        yield tensor.dequantize()
    else:
        yield tensor if tensor.layout is torch.strided else tensor.to_dense()


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The elements of plain tensors of one shape, side by side, in flat blocks on the CPU.

    Nothing is copied beyond a block: a tensor that does not lie in memory in order is divided first.
    """
    first = tensors[0]
    if first.numel() > BLOCK and not all(tensor.is_contiguous() for tensor in tensors):
        longest = max(range(first.dim()), key=first.shape.__getitem__)
        halves = [tensor.tensor_split(2, longest) for tensor in tensors]
        for parts in zip(*halves, strict=True):
            yield from blocks(*parts)
    elif first.numel():
        yield from zip(*map(_flat, tensors), strict=True)


def _flat(tensor: Tensor) -> Iterator[Tensor]:
    for block in torch.split(tensor.reshape(-1), BLOCK):
        yield block.resolve_conj().resolve_neg().cpu()
