"""Reads tensors of any kind in small blocks, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dtensor import is_distributed

#: Elements read at a time: 250 kB of float64. They stay in the cache, and PyTorch starts no threads below 32,768
#: elements, which would spend more time waiting for each other than working.
BLOCK = 32_000


def dense(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of a tensor of any kind, as plain tensors; nothing if it has no data.

    For a ``DTensor``, the elements of this rank; nothing if it is partial, such as a part of a sum.
    """
    if is_distributed(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            return
        tensor = tensor.to_local()
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
    """Yield the elements of plain tensors of one shape, in parallel and in order, in flat blocks on the CPU.

    The ends of blocks depend only on the shape, so a sum over blocks is the same for any strides. Nothing larger than a
    block is copied.
    """
    number = tensors[0].numel()
    if number <= BLOCK:
        if number:
            yield tuple(map(_flat, tensors))
        return
    size = tensors[0].shape[0]
    rows = BLOCK * size // number  # that fit into a block
    if rows:
        split = [tensor.tensor_split(-(-size // rows)) for tensor in tensors]
        yield from (tuple(map(_flat, parts)) for parts in zip(*split, strict=True))
    else:
        for index in range(size):
            yield from blocks(*(tensor[index] for tensor in tensors))


def _flat(block: Tensor) -> Tensor:
    return block.reshape(-1).resolve_conj().resolve_neg().cpu().contiguous()
