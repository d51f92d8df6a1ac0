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
        shard, span = self._shard(self._latest)
        if call not in span:
            numbers = range(self.rank.count)
            after = bisect_right(numbers, call, key=lambda number: self._shard(number)[1].start)
            at = max(0, after - 1)
            shard, span = self._shard(at)
            self._latest = at  # not read again: other threads set it, too
        part = shard.part(self.role, self.name)
        if part is None or call not in span:
            raise corrupt(shard.path, ANOTHER)
        return Found(shard, *part.place(call - span.start))

    def _shard(self, number: int) -> tuple[Shard, range]:
        """Return a shard, and the numbers of the calls of the layer in it, void ones included."""
        shard = self.rank.shard(number)
        return shard, shard.span(self.role, self.name)

    @cached_property
    def _skips(self) -> list[tuple[int, int]]:
        """The runs of calls that do not count: how many calls are before each, and how many it has."""
        spans = [self._shard(number)[1] for number in self.rank.heading.uncounted]
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
        columns = self._columns(new=how == "stack") if dim == 0 else []
        if not columns:
            return super()._join(how, dim)
        calls = 0
        for shard, part in self._read():
            here = slice(calls, calls := calls + len(part))
            for leaf, column in zip(part.groups[0].leaves, columns, strict=True):
                column.read(shard, leaf.begin, here)
        return part.groups[0].structure.spec.fill([column.joined for column in columns])

    def _columns(self, *, new: bool) -> list[_Column]:
        """Allocate memory for each tensor of all calls, joined; if ``new``, each call is one row.

        Empty if the calls are too different to be joined by copying bytes.
        """
        known: object = None
        counts: list[list[Tensor]] = []
        rows: list[list[int] | None] = []
        dtypes: list[torch.dtype] = []
        for _, part in self._read():
            group, *others = part.groups
            rows = [leaf.row(new=new) for leaf in group.leaves]
            dtypes = [leaf.dtype for leaf in group.leaves]
            known = known or (group.text, dtypes, rows)
            alike = not others and known == (group.text, dtypes, rows)
            if not alike or None in rows or not group.structure.joins:
                return []
            counts.append([leaf.counts(new=new) for leaf in group.leaves])
        return [
            _Column(dtype, row or [], torch.cat(many), self._order)
            for dtype, row, many in zip(dtypes, rows, zip(*counts, strict=True), strict=True)
        ]

    def _read(self) -> Iterator[tuple[Shard, Part]]:
        return chain.from_iterable(source.parts() for source in self._sources)


class _Column:
    """One tensor of the values: the rows of all calls, joined.

    Args:
        dtype: of the tensor.
        row: the shape of a row.
        counts: how many rows each call has, in the order of the files, ``(calls,)``.
        order: the calls in their own order; ``None`` if it is that of the files.
    """

    def __init__(
        self, dtype: torch.dtype, row: list[int], counts: Tensor, order: Tensor | None
    ) -> None:
        self.joined = torch.empty((int(counts.sum()), *row), dtype=dtype, device="cpu")
        self._counts = counts
        ordered = counts if order is None else counts[order]
        self._firsts = ordered.cumsum(0) - ordered  # the row at which each call begins
        if order is not None:
            self._firsts = torch.empty_like(counts).index_copy_(0, order, self._firsts)

    def read(self, shard: Shard, begin: int, calls: slice) -> None:
        """Read the rows of calls that follow each other in a shard from byte ``begin`` on to their places."""
        if not self.joined.numel():
            return
        firsts, counts = self._firsts[calls], self._counts[calls]
        rows = self.joined.view(len(self.joined), -1).view(torch.uint8)
        width, many = rows.shape[1], int(counts.sum())
        if torch.equal(firsts[1:], (firsts + counts)[:-1]):
            first = int(firsts[0])
            shard.read_into(begin, rows[first : first + many])
            return
        # Also long runs of rows: reading each to its place is no faster, measured for calls of up to 256 KB.
        before = counts.cumsum(0) - counts
        places = torch.repeat_interleave(firsts - before, counts) + torch.arange(many, device="cpu")
        for some in torch.split(places, max(1, _PIECE // width)):
            read = torch.empty((len(some), width), dtype=torch.uint8, device="cpu")
            shard.read_into(begin, read)
            words(rows).index_copy_(0, some, words(read))
            begin += read.nbytes
