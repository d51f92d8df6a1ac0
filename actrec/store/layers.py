"""Layers on disk: where each call is, and how calls that lie behind each other are joined by copying bytes."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from actrec._recordings.passes import PassNumbers
from actrec._values.summary import Summary

from .read_only import ReadOnlyLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from actrec._values.containers import Value

    from .format import Role
    from .index import Found
    from .ledger import SoFar
    from .rank_folder import Rank
    from .shard import Group, Part, Shard

__all__ = ["Source", "StoredLayer"]


class Source(NamedTuple):
    """A layer as one rank has recorded it."""

    rank: Rank
    role: Role
    name: str
    type: str
    so_far: SoFar

    def parts(self) -> Iterator[tuple[Shard, Part]]:
        """What its shards hold of the layer."""
        return self.rank.index.parts(self.role, self.name)

    def find(self, call: int) -> Found:
        """Find a call."""
        return self.rank.index.find(self.role, self.name, call)


class StoredLayer(ReadOnlyLayer):
    """A layer on disk: indexed and iterated over like a list, each call read when it is asked for."""

    def __init__(self, name: str, kind: str, sources: Iterable[Source] = ()) -> None:
        self.name = name
        self.type = kind
        self._sources = list(sources)
        calls = (source.so_far.calls for source in self._sources)
        self._starts = list(accumulate(calls, initial=0))

    @cached_property
    def _order(self) -> Tensor | None:
        """The calls by pass, ``None`` where they are stored so; several ranks or threads store them otherwise."""
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
    def passes(self) -> PassNumbers:
        return PassNumbers(self._numbers)

    @cached_property
    def _numbers(self) -> list[int]:
        return self._stored_passes.sort().values.tolist()

    @property
    def ranks(self) -> list[int]:
        """For each call, the rank that has recorded it; of a tensor in parts, the first of those ranks.

        All zeros, unless a run of several processes was recorded.
        """
        owners = [
            source.rank.number for source in self._sources for _ in range(source.so_far.calls)
        ]
        return owners if self._order is None else [owners[at] for at in self._order.tolist()]

    @property
    def in_parts(self) -> bool:
        """Whether any tensor is a rank's part of a ``DTensor``."""
        return any(source.so_far.in_parts for source in self._sources)

    @override
    def __len__(self) -> int:
        return self._starts[-1]

    @override
    def _call(self, index: int) -> Value:
        found = self.find(index)
        return found.shard.value(found.group, found.call)

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
    def _summary(self) -> Summary:
        found = Summary()
        for source in self._sources:
            found.update(source.so_far.looks)
        return found

    @property
    @override
    def nbytes(self) -> int:
        return sum(source.so_far.nbytes for source in self._sources)

    @override
    def cat(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along an existing dimension. See :meth:`Layer.cat`; nothing is released."""
        joined = self._joined(new=False) if dim == 0 else None
        return super().cat(dim) if joined is None else joined

    @override
    def stack(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along a new dimension. See :meth:`Layer.stack`; nothing is released."""
        joined = self._joined(new=True) if dim == 0 else None
        return super().stack(dim) if joined is None else joined

    def _joined(self, *, new: bool) -> Value | None:
        """Join the calls shard by shard, each read into its place; ``None`` where that is not possible."""
        if self._order is not None or not len(self):
            return None
        plan = _JoinPlan(new=new)
        if not all(plan.fits(part) for part in self._parts()):
            return None
        results = plan.results()
        for shard, part in self._read():
            plan.read(shard, part, results)
        return plan.value(results)

    def _read(self) -> Iterator[tuple[Shard, Part]]:
        return chain.from_iterable(source.parts() for source in self._sources)

    def _parts(self) -> Iterator[Part]:
        return (part for _, part in self._read())


class _JoinPlan:
    """How calls that lie behind each other in the shards become one value."""

    def __init__(self, *, new: bool) -> None:
        self._new = new  # dimension
        self._first: Group | None = None
        self._rows: list[int] = []
        self._at: list[int] = []

    def fits(self, part: Part) -> bool:
        """Take in a part, and return whether its calls can be joined with those before by copying bytes."""
        group, *others = part.groups
        if self._first is None:
            self._first = group
            self._rows = [0] * len(group.leaves)
            self._at = [0] * len(group.leaves)
        if others or group.text != self._first.text or not group.structure.joins:
            return False
        for number, (leaf, first) in enumerate(zip(group.leaves, self._first.leaves, strict=True)):
            sizes, like = (one.shapes if self._new else one.shapes[:, 1:] for one in (leaf, first))
            dims = leaf.shapes.shape[1]
            same = leaf.dtype == first.dtype and sizes.shape[1] == like.shape[1]
            if not same or not bool((sizes == like[0]).all()) or not (dims or self._new):
                return False
            self._rows[number] += len(leaf.shapes) if self._new else int(leaf.shapes[:, 0].sum())
        return bool(group.leaves)

    def results(self) -> list[Tensor]:
        """Memory for the joined tensors."""
        assert self._first is not None  # noqa: S101  # there are calls
        shapes = [leaf.shape(0) if self._new else leaf.shape(0)[1:] for leaf in self._first.leaves]
        return [
            torch.empty((rows, *shape), dtype=leaf.dtype, device="cpu")
            for rows, shape, leaf in zip(self._rows, shapes, self._first.leaves, strict=True)
        ]

    def read(self, shard: Shard, part: Part, results: list[Tensor]) -> None:
        """Read what a shard has."""
        (group,) = part.groups
        for number, (leaf, result) in enumerate(zip(group.leaves, results, strict=True)):
            rows = len(leaf.shapes) if self._new else int(leaf.shapes[:, 0].sum())
            at = self._at[number]
            self._at[number] = at + rows
            shard.read_into(leaf.extent(0, len(leaf.shapes))[0], result[at : at + rows])

    def value(self, results: list[Tensor]) -> Value:
        """The joined value."""
        assert self._first is not None  # noqa: S101  # likewise
        return self._first.structure.spec.fill(results)
