"""Reading ahead: what comes next is made by a thread, while the program works with what it has."""

from __future__ import annotations

import atexit
from collections.abc import Generator
from contextlib import closing
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Generator[T, None, None], many: int = 1) -> Generator[T, None, None]:
    """Yield the same items; while some are taken, a thread makes the next ones.

    >>> list(ahead(number for number in range(3)))
    [0, 1, 2]

    An error comes where its item would have come. When the generator is closed, so is ``items``, and the thread has ended.

    Args:
        items: what to yield. They are made by one thread alone, and in order.
        many: so many are handed over at a time, for to hand over wakes a thread.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    thread = Thread(
        target=_make, args=(items, many, wanted, made), name="actrec-ahead", daemon=True
    )

    def stop() -> None:
        wanted.put(False)  # noqa: FBT003
        if thread is not current_thread():  # where garbage is collected
            thread.join()

    thread.start()
    atexit.register(stop)  # no thread outlives the modules that it works with
    try:
        wanted.put(True)  # noqa: FBT003
        error: BaseException | None = None
        while error is None:
            found, error = made.get()
            if error is None:
                wanted.put(True)  # noqa: FBT003
            yield from found
    finally:
        atexit.unregister(stop)
        stop()
    if not isinstance(error, StopIteration):
        raise error


def _make(
    items: Generator[T, None, None],
    many: int,
    wanted: SimpleQueue[bool],
    made: SimpleQueue[tuple[list[T], BaseException | None]],
) -> None:
    """Each time that some are wanted, make so many items; or fewer, and the error that came then."""
    with closing(items):
        while wanted.get():
            found: list[T] = []
            error = None
            try:
                while len(found) < many:
                    found.append(next(items))
            except BaseException as raised:  # noqa: BLE001  # it is raised where it belongs
                error = raised
            made.put((found, error))
            del found, error
