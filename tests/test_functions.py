"""``"module:function"`` records what a module's forward calls itself, exactly, and nothing is felt of it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # as everybody calls it
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from actrec import (
    ActrecError,
    CaptureError,
    IncompleteLayerWarning,
    OverflowWarning,
    SelectionError,
    TransformError,
    UnusedLayerWarning,
    attention,
    compare,
    layers,
    load,
    record,
)
from actrec._calls import function_mode
from actrec._calls.forwards import Forward, State
from actrec._calls.parameters import named
from actrec._torch import count_function_modes
from actrec.testing import assert_unhooked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def _no_mode_stays_behind() -> Iterator[None]:
    yield
    assert count_function_modes() == 0


class Block(nn.Module):
    """Writes in place what it has just computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return a residual sum."""
        hidden = self.act(self.a(x) * 2)
        out = self.b(hidden) - 0.5
        out += x
        return F.relu(out, inplace=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return two numbers for each row."""
        for block in self.blocks:
            x = block(x)
        return self.head(x).softmax(-1)


def expected(net: Net, x: Tensor = X) -> dict[str, Tensor]:
    """What the functions of both blocks return, computed out of place."""
    found = {}
    for at, block in enumerate(net.blocks):
        found[f"blocks.{at}:mul"] = block.a(x) * 2
        found[f"blocks.{at}:sub"] = block.b(found[f"blocks.{at}:mul"].relu()) - 0.5
        found[f"blocks.{at}:add"] = found[f"blocks.{at}:sub"] + x
        found[f"blocks.{at}:relu"] = x = found[f"blocks.{at}:add"].relu()
    return found


def unwrapped(net: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in net.modules())


# --- What is recorded ---------------------------------------------------------------------------------


def test_each_call_is_an_item_of_its_name_exactly_as_it_was_returned() -> None:
    net = Net()
    with record(net, "blocks.*:*") as acts:
        out = net(X)
    assert torch.equal(out, net(X))
    assert list(acts) == list(expected(net))  # in execution order
    for name, value in expected(net).items():
        assert torch.equal(acts[name][0], value)
    assert unwrapped(net)
    assert {layer.type for layer in acts.values()} == {"function"}


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("blocks.0:mul", ["blocks.0:mul"]),
        ("blocks.*:relu", ["blocks.0:relu", "blocks.1:relu"]),
        ("**:*ad*", ["blocks.0:add", "blocks.1:add"]),
        (":softmax", [":softmax"]),
        ("blocks.0.act:relu", ["blocks.0.act:relu"]),
        (["head", "head:linear"], ["head", "head:linear"]),
    ],
)
def test_a_name_or_a_glob_may_stand_on_both_sides_of_the_colon(
    query: Any, names: list[str]
) -> None:
    net = Net()
    with record(net, query) as acts:
        net(X)
    assert list(acts) == names


def test_two_stars_mean_every_module_and_the_model_itself() -> None:
    net = Net()
    with record(net, ["**", "**:*"]) as acts:
        net(X)
    order = acts.execution_order
    first = [
        "a:linear",
        "a",
        ":mul",
        "act:relu",
        "act",
        "b:linear",
        "b",
        ":sub",
        ":add",
        ":relu",
        "",
    ]
    spelled = [f"blocks.0{'' if not one or one[0] == ':' else '.'}{one}" for one in first]
    assert order[: len(spelled)] == spelled
    assert order[-3:] == ["head:linear", "head", ":softmax"]
    alone = nn.Linear(4, 2)
    with record(alone, "**:*") as acts:
        alone(X)
    assert list(acts) == [":linear"]


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("add", lambda x: x + x),
        ("add", lambda x: x.add(x)),
        ("add", lambda x: torch.add(x, x)),
        ("add", lambda x: 1 + x),
        ("iadd", lambda x: x.clone().add_(x)),
        ("add", lambda x: torch.ops.aten.add.Tensor(x, x)),
        ("relu", lambda x: x.relu()),
        ("relu", torch.relu),
        ("relu", F.relu),
        ("relu", lambda x: torch.relu_(x.clone())),
        ("relu_", lambda x: F.relu(x.clone(), inplace=True)),
        ("relu", torch.ops.aten.relu),
        ("sub", lambda x: 1 - x),
        ("rsub", lambda x: torch.rsub(x, 1)),
        ("div", lambda x: 1 / x),
        ("truediv", lambda x: x / 2),
        ("floor_divide", lambda x: x // 2),
        ("pow", lambda x: x**2),
        ("pow", lambda x: 2**x),
        ("matmul", lambda x: x @ x.T),
        ("getitem", lambda x: x[0]),
        ("T", lambda x: x.T),
        ("bitwise_and", lambda x: (x > 0) & (x < 1)),
        ("softmax", lambda x: F.softmax(x, -1)),
        ("split", lambda x: x.split(2)),
        ("max", lambda x: x.max(0)),
        ("arange", lambda _: torch.arange(3)),
        ("rand", lambda _: torch.rand(3)),
        ("einsum", lambda x: torch.einsum("ij,kj", x, x)),
        ("scaled_dot_product_attention", lambda x: F.scaled_dot_product_attention(x, x, x)),
    ],
)
def test_a_function_has_one_name_however_it_is_spelled(
    function: str, call: Callable[[Tensor], Any]
) -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return call(x)

    torch.manual_seed(1)
    model = Calls()
    with record(model, f":{function}") as acts:
        out = model(X)
    torch.testing.assert_close(acts[f":{function}"][0], out, rtol=0, atol=0)


