"""FSDP frees the storages of weights between their uses, and allocates them again: a tensor may lie in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actrec._torch import if_imported
from actrec.errors import CaptureError

from .dtensor import is_distributed


def frees_weights(model: nn.Module) -> bool:
    """Return whether FSDP frees the storages of weights of ``model``, or of a model that it is a part of."""
    is_possible = bool(_kinds())  # else the model need not be walked
    return is_possible and (any(sharded(model)) or any(map(is_distributed, model.parameters())))


def sharded(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that FSDP shards, with their names."""
    kinds = _kinds()
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def _kinds() -> tuple[Any, ...]:
    """Return the classes of sharded modules; none if FSDP was not imported."""
    names = ("FullyShardedDataParallel", "FSDPModule")
    kinds = (if_imported("torch.distributed.fsdp", name) for name in names)
    return tuple(kind for kind in kinds if kind is not None)


def refuse_freed(tensor: Tensor) -> None:
    """Raise ``CaptureError`` for a weight that FSDP has freed: reading it would kill the process."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
    if plain and tensor.nbytes and not tensor.untyped_storage().nbytes():
        message = (
            "its memory is freed. FSDP frees the weights of a module after its call; shard the module that uses "
            "them, not the one that returns them"
        )
        raise CaptureError(message)
