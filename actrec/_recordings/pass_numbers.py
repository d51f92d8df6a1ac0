"""The passes of a recording: how many there are, and which one each call belongs to."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import ClassVar, Generic, TypeAlias, TypeVar, overload

from typing_extensions import override

from actrec.errors import OptionError

T = TypeVar("T")


@dataclass(eq=False)
class Count:
    """The number of passes, and which of them raised."""

    count: int = 0
    raised: set[int] = field(default_factory=set)


class ListView(Sequence[T], Generic[T]):
    """A read-only view of a list, with an item for each call. It is equal to any list of the same items."""

    __slots__ = ("_items",)

    def __init__(self, items: list[T]) -> None:
        self._items = items

    @override
    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    @override
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self._items[index]

    @override
    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, ListView)):
            return NotImplemented
        return [*self] == [*other]

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @override
    def __repr__(self) -> str:
        return repr([*self])


#: The rank of a call, ``None`` in memory, and its pass.
RankPass: TypeAlias = tuple[int | None, int]


def calls_of(rank_passes: Sequence[RankPass]) -> dict[RankPass, list[int]]:
    """Return the indices of the calls of each pass."""
    found: dict[RankPass, list[int]] = {}
    for number, rank_pass in enumerate(rank_passes):
        found.setdefault(rank_pass, []).append(number)
    return found


def nth_calls(call: str, title: str, rank_passes: Sequence[RankPass], nth: int) -> list[int]:
    """Return the n-th call of each pass; all calls, if no pass has more than one."""
    given: object = nth
    if isinstance(given, bool) or not isinstance(given, int):
        message = (
            f"{call}: expected a whole number: 0 for the first call of each pass, -1 for the last."
        )
        raise OptionError(message)
    passes = calls_of(rank_passes)
    most = max(map(len, passes.values()), default=0)
    if most < 2:  # noqa: PLR2004
        return list(range(len(rank_passes)))
    found = [calls[nth] for calls in passes.values() if -len(calls) <= nth < len(calls)]
    if not found:
        message = f"{call}: no pass has that many calls of layer {title}, which was called at most {most} times in a pass."
        raise OptionError(message)
    return sorted(found)


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
