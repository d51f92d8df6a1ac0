"""Copies values from a GPU into memory while the model continues.

A tensor is copied in three steps:

1. It is copied on its device, in the stream in which the model computes: the next operation of the model may
   write to the original at once.
2. A separate stream waits for that copy, and copies its bytes into pinned memory.
3. The host waits for the event after step 2, and copies the bytes into ordinary memory. Then the copy on the
   device and the pinned memory are freed.

:meth:`Offload.start` returns the memory of step 3 before it is filled. Nobody sees it then: the call that it
belongs to waits in a queue, after its copies, and is appended to its layer only when its turn comes. The queue is
processed in order: all of it at the end of each pass, before the recording is read, and at the end of the block;
before another copy, the copies that have arrived already, and as many more as make room in the budget.

The copy on the device is freed only after its event was seen, so that its memory is never reused while it is
being read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from actrec._values.modes import normal_mode_unseen
from actrec._values.snapshot import PLAIN, snapshot
from actrec.errors import CaptureError

from .device import Cuda
from .passes import Passes

#: So many bytes may be in flight at a time: on the device, and again in pinned memory.
BUDGET: Final = 512 << 20


class _Copy(NamedTuple):
    """A copy in flight, as bytes."""

    source: Tensor  # on the device
    pinned: Tensor
    memory: Tensor
    done: Any  # the event after the copy from `source` to `pinned`


class _Call(NamedTuple):
    """A call whose values were copied before it."""

    put: Callable[[], None]  # appends them to their layers
    name: str


class Offload:
    """Moves the values of one block into memory. Any thread may use it.

    ``is_right`` tells whether asynchronous copies from a GPU are right; from other GPUs, this moves nothing.
    """

    def __init__(
        self,
        passes: Passes,
        device: Cuda,
        is_right: Callable[[torch.device], bool] = lambda _: True,
        budget: int = BUDGET,
    ) -> None:
        self._passes = passes
        self._device = device
        self._is_right = is_right
        self._budget = budget
        self._streams: dict[torch.device, Any] = {}
        self._queue: deque[_Copy | _Call] = deque()
        self._in_flight = 0  # bytes of the copies in the queue
        self._lock = threading.RLock()
        self._at_work = False  # whether the queue is being processed
        self._error: Exception | None = None  # an error of the queue, until it is raised
        self._broken: CaptureError | None = None  # a copy has failed: no more is moved
        self.trusted: dict[torch.device, bool] = {}  # the GPUs that tensors came from

    def takes(self, tensor: Tensor) -> bool:
        """Return whether :meth:`start` can move ``tensor``: it is plain, and on a GPU that is trusted."""
        if not (self._device.has(tensor) and type(tensor) in PLAIN):
            return False
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return False
        where = tensor.device
        if where not in self.trusted:
            self.trusted[where] = self._is_right(where)
        return self.trusted[where]

    def start(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Begin to move ``tensor`` as it is now, cast to ``dtype`` on its device first.

        Args:
            tensor: one for which :meth:`takes` is true.
            dtype: ``None`` keeps the tensor's own.

        Returns:
            A tensor in memory, of the same shape. Its content is undefined until the queue has been processed.

        Raises:
            CaptureError: an earlier copy has failed, or there is no memory left on the device.
        """
        with self._lock, normal_mode_unseen():
            self._refuse_if_broken()
            try:
                copied = _on_device(tensor.detach(), dtype)
            except torch.OutOfMemoryError:
                self._work_off()  # which frees the copies on the device
                return _moved(tensor.detach(), dtype)
            source = torch.empty(0, dtype=torch.uint8, device=copied.device)
            source.set_(copied.untyped_storage())  # all of it
            memory = torch.empty(len(source), dtype=torch.uint8, device="cpu")
            self._work_off(before=len(source))
            self._refuse_if_broken()
            if not self._send(source, memory):
                memory.copy_(source)  # the model waits
            result = torch.empty(0, dtype=copied.dtype, device="cpu")
            return result.set_(memory.untyped_storage(), 0, copied.shape, copied.stride())

    def keep(self, put: Callable[[], None], name: str) -> None:
        """Run ``put``, which appends the values of a call, when the tensors that :meth:`start` returned are filled.

        This happens at the latest when the pass ends; outside of a pass, now. If it raises, a note on the error has the name
        of the call: the model is elsewhere by then.
        """
        with self._lock:
            self._refuse_if_broken()
            if not self._queue:
                put()
                return
            self._queue.append(_Call(put, name))
        if not self._passes.running:
            self.deliver()

    def finish(self) -> None:
        """Wait until everything is in its layer. An error is raised by the next :meth:`deliver`."""
        with self._lock:
            if not self._at_work:  # else a container's append(), run by the queue, reads its layer
                self._work_off()

    def deliver(self) -> None:
        """Wait until everything is in its layer.

        Raises:
            CaptureError: a copy has failed.
            Exception: whatever the user's container, or the writer of a path, has raised. Raised once.
        """
        self.finish()
        with self._lock:
            error = self._error
            if error is not None and not self._at_work:
                self._error = None
                raise error

    # --- The queue -------------------------------------------------------------------------------------

    def _send(self, source: Tensor, memory: Tensor) -> bool:
        """Queue a copy. Return whether there is pinned memory for it."""
        if len(source) > self._budget:
            return False
        try:
            pinned = self._device.pinned(len(source))
        except RuntimeError:
            return False
        where = source.device
        if where not in self._streams:
            self._streams[where] = self._device.new_stream(where)
        stream = self._streams[where]
        stream.wait_event(self._device.current_stream(where).record_event())
        self._device.copy(stream, pinned, source)
        self._queue.append(_Copy(source, pinned, memory, stream.record_event()))
        self._in_flight += len(source)
        return True

    def _work_off(self, before: int | None = None) -> None:
        """Process the whole queue; or, ``before`` a copy of so many bytes, what has arrived, and what makes room for it."""
        self._at_work = True
        try:
            with normal_mode_unseen():
                while self._queue and (before is None or self._is_next_due(before)):
                    self._next()
        except Exception as error:  # noqa: BLE001  # of the device: raised as a CaptureError
            self._lose(error)
        finally:
            self._at_work = False

    def _is_next_due(self, before: int) -> bool:
        item = self._queue[0]
        is_full = self._in_flight + before > self._budget
        return is_full or not isinstance(item, _Copy) or item.done.query()

    def _next(self) -> None:
        item = self._queue[0]
        if isinstance(item, _Copy):
            item.done.synchronize()
            item.memory.copy_(item.pinned)  # an interrupt may cause this to happen twice
            self._queue.popleft()
            self._in_flight -= len(item.source)
            return
        self._queue.popleft()  # before the call, which must not happen twice
        try:
            item.put()
        except Exception as error:  # noqa: BLE001  # raised by deliver()
            error.add_note(f"raised while actrec kept {item.name}")
            self._error = self._error or error

    def _lose(self, error: Exception) -> None:
        """A copy has failed: drop its call, and all after it."""
        lost = sum(not isinstance(item, _Copy) for item in self._queue)
        self._queue.clear()
        self._in_flight = 0
        self._broken = CaptureError(
            f"record(): copying values from the device into memory failed: {error}. The {lost} calls that were being "
            "copied are not in the recording, those before them are, and nothing more is recorded in this block. To "
            "keep less, use a transform"
        )
        self._broken.__cause__ = error
        self._error = self._broken

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            self._error = None
            raise self._broken


def _on_device(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a copy of ``tensor`` on its device, cast. It occupies its whole storage."""
    return snapshot(tensor) if dtype is None else tensor.to(dtype, copy=True)


def _moved(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Copy the tensor while the model waits. This takes no memory on the device, unless the tensor has gaps."""
    try:
        moved = tensor.to("cpu", copy=True)
    except torch.OutOfMemoryError as error:
        message = (
            f"there is no memory left on {tensor.device} for a copy of a tensor of shape {tuple(tensor.shape)} "
            f"({tensor.nbytes:,} bytes). Take less of it with a transform, or use smaller batches"
        )
        raise CaptureError(message) from error
    return moved if dtype is None else moved.to(dtype)
