"""Times taken in turn, in one process, and what their ratios say.

A time alone means little: it differs between machines, and on one machine from minute to minute. So the
variants of a piece of work take turns, every round gives one ratio, and the median of the rounds is the
result. The quartiles beside it say how far to trust it.

What is timed is the processor time of this process, page faults included. On one thread that is the time
that passes, less what other programs take of it.
"""

from __future__ import annotations

import gc
import statistics
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    #: By variant, its time in each round.
    Times = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the quartiles of a ratio, or of an amount in some unit."""

    name: str
    low: float
    median: float
    high: float
    target: float | None = None
    unit: str = "x"
    exact: str = ""  # who of the two recorded what the layers returned, where that was looked at

    @classmethod
    def of(
        cls,
        name: str,
        values: Iterable[float],
        target: float | None = None,
        unit: str = "x",
        exact: str = "",
    ) -> Row:
        values = list(values)
        quartiles = statistics.quantiles(values, method="inclusive") if values[1:] else values * 3
        return cls(name, *quartiles, target, unit, exact)

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.median <= self.target


def seconds(work: Callable[[], object]) -> float:
    start = process_time()
    work()
    return process_time() - start


def take_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """Ask every variant once a round how long it took, after a round that does not count."""
    for variant in variants.values():
        variant()
    times: Times = {name: [] for name in variants}
    with _no_garbage_collection():
        for number in range(rounds):
            for name in _order(list(variants), number):
                times[name].append(variants[name]())
    return times


def ratios(times: Times, one: str, other: str) -> list[float]:
    """``one / other``, round by round."""
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def added(times: Times, one: str, other: str, without: str) -> list[float]:
    """What ``one`` adds to the time ``without`` any hook, over what ``other`` adds, round by round."""
    base = statistics.median(times[without])  # in one bad round the difference may be nothing
    return [
        (a - base) / max(b - base, base / 1000)
        for a, b in zip(times[one], times[other], strict=True)
    ]


def _order(names: Sequence[str], number: int) -> list[str]:
    """Another order every round, so that nobody always runs in the wake of the same neighbour."""
    first = number // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if number % 2 else turned


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
