"""The aligned calls of several layers, pass by pass: the calls of a pass are its steps."""

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
from .numbering import integers, numbered

_JOIN = " or rows of all positions (flatten=True), for which the calls of a pass are joined"


@dataclass(frozen=True)
class Steps:
    """Equally many calls of each layer, aligned. A layer with one call in a pass has that call in each step of the pass."""

    layers: list[Calls]
    whole: Tensor  #: (layers, steps): whether the call is that of a whole pass with several steps
    passes: Tensor  #: (steps,): the pass, counted in the order of the first layer
    names: (
        list[Any] | Tensor
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
        """The steps in the order of their passes, and the index of each pass's first step in it."""
        counts = torch.bincount(self.passes, minlength=len(self.names))
        return self.passes.argsort(stable=True), counts.cumsum(0) - counts

    def of_passes(self) -> Sequence[Tensor]:
        """Return the steps of each pass, in order."""
        order, _ = self.by_pass
        return torch.split(order, torch.bincount(self.passes).tolist())


def steps(call: str, layers: Sequence[Calls], *, flatten: bool, common: bool) -> Steps:
    """Align the calls of the same unit; or those of the same pass, if a layer has no units.

    If rows are flattened, a layer may have one call in a pass in which others have several.

    Raises:
        AlignmentError: the layers do not have the same passes, or not the same number of calls in one of them.
    """
    keys = _keys(call, layers)
    whole = torch.zeros(len(layers), len(keys[0]), dtype=torch.bool, device="cpu")
    if not all(torch.equal(own, keys[0]) for own in keys[1:]):
        numbers, whole = _side_by_side(call, layers, keys, flatten=flatten, common=common)
        layers = [one.of(own) for one, own in zip(layers, numbers, strict=True)]
        keys = [keys[0][numbers[0]]]
    passes, firsts = numbered(*keys[0].unbind(1))
    units = next((one for one in layers if one.units is not None), None)
    names = keys[0][firsts, -1] if units is None else _in_a_tensor(_names(units, firsts))
    return Steps([*layers], whole, passes, names)


def _names(calls: Calls, which: Tensor | slice = slice(None)) -> list[Any]:
    """Return the keys of the units of some calls, ``None`` for calls without a unit."""
    keys = [*calls.keys, None]
    assert calls.units is not None  # noqa: S101
    return [keys[number] for number in calls.units[which].tolist()]


def _in_a_tensor(names: list[Any]) -> list[Any] | Tensor:
    """Return the keys or numbers of passes as a tensor, if all are integers."""
    if set(map(type, names)) <= {int}:
        return integers(names)
    return names


def _keys(call: str, layers: Sequence[Calls]) -> list[Tensor]:
    """Return what identifies the pass of each call: its unit, ``(calls, 1)``, else its rank and number, ``(calls, 2)``."""
    units = [one.units for one in layers if one.units is not None]
    if len(units) == len(layers) and all(bool((own >= 0).all()) for own in units):
        return [own[:, None] for own in units]
    alone = next((one for one in layers if len(one.moments) and int(one.moments[0, 0]) < 0), None)
    if alone is None:
        return [one.moments for one in layers]
    for one in layers:
        ranks = [rank for rank in torch.unique(one.moments[:, 0]).tolist() if rank >= 0]
        if len(ranks) > 1:
            message = (
                f"{call}: layer {one.title} was recorded by {len(ranks)} ranks, and {alone.title} is in memory, where the rank "
                f"of calls is unknown. Open a single rank, for example actrec.load(path, rank={ranks[0]})."
            )
            raise AlignmentError(message)
    none = torch.tensor([-1, 0], device="cpu")
    return [torch.where(none < 0, none, one.moments) for one in layers]


def _side_by_side(
    call: str, layers: Sequence[Calls], keys: list[Tensor], *, flatten: bool, common: bool
) -> tuple[list[Tensor], Tensor]:
    """Return equally many calls of each layer, in the order of the first one; and which of them are those of a whole pass."""
    passes, firsts = numbered(*torch.cat(keys).unbind(1))  # so those of the first layer come first
    of = torch.split(passes, [*map(len, keys)])
    every = torch.stack([torch.bincount(own, minlength=len(firsts)) for own in of])
    shared = (every > 0).all(0).nonzero()[:, 0]
    counts = every[:, shared]
    most = counts.amax(0)
    wrong = (counts != most) & ((counts != 1) | (not flatten))
    if bool(wrong.any()):
        at = int(wrong.any(0).nonzero()[0, 0])
        which = _first(counts[:, at] == most[at]), _first(wrong[:, at])
        fix = "take one call of each pass (nth=0)" + _JOIN * (not flatten)
        raise _misaligned(call, layers, keys, which, fix)
    lengths = (every > 0).sum(1).tolist()
    if not common and max(lengths) > len(shared):
        other = lengths.index(min(lengths))
        first = _first(((every > 0) & (every[other] == 0)).any(1))
        fix = 'leave out the passes in which one of them was not called (passes="common")'
        raise _misaligned(call, layers, keys, (first, other), fix)
    step = torch.repeat_interleave(torch.arange(len(shared), device="cpu"), most)
    within = torch.arange(len(step), device="cpu") - (most.cumsum(0) - most)[step]
    whole = (counts < most)[:, step]
    firsts_of = (every.cumsum(1) - every)[:, shared][:, step]
    numbers = [
        own.argsort(stable=True)[first + torch.where(mark, 0, within)]
        for own, first, mark in zip(of, firsts_of, whole, strict=True)
    ]
    return numbers, whole


def _first(marks: Tensor) -> int:
    return int(marks.nonzero()[0, 0])


def _misaligned(
    call: str, layers: Sequence[Calls], keys: list[Tensor], which: tuple[int, int], fix: str
) -> AlignmentError:
    first, other = sorted(which)
    expected, found = (_shown(layers[own], keys[own]) for own in (first, other))
    title, name = layers[first].title, layers[other].title
    pairs = zip(expected, found, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    message = (
        f"{call}: layers {title} and {name} do not have the same calls. {title} has {len(expected)}, {name} has "
        f"{len(found)}, and call {same} is {_at(expected, same)} of {title} and {_at(found, same)} of {name}. "
        f"Choose layers that are called equally often in each pass, {fix}, or record them in a separate run."
    )
    return AlignmentError(message)


def _shown(calls: Calls, keys: Tensor) -> list[tuple[Any, ...]]:
    """Return the unit of each call, or its rank and pass."""
    if keys.shape[1] == 1:
        return [(key,) for key in _names(calls)]
    return [(None if rank < 0 else rank, number) for rank, number in keys.tolist()]


def _at(keys: list[tuple[Any, ...]], index: int) -> str:
    if index >= len(keys):
        return "missing"
    *rank, number = keys[index]
    if not rank:
        return f"in unit {number!r}"
    return f"in pass {number}" if rank == [None] else f"in pass {number}, rank {rank[0]},"
