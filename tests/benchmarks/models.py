"""Networks of the usual shapes, small enough to be timed many times on a laptop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- A residual network, shaped as ResNet-50 ----------------------------------------------------------


class Bottleneck(nn.Module):
    """Three convolutions around a shortcut, with one ReLU that is called three times."""

    def __init__(self, wide: int, narrow: int, stride: int, *, in_place: bool) -> None:
        super().__init__()
        out = 4 * narrow
        self.conv1 = nn.Conv2d(wide, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=in_place)
        self.in_place = in_place
        self.shortcut = None
        if stride != 1 or wide != out:
            conv = nn.Conv2d(wide, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.relu(y.add_(shortcut) if self.in_place else y + shortcut)


def resnet(
    blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, *, in_place: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=in_place),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    wide = width
    for stage, count in enumerate(blocks):
        narrow = width * 2**stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            layers.append(Bottleneck(wide, narrow, stride, in_place=in_place))
            wide = 4 * narrow
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 1000)]
    return nn.Sequential(*layers)


# --- A transformer, shaped as GPT-2 -------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(
        self,
        layers: int = 12,
        width: int = 512,
        heads: int = 8,
        length: int = 256,
        words: int = 1000,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# --- Tiny tensors through many layers ------------------------------------------------------------------


def mlp(layers: int = 50, width: int = 16) -> nn.Sequential:
    """Linear layers, each with a ReLU behind it: of such tensors, hooks are most of what is felt."""
    pairs = ((nn.Linear(width, width), nn.ReLU()) for _ in range(layers))
    return nn.Sequential(*(module for pair in pairs for module in pair))


# --- Many modules that do nothing ---------------------------------------------------------------------


def many(blocks: int, leaves: int = 8) -> nn.Sequential:
    """Blocks of two parts of ``leaves`` leaves: ``blocks * (3 + 2 * leaves)`` modules under the root."""

    def part() -> nn.Sequential:
        return nn.Sequential(*(nn.Identity() for _ in range(leaves)))

    return nn.Sequential(*(nn.Sequential(part(), part()) for _ in range(blocks)))
