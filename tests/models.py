"""Models to record: small, with weights that are the same every time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Example(nn.Module):
    """What the example models share: weights that are the same every time."""

    def _fix_weights(self) -> None:
        generator = _seeded(0)
        drawn = [module for module in self.modules() if not isinstance(module, nn.LayerNorm)]
        with torch.no_grad():
            for parameter in (p for module in drawn for p in module.parameters(recurse=False)):
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                weights = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(weights * scale)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ConvNet(_Example):
    """Convolutions whose outputs are overwritten in place, by both activations and the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 10)
        self._fix_weights()

    def example(self, batch: int = 4) -> Tensor:
        """Return images to call it with, the same every time."""
        return torch.randn(batch, 1, 16, 16, generator=_seeded(1))

    def forward(self, images: Tensor) -> Tensor:
        """Return ten numbers for each image."""
        shortcut = self.relu1(self.conv1(images))
        hidden = self.conv2(shortcut)
        hidden += shortcut
        return self.head(self.pool(self.relu2(hidden)).flatten(1))  # type: ignore[no-any-return]


class TinyTransformer(_Example):
    """Two blocks of attention and MLP on token ids, with names that nest: ``blocks.0.attention.query``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 16)
        self.positions = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList([_Block(16, heads=2) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        self._fix_weights()

    def example(self, batch: int = 4, length: int = 12) -> Tensor:
        """Return token ids to call it with, the same every time."""
        return torch.randint(32, (batch, length), generator=_seeded(1))

    def forward(self, ids: Tensor) -> Tensor:
        """Return a number for each token that may follow, at each place."""
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [layer(hidden) for layer in (self.query, self.key, self.value)]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]
