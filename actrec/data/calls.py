"""Where the calls of a layer lie: calls of one shape that lie behind each other are one *stretch*.

Everything goes from stretch to stretch, so a stored recording of a million calls is as fast to align as one of a few.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch

from actrec.store.layers import StoredLayer
from actrec.store.whole import WholeLayer

from .files import File
from .sources import Held, Made, Shape, Source, Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from actrec._recordings.passes import Moment
    from actrec.store.index import Index
    from actrec.store.part import Leaf, Part

    from .selecting import Selected

__all__ = ["Calls", "Stretch", "located", "ranges", "side_by_side"]


@dataclass(frozen=True)
class Stretch:
    """Calls of a layer, of one shape, whose tensors lie behind each other."""

    calls: int
    shape: Shape
    dtype: torch.dtype
    source: Source  #: what they lie in
    offset: int = 0  #: of the first call there, in bytes
    step: int = 0  #: from call to call, in bytes

    def part(self, first: int, calls: int) -> Stretch:
        """Some of the calls."""
        return replace(self, calls=calls, offset=self.offset + first * self.step)


@dataclass(frozen=True)
class Calls:
    """All calls of a layer."""

    moments: list[Moment]  #: rank and pass of each call, in the order of the layer
    stretches: list[Stretch]  #: as they lie
    order: list[int] | None = None  #: for each call of the layer, which of the calls as they lie

    def chosen(self, calls: list[int] | None) -> list[Stretch]:
        """Return the stretches of some calls in this order; of all, if it is ``None``."""
        if self.order is not None:
            calls = self.order if calls is None else [self.order[number] for number in calls]
        if calls is None:
            return self.stretches
        starts = list(accumulate((stretch.calls for stretch in self.stretches), initial=0))
        found = []
        for begin, end in ranges(calls):
            at, first = bisect_right(starts, begin) - 1, begin
            while first < end:
                many = min(end, starts[at + 1]) - first
                found.append(self.stretches[at].part(first - starts[at], many))
                at, first = at + 1, first + many
        return found


def ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers that follow each other, as where they begin and stop.

    >>> list(ranges([0, 1, 2, 5]))
    [(0, 3), (5, 6)]
    """
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], found[-1] + 1


def side_by_side(columns: Sequence[Sequence[Stretch]]) -> list[tuple[Stretch, ...]]:
    """Cut the stretches of several layers so that those beside each other have the same calls."""
    ends = [accumulate(stretch.calls for stretch in column) for column in columns]
    cuts = sorted({0}.union(*ends))
    return list(zip(*(_cut(column, cuts) for column in columns), strict=True))


def _cut(stretches: Sequence[Stretch], cuts: list[int]) -> Iterator[Stretch]:
    at, begin = 0, 0
    for low, high in pairwise(cuts):
        if low >= begin + stretches[at].calls:
            begin += stretches[at].calls
            at += 1
        yield stretches[at].part(low - begin, high - low)


# --- Locating them -------------------------------------------------------------------------------------


def located(layers: Sequence[Selected]) -> list[Calls]:
    """Return where the calls of some layers lie; the header of each shard is read once, however many layers are in it."""
    scans = {id(one): _Scan(one) for one in layers if isinstance(one.layer, StoredLayer)}
    indexes: dict[Index, list[tuple[_Scan, Any]]] = {}
    for scan in scans.values():
        for source in scan.selected.layer._sources:  # type: ignore[attr-defined]
            indexes.setdefault(source.rank.index, []).append((scan, source))
    for index, wanted in indexes.items():
        for shard in index.shards():
            file = File(shard.disk, shard.name, shard.head)
            for scan, source in wanted:
                part = shard.part(source.role, source.name)
                if part is not None:
                    scan.add(file, part, source.rank.number)
    return [scans[id(one)].calls() if id(one) in scans else _unstored(one) for one in layers]


class _Scan:
    """Collects the calls of a stored layer."""

    def __init__(self, selected: Selected) -> None:
        self.selected = selected
        self._number = cache(selected.number)
        self._moments: list[Moment] = []
        self._stretches: list[Stretch] = []

    def add(self, file: File, part: Part, rank: int) -> None:
        """Take in what a shard has of it."""
        leaves = [group.leaves[self._number(group.structure.spec)] for group in part.groups]
        self._moments += [(rank, number) for number in part.passes.tolist()]
        self._stretches += _in_part(file, part, leaves)

    def calls(self) -> Calls:
        """All of them: ordered by pass, and within a pass as they lie."""
        passes = [number for _, number in self._moments]
        if all(a <= b for a, b in pairwise(passes)):
            return Calls(self._moments, self._stretches)
        order = sorted(range(len(passes)), key=passes.__getitem__)
        return Calls([self._moments[at] for at in order], self._stretches, order)


def _in_part(file: File, part: Part, leaves: list[Leaf]) -> Iterator[Stretch]:
    """The calls of a shard; a stretch ends where the group or the shape changes."""
    sources = [Stored(file, leaf.begin) for leaf in leaves]
    new = torch.ones(len(part), dtype=torch.bool, device="cpu")
    for number, leaf in enumerate(leaves):
        new[part.group == number] = _changes(leaf.shapes)
    new[1:] |= _changes(part.group[:, None])[1:]
    for first, end in pairwise([*new.nonzero()[:, 0].tolist(), len(part)]):
        group, call = int(part.group[first]), int(part.within[first])
        leaf = leaves[group]
        begin, step = leaf.extent(call)
        shape, offset = leaf.shape(call), begin - leaf.begin
        yield Stretch(end - first, shape, leaf.dtype, sources[group], offset, step)


def _changes(lines: Tensor) -> Tensor:
    """For each line of a table, whether it is another one than that before it."""
    changes = torch.ones(len(lines), dtype=torch.bool, device="cpu")
    changes[1:] = (lines[1:] != lines[:-1]).any(1)
    return changes


def _unstored(selected: Selected) -> Calls:
    layer = selected.layer
    stretches = []
    if isinstance(layer, WholeLayer):
        tensor_of = cache(selected.number)
        for number, (spec, outlines) in enumerate(layer.outlines()):
            outline = outlines[tensor_of(spec)]
            source: Source = Made(partial(selected.value, number))
            stretches.append(Stretch(1, tuple(outline.shape), outline.dtype, source))
    else:
        for number, value in enumerate(layer):
            tensor = selected.tensor(value, f"call {number}")
            stretches.append(Stretch(1, tuple(tensor.shape), tensor.dtype, Held(tensor)))
    return Calls(layer._moments(), stretches)
