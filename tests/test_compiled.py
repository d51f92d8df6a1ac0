"""Compiled models are recorded eagerly, never silently empty, and are as fast as before afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.experimental.control_flow import map as map_
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from actrec import (
    ActrecError,
    IncompleteLayerWarning,
    UnusedLayerWarning,
    _torch,
    record,
)
from actrec._calls import compiled as compiled_code
from actrec._calls.compiled import Eager

X = torch.randn(2, 4)

# The compiler warns about its own deprecations when it is first used.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    # Its own question, of operators that compile themselves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


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
    outer, inner = net(), net()
    assert stance() == "default"
    with record(outer):
        assert stance() == "force_eager"
        with record(inner):
            inner(X)
        assert stance() == "force_eager"
        outer(X)
    assert stance() == "default"


# --- Stances of the user's ---------------------------------------------------------------------------


def stance() -> str:
    current: str = torch._dynamo.eval_frame._stance.stance
    return current


@pytest.fixture
def _default_stance() -> Iterator[None]:
    import torch._dynamo

    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_default_stance")
def test_a_stance_that_is_set_inside_the_block_stays() -> None:
    model = net()
    with record(model):
        model(X)
        torch.compiler.set_stance("eager_on_recompile")
    assert stance() == "eager_on_recompile"
    with record(model):
        assert stance() == "force_eager"
        model(X)
    assert stance() == "eager_on_recompile"


@pytest.mark.usefixtures("_default_stance")
def test_a_stance_for_a_part_of_the_block_ends_with_that_part() -> None:
    model = net()
    with record(model):
        with torch.compiler.set_stance("eager_on_recompile"):
            with record(model):
                assert stance() == "force_eager"
                model(X)
            assert stance() == "eager_on_recompile"
        assert stance() == "force_eager"
        model(X)
    assert stance() == "default"


@pytest.mark.usefixtures("_default_stance")
def test_a_stance_that_ends_behind_the_block_brings_nothing_of_it_back() -> None:
    model = net()
    torch.compiler.set_stance("eager_on_recompile")
    with record(model):
        model(X)
        part = torch.compiler.set_stance("fail_on_recompile")
    part.__exit__(None, None, None)
    assert stance() == "eager_on_recompile"
    with record(model):
        assert stance() == "force_eager"
        model(X)
    assert stance() == "eager_on_recompile"
    assert not isinstance(torch._dynamo.eval_frame._stance, Eager)


@pytest.mark.usefixtures("_default_stance")
def test_blocks_that_end_in_another_order_leave_no_stance() -> None:
    model = net()
    first, second = record(model), record(model)
    first.__enter__()
    second.__enter__()
    model(X)
    first.__exit__(None, None, None)
    assert stance() == "force_eager"
    second.__exit__(None, None, None)
    assert stance() == "default"
    assert not isinstance(torch._dynamo.eval_frame._stance, Eager)


@pytest.mark.usefixtures("_default_stance")
def test_what_ran_compiled_by_the_users_stance_is_explained() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with pytest.warns(UnusedLayerWarning, match=r"set_stance\(\) was called inside"), record(model):
        torch.compiler.set_stance("default")
        compiled(X)
    with (
        pytest.warns(UnusedLayerWarning, match=r"2 of 3 layers.*\n.*set_stance\(\) was called"),
        record(model),
    ):
        model[0](X)
        torch.compiler.set_stance("default")
        compiled(X)


# --- Operators that compile themselves ----------------------------------------------------------------


class Controlled(nn.Module):
    """A stem, and an operator of PyTorch with a layer in its body."""

    def __init__(self, operator: Callable[[Controlled, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Linear(4, 4), nn.Linear(4, 4)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self, self.stem(x))


OPERATORS: dict[str, tuple[Callable[[Controlled, Tensor], Tensor], int]] = {
    "cond": (
        lambda m, x: torch.cond(x.sum() > -99, lambda x: m.body(1 * x), lambda x: -x, (x,)),
        1,
    ),
    "map": (lambda m, x: map_(lambda x: m.body(1 * x), x), 2),
    "while_loop": (
        lambda m, x: while_loop(
            lambda i, _: i < 3, lambda i, x: (i + 1, m.body(x)), (torch.tensor(0), x)
        )[1],
        3,
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("other", [False, True], ids=["it is recorded", "another one is"])
def test_a_model_with_such_an_operator_trains_as_it_does_unrecorded(name: str, other: bool) -> None:
    model = Controlled(OPERATORS[name][0])
    expected = model(X)
    gradients = torch.autograd.grad(expected.sum(), [*model.parameters()])
    recorded = nn.Sequential(nn.ReLU()) if other else model
    with record(recorded, "0" if other else "stem") as acts:
        recorded(X)
        output = model(X)
    assert torch.equal(output, expected)
    assert all(
        map(torch.equal, torch.autograd.grad(output.sum(), [*model.parameters()]), gradients)
    )
    assert len(acts["0" if other else "stem"]) == (1 if other else 2)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_layer_in_its_body_is_recorded_without_gradients_and_named_with_them(name: str) -> None:
    torch._dynamo.reset()
    operator, calls = OPERATORS[name]
    model = Controlled(operator)
    with torch.no_grad(), record(model) as acts:
        output = model(X)
    assert len(acts["body"]) == calls
    assert torch.allclose(acts["body"][-1], output[-1] if name == "map" else output)
    with (
        pytest.warns(IncompleteLayerWarning, match=r"1 of 2 layers.*\n  'body': .*torch\.cond"),
        record(model) as acts,
    ):
        model.body(X)
        model(X)
    assert (len(acts["stem"]), len(acts["body"])) == (1, 1)
    for compiled in ("before", "inside"):
        if compiled == "inside":
            torch._dynamo.reset()
        with (
            pytest.warns(UnusedLayerWarning, match=r"1 of 2 .*\n  'body': .*torch\.cond") as one,
            record(model),
        ):
            model(X)
        assert len(one) == 1


# --- Other threads ------------------------------------------------------------------------------------


class Compiling:
    """A thread that is compiling, or exporting, all the time."""

    def __enter__(self) -> None:
        self._go_on, is_there = threading.Event(), threading.Event()

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
            is_there.set()
            self._go_on.wait(60)
            return graph.forward

        self._thread = threading.Thread(target=torch.compile(torch.neg, backend=backend), args=(X,))
        self._thread.start()
        assert is_there.wait(60)

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._thread.join()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output)


def test_what_another_thread_compiles_is_none_of_the_recorders_business() -> None:
    torch._dynamo.reset()
    model = Recurrent()
    with Compiling():
        assert torch.compiler.is_compiling(), "in this thread too, says PyTorch"
        with record(model, inputs=True) as acts:
            for _ in range(3):
                model(X)
    with record(model, inputs=True) as expected:
        for _ in range(3):
            model(X)
    assert acts.num_passes == 3
    for name in expected:
        assert acts[name].passes == acts.inputs[name].passes == [0, 1, 2]
    assert torch.equal(acts["lstm"][2][0], expected["lstm"][2][0])
    assert torch.equal(acts.inputs["head"][2]["input"], expected.inputs["head"][2]["input"])


IMPORTED_INSIDE = """
import importlib, sys, threading, torch
from torch import nn
from actrec import record
finders = list(sys.meta_path)
one, two = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
started = threading.Event()
def first():
    with record(one) as acts:
        one(torch.ones(1, 2))
        assert sys.meta_path == finders, "nobody watches imports"
        started.set()
        importlib.import_module("torch._dynamo")
