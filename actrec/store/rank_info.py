"""How far the ranks of a recording have come, as objects and as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

_MOST: Final = 8


@dataclass(frozen=True, slots=True)
class RankInfo:
    """How far one rank of a stored recording has come."""

    number: int
    #: How many passes it has committed.
    num_passes: int
    #: Whether it was closed properly.
    complete: bool
    #: What happened if not, such as "killed or still recording", "left by ValueError" or "wrote nothing".
    error: str | None


def nothing_of(number: int) -> RankInfo:
    """Return the entry of a rank that wrote nothing."""
    return RankInfo(number, 0, complete=False, error="wrote nothing")


def summary(ranks: Iterable[RankInfo]) -> Iterator[str]:
    """Yield what is wrong, with the ranks that it is wrong with.

    >>> ranks = [RankInfo(0, 5, True, None), RankInfo(1, 3, False, "left by ValueError")]
    >>> list(summary([*ranks, nothing_of(2), nothing_of(3)]))
    ['rank 1 left by ValueError', 'ranks 2 and 3 wrote nothing']
    """
    reasons: dict[str, list[int]] = {}
    for info in ranks:
        if info.error is not None:
            reasons.setdefault(info.error, []).append(info.number)
    for reason, numbers in reasons.items():
        yield f"{_named(numbers)} {reason}"


def _named(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > _MOST:
        shown = ", ".join(map(str, numbers[:_MOST]))
        return f"ranks {shown} and {len(numbers) - _MOST} more"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
