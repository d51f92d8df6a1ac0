"""A whole forward with every leaf recorded: against the forward alone, and against the usual hooks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from actrec import record

from .models import GPT, mlp, resnet
from .timing import Row, ratios, seconds, take_turns
from .usual import classic_hook, clone_hook, exact, no_hook, pooling_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

POOLED_TARGET = 1.04
KEPT_TARGET = 1.03
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


@dataclass(frozen=True)
class Work:
    """A network and what it is called with."""

    name: str
    model: nn.Module
    x: Tensor
    repeat: int = 1  # tiny ones are called several times; what hooks cost there has no target


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
    for work in _small_models() if quick else _models():
        has_target = work.repeat == 1
        for mode in MODES:
            times = take_turns(_variants(work, mode), rounds=1 if quick else 15)
            where = f"{work.name}, {mode}"
            pooled = ratios(times, "pooled", "unrecorded")
            kept = ratios(times, "kept", "classic")
            target = POOLED_TARGET if has_target else None
            yield Row.of(f"forward: pooled / unrecorded, {where}", pooled, target)
            pooling = ratios(times, "pooled", "pooling")
            yield Row.of(f"forward: pooled / a hook that pools, {where}", pooling)
            target = KEPT_TARGET if has_target else None
            who = _who_is_exact(work, mode, "classic")
            yield Row.of(f"forward: kept / classic hook, {where}", kept, target, exact=who)
            cloned = ratios(times, "kept", "clone")
            who = _who_is_exact(work, mode, "clone")
            yield Row.of(f"forward: kept / clone hook, {where}", cloned, exact=who)
            yield Row.of(
                f"forward: kept / unrecorded, {where}", ratios(times, "kept", "unrecorded")
            )


def _models() -> Iterator[Work]:
    images = torch.randn(8, 3, 128, 128)
    yield Work("ResNet-50 shape, 8x3x128x128", resnet(), images)
    yield Work("ResNet-50 shape, nothing in place", resnet(in_place=False), images)
    # One thread copies what a 1x1 convolution of up to 16 images reads, if it is shared. More images are left alone.
    images = torch.randn(32, 3, 64, 64)
    yield Work("ResNet-50 shape, nothing in place, 32x3x64x64", resnet(in_place=False), images)
    yield Work("GPT shape, 12 layers of 512, 4x256", GPT(), torch.randint(1000, (4, 256)))
    yield Work("50 linear layers with ReLUs, 8x16", mlp(), torch.randn(8, 16), repeat=20)


def _small_models() -> Iterator[Work]:
    yield Work("small ResNet shape", resnet((1, 1), width=4), torch.randn(2, 3, 32, 32))
    yield Work("small GPT shape", GPT(2, 16, 2, length=8), torch.randint(1000, (2, 8)))
    yield Work("2 linear layers with ReLUs", mlp(2), torch.randn(8, 16), repeat=20)


def _who_is_exact(work: Work, mode: str, other: str) -> str:
    is_exact = {}
    for name in ("kept", other):
        with MODES[mode]():
            with HOOKS[name](work.model) as acts:
                work.model(work.x)
            is_exact[name] = exact(work.model, [work.x], acts)
    assert is_exact["kept"], work.name
    return "both" if is_exact[other] else "actrec alone"


def _variants(work: Work, mode: str) -> dict[str, Callable[[], float]]:
    work.model.eval()

    def run() -> None:
        for _ in range(work.repeat):
            work.model(work.x)

    def variant(hooked: Callable[..., AbstractContextManager[Any]]) -> float:
        with MODES[mode](), hooked(work.model):
            return seconds(run)

    return {name: partial(variant, hooked) for name, hooked in HOOKS.items()}
