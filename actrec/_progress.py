"""Progress of long operations: a wrapper of iterables that shows how many of all items are done.

>>> with showing("adding", 3, progress=False) as each:
...     sum(each([1, 2, 3]))
6

It is shown only on request, by ``progress=True`` or in a command on a terminal, and never from inside a hook. With ``tqdm``
it is a bar, without it one line of text, on stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")

#: Seconds between two lines: on a terminal, where each replaces the one before, and in a file.
_OFTEN: Final = 0.1
_SELDOM: Final = 10.0


class Each(Protocol):
    """Wraps an iterable: an item counts as done when the next one is requested."""

    def __call__(self, items: Iterable[T], /) -> Iterable[T]:
        """Return an iterable of the same items."""


@contextmanager
def showing(what: str, total: int, *, progress: bool) -> Iterator[Each]:
    """Show the progress of an operation while the ``with`` block runs.

    Args:
        what: the operation, such as "statistics".
        total: the number of items in all iterables that will be wrapped.
        progress: whether to show it.

    Returns:
        A context manager that yields the wrapper.
    """
    if not (progress and total):
        yield iter
        return
    with closing(_bar()(total=total, desc=what, leave=False)) as bar:

        def each(items: Iterable[T], /) -> Iterable[T]:
            for item in items:
                yield item
                bar.update(1)

        yield each


def _bar() -> Callable[..., Any]:
    """Return ``tqdm`` if it is installed, else :class:`_Line`."""
    try:
        made: Callable[..., Any] = import_module("tqdm.auto").tqdm
    except ImportError:
        return _Line
    return made


class _Line:
    """A line of text, with the methods of ``tqdm`` that are used here."""

    def __init__(self, *, total: int, desc: str, leave: bool) -> None:
        self._total, self._what, self._leave = total, desc, leave
        self._done = self._width = 0
        self._begin = self._latest = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def update(self, many: int) -> None:
        self._done += many
        now = time.monotonic()
        if now - self._latest >= (_OFTEN if self._is_terminal else _SELDOM):
            self._latest = now
            left = (now - self._begin) * (self._total - self._done) / self._done
            share = self._done / max(self._total, self._done)
            self._write(
                f"{self._what}: {share:.0%}, {self._done:,} of {self._total:,}, {_clock(left)} left"
            )

    def close(self) -> None:
        if self._is_terminal and self._width and not self._leave:
            self._write("")

    def _write(self, text: str) -> None:
        end = "\r" if self._is_terminal else "\n"
        print(text.ljust(self._width), end=end, file=sys.stderr, flush=True)  # noqa: T201
        self._width = len(text) if self._is_terminal else 0


def _clock(seconds: float) -> str:
    """Return a time: ``"1:05:00"``."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
