"""The part of CUDA that recording needs: a stream, an event, pinned memory, one copy. GPUs of AMD are included.

Everything that can go wrong, the order above all, is in ``transfer.py``, which the tests run on a
substitute of :class:`Cuda` whose copies happen only when a thread waits for them.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from actrec.errors import CaptureError


class Cuda:
    """The GPUs of this process."""

    def __init__(self) -> None:
        self.tested: dict[torch.device, bool] = {}  # whether asynchronous copies from it are right

    def is_used(self) -> bool:
        """Whether this process uses a GPU already. Before that, no tensor can be on one."""
        used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return used

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is on a GPU."""
        return tensor.is_cuda

    def current_stream(self, device: torch.device) -> Any:
        """Return the stream in which this thread computes on ``device``."""
        return torch.cuda.current_stream(device)

    def new_stream(self, device: torch.device) -> Any:
        """Return another stream on ``device``."""
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, nbytes: int) -> Tensor:
        """Return page-locked memory. When it is freed, PyTorch caches it for the next call.

        Raises:
            RuntimeError: the system cannot lock more memory.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, stream: Any, to: Tensor, source: Tensor) -> None:
        """Copy in ``stream``, whichever stream and GPU are current, without waiting."""
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)


CUDA: Final = Cuda()


def refuse_graph_capture() -> None:
    """Raise ``CaptureError`` while a CUDA graph is being captured: its replays run no hooks."""
    if CUDA.is_used() and torch.cuda.is_current_stream_capturing():
        message = (
            "a CUDA graph is being captured. Its replays call no hooks, and would overwrite what is recorded "
            "now. Record a call of the model outside of the capture, without the graph"
        )
        raise CaptureError(message)
