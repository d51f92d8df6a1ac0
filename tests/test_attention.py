"""``attention()`` returns the weights that a fused attention used, of what was recorded of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # as everybody calls it
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from actrec import OptionError, attention, record
from actrec import _attention as room

NAME = ":scaled_dot_product_attention"


class Fused(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """Return the mixed values."""
        return F.scaled_dot_product_attention(*args, **kwargs)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(
    query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
) -> Tensor:
    """The weights in double precision, all at once."""
    scores = query.double() @ key.double().mT * (scale or query.shape[-1] ** -0.5)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return scores.softmax(-1).nan_to_num(0)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["none", "causal", "bool", "float"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    shape=st.tuples(st.sampled_from([(), (2,), (2, 4)]), st.integers(1, 7), st.integers(1, 7)),
    scale=st.sampled_from([None, 0.3]),
    block=st.sampled_from([1, 20, 1 << 22]),
)
def test_the_weights_are_those_of_the_fused_function(
    kind: str,
    dtype: torch.dtype,
    shape: tuple[tuple[int, ...], int, int],
    scale: float | None,
    block: int,
) -> None:
    lead, many, keys = shape
    query, key, value = (
        seeded(*lead, n, 8, seed=at).to(dtype) for at, n in enumerate((many, keys, keys))
    )
    mask = seeded(many, keys, seed=5)
    mask = {"bool": mask > 0, "float": mask.to(dtype)}.get(kind)
    model = Fused()
    with record(model, NAME, inputs=True) as acts:
        model(query, key, value, attn_mask=mask, is_causal=kind == "causal", scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "BLOCK", block)
        weights = attention(**acts.inputs[NAME][0], output=acts[NAME][0])
    wanted = reference(query, key, mask, causal=kind == "causal", scale=scale)
    torch.testing.assert_close(weights, wanted.to(weights.dtype), rtol=1e-5, atol=2e-6)


def test_the_weights_are_what_the_plain_kernel_gives_for_unit_values() -> None:
    query, key = seeded(2, 4, 5, 8), seeded(2, 4, 5, 8, seed=1)
    eye = torch.eye(5).expand(2, 4, 5, 5)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(query, key, eye)
    torch.testing.assert_close(attention(query, key), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_heads_of_queries_share_those_of_keys(
    kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = seeded(2, 6, 5, 8), seeded(2, 2, 5, 8, seed=1), seeded(2, 2, 5, 8, seed=2)
    mask = {"bool": seeded(2, 1, 5, 5) > -1, "float": seeded(6, 5, 5)}.get(kind)
    monkeypatch.setattr(room, "BLOCK", block)
    model = Fused()
    with record(model, NAME, inputs=True) as acts:
        model(query, key, value, mask, 0.0, kind == "causal", enable_gqa=True)
    weights = attention(**acts.inputs[NAME][0], output=acts[NAME][0])
    wide = key.repeat_interleave(3, dim=1)
    causal = kind == "causal"
    torch.testing.assert_close(weights, attention(query, wide, None, mask, is_causal=causal))


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is made, besides views and the first."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        has_memory = isinstance(out, Tensor) and not out.is_meta
        if has_memory and out._base is None and not func.is_view:
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize(("queries", "keys"), [(1, 64), (64, 64)])
def test_besides_the_map_little_memory_is_needed(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BLOCK", 1024)
    query = seeded(2, 8, queries, 16).half()
    key, value = (seeded(2, 2, keys, 16, seed=at).half() for at in (1, 2))
    output = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with Largest() as largest:
        weights = attention(query, key, value, enable_gqa=True, output=output)
    assert largest.sizes[0] == weights.numel() == 2 * 8 * queries * keys
    assert max(largest.sizes[1:]) <= 1024


def test_a_query_that_sees_no_key_has_zeros() -> None:
    query = key = value = seeded(1, 3, 8)
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    output = F.scaled_dot_product_attention(query, key, value, mask)
    weights = attention(query, key, value, mask, output=output)
    assert weights[0, 1].tolist() == [0, 0, 0]
    assert weights[0, 0, 2] == 0


def test_maps_can_be_made_less_of_while_the_model_runs() -> None:
    model = Fused()
    query = seeded(2, 4, 5, 8)
    last = {NAME: lambda given: attention(**given)[..., -1, :]}
    with record(model, (), inputs=last) as acts:
        model(query, query, query, is_causal=True)
    assert torch.equal(acts.inputs[NAME][0], attention(query, query, is_causal=True)[..., -1, :])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dropout_p": 0.1}, "which weights were dropped"),
        ({"is_causal": True, "attn_mask": torch.ones(3, 3)}, "one of the two"),
        ({"value": None}, "give the values too"),
        ({"scale": 2.0}, "differs from the output by up to"),
        ({"is_causal": True}, "differs from the output by up to"),
        ({"query": torch.full((2, 3, 8), torch.nan)}, "differs from the output by up to"),
    ],
)
def test_weights_that_are_not_those_of_the_call_are_refused(
    changed: dict[str, Any], said: str
) -> None:
    query = key = value = seeded(2, 3, 8)
    given_ = {"query": query, "key": key, "value": value}
    output = F.scaled_dot_product_attention(**given_)
    attention(**given_, output=output)
    with pytest.raises(OptionError, match=said):
        attention(**{**given_, **changed}, output=output)


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ([(2, 4, 5, 8), (2, 4, 7, 6)], {}, r"\(2, 4, 5, 8\), \(2, 4, 7, 6\) do not fit"),
        ([(2, 4, 5, 8), (2, 2, 7, 8)], {}, "do not fit"),
        ([(2, 4, 5, 8), (2, 3, 7, 8)], {"enable_gqa": True}, "do not fit"),
        ([(2, 4, 5, 8), (8,)], {}, "do not fit"),
        ([(4, 5, 8), (4, 7, 8), (4, 6, 8)], {}, "do not fit"),
        ([(4, 5, 8), (4, 7, 8), (4, 7, 8), (5, 6)], {}, "do not fit"),
        (
            [(4, 5, 8), (4, 7, 8), (4, 7, 3)],
            {"output": torch.zeros(4, 5, 8)},
            r"the output is \(4, 5, 8\), and should be \(4, 5, 3\)",
        ),
    ],
)
def test_tensors_of_different_calls_are_told_by_their_shapes(
    shapes: list[tuple[int, ...]], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OptionError, match=rf"attention\(\): .*{reason}.*Are they of one call"):
        attention(*map(torch.zeros, shapes), **options)
