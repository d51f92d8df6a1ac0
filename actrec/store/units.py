"""The keys of units on disk: one more layer, with one call for each unit, in the pass of the unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from actrec._recordings.pass_numbers import RankPass
from actrec._recordings.units import Key, Units

from .call import Call
from .format import Defect, Slot, corrupt, need
from .layers import Source
from .part import Group
from .shard import Shard

#: The layer of the keys.
UNIT: Final = Slot("unit", 0, "key", "unit")


def tensor_of(key: Key) -> Tensor:
    """Return a key as a tensor: ``()`` of int64, or the bytes of a string as ``(N)`` of uint8."""
    if isinstance(key, int):
        return torch.tensor(key, dtype=torch.int64, device="cpu")
    return torch.tensor(list(key.encode()), dtype=torch.uint8, device="cpu")


def key_call(number: int, key: Key) -> Call:
    """Return the key of pass ``number`` as it is written."""
    return Call.of(UNIT, number, tensor_of(key))


class StoredUnits(Units):
    """The stored units, read at the first use: all keys of a shard in one read."""

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__()
        self.sources = sources

    @cached_property
    @override
    def keys(self) -> dict[RankPass, Key]:
        read = (self.of_shard(one, shard) for one in self.sources for shard, _ in one.parts())
        return dict(chain.from_iterable(read))

    @override
    def __len__(self) -> int:
        return sum(source.so_far.calls for source in self.sources)

    @property
    def are_read(self) -> bool:
        """Whether the keys are known without reading anything."""
        return "keys" in vars(self) or not len(self)

    def of_shard(self, source: Source, shard: Shard) -> Iterator[tuple[RankPass, Key]]:
        """Yield the keys in a shard, each with its rank and pass."""
        part = shard.part(source.role, source.name)
        if part is None:
            return
        try:
            groups = [_keys(shard, group) for group in part.groups]
        except Defect as defect:
            raise corrupt(shard.path, defect) from None
        places = zip(part.group.tolist(), part.within.tolist(), strict=True)
        for number, (group, at) in zip(part.passes.tolist(), places, strict=True):
            yield (source.rank.number, number), groups[group][at]


def _keys(shard: Shard, group: Group) -> list[Key]:
    """Read the keys of a group: all of them integers, or all of them text."""
    kinds = [(leaf.dtype, leaf.shapes.shape[1]) for leaf in group.leaves]
    need(
        kinds in ([(torch.int64, 0)], [(torch.uint8, 1)]),
        "the key of a unit is neither a number nor text",
    )
    (leaf,) = group.leaves
    data = torch.empty(int(leaf.starts[-1]), dtype=leaf.dtype, device="cpu")
    shard.read_into(leaf.begin, data)
    if leaf.dtype is torch.int64:
        return [*data.tolist()]
    text, starts = bytes(data.tolist()), leaf.starts.tolist()
    try:
        return [text[a:b].decode() for a, b in pairwise(starts)]
    except UnicodeDecodeError as error:
        message = f"the key of a unit is not text ({error.reason})"
        raise Defect(message) from None
