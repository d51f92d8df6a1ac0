"""The passes of the calls of a layer that is being written: a few numbers, however many calls there are."""

from __future__ import annotations

from array import array
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PassRuns"]


class _Passes(NamedTuple):
    """Passes that follow each other and have equally many calls."""

    first: int
    many: int
    calls: int  # in each of them


class PassRuns:
    """The pass of each call, in as little memory as the number of calls in a pass changes.

    It may be read while another thread adds.
    """

    def __init__(self) -> None:
        self._over = array("q")  # runs that do not go on
        # How many of those there are, the run that goes on, the latest pass, its calls, and all calls: changed in one step.
        self._state = (0, _Passes(0, 0, 0), -1, 0, 0)

    def add(self, number: int) -> None:
        """Add a call of a pass."""
        over, run, latest, calls, total = self._state
        if number == latest:
            self._state = (over, run, latest, calls + 1, total + 1)
            return
        if (latest, calls) == (run.first + run.many, run.calls):
            run = run._replace(many=run.many + 1)
        elif calls:
            self._over.extend(run)
            over, run = over + len(run), _Passes(latest, 1, calls)
        self._state = (over, run, number, 1, total + 1)

    def __len__(self) -> int:
        return self._state[-1]

    def __iter__(self) -> Iterator[int]:
        over, run, latest, calls, _ = self._state
        flat = iter((*self._over[:over], *run, latest, 1, calls))
        for first, many, each in zip(flat, flat, flat, strict=True):
            for number in range(first, first + many):
                yield from repeat(number, each)
