"""The passes of a recording: how many there are, and which one each call belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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


def calls_of(
    rank_passes: Sequence[RankPass], among: Iterable[int] | None = None
) -> dict[RankPass, list[int]]:
    """Return the indices of the calls of each pass, among all calls or some."""
    found: dict[RankPass, list[int]] = {}
    for number in range(len(rank_passes)) if among is None else among:
        found.setdefault(rank_passes[number], []).append(number)
    return found


def nth_calls(
    call: str, title: str, rank_passes: Sequence[RankPass], nth: int, among: Iterable[int]
) -> list[int]:
    """Return the n-th call of each pass, among some calls; all of these, if no pass has more than one."""
    given: object = nth
    if isinstance(given, bool) or not isinstance(given, int):
        message = (
            f"{call}: expected a whole number: 0 for the first call of each pass, -1 for the last."
        )
        raise OptionError(message)
    among = list(among)
    passes = calls_of(rank_passes, among)
    most = max(map(len, passes.values()), default=0)
    if most < 2:  # noqa: PLR2004
        return among
    found = [calls[nth] for calls in passes.values() if -len(calls) <= nth < len(calls)]
    if not found:
        message = f"{call}: no pass has that many calls of layer {title}, which was called at most {most} times in a pass."
        raise OptionError(message)
    return sorted(found)