def test_results_without_a_tensor_are_no_values_and_what_setitem_wrote_to_is() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            if x.size(0) > 1 and x.dim() and x.is_floating_point():
                x[0] = 7
            return x.zero_()

    model = Writes()
    with record(model, ":*") as acts:
        model(X)
    assert list(acts) == [":clone", ":setitem", ":zero"]
    assert acts[":setitem"][0][0].tolist() == [7] * 4
    assert torch.equal(acts[":clone"][0], X)


def test_out_and_views_are_recorded_as_they_were() -> None:
    class Outs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            torch.mul(x, 2, out=out)
            part = out[1:].transpose(0, 1)
            out.zero_()
            return part

    model = Outs()
    with record(model, [":mul", ":transpose"]) as acts:
        model(X)
    assert torch.equal(acts[":mul"][0], X * 2)
    assert torch.equal(acts[":transpose"][0], (X * 2)[1:].T)


def test_arguments_are_recorded_by_name_before_they_are_overwritten() -> None:
    net = Net()
    with record(net, ["blocks.0:add", "blocks.0:relu"], inputs=True) as acts:
        net(X)
    values = expected(net)
    given = acts.inputs["blocks.0:add"][0]
    assert torch.equal(given["input"], values["blocks.0:sub"])
    assert torch.equal(given["other"], X)
    assert [*acts.inputs["blocks.0:relu"][0]] == ["input", "inplace"]
    assert torch.equal(acts.inputs["blocks.0:relu"][0]["input"], values["blocks.0:add"])


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.0, True), "query key value attn_mask dropout_p is_causal"),
        (lambda x: torch.cat([x, x], 1), "tensors dim"),
        (lambda x: x.permute(1, 0), "input dims"),
        (lambda x: x.max(1), "input dim"),
        (lambda x: x[0], "input idx"),
        (lambda x: x.T, "input"),
        (lambda x: x.view(torch.int32), "input dtype"),
        (lambda x: torch.einsum("ij,kj", x, x), "args"),
        (lambda x: torch.relu_(x.clone()), "input"),
        (lambda x: torch.ops.aten.add.Tensor(x, x, alpha=2), "input other alpha"),
        (lambda x: torch.zeros(2, 3), "size"),
        (lambda x: torch.add(x, x, out=x.clone()), "input other out"),
    ],
)  # fmt: skip
def test_arguments_have_the_names_of_pytorch(call: Callable[[Tensor], Any], names: str) -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return call(x)

    model = Calls()
    with record(model, ":*", inputs=True) as acts:
        model(X)
    assert [*acts.inputs[acts.execution_order[-1]][0]] == names.split()


def test_a_function_that_says_nothing_of_its_parameters_has_args() -> None:
    @torch.overrides.wrap_torch_function(lambda *args: args)
    def mine(*args: Tensor) -> Tensor:
        return args[0] + 1

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return mine(x, x)

    model = Calls()
    with record(model, ":*", inputs=True) as acts:
        model(X)
    assert [len(given["args"]) for given in acts.inputs[acts.execution_order[0]]] == [2]


# --- As for modules -----------------------------------------------------------------------------------


