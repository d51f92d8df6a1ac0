"""A whole forward with every leaf recorded: against the forward alone, and against the usual hooks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from actrec import record

from .models import GPT, resnet
from .timing import Row, ratios, seconds, take_turns
from .usual import classic_hook, clone_hook, no_hook, pooling_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

POOLED_TARGET = 1.04
KEPT_TARGET = 1.03
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


def pool(value: Tensor) -> Tensor:
    """The mean over the positions of an image or of a text."""
    return value.mean((2, 3)) if value.dim() == 4 else value.mean(-2)


HOOKS = {
    "unrecorded": no_hook,
    "classic": classic_hook,
    "clone": clone_hook,
    "kept": record,
    "pooled": partial(record, transform=pool),
    "pooling": partial(pooling_hook, pool=pool),
}


def measure(*, quick: bool) -> Iterator[Row]:
    for what, model, x in _small_models() if quick else _models():
        for mode in MODES:
            times = take_turns(_variants(model.eval(), x, mode), rounds=1 if quick else 15)
            where = f"{what}, {mode}"
            pooled = ratios(times, "pooled", "unrecorded")
            kept = ratios(times, "kept", "classic")
            yield Row.of(f"forward: pooled / unrecorded, {where}", pooled, POOLED_TARGET)
            pooling = ratios(times, "pooled", "pooling")
            yield Row.of(f"forward: pooled / a hook that pools, {where}", pooling)
            yield Row.of(f"forward: kept / classic hook, {where}", kept, KEPT_TARGET)
            yield Row.of(f"forward: kept / clone hook, {where}", ratios(times, "kept", "clone"))
            yield Row.of(
                f"forward: kept / unrecorded, {where}", ratios(times, "kept", "unrecorded")
            )


def _models() -> Iterator[tuple[str, nn.Module, Tensor]]:
    images = torch.randn(8, 3, 128, 128)
    yield "ResNet-50 shape, 8x3x128x128", resnet(), images
    yield "ResNet-50 shape, nothing in place", resnet(in_place=False), images
    yield "GPT shape, 12 layers of 512, 4x256", GPT(), torch.randint(1000, (4, 256))


def _small_models() -> Iterator[tuple[str, nn.Module, Tensor]]:
    yield "small ResNet shape", resnet((1, 1), width=4), torch.randn(2, 3, 32, 32)
    yield "small GPT shape", GPT(2, 16, 2, length=8), torch.randint(1000, (2, 8))


def _variants(model: nn.Module, x: Tensor, mode: str) -> dict[str, Callable[[], float]]:
    def variant(hooked: Callable[..., AbstractContextManager[Any]]) -> float:
        with MODES[mode](), hooked(model):
            return seconds(lambda: model(x))

    return {name: partial(variant, hooked) for name, hooked in HOOKS.items()}
