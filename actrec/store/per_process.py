"""What each process makes for itself: locks, connections, open files. A forked process does not use those of its parent."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from typing_extensions import override

T = TypeVar("T")


class PerProcess(Generic[T]):
    """An object of which each process has its own. A copy or a pickle has another one.

    >>> begun = PerProcess(list)
    >>> begun().append("here")
    >>> begun()
    ['here']
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made = os.getpid(), make()

    def __call__(self) -> T:
        """Return the object of this process."""
        pid, made = self._made
        if pid != os.getpid():  # forked off; several threads may find that at the same time
            made = self._make()
            self._made = os.getpid(), made
        return made

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return PerProcess, (self._make,)
