"""Counts of what the shards of a rank hold, up to and including each: they are in the header of each shard.

So the last shard alone tells which layers have how many calls, their passes, shapes and dtypes: opening a recording reads
one header of each rank, however many shards there are. And the shard with call ``i`` of a layer is found by bisection,
because each header says how many calls there are before it. There is no other file that could be missing, stale or
damaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, NamedTuple

import torch

from actrec._rank import MAX_RANKS
from actrec._values.outline import drawn
from actrec._values.shapes import Summary

from .format import MAX_DIMS, Slot, need
from .forms import Maybe, checked
from .part import Part

#: The forms of the heading and of the counts of a layer in the header of a shard.
HEADING: Final = {
    "recording": str,
    "rank": int,
    "ranks": int,
    "began": int,
    "shard": int,
    "committed": int,
    "parts": [(int, int)],
    "void": [int],
    "raised": [int],
    "ended": Maybe(str),
}
SO_FAR: Final = {
    **dict.fromkeys(("stored", "calls", "bytes", "first", "last", "passes", "most"), int),
    "ordered": bool,
    "in_parts": bool,
    "kinds": [str],
    "dtypes": [str],
    "shapes": [([int], [int])],
}


#: A key that earlier versions did not write.
_NESTED: Final = Maybe([(str, [int], [int])])


@dataclass(frozen=True, slots=True)
class Heading:
    """What a shard says about itself and about the shards before it.

    A call counts if its pass is before ``committed`` of the last shard, and its shard is not ``void``: a pass
    that is larger than a shard is written in parts, and the parts of a pass that was never completed are void.
    """

    recording: str
    rank: int
    ranks: int  #: of the run that wrote it
    began: int  #: when that run began in this rank, in nanoseconds since 1970
    shard: int
    committed: int  #: with this shard, the passes before this number are complete
    #: Shards with calls of passes that are not complete: shard and pass.
    parts: tuple[tuple[int, int], ...] = ()
    void: tuple[int, ...] = ()  #: shards whose calls do not count
    raised: tuple[int, ...] = ()  #: passes that raised, of those that are complete
    #: ``""`` if the run was closed properly with this shard; else the exception or the reason that ended it.
    ended: str | None = None

    @classmethod
    def of(cls, about: dict[str, Any]) -> Heading:
        """Return the heading from a header, which has the form ``HEADING``."""
        heading = cls(*(_tuple(about[key]) for key in HEADING))
        need(
            heading.ranks <= MAX_RANKS,
            f"it is of a run of {heading.ranks} ranks, and {MAX_RANKS} is the limit",
        )
        raised = max(heading.raised, default=-1)
        need(raised < heading.committed, "a pass raised that is not committed")
        return heading

    @property
    def is_part(self) -> bool:
        """Whether the calls of this shard are of a pass that is not complete."""
        return bool(self.parts) and self.parts[-1][0] == self.shard

    @property
    def uncounted(self) -> tuple[int, ...]:
        """The shards whose calls do not count if this is the last one."""
        return tuple(sorted({*self.void, *(shard for shard, _ in self.parts)}))


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


class Commit(NamedTuple):
    """What one more shard commits."""

    committed: int  #: with it, the passes before this number are complete
    part_of: int | None = None  #: the pass that all its calls are of, if it is not complete
    raised: tuple[int, ...] = ()  #: the passes that raised, of those that it commits
    dropped: Collection[int] = ()  #: passes whose parts, if there are any, do not count from now on
    ended: str | None = None  #: how the run ended, if this is its last shard: ``""`` for properly


@dataclass(slots=True)
class SoFar:
    """The counts of one layer in the shards of a rank, up to and including one of them."""

    stored: int = 0  #: calls, including void ones
    calls: int = 0
    nbytes: int = 0
    first: int = 0  #: pass
    last: int = 0
    passes: int = 0  #: with any call
    most: int = 0  #: calls in a pass
    ordered: bool = True  #: whether the calls follow each other by pass, from shard to shard
    in_parts: bool = False  #: whether any tensor is a rank's part of a DTensor
    looks: Summary = field(default_factory=Summary)

    def add(self, calls: Sequence[Part]) -> None:
        """Count all calls of some passes, which follow those counted before."""
        passes, counts = torch.unique(torch.cat([o.passes for o in calls]), return_counts=True)
        self.first = self.first if self.calls else int(passes[0])
        self.last = int(passes[-1])
        self.passes += len(passes)
        self.most = max(self.most, int(counts.max()))
        self.calls += int(counts.sum())
        for one in calls:
            self.nbytes += one.nbytes
            self.in_parts = self.in_parts or one.in_parts
            self.looks.update(one.summary())

    def node(self) -> dict[str, Any]:
        """Return the counts as they are in the metadata, in the form ``SO_FAR``."""
        *facts, looks = (getattr(self, one.name) for one in fields(self))
        nested = looks.nested
        return {
            **dict(zip(SO_FAR, facts, strict=False)),
            "kinds": list(looks.kinds),
            "dtypes": list(looks.dtypes),
            "shapes": [[*pair] for pair in looks.shapes.values()],
            "nested": None if nested is None else [[key, *sizes] for key, sizes in nested.items()],
        }

    def agrees(self, other: SoFar) -> bool:
        """Whether two are equal, except for descriptions of values, which another version may have worded differently."""
        words = {"kinds": None, "nested": None}
        return self.node() | words == other.node() | words

    @classmethod
    def of(cls, node: Any) -> SoFar:
        """Return the counts from the metadata, which have the form ``SO_FAR``."""
        *facts, kinds, dtypes, shapes = (node[key] for key in SO_FAR)
        nested = checked(node.get("nested"), _NESTED, "the outlines of nested values")
        devices = {"cpu": None} if dtypes else {}
        looks = Summary(dict.fromkeys(kinds), dict.fromkeys(dtypes), devices)
        for low, high in shapes:
            fit = len(low) == len(high) <= MAX_DIMS
            need(
                fit, "the least and the largest shape differ in their dimensions, or have too many"
            )
            looks.add_shape(low, high)
        looks.nested = None if nested is None else {}
        for template, low, high in nested or ():
            need(_is_outline(template, low, high), "an outline of nested values is damaged")
            looks.add_outline(template, low, high)
        found = cls(*facts)
        found.looks = looks
        return found


def _is_outline(template: str, low: Sequence[int], high: Sequence[int]) -> bool:
    try:
        drawn(template, low, high)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class Ledger:
    """The state of a rank's writer, from which the header of the next shard is made."""

    heading: Heading  #: of the last shard
    layers: dict[Slot, SoFar] = field(default_factory=dict)  #: in the order of their first calls
    _waiting: list[Part] = field(default_factory=list)  # in parts of passes that are not complete
    _latest: dict[Slot, int] = field(default_factory=dict)  # the last pass in a shard of this run

    def next(self, laid: Sequence[Part], commit: Commit) -> Heading:
        """Count the calls of one more shard, and return its heading."""
        heading, shard = self.heading, self.heading.shard + 1
        held = [one for one in self._waiting if int(one.passes[0]) not in commit.dropped]
        self._waiting = []
        counting: dict[Slot, list[Part]] = defaultdict(list)
        for one in laid:
            self._store(one)
        for one in [*held, *laid]:
            is_complete = int(one.passes[0]) < commit.committed
            (counting[one.slot] if is_complete else self._waiting).append(one)
        for slot, calls in counting.items():
            self.layers[slot].add(calls)
        parts = tuple(part for part in heading.parts if part[1] >= commit.committed)
        if commit.part_of is not None:
            parts += ((shard, commit.part_of),)
        void = (before for before, number in heading.parts if number in commit.dropped)
        self.heading = replace(
            heading,
            shard=shard,
            committed=commit.committed,
            parts=parts,
            void=(*heading.void, *void),
            raised=(*heading.raised, *commit.raised),
            ended=commit.ended,
        )
        return self.heading

    def _store(self, one: Part) -> None:
        so_far = self.layers.setdefault(one.slot, SoFar())
        so_far.stored += len(one.passes)
        latest = self._latest.get(one.slot, so_far.last)
        so_far.ordered = so_far.ordered and int(one.passes[0]) >= latest
        self._latest[one.slot] = max(latest, int(one.passes[-1]))

    def resumed(self, ranks: int, now: int) -> Ledger:
        """Return the state of a run that is resumed here: the parts of passes that were never completed are void."""
        heading = replace(
            self.heading,
            ranks=ranks,
            began=max(now, self.heading.began + 1),  # a clock may be set back
            parts=(),
            void=self.heading.uncounted,
            ended=None,
        )
        return Ledger(heading, deepcopy(self.layers))
