"""Layers on disk: where each call is, and how calls that follow each other in a file are joined by copying bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from actrec._recordings.layer import Role
from actrec._recordings.pass_numbers import ListView
from actrec._values.containers import Value
from actrec._values.join import How
from actrec._values.memory import words
from actrec._values.shapes import Summary

from .dtensor import Spread
from .format import ANOTHER, corrupt
from .ledger import SoFar
from .part import Group, Part
from .rank import Rank
from .read_only import ReadOnlyLayer
from .shard import Shard

#: Runs of at least so many bytes are read to their place directly; shorter ones are read together, and then copied.
_RUN: Final = 1 << 16
_PIECE: Final = 1 << 22  # bytes that are read together


class Found(NamedTuple):
    """Where a call is."""

    shard: Shard
    group: Group
    call: int  #: its number in the group

    def value(self) -> Value:
        """Read the call."""
        tensors = [self.shard.tensor(leaf, self.call) for leaf in self.group.leaves]
        return self.group.structure.spec.fill(tensors)

    def tensor(self, number: int) -> Tensor:
        """Read one of its tensors."""
        return self.shard.tensor(self.group.leaves[number], self.call)


@dataclass(eq=False)
class Source:
    """A layer as one rank has recorded it."""

    rank: Rank
    role: Role
    name: str
    type: str
    so_far: SoFar
    _latest: int = 0  # the shard in which the last call was found

    def parts(self) -> Iterator[tuple[Shard, Part]]:
        """Yield the part of the layer in each shard, in order, without shards that do not count."""
        for shard in self.rank.shards():
            part = shard.part(self.role, self.name)
            if part is not None:
                yield shard, part

    def find(self, call: int) -> Found:
        """Find a call."""
        for begin, many in self._skips:
            if call >= begin:
                call += many
        at = self._latest
        if call not in self._span(at):
            after = bisect_right(range(self.rank.count), call, key=lambda n: self._span(n).start)
            self._latest = at = max(0, after - 1)
        shard = self.rank.shard(at)
        span = shard.span(self.role, self.name)
        part = shard.part(self.role, self.name)
        if part is None or call not in span:
            raise corrupt(shard.path, ANOTHER)
        return Found(shard, *part.place(call - span.start))

    def _span(self, number: int) -> range:
        return self.rank.shard(number).span(self.role, self.name)

    @cached_property
    def _skips(self) -> list[tuple[int, int]]:
        """The runs of calls that do not count: how many calls are before each, and how many it has."""
        spans = map(self._span, self.rank.heading.uncounted)
        return [(span.start, len(span)) for span in spans if span]


class StoredLayer(ReadOnlyLayer):
    """A layer on disk: indexed and iterated over like a list; each access reads a call."""

    def __init__(self, name: str, kind: str, sources: Iterable[Source] = ()) -> None:
        self.name = name
        self.type = kind
        self._sources = list(sources)
        calls = (source.so_far.calls for source in self._sources)
        self._starts = list(accumulate(calls, initial=0))

    @cached_property
    def _order(self) -> Tensor | None:
        """The stored calls sorted by pass; ``None`` if they are stored in that order. Ranks or threads may mix them."""
        found = [source.so_far for source in self._sources if source.so_far.calls]
        if all(one.ordered for one in found) and all(a.last <= b.first for a, b in pairwise(found)):
            return None
        return self._stored_passes.argsort(stable=True)

    @cached_property
    def _stored_passes(self) -> Tensor:
        parts = [part.passes for source in self._sources for _, part in source.parts()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")

    @property
    @override
    def passes(self) -> ListView[int]:
        return ListView(self._numbers)

    @cached_property
    def _numbers(self) -> list[int]:
        return self._stored_passes.sort().values.tolist()

    @property
    def ranks(self) -> list[int]:
        """For each call, the rank that has recorded it; for a tensor in parts, the first of its ranks.

        All are 0, unless several processes have recorded.
        """
        owners = [
            source.rank.number for source in self._sources for _ in range(source.so_far.calls)
        ]
        return owners if self._order is None else [owners[at] for at in self._order.tolist()]

    @property
    def in_parts(self) -> bool:
        """Whether any tensor is a rank's part of a ``DTensor``."""
        return any(source.so_far.in_parts for source in self._sources)

    def spreads(self) -> tuple[list[tuple[tuple[int, Spread], ...]], list[int]]:
        """Return the different ways in which tensors are spread over ranks, and the index of its way for each call."""
        kinds: dict[tuple[tuple[int, Spread], ...], int] = {}
        found = [torch.zeros(0, dtype=torch.int64, device="cpu")]
        for _, part in self._read():
            ways = [kinds.setdefault(one.structure.parts, len(kinds)) for one in part.groups]
            found.append(torch.tensor(ways, device="cpu")[part.group])
        stored = torch.cat(found)
        return [*kinds], (stored if self._order is None else stored[self._order]).tolist()

    @override
    def __len__(self) -> int:
        return self._starts[-1]

    @override
    def _call(self, index: int) -> Value:
        return self.find(index).value()

    def find(self, index: int) -> Found:
        """Find a call."""
        if self._order is not None:
            index = int(self._order[index])
        at = bisect_right(self._starts, index) - 1
        return self._sources[at].find(index - self._starts[at])

    @override
    def _per_pass(self) -> tuple[int, int]:
        found = [source.so_far for source in self._sources]
        return max((one.most for one in found), default=0), sum(one.passes for one in found)

    @override
    def _seen(self) -> tuple[Summary, dict[object, int]]:
        found, nbytes = Summary(), 0
        for source in self._sources:
            found.update(source.so_far.looks)
            nbytes += source.so_far.nbytes
        return found, {id(self): nbytes}

    @override
    def _join(self, how: How, dim: int, *, release: bool = False) -> Value:
        new = how == "stack"
        room = self._room(new=new) if dim == 0 else []
        if not room:
            return super()._join(how, dim)
        calls = 0
        for shard, part in self._read():
            here = slice(calls, calls := calls + len(part))
            for leaf, (joined, firsts) in zip(part.groups[0].leaves, room, strict=True):
                _scatter(shard, leaf.begin, joined, firsts[here], leaf.counts(new=new))
        return part.groups[0].structure.spec.fill([joined for joined, _ in room])

    def _room(self, *, new: bool) -> list[tuple[Tensor, Tensor]]:
        """Allocate memory for each tensor of all calls, joined. Return it, and the row at which each stored call begins.

        Empty if the calls are too different to be joined by copying bytes.
        """
        known: tuple[str, list[tuple[torch.dtype, list[int] | None]]] | None = None
        counts: list[tuple[Tensor, ...]] = []
        for _, part in self._read():
            group, *others = part.groups
            rows = [leaf.row(new=new) for leaf in group.leaves]
            look = (
                group.text,
                [(leaf.dtype, row) for leaf, row in zip(group.leaves, rows, strict=True)],
            )
            known = known or look
            if others or look != known or None in rows or not group.structure.joins:
                return []
            counts.append(tuple(leaf.counts(new=new) for leaf in group.leaves))
        kinds = known[1] if known else []
        room = []
        for (dtype, shape), parts in zip(kinds, zip(*counts, strict=True), strict=True):
            many = torch.cat(parts)
            joined = torch.empty((int(many.sum()), *(shape or ())), dtype=dtype, device="cpu")
            room.append((joined, self._firsts(many)))
        return room

    def _firsts(self, counts: Tensor) -> Tensor:
        """Return the row at which each stored call begins, among all rows in the order of the calls."""
        if self._order is None:
            return counts.cumsum(0) - counts
        ordered = counts[self._order]
        return torch.empty_like(counts).index_copy_(0, self._order, ordered.cumsum(0) - ordered)

    def _read(self) -> Iterator[tuple[Shard, Part]]:
        return chain.from_iterable(source.parts() for source in self._sources)


def _scatter(shard: Shard, begin: int, joined: Tensor, firsts: Tensor, counts: Tensor) -> None:
    """Read the rows of calls that follow each other in a shard, and put those of each call to its place in ``joined``."""
    if not joined.numel():
        return
    heads = (firsts[1:] != (firsts + counts)[:-1]).nonzero()[:, 0] + 1
    rows = joined.view(len(joined), -1).view(torch.uint8)
    width, many = rows.shape[1], int(counts.sum())
    if len(heads) * _RUN <= many * width:  # few, and long
        for some in torch.tensor_split(torch.stack([firsts, counts], 1), heads.tolist()):
            first, total = int(some[0, 0]), int(some[:, 1].sum())
            shard.read_into(begin, rows[first : first + total])
            begin += total * width
        return
    before = counts.cumsum(0) - counts
    places = torch.repeat_interleave(firsts - before, counts) + torch.arange(many, device="cpu")
    for some in torch.split(places, max(1, _PIECE // width)):
        read = torch.empty((len(some), width), dtype=torch.uint8, device="cpu")
        shard.read_into(begin, read)
        words(rows).index_copy_(0, some, words(read))
        begin += read.nbytes
