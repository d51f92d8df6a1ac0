"""docs/how-to/vllm.md against a stand-in for vLLM, which is not run: it needs a build for a GPU."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actrec.testing import assert_unhooked
from tests.recipes.pages import blocks, run

PAGE = "vllm.md"
HEADINGS = ["Whole prompts, one request at a time"]
WIDTH, CHUNK = 8, 5


class Layer(nn.Module):
    """Returns what it adds, and the residual stream without it; overwrites both of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual += hidden
        hidden.copy_(residual).div_(residual.norm(dim=-1, keepdim=True))
        return self.mlp(hidden), residual


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([Layer() for _ in range(3)])})
        self.tokens = nn.Embedding(256, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.streams(tokens)[-1]

    def streams(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream behind each layer, as recorded by hand."""
        hidden, residual = self.tokens(tokens), torch.zeros(len(tokens), WIDTH)
        found = []
        for layer in self.model["layers"]:
            hidden, residual = layer(hidden, residual)
            found.append(hidden + residual)
        return found


class StandIn:
    """An engine with one worker, which has a class of the user's among its bases."""

    def __init__(self, **options: Any) -> None:
        assert options["enforce_eager"]
        assert not options["enable_prefix_caching"]
        assert options["max_num_seqs"] == 1
        module, _, name = options["worker_extension_cls"].rpartition(".")
        extension = getattr(import_module(module), name)
        model = self.model = Model()
        self.worker = type("Worker", (extension,), {"get_model": lambda _: model})()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    @torch.inference_mode()
    def generate(self, prompts: list[str], sampling: Any) -> list[Any]:
        assert sampling.max_tokens == 1
        for tokens in map(tokenized, prompts):
            for chunk in tokens.split(CHUNK):  # long prompts come in parts
                self.model(chunk)
        return [SimpleNamespace(prompt_token_ids=tokenized(prompt).tolist()) for prompt in prompts]


def tokenized(prompt: str) -> Tensor:
    return torch.tensor(list(prompt.encode()))


def stand_in(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def test_each_prompt_gets_the_residual_stream_of_its_own_tokens(tmp_path, monkeypatch):
    worker, engine = blocks(PAGE, *HEADINGS)
    vllm = stand_in("vllm", LLM=StandIn, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    names = run(PAGE, [worker], tmp_path)
    monkeypatch.setitem(sys.modules, "recording_worker", stand_in("recording_worker", **names))

    names = run(PAGE, [engine], tmp_path)
    model, states = names["llm"].model, names["states"]
    assert len(states) == 3
    with torch.inference_mode():
        for prompt, state in zip(names["prompts"], states, strict=True):
            chunks = [model.streams(chunk)[1] for chunk in tokenized(prompt).split(CHUNK)]
            assert torch.equal(state, torch.cat(chunks))
    assert_unhooked(model)


def test_rows_that_are_missing_are_noticed(tmp_path, monkeypatch):
    worker, engine = blocks(PAGE, *HEADINGS)

    class Caching(StandIn):
        def generate(self, prompts: list[str], sampling: Any) -> list[Any]:
            super().generate([*prompts[:-1], prompts[-1][1:]], sampling)
            return [SimpleNamespace(prompt_token_ids=[*prompt.encode()]) for prompt in prompts]

    vllm = stand_in("vllm", LLM=Caching, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    names = run(PAGE, [worker], tmp_path)
    monkeypatch.setitem(sys.modules, "recording_worker", stand_in("recording_worker", **names))
    with pytest.raises(RuntimeError, match="split"):
        run(PAGE, [engine], tmp_path)
