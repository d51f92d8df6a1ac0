"""The calls of a layer as a table: the pass, the shape and the place of the bytes of each.

The table is made of tensors with a line for each call, so a few operations align a million calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actrec._recordings.pass_numbers import RankPass
from actrec._recordings.units import Key
from actrec.store.joined_ranks import WholeLayer
from actrec.store.layers import Source as StoredSource
from actrec.store.layers import StoredLayer
from actrec.store.part import Leaf
from actrec.store.rank import Rank
from actrec.store.shard import Shard
from actrec.store.units import StoredUnits

from .numbering import integers
from .selecting import Selected
from .sources import Held, Shape, Source, Stored


class Look(NamedTuple):
    """The shape and dtype of a call."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Calls:
    """Calls of a layer."""

    title: str
    moments: Tensor  #: (calls, 2): rank and pass of each; in memory, the rank is -1
    units: Tensor | None  #: (calls,): the number of each call's unit, or -1; ``None`` without units
    keys: Mapping[Any, int]  #: the numbers of all units, by their keys
    numbers: Tensor  #: (calls,): their indices in the layer that the user gave
    places: Tensor  #: (calls, 3): the numbers of look and source, and the first byte there
    looks: list[Look]
    sources: list[Source]

    def of(self, numbers: Tensor) -> Calls:
        """Return some of the calls."""
        return replace(
            self,
            moments=self.moments[numbers],
            units=None if self.units is None else self.units[numbers],
            numbers=self.numbers[numbers],
            places=self.places[numbers],
        )

    def at(self, call: int) -> str:
        """Name a call, in a message."""
        return f"call {int(self.numbers[call])} (pass {int(self.moments[call, 1])}) of {self.title}"


def located(layers: Sequence[Selected]) -> list[Calls]:
    """Return the calls of some layers. The header of each shard is read once, however many layers are in it."""
    keys: dict[Any, int] = {}
    tables = [_Table(selected, keys) for selected in layers]
    stored = [table for table in tables if isinstance(table.selected.layer, StoredLayer)]
    known = dict.fromkeys(table.selected.layer._units for table in stored)
    units = [_Keys(one) for one in known if isinstance(one, StoredUnits) and not one.are_read]
    wanted: dict[Rank, list[tuple[_Table | _Keys, Any]]] = {}
    readers: list[_Table | _Keys] = [*stored, *units]
    for one in readers:
        for source in one.stored:
            wanted.setdefault(source.rank, []).append((one, source))
    for rank, every in wanted.items():
        for shard in rank.shards():
            file = Stored(shard.disk, shard.name, shard.head)
            for one, source in every:
                one.add_shard(source, shard, file)
    for keys_of in units:
        keys_of.known.keys = keys_of.found
    for table in tables:
        if table not in stored:
            table.add_values()
    return [table.calls() for table in tables]


class _Keys:
    """Collects the keys of units, which are in the same shards."""

    def __init__(self, known: StoredUnits) -> None:
        self.known = known
        self.stored = known.sources
        self.found: dict[RankPass, Key] = {}

    def add_shard(self, source: StoredSource, shard: Shard, _: Stored) -> None:
        """Add the keys in a shard."""
        self.found.update(self.known.of_shard(source, shard))


class _Table:
    """Collects the calls of a layer."""

    def __init__(self, selected: Selected, keys: dict[Any, int]) -> None:
        self.selected = selected
        self._keys = keys
        self._number = cache(selected.number)
        self._looks: dict[Look, int] = {}
        self._sources: list[Source] = []
        self._moments = [torch.empty((0, 2), dtype=torch.int64, device="cpu")]
        self._places = [torch.empty((0, 3), dtype=torch.int64, device="cpu")]

    @property
    def stored(self) -> Sequence[StoredSource]:
        """The sources of a stored layer, one for each rank."""
        return self.selected.layer._sources  # type: ignore[attr-defined,no-any-return]

    def add_shard(self, source: StoredSource, shard: Shard, file: Stored) -> None:
        """Add the calls of a stored layer in a shard."""
        part = shard.part(source.role, source.name)
        if part is None:
            return
        groups = []
        for group in part.groups:
            leaf = group.leaves[self._number(group.structure.spec)]
            begins = leaf.begin + leaf.starts[:-1] * leaf.dtype.itemsize
            which = torch.full_like(begins, len(self._sources))
            groups.append(torch.stack([self._looks_of(leaf), which, begins], 1))
        firsts = torch.tensor([*accumulate(map(len, groups), initial=0)], device="cpu")
        self._places.append(torch.cat(groups)[firsts[part.group] + part.within])
        self._sources.append(file)
        self._moments.append(
            torch.stack([torch.full_like(part.passes, source.rank.number), part.passes], 1)
        )

    def add_values(self) -> None:
        """Add the calls of a layer in memory, or of one whose calls are assembled on access."""
        layer, lines = self.selected.layer, []
        if isinstance(layer, WholeLayer):
            for number, (spec, outlines) in enumerate(layer.outlines()):
                lines.append((self._look(outlines[self._number(spec)]), number, 0))
                self._sources.append(Held(partial(self.selected.value, number)))
        else:
            for number, value in enumerate(layer):
                tensor = self.selected.tensor(value, f"call {number}")
                lines.append((self._look(tensor), number, 0))
                self._sources.append(Held(tensor.detach()))
        moments = [(-1 if rank is None else rank, number) for rank, number in layer._rank_passes()]
        self._moments.append(integers(moments).view(-1, 2))
        self._places.append(integers(lines).view(-1, 3))

    def calls(self) -> Calls:
        """Return the calls of the selected layer, in its order: files are ordered by rank, layers by pass."""
        moments, places = torch.cat(self._moments), torch.cat(self._places)
        if isinstance(self.selected.layer, StoredLayer) and bool((moments[:, 1].diff() < 0).any()):
            order = moments[:, 1].argsort(stable=True)
            moments, places = moments[order], places[order]
        among, numbers = self.selected.among, torch.arange(len(moments), device="cpu")
        found = Calls(
            self.selected.title,
            moments,
            self._units(moments),
            self._keys,
            numbers,
            places,
            [*self._looks],
            self._sources,
        )
        if among is None:
            return found
        few = integers(among)
        return replace(found.of(few), numbers=numbers[: len(few)])

    def _units(self, moments: Tensor) -> Tensor | None:
        """Return the number of each call's unit; ``None`` if no call has a unit."""
        known = getattr(self.selected.layer, "_units", None)
        if known is None or not (known or known.open):
            return None
        runs, of_calls = torch.unique_consecutive(moments, dim=0, return_inverse=True)
        passes = [(None if rank < 0 else rank, number) for rank, number in runs.tolist()]
        units = [
            -1 if key is None else self._keys.setdefault(key, len(self._keys))
            for key in known.of(passes)
        ]
        found = integers(units)[of_calls]
        return found if bool((found >= 0).any()) else None

    def _look(self, tensor: Tensor) -> int:
        return self._looks.setdefault(Look(tuple(tensor.shape), tensor.dtype), len(self._looks))

    def _looks_of(self, leaf: Leaf) -> Tensor:
        """Return the number of the look of each call of a group. Calls of the same shape mostly follow each other."""
        new = (leaf.shapes[1:] != leaf.shapes[:-1]).any(1)
        begins = [0, *(new.nonzero()[:, 0] + 1).tolist()]
        looks = [Look(leaf.shape(begin), leaf.dtype) for begin in begins]
        numbers = [self._looks.setdefault(look, len(self._looks)) for look in looks]
        which = torch.cat([new.new_zeros(1), new]).cumsum(0)
        return integers(numbers)[which]
