"""What the shards of a rank hold, counted up from the first: it stands in the header of each shard.

So the last shard alone says how many calls of which layers there are, of which passes, and what they look like: opening a
recording reads one header of each rank, however many shards there are. And the shard with call ``i`` of a layer
is found by bisection, for each header says how many calls there are before it. No file beside the shards can be missing,
stale or damaged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from actrec._values.summary import Summary

from .format import MAX_DIMS, Slot, integer, items, mapping, need, text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["Heading", "Laid", "Ledger", "SoFar"]


@dataclass(frozen=True, slots=True)
class Heading:
    """What a shard says of itself and of those before it.

    A call counts if its pass is before ``committed`` of the last shard, and its shard is not ``void``: a pass
    that is larger than a shard is written in parts, and those of a pass that was never completed are void.
    """

    recording: str
    rank: int
    ranks: int  #: of the run that wrote it
    shard: int
    committed: int  #: with this shard, the passes before this number are complete
    parts: tuple[
        tuple[int, int], ...
    ] = ()  #: shards with calls of passes that are not: shard and pass
    void: tuple[int, ...] = ()  #: shards whose calls do not count
    raised: tuple[int, ...] = ()  #: passes that raised, of those that are complete
    ended: str | None = (
        None  #: ``""`` if the run was closed properly with this shard, or what it was left by
    )

    @property
    def is_part(self) -> bool:
        """Whether the calls of the shard itself are of a pass that was not complete."""
        return bool(self.parts) and self.parts[-1][0] == self.shard

    @property
    def uncounted(self) -> tuple[int, ...]:
        """The shards whose calls do not count if this is the last one."""
        return tuple(sorted({*self.void, *(shard for shard, _ in self.parts)}))


@dataclass(slots=True)
class SoFar:
    """What the shards of a rank hold of one layer, up to and including one of them."""

    stored: int = 0  #: calls, those included that do not count
    calls: int = 0
    nbytes: int = 0
    first: int = 0  #: pass
    last: int = -1
    passes: int = 0  #: with any call
    most: int = 0  #: calls in a pass
    latest: int = 0  #: calls in the last pass
    ordered: bool = True  #: whether the calls follow each other by pass
    in_parts: bool = False  #: whether any tensor is a rank's part of a DTensor
    looks: Summary = field(default_factory=Summary)

    def add(self, calls: Laid) -> None:
        """Take in calls that count."""
        first, last = int(calls.passes[0]), int(calls.passes[-1])
        counts = torch.unique_consecutive(calls.passes, return_counts=True)[1]
        if self.calls and first == self.last:  # it was written in parts
            counts[0] += self.latest
            self.passes -= 1
        self.passes += len(counts)
        self.most = max(self.most, int(counts.max()))
        self.latest = int(counts[-1])
        self.first = min(self.first, first) if self.calls else first
        self.ordered = self.ordered and first >= self.last
        self.last = max(self.last, last)
        self.calls += len(calls.passes)
        self.nbytes += calls.nbytes
        self.in_parts = self.in_parts or calls.in_parts
        self.looks.update(calls.looks)

    def node(self) -> dict[str, Any]:
        """As it stands in the metadata."""
        looks = self.looks
        return {
            "stored": self.stored,
            "calls": self.calls,
            "bytes": self.nbytes,
            "first": self.first,
            "last": self.last,
            "passes": self.passes,
            "most": self.most,
            "latest": self.latest,
            "ordered": self.ordered,
            "in_parts": self.in_parts,
            "kinds": list(looks.kinds),
            "dtypes": list(looks.dtypes),
            "shapes": [[*pair] for pair in looks.shapes.values()],
        }

    @classmethod
    def parsed(cls, node: Any, stored: int) -> SoFar:
        """What the metadata say, checked."""
        numbers = ("calls", "bytes", "first", "last", "passes", "most", "latest")
        node = mapping(node, "what there is so far", *numbers, *_FLAGS, "kinds", "dtypes", "shapes")
        for flag in _FLAGS:
            need(type(node[flag]) is bool, f"{flag!r} is neither true nor false")
        last = node["last"]
        need(type(last) is int and last >= -1, "'last' so far is no pass")
        looks = Summary(
            dict.fromkeys(text(kind, "a kind") for kind in items(node["kinds"], "the kinds")),
            dict.fromkeys(text(dtype, "a dtype") for dtype in items(node["dtypes"], "the dtypes")),
            {"cpu": None} if node["dtypes"] else {},
        )
        for pair in items(node["shapes"], "the shapes"):
            low, high = (_sizes(shape) for shape in items(pair, "the least and the largest shape"))
            need(
                len(low) == len(high), "the least and the largest shape differ in their dimensions"
            )
            looks.add_shape(low, high)
        found = {key: integer(node[key], f"{key!r} so far") for key in numbers if key != "last"}
        first, calls, nbytes = found.pop("first"), found.pop("calls"), found.pop("bytes")
        flags = {flag: node[flag] for flag in _FLAGS}
        return cls(stored, calls, nbytes, first, last, looks=looks, **found, **flags)


_FLAGS = ("ordered", "in_parts")


def _sizes(shape: Any) -> list[int]:
    shape = items(shape, "a shape")
    need(len(shape) <= MAX_DIMS, f"a shape has {len(shape)} dimensions")
    return [integer(size, "a size") for size in shape]


@dataclass(frozen=True, slots=True)
class Laid:
    """The calls of one layer in one shard, as far as the ledger counts them."""

    slot: Slot
    passes: Tensor  #: (calls,)
    nbytes: int
    in_parts: bool  #: whether any tensor is a rank's part of a DTensor
    looks: Summary


@dataclass(slots=True)
class Ledger:
    """The state of a rank's writer: what stands in the header of the next shard."""

    heading: Heading  #: of the last shard
    layers: dict[Slot, SoFar] = field(default_factory=dict)  #: by the end of their first calls
    _waiting: list[Laid] = field(default_factory=list)  # in parts of passes that are not complete

    def next(
        self,
        laid: Iterable[Laid],
        committed: int,
        *,
        part_of: int | None = None,
        raised: Iterable[int] = (),
        ended: str | None = None,
    ) -> Heading:
        """Count the calls of one more shard, and return its heading.

        Args:
            laid: the calls.
            committed: with this shard, the passes before this number are complete.
            part_of: the pass that all calls are of, if it is not complete yet.
            raised: the passes that raised, of those that it commits.
            ended: how the run ended, if this is its last shard: ``""`` for properly.
        """
        shard = self.heading.shard + 1
        parts = tuple(part for part in self.heading.parts if part[1] >= committed)
        if part_of is not None:
            parts += ((shard, part_of),)
        for one in laid:
            self.layers.setdefault(one.slot, SoFar()).stored += len(one.passes)
            if part_of is not None:
                self._waiting.append(one)
        complete = [one for one in self._waiting if int(one.passes[0]) < committed]
        self._waiting = [one for one in self._waiting if int(one.passes[0]) >= committed]
        for one in [*complete, *(laid if part_of is None else ())]:
            self.layers[one.slot].add(one)
        self.heading = replace(
            self.heading,
            shard=shard,
            committed=committed,
            parts=parts,
            raised=(*self.heading.raised, *raised),
            ended=ended,
        )
        return self.heading

    def resumed(self, ranks: int) -> Ledger:
        """Return the state of a run that goes on here: the parts of passes that were never completed are void."""
        heading = replace(
            self.heading, ranks=ranks, parts=(), void=self.heading.uncounted, ended=None
        )
        return Ledger(heading, self.layers)
