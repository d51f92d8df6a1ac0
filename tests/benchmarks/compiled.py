"""Compiled models: what recording adds to a forward of compiled code that stays compiled, and what eager mode takes."""

from __future__ import annotations

from time import process_time
from typing import TYPE_CHECKING

import torch

from actrec import record

from .functions import Block
from .timing import Row, ratios, seconds, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

#: By its name: width, blocks, shape of the input without the width, forwards in a round.
MODELS = {
    "GPT 512 wide, 8 blocks, 256 tokens": (512, 8, (2, 128), 3),
    "GPT 128 wide, 8 blocks, 16 tokens": (128, 8, (1, 16), 60),
}
LAYERS = {"every block": "*", "every leaf": None}
TARGETS = {
    ("GPT 512 wide, 8 blocks, 256 tokens", "every block"): 1.03,
    ("GPT 512 wide, 8 blocks, 256 tokens", "every leaf"): 1.06,
    ("GPT 128 wide, 8 blocks, 16 tokens", "every block"): 1.10,
}


def measure(*, quick: bool) -> list[Row]:
    rows = []
    for name, (width, many, shape, calls) in MODELS.items():
        torch._dynamo.reset()
        model = torch.nn.Sequential(*(Block(width) for _ in range(1 if quick else many))).eval()
        x = torch.randn(*shape, width)
        with torch.inference_mode():
            rows += _rows(name, model, x, 1 if quick else calls, rounds=2 if quick else 15)
    return rows


def _rows(name: str, model: nn.Module, x: Tensor, calls: int, rounds: int) -> list[Row]:
    run = torch.compile(lambda x: model(x), backend="inductor")  # noqa: PLW0108
    first = seconds(lambda: run(x))  # and again, when it is recorded for the first time

    def timed() -> float:
        return seconds(lambda: [run(x) for _ in range(calls)])

    def recorded(layers: str | None, *, compiled: bool) -> Callable[[], float]:
        def work() -> float:
            with record(model, layers, compiled=compiled):
                return timed()

        return work

    rows = []
    for what, layers in LAYERS.items():
        start = process_time()
        recorded(layers, compiled=True)()
        again = process_time() - start
        kinds = {"compiled": timed, "recorded": recorded(layers, compiled=True)}
        kinds["eager"] = recorded(layers, compiled=False)
        times = take_turns(kinds, rounds)
        case = f"{name}: {what}"
        target = TARGETS.get((name, what))
        rows += [
            Row.of(f"{case}, compiled", ratios(times, "recorded", "compiled"), target),
            Row.of(f"{case}, eager", ratios(times, "eager", "compiled")),
            Row.of(f"{case}, the first call in a block, compiling", [again / first]),
        ]
    return rows
