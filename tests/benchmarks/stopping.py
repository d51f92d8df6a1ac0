"""Stopping early after a quarter of a deep net, against running that quarter alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actrec import record

from .timing import Row, ratios, seconds, take_turns
from .usual import no_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

TARGET = 1.05
DEPTH = 48


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.wide(self.norm(x)).relu_())


def measure(*, quick: bool) -> Iterator[Row]:
    width = 8 if quick else 256
    whole = nn.Sequential(*(Residual(width) for _ in range(DEPTH)))
    quarter = whole[: DEPTH // 4]
    last = str(DEPTH // 4 - 1)
    x = torch.randn(4, width) if quick else torch.randn(256, width)
    variants = {
        "stopped": partial(_forward, whole, x, partial(record, layers=last, stop_early=True)),
        "quarter": partial(_forward, quarter, x, no_hook),
        "whole": partial(_forward, whole, x, no_hook),
    }
    times = take_turns(variants, rounds=2 if quick else 41)
    name = f"stop_early after {DEPTH // 4} of {DEPTH} blocks"
    yield Row.of(f"{name} / that quarter alone", ratios(times, "stopped", "quarter"), TARGET)
    yield Row.of(f"{name} / the whole forward", ratios(times, "stopped", "whole"))


def _forward(
    model: nn.Module, x: Tensor, hooked: Callable[..., AbstractContextManager[Any]]
) -> float:
    with torch.no_grad(), hooked(model):
        return seconds(lambda: model(x))
