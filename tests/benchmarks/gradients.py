"""A step of training with gradients recorded, against one without: forward, loss and backward."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from actrec import record

from .models import resnet
from .timing import Row, ratios, seconds, take_turns
from .usual import no_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

TARGET = 1.05


def blocks(name: str, module: nn.Module) -> bool:
    """The residual blocks: what Grad-CAM and its like look at."""
    return type(module).__name__ == "Bottleneck"


def pool(value: Tensor) -> Tensor:
    return value.mean((2, 3))


RECORDINGS = {
    "none": no_hook,
    "values": partial(record, layers=blocks, transform=pool),
    "gradients": partial(record, layers=blocks, transform=pool, grads=True),
    "whole gradients": partial(record, layers=blocks, grads=True),
}


def measure(*, quick: bool) -> Iterator[Row]:
    model = resnet((1, 1), width=4) if quick else resnet((2, 2, 2, 2))
    images = torch.randn(2, 3, 32, 32) if quick else torch.randn(8, 3, 96, 96)
    variants = {name: partial(_step, model, images, hooked) for name, hooked in RECORDINGS.items()}
    times = take_turns(variants, rounds=1 if quick else 21)
    what = "training step, ResNet shape, every block"
    pooled = ratios(times, "gradients", "none")
    yield Row.of(f"{what}: values and gradients, pooled / unrecorded", pooled, TARGET)
    whole = ratios(times, "whole gradients", "none")
    yield Row.of(f"{what}: values and gradients, whole / unrecorded", whole, TARGET)
    yield Row.of(f"{what}: values alone, pooled / unrecorded", ratios(times, "values", "none"))


def _step(
    model: nn.Module, images: Tensor, hooked: Callable[..., AbstractContextManager[Any]]
) -> float:
    def work() -> None:
        model(images).square().mean().backward()

    with hooked(model):
        return seconds(work)
