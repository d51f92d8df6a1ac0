"""Functions inside modules: what recording them adds to a forward, against one that is not recorded."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actrec import record

from .timing import Row, ratios, seconds, take_turns
from .usual import no_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y, inplace=True)


def gpt(width: int) -> nn.Module:
    return nn.Sequential(*(Block(width) for _ in range(12)))


ATTENTION = ["*.attention:scaled_dot_product_attention", "*:add"]


def pool(value: Tensor) -> Tensor:
    return value.mean((2, 3))


def measure(*, quick: bool) -> Iterator[Row]:
    rounds = 1 if quick else 21
    sizes = {16: 1.08} if quick else {256: 1.08, 512: 1.02}
    for width, target in sizes.items():
        model, x = gpt(width), torch.randn(1, 8 if quick else 128, width)
        recordings = {
            "none": no_hook,
            "functions": partial(record, layers=ATTENTION),
            "blocks": partial(record, layers="*"),
        }
        times = _times(model, x, recordings, rounds)
        what = f"GPT of 12 blocks, {width} wide, {min(times['none']) * 1000:.0f} ms"
        yield Row.of(
            f"{what}: attention and sums / unrecorded", ratios(times, "functions", "none"), target
        )
        yield Row.of(f"{what}: the blocks / unrecorded", ratios(times, "blocks", "none"))
    model = nn.Sequential(*(Residual(4 if quick else 64) for _ in range(8))).eval()
    images = torch.randn(1, *((4, 8, 8) if quick else (64, 32, 32)))
    recordings = {
        "none": no_hook,
        "functions": partial(record, layers=["*:add", "*:relu"], transform=pool),
    }
    times = _times(model, images, recordings, rounds)
    what = "ResNet of 8 blocks: all sums and activations, pooled / unrecorded"
    yield Row.of(what, ratios(times, "functions", "none"), 1.06)


def _times(model: nn.Module, x: Tensor, recordings: Any, rounds: int) -> Any:
    variants = {name: partial(_forward, model, x, hooked) for name, hooked in recordings.items()}
    return take_turns(variants, rounds=rounds)


def _forward(
    model: nn.Module, x: Tensor, hooked: Callable[..., AbstractContextManager[Any]]
) -> float:
    with torch.no_grad(), hooked(model):
        return seconds(lambda: model(x))
