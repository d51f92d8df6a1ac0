"""Pairs the calls of two layers: by unit, or by index."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from actrec._text import count

from .layer import Layer
from .reduced import Reduced
from .units import Key


class Alone(NamedTuple):
    """The first call without a partner."""

    number: int  #: of its pass
    note: str


class Pairing(NamedTuple):
    """The indices of paired calls of two layers."""

    ours: Sequence[int]
    theirs: Sequence[int]
    alone: Alone | None


def paired(a: Layer[Any], b: Layer[Any]) -> Pairing:
    """Pair the calls of two layers, in the order of ``a``."""
    ours, theirs = [*a.units], [*b.units]
    is_reduced = isinstance(a, Reduced) or isinstance(b, Reduced)
    if ours == theirs or is_reduced or None in ours or None in theirs:
        both = range(min(len(a), len(b)))
        if len(a) == len(b):
            return Pairing(both, both, None)
        longer = a if len(a) > len(b) else b
        note = f"{len(a):,} and {count(len(b), 'call')}"
        return Pairing(both, both, Alone(longer.passes[len(both)], note))
    waiting: dict[Key | None, deque[int]] = {key: deque() for key in theirs}
    for number, key in enumerate(theirs):
        waiting[key].append(number)
    pairs = [(at, waiting[key].popleft()) for at, key in enumerate(ours) if waiting.get(key)]
    found = {at for at, _ in pairs}
    alone = [(a.passes[at], key) for at, key in enumerate(ours) if at not in found]
    alone += [(b.passes[numbers[0]], key) for key, numbers in waiting.items() if numbers]
    first = None
    if alone:
        number, key = alone[0]
        here, there = ours.count(key), theirs.count(key)
        first = Alone(number, f"{here:,} and {count(there, 'call')} of unit {key!r}")
    return Pairing([at for at, _ in pairs], [at for _, at in pairs], first)
