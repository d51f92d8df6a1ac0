"""Compiled models are recorded eagerly, never silently empty, and are as fast as before afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from actrec import ActrecError, record

X = torch.randn(2, 4)

# The compiler warns about its own deprecations when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


Compile = Callable[[nn.Sequential, str], Callable[[Tensor], Tensor]]


def _method(model: nn.Sequential, backend: str) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend)
    return model


def _function(model: nn.Sequential, backend: str) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return model(x)

    return torch.compile(run, backend=backend)


def _submodule(model: nn.Sequential, backend: str) -> Callable[[Tensor], Tensor]:
    model[0] = torch.compile(model[0], backend=backend)  # type: ignore[assignment]
    return model


FORMS: dict[str, Compile] = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend),
    "fullgraph": lambda model, backend: torch.compile(model, backend=backend, fullgraph=True),
    "module.compile": _method,
    "function": _function,
    "submodule": _submodule,
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compile_", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("first", ["compiled before", "compiled inside"])
def test_a_compiled_model_is_recorded_exactly(compile_: Compile, backend: str, first: str) -> None:
    model, reference = net(), net()
    reference.load_state_dict(model.state_dict())
    run = compile_(model, backend)
    if first == "compiled before":
        run(X)
    recorded = run if isinstance(run, nn.Module) else model
    with record(recorded, ["0", "1", "2"]) as acts:
        run(X)
        run(X)
    with record(reference) as expected:
        reference(X)
        reference(X)
    assert acts.num_passes == 2
    for name in expected:
        assert all(map(torch.equal, acts[name], expected[name])), name
    assert (acts["0"][0] < 0).any()


def test_the_compiled_code_is_kept_and_does_not_grow() -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = torch.compile(net(), backend=backend)
    model(X)
    for _ in range(20):
        with record(model) as acts:
            model(X)
        assert len(acts["_orig_mod.0"]) == 1
        model(X)
    assert graphs == 1


def test_a_block_inside_a_compiled_region_is_refused() -> None:
    model = net()

    def step(x: Tensor) -> Tensor:
        with record(model) as acts:
            model(x)
        return acts["0"][0]

    with pytest.raises(ActrecError, match=r"torch\.compile is compiling"):
        torch.compile(step, backend="eager")(X)
    with pytest.raises(Exception, match="compil"):
        torch.compile(step, backend="eager", fullgraph=True)(X)
    with record(model) as acts:
        model(X)
    assert len(acts["0"]) == 1, "and the next block works"


def test_the_stance_of_the_compiler_is_as_before() -> None:
    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    outer, inner = net(), net()
    assert stance() == "default"
    with record(outer):
        assert stance() == "force_eager"
        with record(inner):
            inner(X)
        assert stance() == "force_eager"
        outer(X)
    assert stance() == "default"


IN_A_FRESH_PROCESS = """
import sys, torch
from torch import nn
from actrec import record
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
assert "torch._dynamo" not in sys.modules, "nobody has imported the compiler"
with record(model) as acts:
    assert "torch._dynamo" not in sys.modules, "and recording does not"
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        compiled(torch.randn(2, 4))
assert [len(layer) for layer in acts.values()] == [3, 3], acts
assert (acts["0"].cat() < 0).any()
assert torch._dynamo.eval_frame._stance.stance == "default"
"""


def test_a_model_that_is_compiled_for_the_first_time_inside_the_block_is_recorded() -> None:
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], check=True, timeout=300)
