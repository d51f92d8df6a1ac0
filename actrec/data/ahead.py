"""Reading ahead: what comes next is made by a thread, while the program works with what it has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["ahead"]

T = TypeVar("T")

_END: Final = object()


def ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the same items; when one is taken, a thread goes on to make the next.

    >>> list(ahead(number for number in range(3)))
    [0, 1, 2]

    An error comes where its item would have come. When the generator is closed, so is ``items``, and the thread has ended.
    """
    with closing(items), ThreadPoolExecutor(1, "actrec-ahead") as thread:
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item  # type: ignore[misc]  # it is none of the end
