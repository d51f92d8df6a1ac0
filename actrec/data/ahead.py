"""Reading ahead: a thread makes the next items while the program works with the current ones.

With the standard library's executor this would be shorter, and taking a batch would take the training thread several times as long.
"""

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

    An error is raised in place of its item. Closing the generator closes ``items`` and ends the thread.

    Args:
        items: the items to yield. A single thread makes them, in order.
        many: how many are handed over at a time: each time wakes a thread.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    thread = Thread(
        target=_make, args=(items, many, wanted, made), name="actrec-ahead", daemon=True
    )

    def stop() -> None:
        wanted.put(False)  # noqa: FBT003
        if thread is not current_thread():  # the garbage collector may run in it
            thread.join()

    thread.start()
    atexit.register(stop)  # the thread must end before modules are torn down
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
    """For each request, make ``many`` items; or fewer, and the error that ended them."""
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
