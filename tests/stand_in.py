"""A stand-in for a GPU: its copies happen only when somebody waits for them.

Tensors on the CPU pass for tensors on the device; those of one dimension do not, so that a model can have
both. Until a copy has been waited for, its pinned memory holds poison. It stays poisoned if the copy on the
device was let go of too early, or if the stream that moves it did not wait for the stream that made it.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from actrec._calls import self_test, transfer
from actrec._calls.capture import Capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

POISON = 0xA5


class StandInEvent:
    def __init__(self, stream: StandInStream) -> None:
        self.stream = stream
        self.position = len(stream.work)
        self.clock = stream.device.clock

    def query(self) -> bool:
        if self.stream.device.is_quick():
            self.synchronize()
        return self.stream.done >= self.position

    def synchronize(self) -> None:
        self.stream.device.on_wait()
        while self.stream.done < self.position:
            self.stream.work[self.stream.done]()
            self.stream.done += 1


class StandInStream:
    def __init__(self, device: StandIn) -> None:
        self.device = device
        self.work: list[Callable[[], None]] = []
        self.done = 0
        self.seen = 0  # up to when it has waited for what the model computes

    def record_event(self) -> StandInEvent:
        return StandInEvent(self)

    def wait_event(self, event: StandInEvent) -> None:
        self.seen = max(self.seen, event.clock)


class StandIn:
    def __init__(self) -> None:
        self.tested = {torch.device("cpu"): True}
        self.clock = 0  # counts what the model, and actrec on its stream, have computed
        self.pinned_bytes = 0  # in use
        self.most_pinned = 1 << 40
        self.peak = 0
        self.copied: list[int] = []  # bytes of every copy
        self.streams: list[StandInStream] = []
        self.compute = StandInStream(self)
        self.is_quick: Callable[[], bool] = lambda: False  # whether a copy is done when asked
        self.on_wait: Callable[[], None] = lambda: None

    def is_used(self) -> bool:
        return True

    def has(self, tensor: Tensor) -> bool:
        return tensor.dim() != 1

    def current_stream(self, device: torch.device) -> StandInStream:
        return self.compute

    def new_stream(self, device: torch.device) -> StandInStream:
        self.streams.append(StandInStream(self))
        return self.streams[-1]

    def pinned(self, nbytes: int) -> Tensor:
        if self.pinned_bytes + nbytes > self.most_pinned:
            message = "the system locks no more"
            raise RuntimeError(message)
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._pin(nbytes)
        weakref.finalize(memory, self._pin, -nbytes)
        return memory

    def _pin(self, nbytes: int) -> None:
        self.pinned_bytes += nbytes
        self.peak = max(self.peak, self.pinned_bytes)

    def copy(self, stream: StandInStream, to: Tensor, source: Tensor) -> None:
        to.fill_(POISON)
        self.copied.append(len(to))
        there, here = weakref.ref(source), weakref.ref(to)
        made, seen = self.clock, stream.seen

        def work() -> None:
            source, to = there(), here()
            if source is not None and to is not None and seen >= made:
                to.copy_(source)

        stream.work.append(work)


@contextmanager
def standing_in(device: StandIn, budget: int = 1 << 20) -> Iterator[None]:
    """Let ``record()`` take ``device`` for what its values are on."""
    on_device, asked_for = transfer._on_device, Capture.asked_for

    def ticking(*args: object) -> Tensor:
        result = on_device(*args)
        device.clock += 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "CUDA", device)
        patch.setattr(self_test, "Offload", partial(transfer.Offload, budget=budget))
        patch.setattr(
            Capture, "asked_for", lambda *a, **kw: replace(asked_for(*a, **kw), direct=False)
        )
        patch.setattr(transfer, "_on_device", ticking)
        yield
