"""Forwards that return before they have run: what a generator or a coroutine calls later still belongs to its pass."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, Final

from actrec._torch import frames

#: The types of what such a forward returns, each with the attribute that has its frame.
KINDS: Final = {
    GeneratorType: "gi_frame",
    CoroutineType: "cr_frame",
    AsyncGeneratorType: "ag_frame",
}


class Suspended:
    """The generators and coroutines that forwards returned, each with its pass."""

    def __init__(self) -> None:
        #: By generator or coroutine. A plain dict until there is one: quicker to test.
        self.passes: MutableMapping[Any, int] = {}

    def add(self, one: object, number: int) -> None:
        """A forward of pass ``number`` returned it."""
        self.passes = self.passes or weakref.WeakKeyDictionary()
        self.passes[one] = number

    def forget(self, number: int) -> None:
        """Pass ``number`` has ended, whether they have run or not."""
        for one in [one for one, own in self.passes.items() if own == number]:
            del self.passes[one]

    def unfinished(self) -> list[int]:
        """Return the passes of those that have not ended."""
        return [number for one, number in self.passes.items() if _frame(one) is not None]

    def running(self) -> int | None:
        """Return the pass of the one that this thread is running."""
        # The frames are kept while they are compared: what takes the place of one has its id.
        stopped = {_frame(one): number for one, number in self.passes.items()}
        around = frames() if stopped else ()
        return next((stopped[frame] for frame in around if frame in stopped), None)


def _frame(one: Any) -> FrameType | None:
    """Return the frame in which it runs or is suspended; ``None`` when it has ended."""
    return getattr(one, KINDS[type(one)])  # type: ignore[no-any-return]