def test_gradients_are_those_of_the_values_and_the_models_own_are_unchanged() -> None:
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).tanh() * 2
            y += x
            return y.view(4, 3).sin()

    model = Smooth()
    model(X).sum().backward()
    plain = model.a.weight.grad
    model.zero_grad()
    with record(model, ":*", grads=True) as acts:
        model(X).sum().backward()
    assert torch.equal(model.a.weight.grad, plain)
    y = acts[":add"][0].requires_grad_()
    (known,) = torch.autograd.grad(y.view(4, 3).sin().sum(), y)
    assert torch.equal(acts.grads[":add"][0], known)
    assert torch.equal(acts.grads[":mul"][0], known)
    assert torch.equal(acts.grads[":view"][0].reshape(3, 4), known)
    with record(model, ":mul", detach=False) as acts:
        model(X)
    acts[":mul"][0].sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_runs_again_is_not_recorded_again(use_reentrant: bool) -> None:
    class Saves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant) * 3

    model = Saves()
    x = X.clone().requires_grad_()
    with record(model, ["inner:sub", ":mul"], grads=True) as acts:
        model(x).sum().backward()
    assert [len(acts["inner:sub"]), len(acts[":mul"])] == [1, 1]
    relu = acts["inner:sub"][0] + X > 0
    assert torch.equal(acts.grads["inner:sub"][0], relu * 3.0)


def test_part_of_a_forward_in_reentrant_checkpointing_says_why_it_has_no_gradients() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda t: t.sin() * 2, x, use_reentrant=True) + 1

    model = Part()
    x = X.clone().requires_grad_()
    with (
        pytest.warns(UserWarning, match="':sin', ':mul': its calls ran inside reentrant"),
        record(model, ":*", grads=True) as acts,
    ):
        model(x).sum().backward()
    assert torch.equal(acts[":mul"][0], X.sin() * 2)
    assert torch.equal(acts.grads[":add"][0], torch.ones(3, 4))
    assert list(acts.grads[":sin"]) == [None]


def test_transforms_are_applied_and_each_query_may_have_its_own() -> None:
    net = Net()
    queries = {"blocks.*:*": lambda t: t.mean(0) + 1, "blocks.0:add": torch.sum}
    with record(net, queries) as acts:
        net(X)
    values = expected(net)
    assert torch.equal(acts["blocks.0:add"][0], values["blocks.0:add"].sum())
    assert torch.equal(acts["blocks.1:add"][0], values["blocks.1:add"].mean(0) + 1)
    assert next(iter(acts)) == "blocks.0:add"  # it is spelled out: it is there from the start
    with pytest.raises(TransformError, match=r"layer 'blocks\.0:mul'"):  # noqa: SIM117  # the message
        with record(net, "blocks.0:mul", transform=lambda t: t.nothing):
            net(X)


def test_a_forward_ends_early_behind_the_modules_whose_functions_are_chosen() -> None:
    net = Net()
    with record(net, ["blocks.0:*"], stop_early=True) as acts:
        assert net(X) is None
    assert len(acts["blocks.0:relu"]) == 1
    with record(net, [":softmax", "blocks.0"], stop_early=True) as acts:
        assert net(X) is not None
    assert unwrapped(net)


def test_functions_are_written_to_disk_and_gone_on_with(tmp_path: Path) -> None:
    net = Net()
    with record(net, ["blocks.0", "blocks.*:*"], inputs=True) as memory:
        net(X)
        net(X)
    for _ in range(2):
        with record(
            net, ["blocks.0", "blocks.*:*"], inputs=True, into=tmp_path / "a", resume=True
        ) as acts:
            net(X)
    stored = load(tmp_path / "a")
    assert compare(memory, stored).first_difference is None
    assert acts["blocks.1:add"].passes == stored["blocks.1:add_"].passes == [0, 1]
    assert stored.execution_order == memory.execution_order
    assert torch.equal(
        stored.inputs["blocks.1:mul"][1]["input"], memory.inputs["blocks.1:mul"][1]["input"]
    )
    memory.save(tmp_path / "b")
    assert compare(load(tmp_path / "b"), stored).first_difference is None


