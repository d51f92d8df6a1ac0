"""What a rank has recorded, in outline: of each layer how many calls are in which shard, and of which passes.

A recording may have a million shards, and the header of each says where every call begins. That would be tens of
gigabytes, so it is read, checked and forgotten: what is kept takes a few numbers for each layer and shard, and a
header is read again when one of its calls is.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import chain, pairwise, repeat
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from actrec._forms import Form, form

from ._index import numbers
from ._tree import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ._format import Role, Slot
    from ._index import Group, Leaf, Opened, Part, Run

__all__ = ["Held", "Look", "LookLeaf", "Outline", "PassRuns", "form_of", "look", "per_pass"]


class LookLeaf(NamedTuple):
    """A tensor in a value, without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]


#: A value without its data: its structure, and its tensors.
Look: TypeAlias = tuple[str, tuple[LookLeaf, ...]]


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


@dataclass(slots=True, eq=False)
class Held:
    """What the shards of a rank hold of one layer."""

    slot: Slot
    shards: array[int] = field(default_factory=lambda: array("Q"))  # those that hold any of it
    starts: array[int] = field(
        default_factory=lambda: array("Q", [0])
    )  # their first calls, and the end
    triples: array[int] = field(
        default_factory=lambda: array("Q")
    )  # the runs of passes, one behind the other
    first: int = 0  # pass
    last: int = -1
    ordered: bool = True  # whether the calls follow each other by pass
    nbytes: int = 0
    looks: dict[Look, None] = field(default_factory=dict)  # how its values look

    def add(self, number: int, part: Part) -> None:
        """Add what shard ``number`` holds."""
        self.shards.append(number)
        self.starts.append(self.starts[-1] + sum(many for _, _, many in part.passes))
        for first, step, many in part.passes:
            self.first = first if self.last < 0 else self.first
            self.triples.extend((first, step, many))
            self.ordered = self.ordered and first >= self.last
            self.last = first + step * (many - 1)
        self.nbytes += covered(spans(part))
        for group in part.groups:
            self.looks.update(dict.fromkeys(looks(group)))

    @property
    def runs(self) -> Iterator[Run]:
        """The runs of passes of all calls."""
        flat = iter(self.triples)
        return zip(flat, flat, flat, strict=True)

    @property
    def passes(self) -> Iterator[int]:
        """The pass of each call, as they are stored."""
        return numbers(self.runs)


def per_pass(runs: Iterable[Run]) -> tuple[int, int]:
    """How many calls there are in the pass with most, and how many passes with any.

    >>> per_pass([(0, 1, 3), (2, 0, 2), (3, 1, 1)])
    (3, 4)
    """
    most = passes = here = 0
    last = -1
    for first, step, many in runs:
        here = (here if first == last else 0) + (1 if step else many)
        passes += (many if step else 1) - (first == last)
        most = max(most, here)
        if step and many > 1:
            here = 1
        last = first + step * (many - 1)
    return most, passes


class Outline:
    """What a rank has recorded, shard after shard."""

    def __init__(self) -> None:
        self.held: dict[tuple[Role, str], Held] = {}  # by the first call of each layer that ended
        self.nbytes = 0  # what several layers share counts once
        self.committed = 0
        self.raised: set[int] = set()  # passes
        self.count = 0  # of shards
        self._waiting: list[Opened] = []  # parts of passes that no shard has committed yet

    def add(self, opened: Opened) -> None:
        """Add the next shard."""
        self.count += 1
        self.committed = opened.shard.heading.committed
        self.raised.update(opened.shard.heading.raised)
        if opened.shard.heading.part:
            self._waiting.append(opened)
            return
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if _first(one) < self.committed:
                self._add(one)
            else:
                self._waiting.append(one)
        self._add(opened)

    def _add(self, opened: Opened) -> None:
        number = opened.shard.heading.shard
        for part in opened.parts:
            key = part.slot.role, part.slot.name
            if key not in self.held:
                self.held[key] = Held(part.slot)
            self.held[key].add(number, part)
        self.nbytes += covered(chain.from_iterable(map(spans, opened.parts)))

    @property
    def leftovers(self) -> list[int]:
        """The shards with calls of a pass that was never completed."""
        return [opened.shard.heading.shard for opened in self._waiting]


def _first(opened: Opened) -> int:
    return min((first for part in opened.parts for first, _, _ in part.passes), default=0)


# --- Bytes -------------------------------------------------------------------------------------------


def spans(part: Part) -> Iterator[tuple[int, int]]:
    """Where the tensors of a layer begin and end in the file."""
    return (
        (leaf.begin, leaf.begin + leaf.nbytes) for group in part.groups for leaf in group.leaves
    )


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """How many bytes lie in any of the spans.

    >>> covered([(0, 4), (2, 6), (8, 9)])
    7
    """
    total = reached = 0
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return total


# --- Looks -------------------------------------------------------------------------------------------


def looks(group: Group) -> Iterator[Look]:
    """How the values of a group look, without repeating one that follows its like."""
    return (look(group, call) for call in _changes(group.leaves))


def look(group: Group, call: int) -> Look:
    """How a value of a group looks."""
    return group.structure, tuple(LookLeaf(leaf.dtype, leaf.shape(call)) for leaf in group.leaves)


def _changes(leaves: list[Leaf]) -> list[int]:
    """The calls with which the number of rows of any tensor changes, and the first."""
    return sorted({0, *(first for leaf in leaves for first, _ in pairwise(leaf.calls))})


def form_of(structure: str, leaves: Iterable[LookLeaf | torch.Tensor]) -> Form:
    """The form of a value that looks like this; ``Defect`` if no value does."""
    empty = [torch.zeros((), dtype=leaf.dtype, device="cpu").expand(leaf.shape) for leaf in leaves]
    return form(decode(structure, empty.__getitem__))
