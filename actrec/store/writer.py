"""The writer: a thread that puts calls on the disk, shard by shard, while the model computes the next.

A shard counts when it has reached the disk for certain, which takes the disk as long as writing takes the
processor. So while the thread writes a shard, another one waits for the disk to have the shard before it.

What waits counts against a budget of bytes. A call that does not fit waits until there is room, and with
it the forward that it belongs to. A pass is committed only when no call can be added to it any more: when
it and all passes before it have ended, and a later one has begun. A pass that is larger than a shard is
written in parts, which count when the shard that commits the pass is there.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from actrec._values.heap import give_back
from actrec.errors import WriteError

from . import shard as _shard
from .description import Ending
from .format import END, MAX_HEADER
from .reader import shard_name
from .shard import Call, Heading

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .folder import Folder
    from .place import Place, Unfinished

__all__ = ["Writer", "counted"]

#: What a tensor takes in Python's memory besides its data, roughly. It counts too.
OVERHEAD: Final = 1024
_ROOM: Final = 1 << 12  # bytes for what a header says of the shard
_PATIENCE: Final = 1.0  # seconds between two looks whether the thread is still there
_TICK: Final = 0.1  # seconds between two looks at the clock, at least


def counted(call: Call, places: dict[object, int]) -> int:
    """What a call counts against the budget, beyond memory in ``places``, to which its own is added."""
    size = len(call.structure) + OVERHEAD * (1 + len(call.tensors))
    for tensor in call.tensors:
        place, nbytes = _shard.place(tensor)
        if place not in places:
            places[place] = nbytes
            size += nbytes
    return size


def _described(call: Call) -> int:
    """What a call takes in the header of a shard at most."""
    return _shard.named(call.slot) + _shard.described(call.structure, call.tensors)


class _Batch(NamedTuple):
    """What becomes one shard."""

    calls: list[Call]
    committed: int
    part: bool
    size: int
    raised: tuple[int, ...]


class Writer:
    """Writes one ``rank-`` folder. One thread of its own writes; any thread may give it calls."""

    def __init__(
        self,
        disk: Place,
        recording: str,
        folder: Folder,
        *,
        rank: int = 0,
        shards: int = 0,
        committed: int = 0,
        raised: Collection[int] = (),
    ) -> None:
        self._disk = disk
        self._recording = recording
        self._rank = rank
        self._shards = self._finished = shards  # how many there are: written, and on the disk
        self._finishing: threading.Thread | None = None
        self._budget = folder.budget
        self._limit = min(folder.shard_bytes, max(folder.budget // 2, 1))
        self._seconds = folder.seconds
        self._complete: Callable[[], int] = lambda: 0  # how many passes can be committed
        self.committed = committed  # on the disk
        self._raised = raised  # the passes that raised; it grows
        self._cut_at = committed  # and in the queue
        self._parted: set[int] = (
            set()
        )  # passes of which there are parts that no shard has committed
        self.used = 0  # bytes pending, queued or being written
        self._pending: list[Call] = []
        self._pending_size = self._pending_described = 0
        self._places: dict[object, int] = {}  # the memory of what is pending
        self._queue: deque[_Batch] = deque()
        self._writing = False
        self._closed = False
        self._error: WriteError | None = None
        self._failed = self._ended = False
        self._changed = threading.Condition(threading.RLock())
        self._last_cut = time.monotonic()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="actrec-writer", daemon=True)
        self._thread.start()

    # --- Taking calls ----------------------------------------------------------------------------------

    def keep(self, call: Call, complete: Callable[[], int]) -> None:
        """Take a call; wait until there is room for it. ``complete()`` is how many passes can be committed.

        Raises ``WriteError`` if the writer has failed, once: after that, calls are dropped.
        """
        with self._changed:
            self._check()
            if self._failed or self._closed:
                return
            self._complete = complete
            described = _described(call)
            while self._pending and self._pending_described + described > MAX_HEADER - _ROOM:
                self._cut(complete(), everything=True)
            call.size = counted(call, self._places)
            while self.used and self.used + call.size > self._budget:
                self._make_room(complete)
            if not self._pending:
                self._changed.notify_all()  # the thread looks at the clock from now on
            self._pending.append(call)
            self.used += call.size
            self._pending_size += call.size
            self._pending_described += described
            if self._is_due():
                self._cut(complete(), everything=self._pending_size >= self._limit)

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _make_room(self, complete: Callable[[], int]) -> None:
        if not self._queue and not self._writing:
            self._cut(complete(), everything=True)
        self._changed.wait(_PATIENCE)
        if not self._thread.is_alive() and not self._failed:
            self._fail(RuntimeError("the thread that writes has died"))
        self._check()

    def _is_due(self) -> bool:
        is_full = self._pending_size >= self._limit
        return is_full or time.monotonic() - self._last_cut >= self._seconds

    def _until_due(self) -> float | None:
        """How many seconds to wait before what is pending is looked at; ``None`` if there is nothing."""
        if not self._pending and not self._parted:
            return None
        due = self._last_cut + self._seconds - time.monotonic()
        return min(max(due, _TICK), threading.TIMEOUT_MAX)

    def _cut(self, complete: int, *, everything: bool) -> None:
        """Queue what is complete as a shard and, of ``everything``, each pass that is not as a part."""
        complete = max(complete, self._cut_at)
        done = [call for call in self._pending if call.number < complete]
        rest = [call for call in self._pending if call.number >= complete]
        if done or any(number < complete for number in self._parted):
            self._commit(done, complete)
        if everything and sum(call.size for call in rest) >= (0 if not done else self._limit):
            for number in sorted({call.number for call in rest}):
                part = [call for call in rest if call.number == number]
                self._enqueue(part, self._cut_at, part=True)
                self._parted.add(number)
            rest = []
        self._pending = rest
        self._pending_size = sum(call.size for call in rest)
        self._pending_described = sum(map(_described, rest))
        self._places.clear()
        self._last_cut = time.monotonic()

    def _commit(self, calls: list[Call], complete: int) -> None:
        before, self._cut_at = self._cut_at, complete
        self._parted = {number for number in self._parted if number >= complete}
        raised = tuple(sorted(one for one in list(self._raised) if before <= one < complete))
        self._enqueue(calls, complete, part=False, raised=raised)

    def _enqueue(
        self, calls: list[Call], committed: int, *, part: bool, raised: tuple[int, ...] = ()
    ) -> None:
        size = sum(call.size for call in calls)
        give_back(size)
        self._queue.append(_Batch(calls, committed, part, size, raised))
        self._changed.notify_all()

    # --- Writing ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                unfinished = self._write(batch)
                committed, size = batch.committed, batch.size
                del batch  # and the values with it
                self._written(size)
                self._hand_over(unfinished, committed)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it reaches the caller
            # Or else the frames that the error went through would keep the values.
            traceback.clear_frames(error.__traceback__)
            batch = None
            self._settle()
            self._fail(error)
        self._settle()

    def _next(self) -> _Batch | None:
        """The next batch, once there is one; what is complete becomes one when its time has come, though no call does."""
        with self._changed:
            while not self._queue and not self._closed and not self._failed:
                if self._changed.wait(self._until_due()):
                    continue
                self._cut(self._complete(), everything=False)
            self._writing = bool(self._queue)
            return self._queue.popleft() if self._queue else None

    def _written(self, size: int) -> None:
        with self._changed:
            self.used = max(self.used - size, 0)
            self._writing = False
            self._changed.notify_all()

    def _write(self, batch: _Batch) -> Unfinished:
        heading = Heading(
            self._recording, self._rank, self._shards, batch.committed, batch.part, batch.raised
        )
        write = partial(_shard.write, heading=heading, calls=batch.calls)
        return self._disk.begin(shard_name(self._shards), write)

    def _hand_over(self, unfinished: Unfinished, committed: int) -> None:
        """Let another thread wait for the disk, once it has the shard before."""
        self._settle()
        if self._failed:  # to put this one into the folder would leave a gap
            unfinished.discard()
            return
        self._shards += 1
        self._finishing = threading.Thread(
            target=self._finish, args=(unfinished, committed), name="actrec-finisher", daemon=True
        )
        self._finishing.start()

    def _finish(self, unfinished: Unfinished, committed: int) -> None:
        try:
            unfinished.finish()
            self._finished += 1
            self.committed = committed
        except BaseException as error:  # noqa: BLE001  # whatever it is, it reaches the caller
            self._fail(error)

    def _settle(self) -> None:
        """Wait until the disk has what was written."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failed:
                return
            what_now = (
                "That run goes on there; choose another path for this one."
                if isinstance(error, FileExistsError)
                else "record(..., resume=True) goes on after them."
            )
            failure = WriteError(
                f"recording into {self._disk.parent}: {shard_name(self._finished)} could not be written: {error}. "
                f"The {self.committed} passes that were committed are safe. {what_now}"
            )
            failure.__cause__ = error
            self._error, self._failed = failure, True
            self._queue.clear()
            self._pending.clear()
            self._places.clear()
            self.used = 0
            self._writing = False
            self._changed.notify_all()

    # --- Ending ----------------------------------------------------------------------------------------

    def close(self, passes: int, error: str | None = None) -> None:
        """Commit ``passes`` passes, and say how the run ended. May be called again, which does nothing.

        A process that was forked off has no thread, and nothing to write.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            if not self._closed:
                self._close(max(passes, self._cut_at))
        if threading.current_thread() in {self._thread, self._finishing}:
            return  # it collects garbage, a dropped block among it: it cannot wait for itself
        self._thread.join()
        if not self._failed and not self._ended:
            self._ended = True
            ending = Ending(self._recording, self.committed, self._finished, error)
            try:
                self._disk.commit(END, lambda file: file.write(ending.content()))
            except OSError as failure:
                self._fail(failure)

    def _close(self, passes: int) -> None:
        if not self._failed:
            self._cut(passes, everything=False)
            if self._cut_at < passes:
                self._commit([], passes)
        self.used -= sum(call.size for call in self._pending)
        self._pending.clear()
        self._closed = True
        self._changed.notify_all()

    def unseen(self) -> WriteError | None:
        """The error that no call has raised; from then on it counts as seen."""
        error, self._error = self._error, None
        return error
