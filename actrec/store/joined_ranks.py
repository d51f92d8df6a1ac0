"""A layer whose parts several ranks have recorded: each call is assembled when it is read.

Parts belong to the same call if they are of the same layer, of the same unit (outside of units, pass), are the call with the
same index in it, and are spread in the same way. A call of which parts are missing is left out, like a pass that was never
committed. Calls that a rank has recorded whole are not joined: ``layers.py`` puts them in the order of their passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from actrec._progress import Each
from actrec._recordings.pass_numbers import ListView
from actrec._values.containers import Value
from actrec._values.shapes import Summary
from actrec._values.spec import Spec
from actrec.errors import CorruptRecordingError

from .dtensor import Spread
from .format import Defect, corrupt
from .layers import Found, StoredLayer
from .read_only import ReadOnlyLayer


class _Call(NamedTuple):
    """A call of the layer: the recorded calls of which it is made."""

    number: int  # of its pass
    rank: int  # the first that has a part
    spreads: tuple[tuple[int, Spread], ...]  # of the tensors that are parts
    parts: dict[int, int]  # by rank, the recorded call


class WholeLayer(ReadOnlyLayer):
    """A layer on disk whose calls are assembled from the parts that several ranks have recorded."""

    def __init__(self, recorded: StoredLayer) -> None:
        self.name = recorded.name
        self.type = recorded.type
        self.recorded = recorded

    @cached_property
    def _every(self) -> list[_Call]:
        """All calls, also those of which parts are missing."""
        calls: dict[object, _Call] = {}
        counts: Counter[tuple[int, int]] = Counter()
        recorded = self.recorded
        rank_passes = [*zip(recorded.ranks, recorded.passes, strict=True)]
        units = [None] * len(rank_passes) if self._units is None else self._units.of(rank_passes)
        kinds, kind_of = recorded.spreads()
        for index, (owner, unit, kind) in enumerate(zip(rank_passes, units, kind_of, strict=True)):
            rank, number = owner
            # If a unit has failed on one rank, its later passes have other numbers: units go by key.
            of = number if unit is None else (unit,)
            key = (of, counts[owner], kind) if kinds[kind] else index
            calls.setdefault(key, _Call(number, rank, kinds[kind], {})).parts[rank] = index
            counts[owner] += 1
        return [*calls.values()]

    @cached_property
    def _calls(self) -> list[_Call]:
        """The calls that are whole."""

        @cache
        def enough(spreads: tuple[tuple[int, Spread], ...], *ranks: int) -> bool:
            return all(spread.enough(ranks) for _, spread in spreads)

        return [call for call in self._every if enough(call.spreads, *call.parts)]

    @property
    def left_out(self) -> int:
        """How many calls are left out because parts of them are missing."""
        return len(self._every) - len(self._calls)

    @property
    @override
    def passes(self) -> ListView[int]:
        return ListView([call.number for call in self._calls])

    @property
    def ranks(self) -> list[int]:
        """For each call, the first rank that has recorded a part of it."""
        return [call.rank for call in self._calls]

    @override
    def __len__(self) -> int:
        return len(self._calls)

    @override
    def _call(self, index: int) -> Value:
        call = self._calls[index]
        first = self._first(call)
        spreads = dict(call.spreads)
        tensors = [
            self._whole(call, number, spreads[number])
            if number in spreads
            else first.tensor(number)
            for number in range(len(first.group.leaves))
        ]
        return first.group.structure.spec.fill(tensors)

    def _whole(self, call: _Call, number: int, spread: Spread) -> Tensor:
        def part(rank: int) -> Tensor:
            return self.recorded.find(call.parts[rank]).tensor(number)

        try:
            return spread.whole(call.parts, part)
        except Defect as defect:
            raise corrupt(self._first(call).shard.path, defect) from None

    def _first(self, call: _Call) -> Found:
        return self.recorded.find(call.parts[call.rank])

    def outlines(self) -> Iterator[tuple[Spec, list[Tensor]]]:
        """Yield the spec of each call and its tensors, without data: on the meta device."""
        for call in self._calls:
            first = self._first(call)
            shapes = {number: spread.shape for number, spread in call.spreads}
            leaves = enumerate(first.group.leaves)
            tensors = [
                torch.empty(
                    shapes.get(number, leaf.shape(first.call)), dtype=leaf.dtype, device="meta"
                )
                for number, leaf in leaves
            ]
            yield first.group.structure.spec, tensors

    @override
    def _seen(self) -> tuple[Summary, dict[object, int]]:
        looks, _ = self.recorded._seen()
        summary, nbytes = Summary(dtypes=looks.dtypes, devices=looks.devices), 0
        for spec, tensors in self.outlines():
            shapes = [tensor.shape for tensor in tensors]
            summary.add_spec(spec, shapes, shapes)
            nbytes += sum(tensor.nbytes for tensor in tensors)
        return summary, {id(self): nbytes}

    def problems(self, each: Each) -> Iterator[str]:
        """Yield what is wrong with calls whose parts do not fit together."""
        for index in each(range(len(self))):
            try:
                self._call(index)
            except CorruptRecordingError as error:
                yield str(error)
