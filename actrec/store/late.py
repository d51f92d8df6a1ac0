"""Gradients that are recorded to a path. They arrive after their calls, and are written with the passes of these.

A gradient may arrive in several parts, in one backward or in several. The gradients of a pass are written when no more are
expected: when a later pass has begun after the end of a backward that reached this pass, or a later one. (Several forwards
may share a backward.) Those of a unit are written when the unit has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

from typing_extensions import override

from actrec._torch import at_end_of_backward, backward_number
from actrec._values.containers import Value

from .call import Call
from .format import Slot
from .live import LiveLayer, Writing


class Backwards:
    """Which passes still await gradients, for all layers of a block."""

    def __init__(self, complete: Callable[[], int]) -> None:
        """``complete`` returns how many passes will get no more calls, apart from gradients."""
        #: Each yields what one layer writes with the passes before a number, once these are committed.
        self.late: list[Callable[[int], Iterator[Call]]] = []
        self.lock = threading.RLock()  # the writer must not be called while it is held
        self._complete = complete
        self._expecting: set[int] = set()  # passes that a backward may reach
        self._running: dict[int, int] = {}  # the latest pass that each running backward has reached
        self._reached = -1  # the latest pass that a backward which has ended had reached
        self._latest = -1  # the latest pass that has begun
        self._over = -1  # up to this pass, no more gradients are expected

    def begin(self, number: int) -> None:
        """A call of pass ``number`` was recorded. At its first call, the passes that backwards have reached are over."""
        with self.lock:
            if number > self._latest:
                self._latest, self._over = number, self._reached

    def expect(self, number: int) -> None:
        """A backward may reach pass ``number``."""
        with self.lock:
            self._expecting.add(number)

    def expect_no_more(self, number: int) -> None:
        """Pass ``number`` is a unit that has ended."""
        with self.lock:
            self._expecting.discard(number)

    def arrive(self, number: int) -> None:
        """A backward is running, and has reached pass ``number``."""
        with self.lock:
            backward = backward_number()
            known = self._running.get(backward)
            self._running[backward] = number if known is None else max(known, number)
        if known is None:
            at_end_of_backward(partial(self._end, backward))

    def _end(self, backward: int) -> None:
        with self.lock:
            self._reached = max(self._reached, self._running.pop(backward, -1))
            # A backward that raised never reports its end.
            self._running = {one: at for one, at in self._running.items() if one > backward}

    def count_complete(self) -> int:
        """Return how many passes are complete, with their gradients."""
        complete = self._complete()
        with self.lock:
            waiting = [number for number in self._expecting if number > self._over]
            return min([complete, *waiting])

    def take(self, complete: int) -> Iterator[Call]:
        """Yield the gradients of the passes before ``complete``, to be written now."""
        with self.lock:
            self._expecting = {number for number in self._expecting if number >= complete}
            for take in self.late:
                yield from take(complete)


class LateLayer(LiveLayer):
    """A layer of gradients that are recorded to a path."""

    def __init__(self, stream: Writing, slot: Slot, backwards: Backwards) -> None:
        super().__init__(stream, slot)
        self._backwards = backwards
        #: By pass, the gradients that may still change.
        self._held_back: dict[int, list[Value]] = {}
        backwards.late.append(self._take)

    @override
    def _keep(self, value: Value, number: int) -> None:
        self._stream.keep_later()
        with self._backwards.lock:
            self._backwards.begin(number)
            self._held_back.setdefault(number, []).append(value)
        self._counts(number).passes.add(number)

    @override
    def _settle(self, number: int) -> None:
        super()._settle(number)
        self._backwards.expect_no_more(number)

    @override
    def _drop(self, number: int) -> None:
        super()._drop(number)
        self._backwards.expect_no_more(number)
        with self._backwards.lock:
            self._held_back.pop(number, None)

    def _take(self, complete: int) -> Iterator[Call]:
        """Yield the gradients of the passes before ``complete``."""
        for number in sorted(number for number in self._held_back if number < complete):
            for value in self._held_back.pop(number):
                call = Call.of(self._slot, number, value, parts=True, before=self._look)
                self._look = call.look
                self._settled.add(call.look, value)
                yield call
