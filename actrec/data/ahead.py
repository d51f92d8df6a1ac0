"""Reading ahead: a thread makes the next items while the program works with the current ones."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
    thread = ThreadPoolExecutor(1, "actrec-ahead")
    try:
        coming = thread.submit(_made, items, many)
        error = None
        while error is None:
            found, error = coming.result()
            if error is None:
                coming = thread.submit(_made, items, many)
            yield from found
    finally:
        # Raised at the end of the program, when the thread has ended; and if the garbage collector runs in the thread, which
        # cannot wait for itself.
        with suppress(RuntimeError):
            thread.submit(items.close)
            thread.shutdown()
    if not isinstance(error, StopIteration):
        raise error


def _made(items: Iterator[T], many: int) -> tuple[list[T], BaseException | None]:
    """Make ``many`` items; or fewer, and the error that ended them."""
    found: list[T] = []
    try:
        while len(found) < many:
            found.append(next(items))
    except BaseException as error:  # noqa: BLE001  # it is raised where it belongs
        return found, error
    return found, None
