"""Reentrant activation checkpointing: it runs a region without a graph, and again, with one, inside ``backward()``.

:class:`Regions` finds the call that is being run again: the calls of a layer come in the same order both times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from actrec._torch import backward_number, checkpoint_frames

T = TypeVar("T")


@dataclass
class _Region(Generic[T]):
    """The calls of one layer in one region, and how many of them a backward has run again."""

    calls: list[T | None] = field(default_factory=list)
    backward: int = -1
    repeated: int = 0

    def next(self) -> T | None:
        if self.backward != backward_number():  # another backward starts over
            self.backward, self.repeated = backward_number(), 0
        self.repeated += 1
        return self.calls[self.repeated - 1] if self.repeated <= len(self.calls) else None


class Regions(Generic[T]):
    """The regions that calls of one layer ran in, by the autograd context of their checkpoints."""

    def __init__(self) -> None:
        self._regions: WeakKeyDictionary[Any, _Region[T]] = WeakKeyDictionary()

    def remember(self, call: T | None) -> bool:
        """A call ran without a graph, in regions that will run again: all that have begun and not ended. Return whether it did."""
        will_run_again = False
        for run, frame in checkpoint_frames():
            if run != "forward":
                break
            self._regions.setdefault(frame.f_locals["ctx"], _Region()).calls.append(call)
            will_run_again = True
        return will_run_again

    def find(self) -> T | None:
        """Return the call that runs again now, if it was remembered."""
        again = next((item for item in checkpoint_frames() if item[0] != "forward"), None)
        if again is None:  # compiled code recomputes it by itself
            return None
        run, frame = again
        region = self._regions.get(frame.f_locals["ctx"]) if run == "backward" else None
        return None if region is None else region.next()
