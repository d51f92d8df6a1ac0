"""The passes of a recording: how many there have been, and which one each call belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, overload

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Count", "PassNumbers"]


@dataclass(eq=False)
class Count:
    """How many passes there have been, and which of them raised."""

    count: int = 0
    raised: set[int] = field(default_factory=set)


class _Numbers(Protocol):
    """Numbers in order."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...
    def __iter__(self) -> Iterator[int]: ...


class PassNumbers(Sequence[int]):
    """The pass of each call: a view, which follows its layer until that is cleared. It equals a list of the same numbers."""

    __slots__ = ("_numbers",)

    def __init__(self, numbers: _Numbers) -> None:
        self._numbers = numbers

    @override
    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    @override
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self._numbers[at] for at in range(len(self))[index]]
        return self._numbers[range(len(self))[index]]

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, PassNumbers)):
            return NotImplemented
        return [*self] == [*other]

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @override
    def __repr__(self) -> str:
        return repr([*self])
