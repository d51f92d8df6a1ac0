"""The passes of the calls of a layer that is being written, in a few numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import repeat


class PassRuns:
    """The pass of each call. The memory grows only when the number of calls in a pass changes.

    Consecutive passes with equally many calls are a run: its first pass, how many passes, and how many calls in each.
    A thread may read while another one adds.
    """

    def __init__(self, passes: Iterable[int] = ()) -> None:
        self._over = array("q")  # runs that have ended
        # How many numbers those are, the current run, the latest pass, its calls, and all calls: changed in one step.
        self._state = (0, 0, 0, 0, -1, 0, 0)
        for number in passes:
            self.add(number)

    def add(self, number: int) -> None:
        """Add a call of a pass."""
        over, first, many, each, latest, calls, total = self._state
        if number == latest:
            self._state = (over, first, many, each, latest, calls + 1, total + 1)
            return
        if latest == first + many and calls == each:
            many += 1
        elif calls:
            self._over.extend((first, many, each))
            over, first, many, each = over + 3, latest, 1, calls
        self._state = (over, first, many, each, number, 1, total + 1)

    def __len__(self) -> int:
        return self._state[-1]

    def __iter__(self) -> Iterator[int]:
        return in_runs(self.runs())

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Return the runs: first pass, how many passes, and how many calls in each."""
        over, first, many, each, latest, calls, _ = self._state
        flat = iter((*self._over[:over], first, many, each, latest, 1, calls))
        return (run for run in zip(flat, flat, flat, strict=True) if run[1] * run[2])


def in_runs(runs: Iterable[tuple[int, int, int]]) -> Iterator[int]:
    """Yield the pass of each call in some runs."""
    for first, passes, calls in runs:
        for number in range(first, first + passes):
            yield from repeat(number, calls)
