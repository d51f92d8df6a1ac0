"""Memory for what a worker process gives to its parent.

A ``DataLoader`` copies what its workers make into shared memory, which costs more than to make it. What is
in shared memory already is sent as it is. PyTorch makes some for its own use, by a private function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ["to_give"]

_new_shared: Any = getattr(torch.UntypedStorage, "_new_shared", None)


def to_give(rows: int, width: int) -> Tensor:
    """Memory for so many rows of so many bytes: shared memory, if this is a worker process."""
    if not rows * width or _new_shared is None or get_worker_info() is None:
        return torch.empty((rows, width), dtype=torch.uint8, device="cpu")
    memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    return memory.set_(_new_shared(rows * width), 0, torch.Size((rows, width)))  # type: ignore[call-overload,no-any-return]
