"""Functions in the blocks of known architectures, against forwards in which every value is written down by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # as everybody calls it

from actrec import attention, record

if TYPE_CHECKING:
    from collections.abc import Callable

    Noted = dict[str, list[Tensor]]


def note(noted: Noted | None, name: str, value: Tensor) -> Tensor:
    """Write down a value as it is now."""
    if noted is not None:
        noted.setdefault(name, []).append(value.detach().clone())
    return value


class ResNetBlock(nn.Module):
    """As torchvision has it: the sum and both activations are in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def example(self) -> Tensor:
        return torch.randn(2, 4, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x), inplace=True)
        out = self.conv2(out)
        out += x
        return F.relu_(out)

    def noted(self, x: Tensor, noted: Noted) -> Tensor:
        out = note(noted, "relu", self.conv1(x).relu())
        out = note(noted, "add", self.conv2(out) + x)
        return note(noted, "relu", out.relu())


class LlamaAttention(nn.Module):
    """Rotated queries and keys, grouped heads, a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)

    def example(self) -> Tensor:
        return torch.randn(2, 5, 16)

    @staticmethod
    def angles(x: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.arange(x.shape[1])[:, None] / 10 ** torch.arange(2)
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.angles(x)
        q, k, v = (
            part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        q, k = (t * cos + self.rotate(t) * sin for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def noted(self, x: Tensor, noted: Noted) -> Tensor:
        cos, sin = self.angles(x)
        q, k, v = (
            part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        turned = []
        for t in (q, k):
            plain = note(noted, "mul", t * cos)
            turned.append(note(noted, "add", plain + note(noted, "mul", self.rotate(t) * sin)))
        mixed = F.scaled_dot_product_attention(*turned, v, is_causal=True, enable_gqa=True)
        note(noted, "scaled_dot_product_attention", mixed)
        return self.o(mixed.transpose(1, 2).flatten(2))


class GPT2Block(nn.Module):
    """One projection for queries, keys and values; two residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def example(self) -> Tensor:
        return torch.randn(2, 5, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.noted(x, None)

    def noted(self, x: Tensor, noted: Noted | None) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).split(16, dim=-1)
        q, k, v = (t.view(2, 5, 4, 4).transpose(1, 2) for t in (q, k, v))
        scores = note(noted, "matmul", q @ k.mT) / 2
        scores = scores.masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)
        weights = note(noted, "softmax", F.softmax(scores, dim=-1))
        mixed = note(noted, "matmul", weights @ v)
        x = note(noted, "add", x + self.proj(mixed.transpose(1, 2).reshape(2, 5, 16)))
        hidden = note(noted, "gelu", F.gelu(self.up(self.ln2(x)), approximate="tanh"))
        return note(noted, "add", x + self.down(hidden))


class SwinBlock(nn.Module):
    """Windows that are shifted with roll, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def example(self) -> Tensor:
        return torch.randn(2, 4, 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.noted(x, None)

    def noted(self, x: Tensor, noted: Noted | None) -> Tensor:
        shifted = note(noted, "roll", torch.roll(x, (-1, -1), (1, 2)))
        windows = shifted.view(2, 2, 2, 2, 2, 8)
        windows = note(noted, "permute", windows.permute(0, 1, 3, 2, 4, 5)).reshape(8, 4, 8)
        q, k, v = self.qkv(windows).chunk(3, -1)
        mixed = note(noted, "softmax", (q @ k.mT).softmax(-1)) @ v
        back = self.proj(mixed).view(2, 2, 2, 2, 2, 8)
        back = note(noted, "permute", back.permute(0, 1, 3, 2, 4, 5)).reshape(2, 4, 4, 8)
        back = note(noted, "roll", torch.roll(back, (1, 1), (1, 2)))
        return note(noted, "add", x + back)


class LSTMCell(nn.Module):
    """Gates that are split from one product; the state is written in place, step after step."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(8, 16)

    def example(self) -> Tensor:
        return torch.randn(3, 2, 4)

    def forward(self, steps: Tensor) -> Tensor:
        hidden = torch.zeros(2, 4)
        cell = torch.zeros(2, 4)
        for x in steps:
            i, f, g, o = self.gates(torch.cat([x, hidden], -1)).chunk(4, -1)
            cell *= f.sigmoid_()
            cell += i.sigmoid_() * g.tanh_()
            hidden = o.sigmoid_() * cell.tanh()
        return hidden

    def noted(self, steps: Tensor, noted: Noted) -> Tensor:
        hidden = torch.zeros(2, 4)
        cell = torch.zeros(2, 4)
        for x in steps:
            i, f, g, o = self.gates(torch.cat([x, hidden], -1)).chunk(4, -1)
            cell = note(noted, "mul", cell * note(noted, "sigmoid", f.sigmoid()))
            gated = note(noted, "sigmoid", i.sigmoid()) * note(noted, "tanh", g.tanh())
            cell = note(noted, "add", cell + note(noted, "mul", gated))
            opened = note(noted, "sigmoid", o.sigmoid())
            hidden = note(noted, "mul", opened * note(noted, "tanh", cell.tanh()))
        return hidden


@pytest.mark.parametrize("make", [ResNetBlock, LlamaAttention, GPT2Block, SwinBlock, LSTMCell])
@torch.no_grad()
def test_every_value_is_the_one_that_was_written_down(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    x = model.example()
    noted: Noted = {}
    result = model.noted(x, noted)
    plain = model(x)
    with record(model, [f":{name}" for name in noted]) as acts:
        assert torch.equal(model(x), plain)
    torch.testing.assert_close(plain, result)
    for name, values in noted.items():
        recorded = acts[f":{name}"]
        assert len(recorded) == len(values), name
        for got, wanted in zip(recorded, values, strict=True):
            assert torch.equal(got, wanted), name


def test_the_map_of_rotated_grouped_queries_is_that_of_what_was_recorded() -> None:
    model = LlamaAttention()
    name = ":scaled_dot_product_attention"
    with torch.no_grad(), record(model, name, inputs=True) as acts:
        model(model.example())
    weights = attention(**acts.inputs[name][0], output=acts[name][0])
    assert weights.shape == (2, 4, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
