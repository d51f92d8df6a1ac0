"""For your own tests: a check that nothing was left on a model, and small models to record.

>>> from actrec import record, testing
>>> model = testing.ConvNet()
>>> with record(model) as acts:
...     output = model(model.example(batch=2))
>>> testing.assert_unhooked(model)

The models have fixed weights, so their outputs are the same every time. They are small: a forward takes
less than a millisecond or so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from actrec._calls.hooks import Hook

from ._text import listed
from ._torch import hook_tables

__all__ = ["ConvNet", "Recurrent", "TinyTransformer", "assert_unhooked"]


def assert_unhooked(model: nn.Module) -> None:
    """Raise ``AssertionError`` if a hook of actrec is on ``model`` or on a module in it.

    >>> from actrec import record
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> with record(model, "0"):  # doctest: +ELLIPSIS
    ...     assert_unhooked(model)
    Traceback (most recent call last):
    AssertionError: assert_unhooked(): hooks of actrec are on '', '0' of this Sequential...
    >>> assert_unhooked(model)

    Hooks of others do not matter. While a block is running its hooks are there, so call it behind. It
    changes nothing.
    """
    hooked = [name for name, module in model.named_modules() if _has_hooks(module)]
    if hooked:
        message = (
            f"assert_unhooked(): hooks of actrec are on {listed(hooked)} of this {type(model).__name__}. Is a "
            "record() block still running, or a generator that holds one still alive?"
        )
        raise AssertionError(message)


def _has_hooks(module: nn.Module) -> bool:
    return any(isinstance(hook, Hook) for table in hook_tables(module) for hook in table.values())


class _Example(nn.Module):
    """What the example models share: weights that are the same every time."""

    def _fix_weights(self) -> None:
        generator = _seeded(0)
        drawn = [module for module in self.modules() if not isinstance(module, nn.LayerNorm)]
        with torch.no_grad():
            for parameter in (p for module in drawn for p in module.parameters(recurse=False)):
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                weights = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.copy_(weights * scale)

    def _on_device(self, example: Tensor) -> Tensor:
        return example.to(next(self.parameters()).device)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


class ConvNet(_Example):
    """Convolutions whose outputs are overwritten in place: the case that the usual hook gets wrong.

    >>> model = ConvNet()
    >>> model(model.example(batch=2)).shape
    torch.Size([2, 10])

    Both activations work in place, and so does the addition of the shortcut.
    """

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
        return self._on_device(torch.randn(batch, 1, 16, 16, generator=_seeded(1), device="cpu"))

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return ten numbers for each image."""
        shortcut = self.relu1(self.conv1(images))
        hidden = self.conv2(shortcut)
        hidden += shortcut
        return self.head(self.pool(self.relu2(hidden)).flatten(1))  # type: ignore[no-any-return]


class TinyTransformer(_Example):
    """Two blocks of attention and MLP on token ids, with names that nest: ``blocks.0.attention.query``.

    >>> model = TinyTransformer()
    >>> model(model.example(batch=2)).shape
    torch.Size([2, 12, 32])
    """

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
        return self._on_device(
            torch.randint(32, (batch, length), generator=_seeded(1), device="cpu")
        )

    @override
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

    @override
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

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        parts = [layer(hidden) for layer in (self.query, self.key, self.value)]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Recurrent(_Example):
    """A cell that is called once for each step, and a layer that returns tensors in tuples.

    >>> from actrec import record
    >>> model = Recurrent()
    >>> with record(model, ["cell", "lstm"]) as acts:
    ...     output = model(model.example(batch=2, steps=5))
    >>> len(acts["cell"]), len(acts["lstm"])
    (5, 1)
    >>> acts["lstm"]
    Layer 'lstm' (LSTM): 1 call, tuple of 2 float32, 224 B
    """

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 2)
        self._fix_weights()

    def example(self, batch: int = 4, steps: int = 6) -> Tensor:
        """Return sequences to call it with, the same every time."""
        return self._on_device(torch.randn(batch, steps, 3, generator=_seeded(1), device="cpu"))

    @override
    def forward(self, sequences: Tensor) -> Tensor:
        """Return two numbers for each sequence."""
        hidden, states = sequences.new_zeros(len(sequences), 4), []
        for step in sequences.unbind(1):
            hidden = self.cell(step, hidden)
            states.append(hidden)
        _, (last, _) = self.lstm(torch.stack(states, 1))
        return self.head(last[-1])  # type: ignore[no-any-return]
