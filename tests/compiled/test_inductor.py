"""Compiled by Inductor, models are recorded with ``compiled=True`` as they are in eager mode: each call, in order, but for last bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actrec import record
from actrec._values.spec import flatten
from tests.models import ConvNet, TinyTransformer
from tests.test_compiled_kept import Breaks, Checkpointed, Nested, Net, Recursive, of_torch
from tests.test_every_transformers_architecture import build, given_to

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what compilers and architectures warn of by themselves
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    record(nn.ReLU(), compiled=True)  # which tests itself, the first time
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check(model: nn.Module, run: Any, work: Any, **options: Any) -> None:
    """Record ``work(run)`` in eager mode and in compiled code, and compare them; the second block compiles nothing."""
    with record(model, ["**", ""], **options) as eager:
        work(run)
    work(run)
    for again in (False, True):
        before = graphs()
        with record(model, ["**", ""], compiled=True, **options) as acts:
            work(run)
        assert not again or graphs() == before
    before = graphs()
    work(run)
    assert graphs() == before, "the user's code is used again"
    alike(acts, eager)


def alike(acts: Any, eager: Any) -> None:
    assert [*acts] == [*eager]
    assert acts.num_passes == eager.num_passes
    for beside in ("", "inputs", "grads"):
        one, other = (getattr(of, beside, None) if beside else of for of in (acts, eager))
        for name in [] if other is None else other:
            assert [*one[name].passes] == [*other[name].passes], (beside, name)
            for mine, theirs in zip(one[name], other[name], strict=True):
                (tensors, spec), (expected, structure) = flatten(mine), flatten(theirs)
                assert spec == structure, (beside, name)
                for a, b in zip(tensors, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


NETS = {
    "blocks": (Net, torch.randn(2, 4)),
    "of torch": (of_torch, torch.randn(2, 4)),
    "nested": (Nested, torch.randn(2, 4)),
    "recursive": (Recursive, torch.randn(2, 4)),
    "breaks": (Breaks, torch.randn(2, 4)),
    "convolutions": (ConvNet, ConvNet().example()),
    "transformer": (TinyTransformer, TinyTransformer().example()),
    "lstm": (lambda: nn.Sequential(nn.LSTM(4, 3, num_layers=2)), torch.randn(5, 2, 4)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0), 2),
        torch.randn(5, 2, 8),
    ),
    "attention": (Attends, torch.randn(5, 2, 8)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        torch.randn(2, 1, 8, 8),
    ),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(10, 4)), torch.randint(10, (3, 5))),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("grads", [False, True])
def test_a_net(name: str, grads: bool) -> None:
    make, x = NETS[name]
    torch.manual_seed(0)
    model = make()
    run = torch.compile(model)

    def work(run: Any) -> None:
        for _ in range(2):
            output = run(x)
            if grads:
                first = output if isinstance(output, Tensor) else output[0]
                first.square().sum().backward()

    check(model, run, work, inputs=True, grads=grads)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"fullgraph": True}])
def test_a_mode_of_inductor(mode: str, options: Any) -> None:
    model = Net()
    run = torch.compile(model, mode=mode, **options)
    with torch.no_grad():
        check(model, run, lambda run: [run(torch.ones(n, 4)) for n in (2, 3)])


def test_code_that_is_wrapped_in_cpp() -> None:
    model = Net().eval()
    with torch.no_grad(), torch._inductor.config.patch(cpp_wrapper=True):
        check(model, torch.compile(model), lambda run: [run(torch.ones(2, 4))])


def test_autocast_and_checkpointing() -> None:
    model = Checkpointed(reentrant=False)
    run = torch.compile(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, run, lambda run: run(torch.ones(2, 4)).sum().backward())


ARCHITECTURES = [
    *("BloomForCausalLM", "CohereForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel"),
    *("GPTNeoXForCausalLM", "Gemma2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
    *("OPTForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("AlbertForMaskedLM", "BertForMaskedLM", "DistilBertForMaskedLM", "RobertaForMaskedLM"),
    *("T5ForConditionalGeneration", "BartForConditionalGeneration", "ViTForImageClassification"),
    "ConvNextForImageClassification",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_of_transformers(name: str) -> None:
    model, given = build(name).eval(), given_to(name)
    run = torch.compile(model)
    with torch.no_grad():
        check(model, run, lambda run: run(**given), inputs=True)