def test_replicas_and_threads_record_their_own_calls() -> None:
    net = Net()
    outs: dict[int, Tensor] = {}

    def call(at: int) -> None:
        outs[at] = net(X + at)

    with record(net, "blocks.*:add") as acts:
        threads = [threading.Thread(target=call, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for at, number in enumerate(acts["blocks.0:add"].passes):
        call_of = acts["blocks.1:add"].passes.index(number)
        found = [
            t
            for t in range(4)
            if torch.equal(expected(net, X + t)["blocks.0:add"], acts["blocks.0:add"][at])
        ]
        assert torch.equal(
            acts["blocks.1:add"][call_of], expected(net, X + found[0])["blocks.1:add"]
        )


def replica_of_zeros(model: nn.Module) -> nn.Module:
    """What DataParallel makes of a model, with weights of its own."""
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        replica._modules[name] = replica_of_zeros(child)
    for key, parameter in model.named_parameters(recurse=False):
        setattr(replica, key, parameter.detach() * 0)
    return replica


@pytest.mark.parametrize("stop_early", [False, True])
def test_a_replica_computes_with_its_own_weights(stop_early: bool) -> None:
    model = Block()
    with record(model, ":*", stop_early=stop_early) as acts:
        replica = replica_of_zeros(model)
        with acts.pause():
            assert torch.equal(replica(X), F.relu(X - 0.5))
        out = replica(X)
        model(X)
    assert len(acts[":mul"]) == 2
    assert torch.equal(acts[":mul"][0], torch.zeros(3, 4))
    assert torch.equal(acts[":relu"][0], F.relu(X - 0.5))
    assert out is None or torch.equal(out, F.relu(X - 0.5))
    assert not torch.equal(acts[":mul"][1], torch.zeros(3, 4))


def test_a_replica_whose_modules_call_forwards_themselves_is_no_other_module() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.doubles = Doubles()

        def forward(self, x: Tensor) -> Tensor:
            return self.doubles.forward(self.inner(x)) + 1

    model = nn.Sequential(Calls())
    with record(model, "**:*") as acts:
        replica = replica_of_zeros(model)
        assert torch.equal(replica(X), torch.ones(3, 4))
    assert torch.equal(acts["0.doubles:mul"][0], torch.zeros(3, 4))


class Doubles(nn.Module):
    factor = 2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_functional_call_computes_with_the_weights_that_it_is_given() -> None:
    net = Net()
    zeros = {name: torch.zeros_like(one) for name, one in net.named_parameters()}
    with record(net, "blocks.*:*") as acts:
        out = torch.func.functional_call(net, zeros, X)
        net(X)
    assert torch.equal(acts["blocks.0:add"][0], X - 0.5)
    assert torch.equal(out, torch.full((3, 2), 0.5))
    for name, value in expected(net).items():
        assert torch.equal(acts[name][1], value)


def test_functions_under_autocast_and_a_default_device_are_what_they_are_there() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.T + torch.ones(3)

    model = Products()
    with torch.autocast("cpu", torch.bfloat16), record(model, ":*") as acts:
        out = model(X)
    assert torch.equal(acts[":matmul"][0], (X.bfloat16() @ X.T.bfloat16()))
    assert torch.equal(acts[":add"][0], out)
    with torch.device("meta"), record(model, ":*") as acts:
        model(X.to("meta"))
    assert acts[":ones"][0].is_meta


def test_each_step_of_generate_has_its_functions_and_the_tokens_are_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, pad_token_id=0, **sizes, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    ids = torch.tensor([[5, 6, 7]])
    plain = model.generate(ids, **options)
    name = "model.layers.*.self_attn:scaled_dot_product_attention"
    with record(model, name, inputs=True) as acts:
        assert torch.equal(model.generate(ids, **options), plain)
    for layer, calls in acts.items():
        assert len(calls) == 3
        given = acts.inputs[layer]
        assert [one["query"].shape[2] for one in given] == [3, 1, 1]
        assert [one["key"].shape[2] for one in given] == [3, 4, 5]
        for received, output in zip(given, calls, strict=True):
            attention(**received, output=output)


def test_what_hooks_of_modules_inside_call_is_nothing_that_the_forward_calls() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.spectral_norm(nn.Linear(4, 4))
            self.lazy = nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lazy(self.a(x)).relu()

    torch.manual_seed(0)
    model = Normed().eval()
    with record(model, "**:*") as acts:
        model(X)
    assert list(acts) == ["a:linear", "lazy:linear", ":relu"]


def test_a_module_that_a_forward_makes_for_itself_is_a_helper() -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.ReLU()(x) + 1

    model = Makes()
    with record(model, ":*") as acts:
        model(X)
    assert list(acts) == [":relu", ":add"]


def test_two_stars_go_for_the_model_where_nothing_inside_is_called() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.eye(4)])
            with warnings.catch_warnings(action="ignore"):  # it is deprecated
                self.script = torch.jit.script(nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            return self.script(x) @ self.weights[0]

    model = Lists()
    with record(model, "**:*") as acts:
        model(X)
    assert list(acts) == [":matmul"]


def test_a_function_that_compiles_what_it_is_given_does_so_as_ever() -> None:
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t - 2, (x,)) + 1

    model = Chooses()
    with record(model, ":*") as acts:
        out = model(X + 1)
    assert torch.equal(out, (X + 1) * 2 + 1)
    assert torch.equal(acts[":cond"][0][0], (X + 1) * 2)
    assert torch.equal(acts[":add"][0], out)


