"""Functions inside modules: what recording them adds to a forward, against one that is not recorded."""

from __future__ import annotations

from contextlib import contextmanager
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


class NotedAttention(Attention):
    """The same, with what is recorded of it written down by hand."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.noted.append(mixed.clone())
        return self.out(mixed.transpose(1, 2).flatten(2))


class NotedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        self.noted.append(x.clone())
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        self.noted.append(x.clone())
        return x


class NotedResidual(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        self.noted.append(pool(y))
        y = self.bn2(self.conv2(y))
        y += x
        self.noted.append(pool(y))
        y = F.relu(y, inplace=True)
        self.noted.append(pool(y))
        return y


def gpt(width: int) -> nn.Module:
    return nn.Sequential(*(Block(width) for _ in range(12)))


ATTENTION = ["*.attention:scaled_dot_product_attention", "*:add"]
NOTED = {Attention: NotedAttention, Block: NotedBlock, Residual: NotedResidual}


def pool(value: Tensor) -> Tensor:
    return value.mean((2, 3))


@contextmanager
def by_hand(model: nn.Module) -> Iterator[None]:
    """The least that it can cost: forwards that copy, or pool, the values themselves."""
    for module in model.modules():
        module.__class__ = NOTED.get(type(module), type(module))
        module.noted = []
    yield
    plain = {noted: kind for kind, noted in NOTED.items()}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
        del module.noted


def measure(*, quick: bool) -> Iterator[Row]:
    rounds = 1 if quick else 21
    sizes = {16: 1.08} if quick else {256: 1.08, 512: 1.02}
    for width, target in sizes.items():
        model, x = gpt(width), torch.randn(1, 8 if quick else 128, width)
        recordings = {
            "none": no_hook,
            "functions": partial(record, layers=ATTENTION),
            "by hand": by_hand,
            "blocks": partial(record, layers="*"),
        }
        times = _times(model, x, recordings, rounds)
        times["first"] = _times(model, x, {"": recordings["functions"]}, rounds, before=0)[""]
        what = f"GPT of 12 blocks, {width} wide, {min(times['none']) * 1000:.0f} ms"
        names = {
            "functions": "attention and sums",
            "first": "the same, the first forward of a block",
            "by hand": "the same, copied by hand",
            "blocks": "the blocks",
        }
        for name, said in names.items():
            ratio = ratios(times, name, "none")
            yield Row.of(
                f"{what}: {said} / unrecorded", ratio, target if name == "functions" else None
            )
    model = nn.Sequential(*(Residual(4 if quick else 64) for _ in range(8))).eval()
    for images in (1,) if quick else (1, 16):
        x = torch.randn(images, *((4, 8, 8) if quick else (64, 32, 32)))
        recordings = {
            "none": no_hook,
            "functions": partial(record, layers=["*:add", "*:relu"], transform=pool),
            "by hand": by_hand,
        }
        times = _times(model, x, recordings, rounds)
        what = f"ResNet of 8 blocks, {min(times['none']) * 1000:.0f} ms: all sums and activations"
        for name, said in {"functions": "pooled", "by hand": "pooled by hand"}.items():
            ratio = ratios(times, name, "none")
            yield Row.of(
                f"{what}, {said} / unrecorded", ratio, 1.06 if name == "functions" else None
            )


def _times(model: nn.Module, x: Tensor, recordings: Any, rounds: int, *, before: int = 1) -> Any:
    """The times of a forward; with ``before=0``, of the first in its block."""
    variants = {
        name: partial(_forward, model, x, hooked, before) for name, hooked in recordings.items()
    }
    return take_turns(variants, rounds=rounds)


def _forward(
    model: nn.Module,
    x: Tensor,
    hooked: Callable[..., AbstractContextManager[Any]],
    before: int,
) -> float:
    with torch.no_grad(), hooked(model):
        for _ in range(before):
            model(x)
        return seconds(lambda: model(x))
