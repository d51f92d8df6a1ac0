"""A layer of which several ranks have recorded parts: each call is put together when it is asked for.

Parts belong together that are of the same layer and pass, are the same how-manieth call of it in that pass, and are
spread in the same way. A call of which parts are missing is left out, as a pass that was never committed is.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from actrec._forms import Form, form
from actrec._recording import PassNumbers
from actrec.errors import CorruptRecordingError

from ._format import Defect, corrupt, integer
from ._outline import look
from ._parts import Spread
from ._read_only import ReadOnlyLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from actrec._nested import Value

    from ._index import Group
    from ._outline import Look
    from ._reader import StoredLayer

__all__ = ["WholeLayer", "has_parts"]

#: The tensors of a value that are parts: their numbers, and how each is spread.
Spreads: TypeAlias = tuple[tuple[int, Spread], ...]


class _Call(NamedTuple):
    """A call of the layer: which of the recorded calls it is made of."""

    number: int  # of its pass
    rank: int  # the first one
    spreads: Spreads
    parts: dict[int, int]  # by rank, the recorded call


class WholeLayer(ReadOnlyLayer):
    """A layer on disk whose calls are made of what several ranks have recorded."""

    def __init__(self, recorded: StoredLayer) -> None:
        self.name = recorded.name
        self.type = recorded.type
        self.recorded = recorded

    @cached_property
    def _found(self) -> tuple[list[_Call], int]:
        """The calls that are whole, and how many are not."""
        calls: dict[object, _Call] = {}
        known: dict[str, Spreads] = {}  # by structure: a group may be gone when its shard is closed
        counts: Counter[tuple[int, int]] = Counter()
        recorded = self.recorded
        for index, owner in enumerate(zip(recorded.passes, recorded.ranks, strict=True)):
            number, rank = owner
            group, _ = recorded._place(index)
            if group.structure not in known:
                known[group.structure] = _spreads(group)
            spreads = known[group.structure]
            key = (number, counts[owner], spreads) if spreads else index
            calls.setdefault(key, _Call(number, rank, spreads, {})).parts[rank] = index
            counts[owner] += 1
        whole = [call for call in calls.values() if _is_whole(call)]
        return whole, len(calls) - len(whole)

    @property
    def left_out(self) -> int:
        """How many calls are left out, for parts of them are missing."""
        return self._found[1]

    @property
    def passes(self) -> PassNumbers:
        return PassNumbers(self._numbers)

    @cached_property
    def _numbers(self) -> list[int]:
        return [call.number for call in self._found[0]]

    @property
    def ranks(self) -> list[int]:
        """For each call, the first rank that has recorded a part of it."""
        return [call.rank for call in self._found[0]]

    def __len__(self) -> int:
        return len(self._found[0])

    def _call(self, index: int) -> Value:
        return self._value(self._found[0][index])

    def _value(self, call: _Call) -> Value:
        group, at = self.recorded._place(call.parts[call.rank])
        return group.decoded(
            lambda k: group.leaves[k].tensor(at, group.shard.storage),
            lambda k, spread: spread.whole(
                call.parts, lambda rank: self._part(call.parts[rank], k)
            ),
        )

    def example(self, index: int) -> Value:
        """A value like a call, that takes no memory and touches no data."""
        call = self._found[0][index]
        return _example(*self.recorded._place(call.parts[call.rank]))

    def _part(self, index: int, number: int) -> Tensor:
        group, at = self.recorded._place(index)
        leaf = group.leaves[number]
        if leaf.expanded:  # to join them would take memory that the file does not have
            message = "a part of a tensor repeats its elements"
            raise corrupt(group.shard.path, message)
        return leaf.tensor(at, group.shard.storage)

    def _forms(self) -> Iterable[Form]:
        forms: dict[Look, Form] = {}
        for call in self._found[0]:
            group, at = self.recorded._place(call.parts[call.rank])
            like = look(group, at)
            if like not in forms:
                forms[like] = form(_example(group, at))
            yield forms[like]

    def _places(self) -> Iterator[tuple[object, int]]:
        for call in self._found[0]:
            group, at = self.recorded._place(call.parts[call.rank])
            spreads = dict(call.spreads)
            for number, leaf in enumerate(group.leaves):
                begin, nbytes = leaf.place(at)
                if number in spreads:
                    nbytes = math.prod(spreads[number].shape) * leaf.dtype.itemsize
                yield (group.shard.path, begin), nbytes

    def problems(self) -> Iterator[str]:
        """What is wrong with the calls whose parts do not fit together."""
        for call in self._found[0]:
            try:
                self._value(call)
            except CorruptRecordingError as error:
                yield str(error)


def _is_whole(call: _Call) -> bool:
    return all(spread.enough(call.parts) for _, spread in call.spreads)


def _example(group: Group, call: int) -> Value:
    def empty(number: int, shape: Iterable[int]) -> Tensor:
        return torch.zeros((), dtype=group.leaves[number].dtype, device="cpu").expand(tuple(shape))

    return group.decoded(
        lambda k: empty(k, group.leaves[k].shape(call)), lambda k, spread: empty(k, spread.shape)
    )


# --- Which values have parts -------------------------------------------------------------------------


def has_parts(structure: str) -> bool:
    """Whether there are tensors in parts in a value of this structure."""
    return '"dtensor":' in structure  # in text, the quotes would be escaped


def _spreads(group: Group) -> Spreads:
    if not has_parts(group.structure):
        return ()
    try:
        nodes = list(_nodes(json.loads(group.structure)))
        return tuple(
            (integer(node["dtensor"], "the number of a tensor"), Spread.parsed(node))
            for node in nodes
        )
    except Defect as defect:
        raise corrupt(group.shard.path, defect) from None
    except (ValueError, RecursionError) as error:
        raise corrupt(group.shard.path, f"a structure is no JSON ({error})") from None


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """The nodes of tensors in parts: the keys of a user's dict are never those of a JSON object."""
    if isinstance(node, dict):
        if "dtensor" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _nodes(item)
