"""The seam between asynchronous copies and a device: streams, events, pinned memory, one copy.

The protocols are a part of what ``torch.cuda`` offers, so :class:`Cuda` adds next to nothing to it.
Everything that can be got wrong, the order above all, is in ``_offload.py``, which the tests run
on a stand-in for a device whose copies happen only when somebody waits for them.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from actrec.errors import CaptureError

__all__ = ["SWITCH", "Cuda", "Device", "Event", "Stream", "refuse_graph_capture", "with_streams"]


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether the work before it is done."""

    def synchronize(self) -> None:
        """Wait until it is."""


class Stream(Protocol):
    """Work of a device that is done in order."""

    def record_event(self) -> Event:
        """Return the point after all work so far."""

    def wait_event(self, event: Event) -> None:
        """Let all further work wait for a point of another stream. The caller does not wait."""


class Device(Protocol):
    """What moves tensors from devices of one kind into memory while the program goes on."""

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is on one of them."""

    def current_stream(self, device: torch.device) -> Stream:
        """The stream that this thread gives its work on ``device`` to."""

    def new_stream(self, device: torch.device) -> Stream:
        """A stream of our own."""

    def pinned(self, nbytes: int) -> Tensor:
        """Return so many bytes that the device can write to by itself."""

    def copy(self, stream: Stream, to: Tensor, source: Tensor, start: int) -> None:
        """Let ``stream`` copy bytes of ``source`` from ``start`` on into all of ``to``."""


class Cuda:
    """GPUs, those of AMD included."""

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is on a GPU."""
        return tensor.is_cuda

    def current_stream(self, device: torch.device) -> Stream:
        """The stream that the model computes on."""
        return torch.cuda.current_stream(device)  # type: ignore[return-value]  # it takes its own events

    def new_stream(self, device: torch.device) -> Stream:
        """A stream beside it."""
        return torch.cuda.Stream(device)  # type: ignore[return-value, no-untyped-call]  # likewise

    def pinned(self, nbytes: int) -> Tensor:
        """Page-locked memory. PyTorch keeps it for the next one when we are done."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, stream: Stream, to: Tensor, source: Tensor, start: int) -> None:
        """Copy on ``stream``, whatever stream and GPU are the current ones."""
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            to.copy_(source[start : start + len(to)], non_blocking=True)


#: The variable of the environment that turns asynchronous copies on, with ``1``. They stay off until
#: ``tests/benchmarks/cuda.py`` has been run on a GPU: a value that is late is better than one that is wrong.
SWITCH = "ACTREC_ASYNC_COPIES"


def with_streams() -> Device | None:
    """What this PyTorch can copy from asynchronously, if anything.

    It does not ask whether there is a GPU: that would take time, and begin to use it.
    """
    is_on = os.environ.get(SWITCH) == "1" and torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    return Cuda() if is_on else None


def refuse_graph_capture() -> None:
    """Raise ``CaptureError`` while a CUDA graph is being captured: its replays run no hooks."""
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if is_used and torch.cuda.is_current_stream_capturing():
        message = (
            "a CUDA graph is being captured. Its replays call no hooks, and would write over what was recorded "
            "now. Record a call of the model outside of the capture, without the graph"
        )
        raise CaptureError(message)