# --- Nothing is felt of it ----------------------------------------------------------------------------


class Stop(BaseException):
    """Interrupts."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_however_a_forward_ends_no_mode_stays(error: type[BaseException]) -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.blocks[0](x + 1)
            raise error

    net = Fails()
    with record(net, "**:*") as acts:
        with pytest.raises(error):
            net(X)
        assert count_function_modes() == 0
    assert len(acts[":add"]) == 1
    assert unwrapped(net)


def test_interrupted_at_any_line_no_mode_and_no_forward_stays() -> None:
    net = Net()

    def interrupted(at: int) -> bool:
        lines = 0

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal lines
            files = ("_calls/function_mode.py", "_calls/functions.py", "_calls/forwards.py")
            if not frame.f_code.co_filename.endswith(files):
                return trace if event == "call" and "actrec" in frame.f_code.co_filename else None
            if event == "line":
                lines += 1
                if lines == at:
                    raise Stop
            return trace

        try:
            with record(net, ["blocks.0:*"], transform=torch.sum):
                sys.settrace(trace)
                try:
                    net(X)
                finally:
                    sys.settrace(None)
        except Stop:
            return True
        finally:
            assert count_function_modes() == 0, at
            assert unwrapped(net), at
        return False

    def at_every_line() -> int:
        at = 1
        while interrupted(at):
            at += 1
        return at

    # In a thread of its own: coverage traces this one.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(at_every_line).result() > 100


def test_modes_of_the_model_and_around_it_keep_their_places() -> None:
    seen: list[str] = []

    class Mine(TorchFunctionMode):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(self.name)
            return func(*args, **(kwargs or {}))

    class Modal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor) -> Tensor:
            with Mine("inside"):
                x = self.inner(x + 1) * 2
            return x - 1

    model = Modal()
    with Mine("around"):
        out = model(X)
        before, seen[:] = seen[:], []
        with record(model, ["inner", ":*"]) as acts:
            same = model(X)
    assert torch.equal(out, same)
    assert list(acts) == ["inner", ":add", ":mul", ":sub"]
    assert [name for name in seen if name == "inside"].count("inside") >= before.count("inside")
    with record(model, ["inner:*", ":*"]) as acts:
        model(X)
    assert list(acts) == [
        ":add",
        "inner:mul",
        "inner:sub",
        "inner:add",
        "inner:relu",
        ":mul",
        ":sub",
    ]


def test_a_mode_that_the_model_leaves_on_stays_on() -> None:
    class Mine(TorchFunctionMode):
        pass

    mode = Mine()

    class Leaves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            mode.__enter__()
            return x

    model = Leaves()
    with record(model, ":add") as acts:
        model(X)
        assert count_function_modes() == 1
        mode.__exit__(None, None, None)
    assert len(acts[":add"]) == 1


def test_blocks_nest_and_each_records_the_functions_that_it_was_asked_for() -> None:
    net = Net()
    with record(net, "blocks.*:*") as outer:
        with record(net, ["blocks.1:add", "blocks.0.a"]) as inner:
            net(X)
        net(X)
    assert list(outer) == list(expected(net))
    assert {name: len(layer) for name, layer in outer.items()} == dict.fromkeys(expected(net), 2)
    assert [len(layer) for layer in inner.values()] == [1, 1]
    assert unwrapped(net)


def saved(net: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "made", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved]
)
def test_copies_and_pickles_of_a_model_that_is_recorded_are_plain_models(made: Any) -> None:
    net = Net()
    net.blocks[0].forward = twice = Twice(net.blocks[0])  # which the user has set
    with record(net, "**:*"), record(net, ["blocks.*:*", "**:add"], stop_early=True):
        copied = made(net)
        net(X)
    for module in (*copied.modules(), *net.modules()):
        assert "__getstate__" not in vars(module)
    for module in copied.modules():
        assert ("forward" in vars(module)) == (module is copied.blocks[0])
    assert net.blocks[0].forward is twice
    assert unwrapped(copied.blocks[1])
    assert torch.equal(copied(X), net(X))


class Twice:
    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor) -> Any:
        return type(self.block).forward(self.block, x) * 2


class CopiesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self) -> Any:
        return type(self), (), vars(self)


@pytest.mark.parametrize("made", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("is_set", [False, True])
def test_modules_that_copy_their_attributes_themselves_are_plain_in_a_copy(
    made: Any, is_set: bool
) -> None:
    net = nn.Sequential(CopiesItself())
    if is_set:
        net[0].forward = Twice(net[0])
    x = torch.randn(2, 4)
    with record(net, "0:relu"):
        copied = made(net)
        assert torch.equal(copied(x), net(x))
    assert not isinstance(vars(copied[0]).get("forward"), Forward)
    assert not isinstance(vars(copied[0]).get("__getstate__"), State)
    assert torch.equal(copied(x), net(x))


def test_a_state_that_is_of_another_kind_stays_as_it_is() -> None:
    net = nn.Sequential(Reduced())
    with record(net, "0:relu"):
        net(X)
        assert pickle.loads(pickle.dumps(net))[0].state == "a state"


def test_a_method_that_a_module_itself_has_for_its_state_is_left_to_it() -> None:
    net = nn.Sequential(CopiesItself())
    own = net[0].__getstate__ = lambda: "a state"
    with record(net, "0:relu"):
        net(X)
        assert net[0].__getstate__ is own
    assert vars(net[0])["__getstate__"] is own


class Reduced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()

    def __getstate__(self) -> Any:
        return ("a state",)

    def __setstate__(self, state: Any) -> None:
        super().__init__()
        (self.state,) = state


def test_a_recording_that_is_dropped_is_gone_at_once() -> None:
    net = Net()
    block = record(net, "blocks.*:*")
    acts = block.__enter__()
    net(X)
    value = weakref.ref(acts["blocks.0:add"][0])
    gc.disable()
    try:
        del block, acts
        assert value() is None
    finally:
        gc.enable()
    assert unwrapped(net)


def test_attention_that_is_fused_in_evaluation_stays_fused() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    model = Attends().eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model(x)
        with record(model, "**:*") as acts:
            assert torch.equal(model(x), plain)
        with (
            pytest.warns(UnusedLayerWarning, match="'attention' runs fused in evaluation"),
            record(model, "attention:*"),
        ):
            model(x)
    assert list(acts) == [":add"]
    model.train()
    with record(model, "attention:*") as acts:
        model(x)
    assert "attention:multi_head_attention_forward" in acts


def test_nothing_is_wrapped_where_no_function_was_asked_for() -> None:
    net = Net()
    with record(net):
        assert unwrapped(net)
        net(X)
    with record(net, "blocks.0:add"):
        net(X)
        wrapped = [name for name, module in net.named_modules() if "forward" in vars(module)]
        assert wrapped == ["blocks.0", "blocks.0.a", "blocks.0.act", "blocks.0.b"]


# --- Never silent -------------------------------------------------------------------------------------


def test_a_name_that_nothing_has_is_told_at_the_end_with_what_was_called() -> None:
    net = Net()
    with (
        pytest.warns(UnusedLayerWarning) as warned,
        record(net, ["blocks.0:rellu", "head:*", "head"]),
    ):
        net(X)
    (message,) = (str(one.message) for one in warned)
    assert "nothing was recorded of 1 of 3 layers" in message
    assert (
        "'blocks.0:rellu': 'blocks.0' did not call it. Called there: 'add', 'mul', 'relu', 'sub'. Did you mean 'relu'?"
        in message
    )
    assert "'blocks.0.**:rellu'" in message
    assert "multi_head_attention_forward" in message


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (":size", "'size' was called there, and returned no tensor"),
        ("never:add", "'never' was never called"),
        ("*:nothing", "the 3 modules that it names did not call it. Called there: 'mul'"),
        ("empty:*", "Called there: nothing."),
        ("steps:mul", "the forward of 'steps' is a generator or a coroutine"),
    ],
)
def test_the_reason_is_told(query: str, said: str) -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Iterator[Tensor]:
            yield x * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.never, self.steps = Empty(), Doubles(), Steps()

        def forward(self, x: Tensor) -> Tensor:
            next(self.steps(x))
            return self.empty(x[: x.size(0)])

    model = Model()
    if query.startswith("*"):
        model.empty = Doubles()
    with pytest.warns(UnusedLayerWarning) as warned, record(model, query):
        model(X)
    assert said in str(warned[0].message)


def test_calls_in_a_pause_or_in_backward_are_told() -> None:
    net = Net()
    with (
        pytest.warns(UnusedLayerWarning, match="was called inside acts.pause"),
        record(net, ["blocks.0:add", "head"]) as acts,
    ):
        with acts.pause():
            net(X)
        net.head(X)

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            net(X)
            return grad

    with (
        pytest.warns(UnusedLayerWarning, match="inside backward"),
        record(net, ["blocks.0:add"]) as acts,
    ):
        net.head(X)
        InBackward.apply(X.clone().requires_grad_()).sum().backward()
    with (
        pytest.warns(IncompleteLayerWarning, match="1 call of it ran inside backward"),
        record(net, ["blocks.0:add"]) as acts,
    ):
        net(X)
        InBackward.apply(X.clone().requires_grad_()).sum().backward()
    assert len(acts["blocks.0:add"]) == 1


def test_a_model_that_is_read_is_not_recorded() -> None:
    net = Net().eval()
    with pytest.warns(UnusedLayerWarning, match="reads the model"), record(net, "blocks.0:add"):
        torch.fx.experimental.proxy_tensor.make_fx(net)(X)


def test_reading_a_model_with_fx_is_no_pass() -> None:
    net = nn.Sequential(Adds())
    with record(net, "0:*") as acts:
        net(X)
        torch.fx.symbolic_trace(net)
        net(X)
    assert {name: layer.passes for name, layer in acts.items()} == {
        "0:ones": [0, 1],
        "0:add": [0, 1],
    }
    assert acts.num_passes == 2


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(1)


def test_functions_inside_torch_func_are_told_where_a_glob_asks_for_all() -> None:
    class Differentiates(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda t: (t.sin() * 2).sum())(x) * 2 + 1

    model = Differentiates()
    with (
        pytest.warns(UnusedLayerWarning, match="':sin', ':sum'.*: it was called inside torch.func"),
        pytest.warns(IncompleteLayerWarning, match="':mul': 1 call of it ran inside torch.func"),
        record(model, ":*", inputs=True) as acts,
    ):
        out = model(X)
    assert torch.equal(acts[":add"][0], out)
    assert len(acts[":mul"]) == 1
    with (
        pytest.warns(UnusedLayerWarning, match="'' was called inside torch.func"),
        record(model, ":s*"),
    ):
        model(X)
    with pytest.raises(CaptureError, match=r"inside torch\.func"), record(model, ":sin"):
        model(X)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("blocks.7:add", "Did you mean 'blocks"),
        ("blocks:add", "a container that is never called"),
        ("blocks.0:", "names no function after the colon"),
        ([], "no layers were given"),
    ],
)
def test_a_query_that_cannot_be_meant_is_refused(query: Any, said: str) -> None:
    net = Net()
    with pytest.raises(SelectionError, match=said):
        record(net, query)


@pytest.mark.parametrize("what", ["inputs", "grads"])
def test_inputs_and_gradients_of_functions_can_be_asked_for_alone(what: str) -> None:
    net = Net()
    with record(net, "head", **{what: {"blocks.*:sub": None, "blocks.0:*": None}}) as acts:
        net(X).sum().backward()
    assert list(acts) == ["head"]
    assert set(getattr(acts, what)) == {
        "blocks.0:mul",
        "blocks.0:sub",
        "blocks.0:add",
        "blocks.0:relu",
        "blocks.1:sub",
    }
    with record(net, ["blocks.0", "blocks.0:sub"], transform=torch.sum, **{what: True}) as acts:
        net(X).sum().backward()
    assert list(acts) == list(getattr(acts, what)) == ["blocks.0", "blocks.0:sub"]


def test_the_table_of_a_models_layers_says_how_to_find_functions() -> None:
    with pytest.raises(SelectionError, match="are known only when the model is called"):
        layers(Net(), "blocks.*:add")


def test_a_unit_that_fails_takes_its_functions_along() -> None:
    net = Net()
    with record(net, "blocks.*:add", inputs=True) as acts:
        with pytest.raises(ValueError, match="mine"), acts.unit("a"):
            net(X)
            message = "mine"
            raise ValueError(message)
        with acts.unit("b"):
            net(X)
    assert len(acts["blocks.0:add"]) == len(acts.inputs["blocks.0:add"]) == 1


def test_inside_vmap_a_function_cannot_be_recorded() -> None:
    net = Net()
    with pytest.raises(CaptureError, match=r"layer 'blocks\.0:add'"), record(net, "blocks.0:add"):
        torch.func.vmap(net)(X)
    with (
        pytest.raises(CaptureError, match=r"layer 'blocks\.0:add'"),
        record(net, "blocks.0:add", inputs=True),
    ):
        torch.func.vmap(net)(X)


def test_a_value_of_ones_own_cannot_have_the_name_of_a_function() -> None:
    net = Net()
    with record(net, "blocks.*:*") as acts:
        net(X)
        with pytest.raises(ActrecError, match="that is the name of a recorded layer"):
            acts.add("blocks.0:add", 1)
        assert acts["blocks.0:__iadd__"] is acts["blocks.0:add"]
    late = Net()
    with record(late, "blocks.*:*") as acts:
        late.blocks[1](X)
        acts.add("blocks.0:add", 1)
        with pytest.raises(ActrecError, match="that is the name of a recorded function"):
            late(X)


def test_functions_of_what_a_wrapper_wraps_have_its_name() -> None:
    net = Net()
    wrapped = nn.DataParallel(net)
    with record(wrapped, [":softmax", "module.blocks.0:add", "blocks.1:add"]) as acts:
        net_out = wrapped(X)
    assert list(acts) == [":softmax", "blocks.0:add", "blocks.1:add"]
    assert torch.equal(acts["module:softmax"][0], net_out)
    assert torch.equal(acts["blocks.0:add"][0], expected(net)["blocks.0:add"])


def test_a_compiled_model_runs_eagerly_and_its_functions_are_recorded() -> None:
    net = Net()
    compiled = torch.compile(net, backend="eager")
    with record(compiled, ["**:*"]) as acts:
        compiled(X)
    assert torch.equal(acts["blocks.1:relu"][0], expected(net)["blocks.1:relu"])


def test_what_the_compiler_reads_is_the_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    with pytest.warns(UnusedLayerWarning), record(net, "blocks.*:add"):
        monkeypatch.setattr(function_mode, "is_dynamo_compiling", lambda: True)
        net(X)
        assert count_function_modes() == 0


def test_a_recorder_that_is_dropped_inside_a_forward_records_no_more() -> None:
    held: list[Any] = []

    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            held.clear()
            return x * 2

    model = Drops()
    block = record(model, ":*")
    held += [block.__enter__(), block]
    del block
    assert torch.equal(model(X), (X + 1) * 2)
    assert unwrapped(model)


def test_values_are_cast_and_what_overflows_is_said() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e6

    model = Large()
    with (
        pytest.warns(OverflowWarning, match="':mul'"),
        record(model, ":mul", dtype=torch.float16) as acts,
    ):
        model(X)
    assert acts[":mul"][0].dtype == torch.float16


def test_arguments_of_a_function_without_a_signature_are_args() -> None:
    assert named(iter, (X,), {}) == {"args": (X,)}


def test_an_input_transform_that_fails_on_a_functions_argument_stops_the_forward_and_is_named() -> (
    None
):
    def refuse(_value: Tensor) -> Tensor:
        raise ValueError("no")

    net = Net()
    with (
        pytest.raises(TransformError, match="relu"),
        record(net, (), inputs={"**:relu": refuse}),
    ):
        net(X)


class Pausing(nn.Module):
    """Pauses the recorder around one of its functions."""

    acts: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        with self.acts.pause():
            x = x.relu()
        return x.relu()


def test_a_function_in_a_pause_is_not_recorded_and_neither_are_its_arguments() -> None:
    net = Pausing()
    with record(net, ":relu", inputs=True) as net.acts:
        net(X)
    assert len(net.acts[":relu"]) == len(net.acts.inputs[":relu"]) == 2


def test_an_overload_packet_of_torch_ops_names_its_arguments() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.relu(x)

    net = Net()
    with record(net, ":relu", inputs=True) as acts:
        net(X)
    assert [*acts.inputs[":relu"][0]] == ["input"]


def test_a_wrapped_forward_is_told_while_the_block_is_open() -> None:
    net = Net()
    with (
        record(net, "**:relu"),
        pytest.raises(AssertionError, match="hooks of actrec"),
    ):
        net(X)
        assert_unhooked(net)
    assert_unhooked(net)


@pytest.mark.parametrize("queries", [["blocks.*:*"], ["blocks.*:*", "blocks.0", "blocks.0.a"]])
def test_a_module_that_is_called_by_itself_is_one_pass(queries: list[str]) -> None:
    net = Net()
    with record(net, queries) as acts:
        out = net.blocks[0](X)
        net.blocks[1](out)
        with pytest.raises(RuntimeError):
            net.blocks[0](X[:, :2])
        net(X)
    assert acts.num_passes == 4
    assert acts["blocks.0:mul"].passes == acts["blocks.0:relu"].passes == [0, 3]
    assert acts["blocks.1:mul"].passes == acts["blocks.1:relu"].passes == [1, 3]
    assert acts.failed_passes == [2]
