"""Asynchronous copies from a device into memory: the model goes on while its values are on their way.

A value takes this way:

1. In the hook it is snapshotted on its device, on the stream that the model computes on. The next
   operation of the model may write to the original at once.
2. A stream of our own waits for the snapshot, and copies it into pinned staging memory.
3. The host waits for the copy, if it is not done yet, and moves the bytes on into ordinary memory. Then
   snapshot and staging are free again.

What :meth:`Offload.start` returns is therefore an empty tensor, filled in step 3. Nobody sees it before:
a call is not put into its layer but queued behind its copies, and the queue is worked off in order.
:meth:`Offload.finish` does that at the end of every pass, whenever somebody looks at a layer from Python,
and at the end of the block. In between, what is there is worked off as calls come in, without waiting.

The host lets go of a snapshot only when it has seen the copy end, so the memory is never given to
somebody else while it is being read.

A container often returns the very tensor that its last child returned. That is not moved twice: it is
snapshotted, compared with the first snapshot on the device, and dropped if equal. The comparison is needed,
for what writes past PyTorch (a Triton kernel, ``.data``) leaves no trace that could be asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from actrec._values.snapshot import check, normal_mode, snapshot
from actrec.errors import CaptureError

from .device import with_streams
from .staging import BUDGET, Piece, Staging

if TYPE_CHECKING:
    from collections.abc import Callable

    from actrec._values.containers import Value

    from .capture import Capture
    from .device import Device, Event, Stream
    from .passes import Passes

__all__ = ["Deferred", "Offload"]

_PLAIN: Final = {Tensor, torch.nn.Parameter}

#: Up to so many bytes it is quicker to move a tensor again than to compare it.
SMALL: Final = 1 << 16


# --- What is queued --------------------------------------------------------------------------------


class _Sent(NamedTuple):
    """Bytes that a stream is copying into staging memory."""

    start: int
    piece: Piece
    done: Event


class _Copy:
    """One tensor on its way."""

    def __init__(self, source: Tensor) -> None:
        self.key = 0  # the id of the original
        self.form = source.dtype, source.shape, source.stride()
        self.bytes: Tensor | None = _bytes(source)  # on the device, until they are here
        self.size = len(self.bytes)
        self.ready: Event | None = None  # when the snapshot is made
        self.result = torch.empty(0, dtype=source.dtype, device="cpu")
        self.sent: deque[_Sent] = deque()
        self.echoes: list[_Echo] = []
        self._here: Tensor | None = None

    def is_done(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(sent.done.query() for sent in self.sent)

    def is_staged(self) -> bool:
        """Whether it takes staging memory."""
        return bool(self.sent)

    def land(self) -> None:
        """Move the oldest bytes that were sent out of the staging memory."""
        start, piece, done = self.sent[0]
        done.synchronize()
        self.put(start, piece.memory)
        self.sent.popleft()
        piece.give_back()

    def put(self, start: int, data: Tensor) -> None:
        """Here are some of the bytes."""
        if self._here is None:
            self._here = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        self._here[start : start + len(data)].copy_(data)

    def finish(self) -> None:
        """Wait until all is here, and make the result of it. May be called again."""
        if self.bytes is None:
            return
        while self.sent:
            self.land()
        here = torch.empty(0, dtype=torch.uint8, device="cpu") if self._here is None else self._here
        self._becomes(here.untyped_storage(), 0, *self.form[1:])

    def _becomes(self, *content: Any) -> None:
        self.result.set_(*content)
        self.bytes = self._here = None
        for echo in self.echoes:  # before anybody can write to the result
            echo.twin = snapshot(self.result)


class _Echo(_Copy):
    """A tensor that was sent before, and need not be sent again if it still is what it was then."""

    def __init__(self, source: Tensor, before: _Copy, send: Callable[[_Copy], None]) -> None:
        super().__init__(source)
        self.before = before.bytes  # what it is compared with, which takes the device a while
        self.compared = before.ready
        self.twin: Tensor | None = None
        self._send = send
        self.answer: _Copy | None = None
        before.echoes.append(self)

    def is_done(self) -> bool:
        if self.answer is not None and self.answer.is_done():
            self._decide()
        return self.answer is None and super().is_done()

    def is_staged(self) -> bool:
        return super().is_staged() or (self.answer is not None and self.answer.is_staged())

    def land(self) -> None:
        if self.sent:
            super().land()
        else:
            self._decide()

    def finish(self) -> None:
        self._decide()
        super().finish()

    def _decide(self) -> None:
        """Wait for the answer; then take what the other one became, or send it after all."""
        if self.answer is None:
            return
        self.answer.finish()
        equal = bool(self.answer.result)
        if equal and self.twin is None:  # the other one is not there yet
            return
        self.answer = self.before = None
        if equal:
            self._becomes(self.twin)
        else:
            self._send(self)


class _Original(NamedTuple):
    """What a copy was made of."""

    tensor: weakref.ref[Tensor]
    version: int | None  # None under inference_mode, where nothing is counted
    copy: _Copy


class _Delivery(NamedTuple):
    """A call that goes into its layer when everything before it in the queue is here."""

    layer: Calls
    value: Value
    number: int


class Calls(Protocol):
    """Where the values of a layer go."""

    def keep(self, value: Value, number: int) -> None:
        """Append a value of pass ``number``."""


# --- The copies of one block -----------------------------------------------------------------------


class Offload:
    """Moves what the layers of one block return into memory. Any thread may use it."""

    def __init__(self, device: Device, budget: int = BUDGET) -> None:
        self._device = device
        self._budget = budget
        self._staging = Staging(device.pinned, budget)
        self._streams: dict[torch.device, Stream] = {}
        self._queue: deque[_Copy | _Delivery] = deque()
        self._since_call = 0  # how many in the queue have come since the last call did
        self._sent: dict[int, _Original] = {}  # by id
        self._lock = threading.RLock()
        self._at_work = False
        self._broken: CaptureError | None = None
        self._unseen: Exception | None = None

    def takes(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` can be moved by :meth:`start`: it is on the device, and plain."""
        return (
            self._device.has(tensor)
            and type(tensor) in _PLAIN
            and tensor.layout is torch.strided
            and not (tensor.is_quantized or tensor.is_nested)
        )

    def start(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Begin to move ``tensor`` as it is now, cast to ``dtype`` first. What is returned is empty as yet."""
        check(tensor)
        with self._lock, normal_mode():
            self._check()
            try:
                source = _on_device(tensor.detach(), dtype)
            except torch.OutOfMemoryError:
                self._work_off()  # lets go of the snapshots that are on their way
                return _moved(tensor.detach(), dtype)
            return self._begin(tensor, source).result

    def keep(self, layer: Calls, value: Value, number: int) -> None:
        """Put a value into ``layer`` as soon as what :meth:`start` returned for it is filled."""
        with self._lock:
            # What the last call returned stays: its container may be about to return the same.
            if self._queue:
                self._work_off(leave=self._since_call, wait=False)
            self._check()
            self._since_call = 0
            if self._queue:
                self._queue.append(_Delivery(layer, value, number))
            else:
                layer.keep(value, number)

    def finish(self) -> None:
        """Wait until everything is where it belongs.

        Raises what went wrong on the way, once: ``CaptureError`` if copies failed, or what a container of the
        user's, or the writer of a path, has raised.
        """
        if not (self._queue or self._at_work or self._unseen):
            return
        with self._lock:
            if self._at_work:  # a layer that is given a call has looked at itself
                return
            self._work_off()
            error, self._unseen = self._unseen, None
        if error is not None:
            raise error

    def close(self) -> Exception | None:
        """Finish, and let go of the staging memory. Return what went wrong, if nobody has heard of it."""
        try:
            self.finish()
        except Exception as error:  # noqa: BLE001  # whoever leaves the block raises it
            return error
        finally:
            self._staging = Staging(self._device.pinned, self._budget)
            self._streams.clear()
            self._sent.clear()
        return None

    # --- Sending ---------------------------------------------------------------------------------------

    def _begin(self, tensor: Tensor, source: Tensor) -> _Copy:
        stream = self._device.current_stream(tensor.device)
        version = None if tensor.is_inference() else tensor._version
        before = self._sent_before(tensor, version, source)
        copy = _Copy(source) if before is None else _Echo(source, before, self._send)
        copy.ready = stream.record_event()
        self._queue.append(copy)
        self._since_call += 1
        self._sent[id(tensor)] = _Original(weakref.ref(tensor), version, copy)
        copy.key = id(tensor)
        if isinstance(copy, _Echo):
            copy.answer = self._compare(copy, stream)
        else:
            self._send(copy)
        return copy

    def _sent_before(self, tensor: Tensor, version: int | None, source: Tensor) -> _Copy | None:
        """The copy of ``tensor`` that is on its way already, unless it is known to be another one by now."""
        original = self._sent.get(id(tensor))
        if original is None or original.tensor() is not tensor or original.version != version:
            return None
        copy = original.copy
        form = source.dtype, source.shape, source.stride()
        return copy if copy.bytes is not None and copy.form == form and copy.size > SMALL else None

    def _compare(self, echo: _Echo, stream: Stream) -> _Copy:
        """Find out on the device whether a tensor is what it was; send the answer."""
        assert echo.bytes is not None and echo.before is not None  # noqa: S101, PT018  # it was just made
        assert echo.compared is not None  # noqa: S101
        stream.wait_event(echo.compared)  # the other one may be the work of another stream
        answer = _Copy(_equal(echo.bytes, echo.before))
        answer.ready = stream.record_event()
        self._send(answer)
        return answer

    def _send(self, copy: _Copy) -> None:
        """Copy on our own stream, piece by piece."""
        assert copy.bytes is not None and copy.ready is not None  # noqa: S101, PT018  # likewise
        device = copy.bytes.device
        if device not in self._streams:
            self._streams[device] = self._device.new_stream(device)
        stream, at = self._streams[device], 0
        stream.wait_event(copy.ready)
        while at < copy.size:
            piece = self._staging.take(copy.size - at)
            if piece is not None:
                self._device.copy(stream, piece.memory, copy.bytes, at)
                copy.sent.append(_Sent(at, piece, stream.record_event()))
                at += len(piece.memory)
            elif not self._make_room():  # the system has no pinned memory for us
                copy.ready.synchronize()  # another stream than this thread's may have made it
                copy.put(at, copy.bytes[at:].to("cpu", copy=True))
                return

    def _make_room(self) -> bool:
        """Free the staging memory that was taken first."""
        for item in self._queue:
            if isinstance(item, _Copy) and item.is_staged():
                try:
                    item.land()
                except Exception as error:  # noqa: BLE001  # said in our words
                    self._lose(error)
                    self._check()
                return True
        return False

    # --- Working off the queue -------------------------------------------------------------------------

    def _work_off(self, *, leave: int = 0, wait: bool = True) -> None:
        """Finish what is in the queue, up to the last ``leave``, or up to what has to be waited for."""
        if self._at_work:
            return
        self._at_work = True
        try:
            with normal_mode():  # what is sent after all may be the first to use a block of staging
                while len(self._queue) > leave and self._next(wait=wait):
                    pass
        finally:
            self._at_work = False

    def _next(self, *, wait: bool) -> bool:
        """Finish what is first in the queue. Return whether to go on."""
        item = self._queue[0]
        if isinstance(item, _Delivery):
            self._queue.popleft()  # first: an interrupt must not deliver it twice
            try:
                item.layer.keep(item.value, item.number)
            except Exception as error:  # noqa: BLE001  # raised by finish(), which somebody calls
                self._unseen = self._unseen or error
            return True
        try:
            if not (wait or item.is_done()):
                return False
            item.finish()
        except Exception as error:  # noqa: BLE001  # likewise
            self._lose(error)
            return False
        self._queue.popleft()
        if item.key in self._sent and self._sent[item.key].copy is item:
            del self._sent[item.key]
        return True

    def _lose(self, error: Exception) -> None:
        """A copy failed: its value must not be seen, nor any that comes after it."""
        if self._broken is not None:
            return
        lost = sum(isinstance(item, _Delivery) for item in self._queue)
        self._broken = CaptureError(
            f"record(): copying values from the device into memory failed: {error}. The {lost} calls that were on their "
            "way are not in the recording, what came before them is, and nothing more is recorded in this block. To "
            "keep less, use a transform"
        )
        self._broken.__cause__ = error
        self._unseen = self._broken
        self._queue.clear()
        self._sent.clear()
        self._since_call = 0

    def _check(self) -> None:
        if self._broken is not None:
            self._unseen = None
            raise self._broken


class Deferred:
    """A layer into which calls go when their copies are complete."""

    def __init__(self, layer: Calls, offload: Offload, passes: Passes) -> None:
        self._layer = layer
        self._offload = offload
        self._passes = passes

    def keep(self, value: Value, number: int) -> None:
        """Append a value of pass ``number``, soon. Outside of a pass: now."""
        self._offload.keep(self._layer, value, number)
        if not self._passes.running:
            self._offload.finish()


# --- Tensors and bytes -----------------------------------------------------------------------------


def _on_device(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of ``tensor`` on its device, cast."""
    return snapshot(tensor) if dtype is None else tensor.to(dtype, copy=True)


def _bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor that fills its storage, in whatever order it has them."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """Whether they are the same bytes. Nobody waits for the answer, which stays on the device."""
    width = torch.int64 if len(one) % 8 == 0 else torch.uint8
    return (one.view(width) == other.view(width)).all()


def _moved(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The plain way, which takes no memory on the device, unless the tensor has gaps."""
    try:
        moved = tensor.to("cpu", copy=True)
    except torch.OutOfMemoryError as error:
        message = (
            f"there is no memory left on {tensor.device} for a copy of a tensor of shape {tuple(tensor.shape)} "
            f"({tensor.nbytes:,} bytes). Take less of it with a transform, or use smaller batches"
        )
        raise CaptureError(message) from error
    return moved if dtype is None else moved.to(dtype)


def offload_for(capture: Capture) -> Offload | None:
    """Return what moves values into memory while the model goes on, if they can be moved like that."""
    device = with_streams() if capture.detach and capture.device == _MEMORY else None
    return None if device is None else Offload(device)


_MEMORY = torch.device("cpu")