def second():
    started.wait()
    for _ in range(500):
        with record(two) as acts:
            two(torch.ones(1, 2))
threads = [threading.Thread(target=work, daemon=True) for work in (first, second)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(120)
    assert not thread.is_alive()
assert torch._dynamo.eval_frame._stance.stance == "default"
with record(one) as acts:
    one(torch.ones(1, 2))
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
"""


def test_blocks_do_not_wait_for_a_compiler_that_another_thread_imports() -> None:
    subprocess.run([sys.executable, "-c", IMPORTED_INSIDE], check=True, timeout=300)


# --- Compiled for the first time inside the block -----------------------------------------------------

IN_A_FRESH_PROCESS = """
import sys, torch
from torch import nn
from actrec import record
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(4, 2)))
model.train(False)
assert "torch._dynamo" not in sys.modules, "nobody has imported the compiler"
with record(model, inputs=True, grads=not OPTIONS, **OPTIONS) as acts:
    BEFORE
    assert "torch._dynamo" not in sys.modules, "and recording does not"
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        result = compiled(torch.randn(2, 4))
        assert (result is None) == bool(OPTIONS)
assert [len(layer) for layer in acts.values()] == [3 + EAGER] * 3, acts
assert acts.num_passes == 3 + EAGER
for name in acts:
    assert acts[name].passes == acts.inputs[name].passes == list(range(3 + EAGER)), (name, acts[name].passes)
assert (acts["0"].cat() < 0).any()
assert torch.equal(acts.inputs["1"][0]["input"], acts["0"][0])
assert torch._dynamo.eval_frame._stance.stance == "default"
count = 0
def backend(graph, _):
    global count
    count += 1
    return graph.forward
torch._dynamo.reset()
compiled = torch.compile(model, backend=backend, fullgraph=True)
assert compiled(torch.randn(2, 4)).shape == (2, 2) and count == 1, "and afterwards it is compiled as ever"
"""


@pytest.mark.parametrize(
    ("eager", "options"), [(0, {}), (1, {"stop_early": True})], ids=["whole", "stopped"]
)
def test_a_model_that_is_compiled_for_the_first_time_inside_the_block_is_recorded(
    eager: int, options: dict[str, bool]
) -> None:
    code = IN_A_FRESH_PROCESS.replace("EAGER", str(eager)).replace("OPTIONS", repr(options))
    code = code.replace("BEFORE", "model(torch.randn(2, 4))" * eager)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


FULLGRAPH = """
import torch
from torch import nn
from actrec import record
model = nn.Sequential(nn.Linear(4, 4))
compiled = None
with record(model) as acts:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    try:
        compiled(torch.randn(2, 4))
    except Exception as error:
        assert "import torch._dynamo before the block" in str(error), error
    else:
        raise AssertionError("a call is missing without a word")
    compiled(torch.randn(2, 4))
assert len(acts["0"]) == 1, acts
"""


def test_one_that_cannot_be_recorded_then_says_what_to_do() -> None:
    subprocess.run([sys.executable, "-c", FULLGRAPH], check=True, timeout=300)


def test_a_compiler_that_comes_inside_the_block_is_told_when_a_pass_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_there = False
    monkeypatch.setattr(compiled_code, "is_compiler_loaded", lambda: is_there)
    model = nn.Linear(4, 4)
    run = torch.compile(lambda x: model(x), backend="eager")  # noqa: PLW0108
    run(X)
    for calls in (1, 2):
        with record(model) as acts:
            model(X)
            is_there = calls == 2
            model(X)
            run(X)
        assert len(acts[""]) == 1 + calls
        assert _torch.stance().stance == "default"


def test_without_the_private_names_the_public_stance_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_code, "stance_setter", lambda: None)
    model = nn.Linear(4, 4)
    run = torch.compile(model, backend="eager")
    run(X)
    with record(model) as acts:
        run(X)
    assert len(acts[""]) == 1
    assert _torch.stance().stance == "default"
