"""From a GPU into memory while the model goes on.

A tensor takes this way:

1. It is copied on its device, in the stream in which the model computes: the next operation of the model may
   write to the original at once.
2. A stream of our own waits for that copy, and copies its bytes into pinned memory.
3. The host waits for the event behind that, and copies the bytes into ordinary memory. The copy on the
   device and the pinned memory are free again.

:meth:`Offload.start` returns the memory of step 3 before it is filled. Nobody sees it then: the call that it
belongs to stands in a queue behind its copies, and comes to its layer only from there. The queue is worked off
in order, by whoever needs what is in it: at the end of each pass, before a look at the recording, and at
the end of the block all of it; before another copy, as much as is there without waiting, and as makes
room in the budget.

The host lets go of the copy on the device only when it has seen the event, so that its memory is never
given to somebody else while it is being read.
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

#: So many bytes may be on their way at a time: on the device, and again in pinned memory.
BUDGET: Final = 512 << 20


class _Copy(NamedTuple):
    """A tensor on its way, as bytes."""

    source: Tensor  # on the device
    pinned: Tensor
    memory: Tensor
    done: Any  # the event behind the copy from the one into the other


class Offload:
    """Moves what the layers of one block return into memory. Any thread may use it.

    ``is_right`` says of a GPU whether copies from it come out right; of another one, nothing is moved.
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
        self._queue: deque[_Copy | Callable[[], None]] = deque()
        self._in_flight = 0  # bytes of the copies in the queue
        self._lock = threading.RLock()
        self._at_work = False  # on the queue
        self._error: Exception | None = None  # what went wrong there, until it is raised
        self._broken: CaptureError | None = None  # a copy has failed, and nothing more is moved
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
            tensor: one that :meth:`takes` is true of.
            dtype: ``None`` keeps the tensor's own.

        Returns:
            A tensor in memory, of the same shape. What is in it is undefined before the queue has been worked off.

        Raises:
            CaptureError: an earlier copy has failed, or there is no memory left on the device.
        """
        with self._lock, normal_mode_unseen():
            self._refuse_if_broken()
            try:
                copied = _on_device(tensor.detach(), dtype)
            except torch.OutOfMemoryError:
                self._work_off()  # and lets go of the copies that are on the device
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

    def keep(self, call: Callable[[], None]) -> None:
        """Run ``call``, which puts values into their layers, when what :meth:`start` returned for them is filled.

        That is at the latest when the pass ends; outside of a pass, now.
        """
        with self._lock:
            self._refuse_if_broken()
            if not self._queue:
                call()
                return
            self._queue.append(call)
        if not self._passes.running:
            self.deliver()

    def finish(self) -> None:
        """Wait until everything is in its layer. What goes wrong is raised by the next :meth:`deliver`."""
        with self._lock:
            if not self._at_work:  # or else a container that is given a call looks at its layer
                self._work_off()

    def deliver(self) -> None:
        """Wait until everything is in its layer.

        Raises:
            CaptureError: a copy has failed.
            Exception: whatever a container of the user's, or the writer of a path, has raised. Once.
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
        """Work off the queue; ``before`` a copy of so many bytes, what is there, and what makes room for it."""
        self._at_work = True
        try:
            with normal_mode_unseen():
                while self._queue and (before is None or self._is_next_due(before)):
                    self._next()
        except Exception as error:  # noqa: BLE001  # of the device: said in our words
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
            item.memory.copy_(item.pinned)  # which an interrupt may let happen twice
            self._queue.popleft()
            self._in_flight -= len(item.source)
            return
        self._queue.popleft()  # first, for this must not happen twice
        try:
            item()
        except Exception as error:  # noqa: BLE001  # raised by deliver()
            self._error = self._error or error

    def _lose(self, error: Exception) -> None:
        """A copy has failed: neither its call nor one behind it must be seen."""
        lost = sum(not isinstance(item, _Copy) for item in self._queue)
        self._queue.clear()
        self._in_flight = 0
        self._broken = CaptureError(
            f"record(): copying values from the device into memory failed: {error}. The {lost} calls that were on their "
            "way are not in the recording, what came before them is, and nothing more is recorded in this block. To "
            "keep less, use a transform"
        )
        self._broken.__cause__ = error
        self._error = self._broken

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            self._error = None
            raise self._broken


def _on_device(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of ``tensor`` on its device, cast. It fills its storage."""
    return snapshot(tensor) if dtype is None else tensor.to(dtype, copy=True)


def _moved(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The blocking way, which takes no memory on the device, unless the tensor has gaps."""
    try:
        moved = tensor.to("cpu", copy=True)
    except torch.OutOfMemoryError as error:
        message = (
            f"there is no memory left on {tensor.device} for a copy of a tensor of shape {tuple(tensor.shape)} "
            f"({tensor.nbytes:,} bytes). Take less of it with a transform, or use smaller batches"
        )
        raise CaptureError(message) from error
    return moved if dtype is None else moved.to(dtype)
