"""Operations on a ``DTensor`` that use only the local shard of each rank, without communication."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import TypeIs

from actrec._torch import if_imported, shard_order
from actrec.errors import CaptureError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # which takes seconds to import


def is_distributed(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether ``tensor`` is a ``DTensor``, of which each rank has a shard."""
    if type(tensor) is Tensor:
        return False
    kind = if_imported("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def on_part(tensor: DTensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a ``DTensor`` like this one, whose local shard is ``change(shard)``. No rank communicates.

    Its own operators may communicate: depending on the version of PyTorch, ``clone()`` or ``detach()`` reduces partial sums,
    or loses the kind of a partial placement.

    Raises:
        CaptureError: a dimension is sharded several times, in another order than that of the mesh.
    """
    if any(dims != sorted(dims) for dims in shard_order(tensor)):
        message = (
            f"a DTensor that is sharded in another order than that of its mesh ({tensor.placements}) cannot be kept. "
            "Redistribute it in the model"
        )
        raise CaptureError(message)
    with torch.no_grad():
        part = change(tensor.to_local())
    return type(tensor).from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        shape=tensor.shape,
        stride=tensor.stride(),
        run_check=False,
    )


def detached(tensor: Tensor) -> Tensor:
    """Return ``tensor.detach()``. No rank communicates."""
    return on_part(tensor, Tensor.detach) if is_distributed(tensor) else tensor.detach()


def cloned(tensor: Tensor) -> Tensor:
    """Return a clone. No rank communicates."""
    if not is_distributed(tensor):
        return tensor.clone()
    if tensor.requires_grad and torch.is_grad_enabled():  # keeps the graph
        return tensor.to(tensor.dtype, copy=True)
    return on_part(tensor, torch.clone)
