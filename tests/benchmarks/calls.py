"""The cost of one hooked call, of layers that cost next to nothing themselves.

Rows that begin with *call* compare whole calls, layer and hook together. Rows that begin with *added*
compare what the hook adds to the call: its time with the hook less its time without any.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actrec import record

from .timing import Row, added, ratios, seconds, take_turns
from .usual import classic_hook, classic_hook_pair, clone_hook, no_hook, no_op_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

TARGET = 1.3
FLAT = 1.1  # the last calls over the first
LAYERS = 24  # hooked calls in a forward, which share the cost of its pass as in a real model
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
HOOKS = {
    "no hook": no_hook,
    "no-op hook": no_op_hook,
    "clone hook": clone_hook,
    "classic hook": classic_hook,
    "actrec": record,
}
HOOKS_ON_INPUTS = {
    "no hook": no_hook,
    "classic pair": classic_hook_pair,
    "actrec": partial(record, inputs=True),
}


def measure(*, quick: bool) -> Iterator[Row]:
    rounds, forwards = (2, 2) if quick else (60, 20)
    linears = nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS))), torch.ones(2, 4)
    relus = nn.Sequential(*(nn.ReLU() for _ in range(LAYERS))), torch.ones(64, 256)
    for mode in MODES:
        for what, work in {"Linear 2x4": linears, "ReLU 64x256": relus}.items():
            times = take_turns(_variants(HOOKS, *work, mode, forwards), rounds)
            yield from _compared(times, "classic hook", f"{what}, {mode}", mode)
            for other in ("clone hook", "no-op hook", "no hook"):
                yield Row.of(
                    f"call: actrec / {other}, {what}, {mode}", ratios(times, "actrec", other)
                )
        times = take_turns(_variants(HOOKS_ON_INPUTS, *linears, mode, forwards), rounds)
        yield from _compared(times, "classic pair", f"inputs=True, Linear 2x4, {mode}", mode)
    single = _variants(HOOKS, nn.Linear(4, 4), torch.ones(2, 4), "no_grad", forwards * LAYERS)
    times = take_turns(single, rounds)
    name = "call: actrec / classic hook, a model that is one Linear 2x4, no_grad"
    yield Row.of(name, ratios(times, "actrec", "classic hook"))
    yield from _many_calls(quick=quick)


def _many_calls(*, quick: bool) -> Iterator[Row]:
    """Whether the last of many calls cost what the first did, with garbage collection on as users have it."""
    calls, rounds = (100, 1) if quick else (100_000, 5)
    model, x = nn.Linear(4, 4), torch.ones(2, 4)

    def run() -> None:
        for _ in range(calls // 10):
            model(x)

    growth = []
    for _ in range(rounds):
        with torch.no_grad(), record(model, ""):
            times = [seconds(run) for _ in range(10)]
        growth.append(times[-1] / times[0])
    name = f"call: the last tenth of {calls:,} calls / the first, Linear 2x4, no_grad"
    yield Row.of(name, growth, FLAT)


def _compared(times: Any, usual: str, where: str, mode: str) -> Iterator[Row]:
    target = None if mode == "grad" else TARGET
    yield Row.of(f"call: actrec / {usual}, {where}", ratios(times, "actrec", usual), target)
    yield Row.of(f"added: actrec / {usual}, {where}", added(times, "actrec", usual, "no hook"))


def _variants(
    hooks: dict[str, Callable[..., AbstractContextManager[Any]]],
    model: nn.Module,
    x: Tensor,
    mode: str,
    forwards: int,
) -> dict[str, Callable[[], float]]:
    """Some forwards in a block of each kind, entered and left outside of the time."""

    def run() -> None:
        for _ in range(forwards):
            model(x)

    def variant(hooked: Callable[..., AbstractContextManager[Any]]) -> float:
        with MODES[mode](), hooked(model):
            return seconds(run)

    return {name: partial(variant, hooked) for name, hooked in hooks.items()}
