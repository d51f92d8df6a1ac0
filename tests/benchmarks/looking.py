"""Looking at a recording of many calls: ``repr``, again and for the first time, over a walk through the calls.

A walk, ``for value in layer: len(value)``, is the least that a look at every call could cost.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from actrec import Recording, load
from tests.made import made_of

from .timing import Row, ratios, seconds, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLS = 200_000
LAYERS = 20
#: Milliseconds, at most, for a table of 200,000 calls that were looked at before, and for one that is stored.
TARGET = 50.0

KINDS: dict[str, Callable[[int], Any]] = {
    "alike": lambda _: torch.zeros(2, 4),
    "of 50 shapes": lambda call: torch.zeros(2, 1 + call % 50),
    "tuples": lambda _: (torch.zeros(2, 4), torch.zeros(1)),
}


def measure(*, quick: bool) -> Iterator[Row]:
    calls = LAYERS * 10 if quick else CALLS
    rounds = 2 if quick else 9
    for kind, make in KINDS.items():
        acts = _recording(make, calls)
        what = f"{calls:,} calls, {kind}"
        yield Row.of(f"repr: first, {what}", [_milliseconds(acts)], unit="ms")
        variants = {"repr": partial(_milliseconds, acts), "walk": partial(_walked, acts)}
        times = take_turns(variants, rounds=rounds)
        yield Row.of(f"repr: again, {what}", times["repr"], TARGET, "ms")
        yield Row.of(f"repr: again / a walk, {what}", ratios(times, "repr", "walk"))
    with TemporaryDirectory() as folder:
        _recording(KINDS["alike"], calls).save(Path(folder, "run"))
        times = [_milliseconds(load(Path(folder, "run"))) for _ in range(rounds)]
        yield Row.of(f"repr: first, {calls:,} calls, stored", times, TARGET, "ms")


def _recording(make: Callable[[int], Any], calls: int) -> Recording[Any]:
    each = calls // LAYERS
    names = [f"layer{number}" for number in range(LAYERS)]
    return made_of({name: map(make, range(each)) for name in names})


def _milliseconds(acts: Recording[Any]) -> float:
    return 1e3 * seconds(partial(repr, acts))


def _walked(acts: Recording[Any]) -> float:
    return 1e3 * seconds(partial(_walk, acts))


def _walk(acts: Recording[Any]) -> None:
    for layer in acts.values():
        for value in layer:
            len(value)
