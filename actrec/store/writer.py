"""The writer: a thread that writes calls to the disk, shard by shard, while the model computes the next ones.

A shard counts once it is synced. Syncing takes about as long as writing, so the two overlap: while one thread
writes a shard, another waits for the sync of the shard before it.

Calls that wait to be written count against a budget of bytes. A call that does not fit waits until there is
room, and its forward with it. :class:`~actrec.store.held.Held` decides which calls make a shard.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Final

from actrec._text import count
from actrec._values.memory import give_back
from actrec.errors import WriteError

from . import new_shard
from .call import Call
from .file_names import shard_name
from .folder import Folder
from .held import Batch, Held
from .ledger import Ledger
from .new_file import Unfinished
from .place import Place
from .upload import Upload

_SHORTEST: Final = 0.1  # seconds that the thread sleeps
_LONGEST: Final = 3600.0  # `seconds` of a folder may be infinite


class Writer:
    """Writes the folder of one rank, in a thread of its own. Any thread may give it calls."""

    def __init__(
        self,
        disk: Place,
        ledger: Ledger,
        folder: Folder,
        complete: Callable[[], int],
        raised: Collection[int],
        *,
        order: Iterable[str],
        late: Callable[[int], Iterable[Call]] = lambda _: (),
    ) -> None:
        """``complete()`` returns how many passes can be committed; ``order`` has the layers in the order of their first calls.

        ``late(n)`` returns calls of passes before ``n`` that exist only once these are complete: gradients.
        """
        self._disk = disk
        self._ledger = ledger
        self._complete = complete
        self._late = late
        self._order = order
        self._budget = folder.budget
        self._seconds = folder.seconds
        self._finished = ledger.heading.shard + 1  # how many shards are synced
        self.committed = ledger.heading.committed  # how many passes are in them
        limit = min(folder.shard_bytes, max(folder.budget // 2, 1))
        self._held = Held(self.committed, limit, raised)
        self._queue: deque[Batch] = deque()
        self._queued_bytes = 0  # bytes in the queue or being written
        self._finisher: threading.Thread | None = None
        self._closed = False  # whether no more calls are taken
        self._failed = False
        self._error: WriteError | None = None  # until it is raised
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._latest = -1  # the pass of the last call
        self._last_cut = time.monotonic()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="actrec-writer", daemon=True)
        self._thread.start()

    @property
    def used(self) -> int:
        """The bytes that wait to be written or are being written."""
        return self._held.size + self._queued_bytes

    # --- Taking calls ----------------------------------------------------------------------------------

    def keep(self, call: Call) -> None:
        """Take a call; wait until there is room for it.

        Raises:
            WriteError: the writer has failed. Raised once; after that, calls are dropped.
        """
        with self._lock:  # "with self._changed" takes twice the time
            if self._error is not None:
                self._raise_if_failed()
            held = self._held
            if held.size + self._queued_bytes + call.look.size > self._budget:
                self._wait_for_room(call.look.size)
            if self._closed:
                return
            if held.add(call):
                self._cut(held.everything(self._fetch_late()))
            elif call.number != self._latest:  # the passes before it may be complete
                self._latest = call.number
                self._look_at_clock()

    def keep_later(self) -> None:
        """There is a call that ``late`` will return.

        Raises:
            WriteError: as for ``keep``.
        """
        with self._changed:
            self._raise_if_failed()
            self._look_at_clock()

    def _look_at_clock(self) -> None:
        if not self._closed and time.monotonic() - self._last_cut >= self._seconds:
            self._cut(self._held.whole(self._fetch_late()))

    def _fetch_late(self) -> int:
        """Return how many passes can be committed, after fetching their late calls."""
        return self._with_late(self._complete())

    def _with_late(self, complete: int) -> int:
        for call in self._late(complete):
            self._held.add(call)
        return complete

    def drop(self, number: int) -> None:
        """Forget the calls of a pass; those on the disk become void."""
        with self._changed:
            self._held.drop(number)
            self._changed.notify_all()  # there may be room now

    def _raise_if_failed(self) -> None:
        error = self.take_error()
        if error is not None:
            raise error

    def _wait_for_room(self, size: int) -> None:
        """Wait until so many bytes fit, or nothing else is waiting."""
        while self.used + size > self._budget and self.used:
            if not self._queued_bytes:
                self._cut(self._held.everything(self._fetch_late()))
            self._changed.wait(1.0)  # without a timeout, Windows would not handle an interrupt
            self._raise_if_failed()

    def _cut(self, batches: Iterable[Batch]) -> None:
        try:
            for batch in batches:
                self._enqueue(batch)
        except BaseException as error:  # an interrupt: a batch may be lost
            self._fail(error)
            raise
        self._last_cut = time.monotonic()

    def _enqueue(self, batch: Batch) -> None:
        size = batch.size
        give_back(size)  # after a large shard, the allocator returns unused memory to the system
        self._queued_bytes += size
        self._queue.append(batch)
        self._changed.notify_all()

    # --- Writing ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                unfinished = self._write(batch)
                committed, size = batch.commit.committed, batch.size
                del batch  # frees the values
                self._written(size)
                self._hand_over(unfinished, committed)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it reaches the caller
            # The frames in the traceback would keep the values alive.
            traceback.clear_frames(error.__traceback__)
            batch = None
            self._settle()
            self._fail(error)
        self._settle()

    def _next(self) -> Batch | None:
        with self._changed:
            while not self._queue and not self._closed:
                wait = self._last_cut + self._seconds - time.monotonic()
                self._changed.wait(min(max(wait, _SHORTEST), _LONGEST))
                self._look_at_clock()
            return self._queue.popleft() if self._queue else None

    def _written(self, size: int) -> None:
        with self._changed:
            self._queued_bytes = max(self._queued_bytes - size, 0)
            self._changed.notify_all()

    def _write(self, batch: Batch) -> Unfinished | Upload:
        parts, tensors = new_shard.lay_out(batch.calls)
        heading = self._ledger.next(parts, batch.commit)
        order = {name: at for at, name in enumerate([*self._order])}
        # A reduction, or a gradient, is first written long after its first call.
        layers = dict(
            sorted(self._ledger.layers.items(), key=lambda one: order.get(one[0].name, len(order)))
        )
        write = partial(
            new_shard.write, heading=heading, layers=layers, parts=parts, tensors=tensors
        )
        return self._disk.begin(shard_name(heading.shard), write)

    def _hand_over(self, unfinished: Unfinished | Upload, committed: int) -> None:
        """Let another thread sync and name the file, after the shard before it."""
        self._settle()
        if self._failed:  # naming this one would leave a gap
            unfinished.discard()
            return
        self._finisher = threading.Thread(
            target=self._finish, args=(unfinished, committed), name="actrec-finisher", daemon=True
        )
        self._finisher.start()

    def _finish(self, unfinished: Unfinished | Upload, committed: int) -> None:
        try:
            unfinished.finish()
            self._finished += 1
            self.committed = committed
        except BaseException as error:  # noqa: BLE001  # whatever it is, it reaches the caller
            self._fail(error)

    def _settle(self) -> None:
        """Wait until the shard before is synced."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failed:
                return
            what_now = (
                "That run continues there; choose another path for this one."
                if isinstance(error, FileExistsError)
                else "record(..., resume=True) continues after them."
            )
            failure = WriteError(
                f"{self._disk.shown(shard_name(self._finished))} could not be written: {str(error) or type(error).__name__}. "
                f"Committed and safe: {count(self.committed, 'pass')}. {what_now}"
            )
            failure.__cause__ = error
            self._error, self._failed, self._closed = failure, True, True
            self._queue.clear()
            self._held.clear()
            self._queued_bytes = 0
            self._changed.notify_all()

    # --- Ending ----------------------------------------------------------------------------------------

    def close(self, passes: int, error: str | None = None) -> None:
        """Commit ``passes`` passes, and say how the run ended. May be called again, which does nothing.

        A forked process has no such thread, and nothing to write.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            if not self._closed:
                self._closed = True
                self._enqueue(self._held.close(self._with_late(passes), error or ""))
        if threading.current_thread() in {self._thread, self._finisher}:
            return  # called by the garbage collector, which runs in this thread: it cannot wait for itself
        self._thread.join()

    def take_error(self) -> WriteError | None:
        """Return the error that no call has raised, and forget it."""
        error, self._error = self._error, None
        return error
