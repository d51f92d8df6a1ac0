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
    from actrec._values.join import How

    from .format import Role
    from .index import Found
    from .ledger import SoFar
    from .part import Group, Leaf, Part
    from .rank_folder import Rank
    from .shard import Shard

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
    def _join(self, how: How, dim: int, *, release: bool = False) -> Value:
        columns = self._columns(new=how == "stack") if dim == 0 and self._order is None else []
        if not columns:
            return super()._join(how, dim)
        for shard, part in self._read():
            for column, leaf in zip(columns, part.groups[0].leaves, strict=True):
                column.read(shard, leaf)
        _, part = next(self._read())
        return part.groups[0].structure.spec.fill([column.rows for column in columns])

    def _columns(self, *, new: bool) -> list[_Column]:
        """The tensors of all calls, to be joined by copying bytes; none where that is not possible."""
        first: Group | None = None
        columns: list[_Column] = []
        for _, part in self._read():
            group, *others = part.groups
            if first is None:
                first = group
                columns = [_Column(leaf, new=new) for leaf in group.leaves]
            same = not others and group.text == first.text and group.structure.joins
            if not same or not all(map(_Column.add, columns, group.leaves)):
                return []
        return columns

    def _read(self) -> Iterator[tuple[Shard, Part]]:
        return chain.from_iterable(source.parts() for source in self._sources)


class _Column:
    """One tensor of the values of a layer, joined: the rows of all calls, one behind the other.

    Args:
        like: this tensor in the first shard.
        new: whether each call is a row of a new dimension.
    """

    def __init__(self, like: Leaf, *, new: bool) -> None:
        self._dtype = like.dtype
        self._new = new
        self._shape = self._sizes(like)[0] if like.shapes.shape[1] or new else None
        self._many = 0
        self._filled = 0

    def _sizes(self, leaf: Leaf) -> Tensor:
        return leaf.shapes if self._new else leaf.shapes[:, 1:]

    def _rows_of(self, leaf: Leaf) -> int:
        return len(leaf.shapes) if self._new else int(leaf.shapes[:, 0].sum())

    def add(self, leaf: Leaf) -> bool:
        """Count the rows that a shard has, and return whether they are of one shape and dtype with those before."""
        sizes = self._sizes(leaf)
        if self._shape is None or leaf.dtype != self._dtype or sizes.shape[1:] != self._shape.shape:
            return False
        self._many += self._rows_of(leaf)
        return bool((sizes == self._shape).all())

    @cached_property
    def rows(self) -> Tensor:
        """All rows."""
        assert self._shape is not None  # noqa: S101  # or else they cannot be joined
        shape = (self._many, *self._shape.tolist())
        return torch.empty(shape, dtype=self._dtype, device="cpu")

    def read(self, shard: Shard, leaf: Leaf) -> None:
        """Read the rows that a shard has."""
        end = self._filled + self._rows_of(leaf)
        shard.read_into(leaf.begin, self.rows[self._filled : end])
        self._filled = end
