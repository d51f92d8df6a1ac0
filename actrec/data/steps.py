"""The calls of several layers side by side, pass by pass: those of a pass are its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from actrec.errors import AlignmentError

from .calls import Calls

_JOIN = " or rows of all positions (flatten=True), for which the calls of a pass are joined"


@dataclass(frozen=True)
class Steps:
    """As many calls of each layer, side by side. A layer with one call in a pass has that in each step of it."""

    layers: list[Calls]
    whole: Tensor  #: (layers, steps): whether the call is that of a whole pass with several steps
    passes: Tensor  #: (steps,): the pass, counted in the order of the first layer
    names: (
        Sequence[Any] | Tensor
    )  #: of each pass, the key of its unit, or without units its number; a tensor of integers

    @property
    def tells(self) -> bool:
        """Whether some pass has several steps."""
        return len(self.names) < len(self.passes)

    @cached_property
    def has_whole(self) -> bool:
        """Whether a layer has one call in a pass with several steps."""
        return bool(self.whole.any())

    @cached_property
    def by_pass(self) -> tuple[Tensor, Tensor]:
        """The steps in the order of their passes, and where there the first one of each pass is."""
        counts = torch.bincount(self.passes, minlength=len(self.names))
        return self.passes.argsort(stable=True), counts.cumsum(0) - counts


def steps(call: str, layers: Sequence[Calls], *, flatten: bool, common: bool) -> Steps:
    """Put the calls of the same unit beside each other; those of the same pass, where a layer has no units.

    Args:
        call: The function that was called, for messages.
        layers: The calls of each layer.
        flatten: Whether a layer with one call in a pass may lie beside one with several.
        common: Whether passes are left out in which a layer has no call.

    Raises:
        AlignmentError: The layers do not have the same passes, or not as many calls in one of them.
    """
    keys = _keys(call, layers)
    if any(own != keys[0] for own in keys[1:]):
        layers, keys, marks = _side_by_side(call, layers, keys, flatten=flatten, common=common)
        whole = torch.tensor(marks, dtype=torch.bool, device="cpu").view(len(layers), -1)
    else:
        whole = torch.zeros(len(layers), len(keys[0]), dtype=torch.bool, device="cpu")
    units = next((one.units for one in layers if one.units is not None), None)
    names = dict(zip(keys[0], units or [key[-1] for key in keys[0]], strict=True))
    if len(names) == len(keys[0]):
        passes = torch.arange(len(names), device="cpu")
    else:
        numbers = {key: number for number, key in enumerate(names)}
        passes = torch.tensor([numbers[key] for key in keys[0]], dtype=torch.int64, device="cpu")
    return Steps([*layers], whole, passes, _in_a_tensor([*names.values()]))


def _in_a_tensor(names: list[Any]) -> list[Any] | Tensor:
    """The names of passes in a tensor, if all are integers."""
    if set(map(type, names)) <= {int}:
        return torch.tensor(names, dtype=torch.int64, device="cpu")
    return names


def _keys(call: str, layers: Sequence[Calls]) -> list[list[Any]]:
    """What tells the pass of each call: its unit, else its rank and number."""
    if all(one.units is not None and None not in one.units for one in layers):
        return [[(key,) for key in one.units or ()] for one in layers]
    alone = next((one for one in layers if one.moments[:1] and one.moments[0][0] is None), None)
    if alone is None:
        return [one.moments for one in layers]
    for one in layers:
        ranks = sorted({rank for rank, _ in one.moments if rank is not None})
        if len(ranks) > 1:
            message = (
                f"{call}: layer {one.title} was recorded by {len(ranks)} ranks, and {alone.title} is in memory, where "
                f"nothing says which rank its calls are of. Open one rank, actrec.load(path, rank={ranks[0]}), say."
            )
            raise AlignmentError(message)
    return [[(None, number) for _, number in one.moments] for one in layers]


def _side_by_side(
    call: str, layers: Sequence[Calls], keys: list[list[Any]], *, flatten: bool, common: bool
) -> tuple[list[Calls], list[list[Any]], list[list[bool]]]:
    """The calls of the passes of the first layer, in its order: as many of each layer; and which are those of whole passes."""
    calls: list[dict[Any, list[int]]] = [{} for _ in layers]
    for keys_of, found in zip(keys, calls, strict=True):
        for number, key in enumerate(keys_of):
            found.setdefault(key, []).append(number)
    shared = [key for key in calls[0] if all(key in found for found in calls)]
    numbers: list[list[int]] = [[] for _ in layers]
    whole: list[list[bool]] = [[] for _ in layers]
    order: list[Any] = []
    for key in shared:
        counts = [len(found[key]) for found in calls]
        most = max(counts)
        wrong = [
            own for own, many in enumerate(counts) if many not in {most, 1 if flatten else most}
        ]
        if wrong:
            fix = "take one call of each pass (nth=0)" + _JOIN * (not flatten)
            raise _misaligned(call, layers, keys, (counts.index(most), wrong[0]), fix)
        order += [key] * most
        for own, many in enumerate(counts):
            numbers[own] += calls[own][key] * (most // many)
            whole[own] += [many < most] * most
    lengths = [len(found) for found in calls]
    if not common and max(lengths) > len(shared):
        other = lengths.index(min(lengths))
        first = next(own for own, found in enumerate(calls) if found.keys() - calls[other])
        fix = 'leave out the passes in which one of them was not called (passes="common")'
        raise _misaligned(call, layers, keys, (first, other), fix)
    return [one.of(own) for one, own in zip(layers, numbers, strict=True)], [order], whole


def _misaligned(
    call: str, layers: Sequence[Calls], keys: list[list[Any]], which: tuple[int, int], fix: str
) -> AlignmentError:
    first, other = sorted(which)
    expected, found = keys[first], keys[other]
    title, name = layers[first].title, layers[other].title
    pairs = zip(expected, found, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    message = (
        f"{call}: layers {title} and {name} do not have the same calls. {title} has {len(expected)}, {name} has "
        f"{len(found)}, and call {same} is {_at(expected, same)} of {title} and {_at(found, same)} of {name}. "
        f"Choose layers that are called equally often in each pass, {fix}, or record them in a run of their own."
    )
    return AlignmentError(message)


def _at(keys: list[Any], index: int) -> str:
    if index >= len(keys):
        return "missing"
    *rank, number = keys[index]
    if not rank:
        return f"in unit {number!r}"
    return f"in pass {number}" if rank == [None] else f"in pass {number}, rank {rank[0]},"
