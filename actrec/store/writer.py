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

from actrec._values.memory import give_back
from actrec.errors import WriteError

from . import layout
from .format import MAX_HEADER
from .index import shard_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .folder import Folder
    from .layout import Call
    from .ledger import Ledger
    from .place import Place
    from .unfinished import Unfinished
    from .upload import Upload

__all__ = ["Writer"]

#: What a tensor takes in Python's memory besides its data, and in the header of a shard besides its structure, roughly.
OVERHEAD: Final = 1024
_PATIENCE: Final = 1.0  # seconds between two looks whether the thread is still there
_LONGEST: Final = 3600.0  # seconds that the thread sleeps: it may have been told to wait for ever


class _Batch(NamedTuple):
    """What becomes one shard."""

    calls: list[Call]
    committed: int
    part_of: int | None = None
    raised: tuple[int, ...] = ()
    ended: str | None = None
    size: int = 0


class Writer:
    """Writes the folder of one rank. One thread of its own writes; any thread may give it calls.

    Args:
        disk: the folder.
        ledger: what the shards hold that are there.
        folder: the settings.
        complete: returns how many passes can be committed.
        raised: the passes that raised; it grows.
    """

    def __init__(
        self,
        disk: Place,
        ledger: Ledger,
        folder: Folder,
        complete: Callable[[], int],
        raised: Collection[int] = (),
    ) -> None:
        self._disk = disk
        self._ledger = ledger
        self._complete = complete
        self._raised = raised
        self._finishing: threading.Thread | None = None
        self._budget = folder.budget
        self._limit = min(folder.shard_bytes, max(folder.budget // 2, 1))
        self._seconds = folder.seconds
        self._finished = ledger.heading.shard + 1  # shards on the disk
        self.committed = ledger.heading.committed  # passes, on the disk
        self._cut_at = self.committed  # and in the queue
        self._parted: set[int] = (
            set()
        )  # passes of which there are parts that no shard has committed
        self.used = 0  # bytes pending, queued or being written
        self._pending: list[Call] = []
        self._pending_size = 0
        self._kinds: dict[object, int] = {}  # of pending values, with what they take in a header
        self._queue: deque[_Batch] = deque()
        self._writing = False
        self._closed = False
        self._error: WriteError | None = None
        self._failed = False
        self._changed = threading.Condition(threading.RLock())
        self._last_cut = time.monotonic()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="actrec-writer", daemon=True)
        self._thread.start()

    # --- Taking calls ----------------------------------------------------------------------------------

    def keep(self, call: Call) -> None:
        """Take a call; wait until there is room for it.

        Raises:
            WriteError: the writer has failed. Raised once; after that, calls are dropped.
        """
        with self._changed:
            self._check()
            if self._failed or self._closed:
                return
            tensors = sum(tensor.nbytes for tensor in call.tensors)
            call.size = tensors + len(call.structure) + OVERHEAD * (1 + len(call.tensors))
            while self.used and self.used + call.size > self._budget:
                self._make_room()
            if not self._pending:
                self._changed.notify_all()  # the thread looks at the clock from now on
            self._pending.append(call)
            self.used += call.size
            self._pending_size += call.size
            kind = call.slot, call.structure, *(tensor.dim() for tensor in call.tensors)
            self._kinds[kind] = len(call.structure) + OVERHEAD * len(call.tensors)
            if self._is_due():
                self._cut(self._complete(), everything=self._is_full())

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _make_room(self) -> None:
        if not self._queue and not self._writing:
            self._cut(self._complete(), everything=True)
        self._changed.wait(_PATIENCE)
        if not self._thread.is_alive() and not self._failed:
            self._fail(RuntimeError("the thread that writes has died"))
        self._check()

    def _is_full(self) -> bool:
        # A kind of value has entries in the header of a shard, however many values there are of it.
        full = len(self._kinds) > 1 and sum(self._kinds.values()) >= MAX_HEADER // 4
        return self._pending_size >= self._limit or full

    def _is_due(self) -> bool:
        return self._is_full() or time.monotonic() - self._last_cut >= self._seconds

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
                self._enqueue(_Batch(part, self._cut_at, part_of=number))
                self._parted.add(number)
            rest = []
        self._pending = rest
        self._pending_size = sum(call.size for call in rest)
        self._kinds.clear()
        self._last_cut = time.monotonic()

    def _commit(self, calls: list[Call], complete: int, ended: str | None = None) -> None:
        raised = sorted(one for one in list(self._raised) if self._cut_at <= one < complete)
        self._cut_at = complete
        self._parted = {number for number in self._parted if number >= complete}
        self._enqueue(_Batch(calls, complete, raised=tuple(raised), ended=ended))

    def _enqueue(self, batch: _Batch) -> None:
        size = sum(call.size for call in batch.calls)
        give_back(size)
        self._queue.append(batch._replace(size=size))
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
        with self._changed:
            while not self._queue and not self._closed and not self._failed:
                wait = self._last_cut + self._seconds - time.monotonic()
                if self._pending and wait <= 0:
                    self._cut(self._complete(), everything=False)
                if not self._queue:
                    wait = min(max(wait, _PATIENCE / 10), _LONGEST)
                    self._changed.wait(wait if self._pending else None)
            self._writing = bool(self._queue)
            return self._queue.popleft() if self._queue else None

    def _written(self, size: int) -> None:
        with self._changed:
            self.used = max(self.used - size, 0)
            self._writing = False
            self._changed.notify_all()

    def _write(self, batch: _Batch) -> Unfinished | Upload:
        parts, tensors = layout.lay_out(batch.calls)
        heading = self._ledger.next(
            parts,
            batch.committed,
            part_of=batch.part_of,
            raised=batch.raised,
            ended=batch.ended,
        )
        layers = self._ledger.layers
        write = partial(layout.write, heading=heading, layers=layers, parts=parts, tensors=tensors)
        return self._disk.begin(shard_name(heading.shard), write)

    def _hand_over(self, unfinished: Unfinished | Upload, committed: int) -> None:
        """Let another thread wait for the disk, once it has the shard before."""
        self._settle()
        if self._failed:  # to put this one into the folder would leave a gap
            unfinished.discard()
            return
        self._finishing = threading.Thread(
            target=self._finish, args=(unfinished, committed), name="actrec-finisher", daemon=True
        )
        self._finishing.start()

    def _finish(self, unfinished: Unfinished | Upload, committed: int) -> None:
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
            self._kinds.clear()
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
                self._close(max(passes, self._cut_at), error or "")
        if threading.current_thread() in {self._thread, self._finishing}:
            return  # it collects garbage, a dropped block among it: it cannot wait for itself
        self._thread.join()

    def _close(self, passes: int, ended: str) -> None:
        if not self._failed:
            done = [call for call in self._pending if call.number < passes]
            self._commit(done, passes, ended)
        self.used -= sum(call.size for call in self._pending if call.number >= passes)
        self._pending.clear()
        self._closed = True
        self._changed.notify_all()

    def unseen(self) -> WriteError | None:
        """Return the error that no call has raised; from then on it counts as seen."""
        error, self._error = self._error, None
        return error
