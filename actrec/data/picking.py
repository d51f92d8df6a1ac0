"""Which calls of the layers count: those of good passes, one of each pass if so asked; all layers have to have the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from actrec._recordings.passes import nth_calls
from actrec.errors import AlignmentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from actrec._recordings.passes import Moment

    from .calls import Calls, Stretch
    from .selecting import Selected

__all__ = ["Pick", "check_calls", "pick"]


@dataclass(frozen=True, eq=False)
class Pick:
    """The calls of a layer that count."""

    title: str
    moments: list[Moment]  #: rank and pass of each
    stretches: list[Stretch]  #: where they lie
    numbers: list[int]  #: as the layer that was given numbers them

    def at(self, call: int) -> str:
        """Name a call, in a message."""
        return f"call {self.numbers[call]} (pass {self.moments[call][1]}) of {self.title}"


def pick(selected: Selected, found: Calls, nth: int | None, raised: AbstractSet[Moment]) -> Pick:
    """Leave out the calls of passes that raised, and all but the n-th of each pass."""
    among = range(len(found.moments)) if selected.among is None else selected.among
    moments = [found.moments[number] for number in among]
    numbers: list[int] = _of_good_passes(moments, raised)
    if nth is not None:
        call = f"{selected.call}(nth={nth!r})"
        numbers = nth_calls(call, selected.title, moments, nth, numbers)
    calls = None if len(numbers) == len(found.moments) else [among[number] for number in numbers]
    moments = [moments[number] for number in numbers]
    return Pick(selected.title, moments, found.chosen(calls), numbers)


def _of_good_passes(moments: list[Moment], raised: AbstractSet[Moment]) -> list[int]:
    """Which calls are of passes that did not raise; what knows no rank, a call or a pass, may be of any."""
    numbers = {number for _, number in raised}

    def is_good(rank: int | None, number: int) -> bool:
        if number not in numbers:
            return True
        return rank is not None and not {(rank, number), (None, number)} & raised

    return [call for call, moment in enumerate(moments) if is_good(*moment)]


def check_calls(call: str, picks: Sequence[Pick]) -> None:
    """Check that all layers have the same calls; one that does not know its ranks goes with a layer of one rank."""
    alone = next((one for one in picks if any(rank is None for rank, _ in one.moments)), None)
    moments = [one.moments for one in picks]
    if alone is not None:
        for one in picks:
            ranks = sorted({rank for rank, _ in one.moments if rank is not None})
            if len(ranks) > 1:
                message = (
                    f"{call}: layer {one.title} was recorded by {len(ranks)} ranks, and {alone.title} is in memory, where "
                    f"nothing says which rank its calls are of. Open one rank, actrec.load(path, rank={ranks[0]}), say."
                )
                raise AlignmentError(message)
        moments = [[(None, number) for _, number in one.moments] for one in picks]
    for other, found in zip(picks[1:], moments[1:], strict=True):
        if found != moments[0]:
            raise _misaligned(call, (picks[0].title, moments[0]), (other.title, found))


def _misaligned(
    call: str, first: tuple[str, list[Moment]], other: tuple[str, list[Moment]]
) -> AlignmentError:
    (title, expected), (name, found) = first, other
    pairs = zip(expected, found, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    message = (
        f"{call}: layers {title} and {name} do not have the same calls. {title} has {len(expected)}, {name} has "
        f"{len(found)}, and call {same} is {_moment(expected, same)} of {title} and {_moment(found, same)} of {name}. "
        "Choose layers that are called equally often in each pass, take one call of each pass (nth=0), or record them "
        "in a run of their own."
    )
    return AlignmentError(message)


def _moment(moments: list[Moment], index: int) -> str:
    if index >= len(moments):
        return "missing"
    rank, number = moments[index]
    return f"in pass {number}" if rank is None else f"in pass {number}, rank {rank},"
