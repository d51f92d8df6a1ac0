"""Recorded gradients are those of the values as the layers returned them, and nobody feels the recording.

References are computed out of place, without hooks, from functions.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from actrec import (
    CaptureError,
    MissingGradientWarning,
    OptionError,
    TransformError,
    UnusedLayerWarning,
    record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = torch.linspace(-1, 1, 12).reshape(3, 4)


# --- Generated nets, in place and out of place ---------------------------------------------------------


class Chunk(nn.Module):
    """Returns a tuple of views."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, -1)


class Slice(nn.Module):
    """Returns a view of a part."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2]


class Both(nn.Module):
    """Returns nested values, one of them not of the graph."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"twice": x * 2, "label": torch.arange(3), "rest": [x + 1, None]}


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.LayerNorm(4),
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "identity": nn.Identity,
    "chunk": Chunk,
    "slice": Slice,
    "both": Both,
}

#: Layers whose output is not needed for their backward, so that the next step may overwrite it.
OVERWRITABLE = {"linear", "norm"}

STEPS = [*LAYERS, "relu_", "mul_", "add_", "residual", "setitem"]


class Recorded(NamedTuple):
    """What a layer returned, in the reference."""

    layer: str
    value: Any


class Generated(nn.Module):
    """Runs steps, of which some write in place if ``in_place``; layers are used again and again."""

    def __init__(self, steps: list[str], *, in_place: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: make() for name, make in LAYERS.items()})
        self.steps = steps
        self.in_place = in_place
        self.seen: list[Recorded] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = []
        start, overwritable = self._called("linear", x), True
        x = start * 1
        for step in self.steps:
            if step in LAYERS:
                x, overwritable = self._layer(step, x, overwritable)
            else:
                x, overwritable = self._written(step, x, start, overwritable)
        return x

    def _called(self, name: str, x: Tensor) -> Any:
        value = F.relu(x) if name == "relu" and not self.in_place else self.layers[name](x)
        self.seen.append(Recorded(name, value))
        return value

    def _layer(self, name: str, x: Tensor, overwritable: bool) -> tuple[Tensor, bool]:
        if name == "relu" and not overwritable:
            x = x * 1
        value = self._called(name, x)
        match name:
            case "chunk":
                return value[0].repeat(1, 2) + value[1].repeat(1, 2), True
            case "slice":
                return value.repeat(1, 2), True
            case "both":
                return value["twice"] * value["rest"][0] + value["label"][:, None], True
            case "identity":
                return value, overwritable
        return value, name in OVERWRITABLE

    def _written(
        self, step: str, x: Tensor, start: Tensor, overwritable: bool
    ) -> tuple[Tensor, bool]:
        if not (self.in_place and overwritable):
            return self._computed(step, x, start), step != "relu_"
        match step:
            case "relu_":
                x.relu_()
            case "mul_":
                x.mul_(3)
            case "add_":
                x.add_(1)
            case "residual":
                x += start
            case "setitem":
                x[:, :2] *= 2
        return x, step != "relu_"

    def _computed(self, step: str, x: Tensor, start: Tensor) -> Tensor:
        match step:
            case "relu_":
                return F.relu(x)
            case "mul_":
                return x * 3
            case "add_":
                return x + 1
            case "residual":
                return x + start
        return torch.cat([x[:, :2] * 2, x[:, 2:]], 1)


def leaves(value: Any) -> list[Tensor | None]:
    """The places of tensors in the values of the layers above."""
    match value:
        case dict():
            return [value["twice"], value["label"], value["rest"][0]]
        case tuple():
            return list(value)
    return [value]


def reference(
    steps: list[str], seed: int
) -> tuple[dict[str, list[list[Tensor | None]]], list[Any]]:
    """The gradient of every value, by layer and call, and those of the parameters."""
    torch.manual_seed(seed)
    model = Generated(steps, in_place=False)
    loss = model(X).square().sum()
    for _, value in model.seen:
        for tensor in leaves(value):
            if tensor is not None and tensor.requires_grad:
                tensor.retain_grad()
    loss.backward()
    found: dict[str, list[list[Tensor | None]]] = {}
    for name, value in model.seen:
        found.setdefault(f"layers.{name}", []).append([t.grad for t in leaves(value)])
    return found, [p.grad for p in model.parameters()]


def same(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


programs = st.lists(st.sampled_from(STEPS), max_size=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs, st.sampled_from(["inside", "after"]), st.booleans())
def test_gradients_of_generated_nets_equal_those_of_an_out_of_place_reference(
    steps: list[str], when: str, keep_graph: bool
) -> None:
    expected, of_parameters = reference(steps, seed=1)
    torch.manual_seed(1)
    model = Generated(steps, in_place=True)
    with record(model, list(expected), grads=True, detach=not keep_graph) as acts:
        loss = model(X).square().sum()
        if when == "inside":
            loss.backward()
    if when == "after":
        loss.backward()
    for name, calls in expected.items():
        for got, gradients in zip(acts.grads[name], calls, strict=True):
            assert all(map(same, leaves(got), gradients)), name
    assert all(
        (a.grad is None) == (b is None)
        and (b is None or torch.allclose(a.grad, b, rtol=1e-5, atol=1e-5))
        for a, b in zip(model.parameters(), of_parameters, strict=True)
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(programs)
def test_the_gradients_of_the_parameters_are_bit_identical_to_an_unrecorded_run(
    steps: list[str],
) -> None:
    chosen = {f"layers.{name}" for name in ["linear", *steps] if name in LAYERS}
    runs = []
    for recorded in (False, True):
        torch.manual_seed(2)
        model = Generated(steps, in_place=True)
        with record(model, chosen, grads=True) if recorded else nullcontext():
            model(X).square().sum().backward()
        runs.append([p.grad for p in model.parameters()])
    for plain, got in zip(*runs, strict=True):
        assert got is plain is None or torch.equal(got, plain)


# --- When gradients arrive -------------------------------------------------------------------------------


class Net(nn.Module):
    """Linear, in-place ReLU, and both once more; its body runs through ``call``."""

    def __init__(self, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.b = nn.Linear(4, 4)
        self.call = call

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.call is None else self.call(self.body, x)


def expected(x: Tensor = X, scale: float = 1.0) -> dict[str, list[Tensor]]:
    """What the gradients in a :class:`Net` are for the loss ``scale * out.square().sum()``."""
    net = Net()
    a = net.a(x)
    hidden = F.relu(a)
    b = net.b(hidden)
    out = F.relu(b)
    grads = torch.autograd.grad(scale * out.square().sum(), [a, hidden, b, out])
    return {"a": [grads[0]], "relu": [grads[1], grads[3]], "b": [grads[2]]}


def loss_of(out: Tensor) -> Tensor:
    return out.square().sum()


def equal(acts: Any, wanted: dict[str, list[Tensor]]) -> bool:
    return all(
        len(acts.grads[name]) == len(values) and all(map(torch.equal, acts.grads[name], values))
        for name, values in wanted.items()
    )


def test_there_is_none_until_backward_reaches_the_call() -> None:
    net = Net()
    with record(net, grads=True) as acts:
        first, second = net(X), net(2 * X)
    assert list(acts.grads["relu"]) == [None] * 4
    assert acts.grads["relu"].passes == acts["relu"].passes == [0, 0, 1, 1]
    loss_of(second).backward()
    assert [g is None for g in acts.grads["relu"]] == [True, True, False, False]
    assert torch.equal(acts.grads["a"][1], expected(2 * X)["a"][0])
    loss_of(first).backward()
    assert torch.equal(acts.grads["a"][0], expected()["a"][0])


def test_a_second_backward_adds_as_it_does_for_a_parameter() -> None:
    net = Net()
    with record(net, grads=True) as acts:
        loss = loss_of(net(X))
        loss.backward(retain_graph=True)
        assert equal(acts, expected())
        loss.backward(retain_graph=True)
    torch.autograd.grad(loss, net.a.weight)
    assert equal(acts, {name: [3 * g for g in grads] for name, grads in expected().items()})


def test_a_part_that_no_gradient_reaches_is_none_in_its_place() -> None:
    model = nn.LSTM(4, 5, batch_first=True)
    with record(model, "", grads=True) as acts:
        _, (hidden, _) = model(X[None])
        assert acts.grads[""][0] == (None, (None, None))
        hidden.sum().backward()
    output, (of_hidden, of_cell) = acts.grads[""][0]
    assert output is None
    assert of_cell is None
    assert torch.equal(of_hidden, torch.ones_like(hidden))


class Unbound(nn.Module):
    """Returns several outputs of one operation."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x * 1).unbind()


@pytest.mark.parametrize("make", [Unbound, lambda: nn.LSTM(4, 5)], ids=["unbind", "LSTM"])
def test_of_several_outputs_of_one_operation_those_without_a_gradient_are_none(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    with record(model, "", grads=True) as acts:
        first, *_ = model(X[:, None].clone().requires_grad_())
        first.sum().backward()
    got, *rest = acts.grads[""][0]
    assert torch.equal(got, torch.ones_like(first))
    assert rest in ([None, None], [(None, None)])


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone. Not gloo's: its threads can keep a process from ending it for ever."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def distributed(net: nn.Module) -> nn.Module:
    """The network under DDP, in such a group: there is nothing to add up."""
    wrapped = nn.parallel.DistributedDataParallel(net)
    wrapped.register_comm_hook(None, noop_hook)
    return wrapped


def test_under_distributed_data_parallel_gradients_are_the_same_and_so_is_training() -> None:
    with process_group():
        net = distributed(Net())
        plain = Net()
        with record(net, ["a", "relu", "b"], grads=True) as acts:
            for _ in range(2):
                loss_of(net(X)).backward()
                loss_of(plain(X)).backward()
    assert torch.equal(acts.grads["a"][1], expected()["a"][0])
    for got, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, wanted.grad)


def test_under_autocast_with_a_scaled_loss_gradients_are_scaled_and_keep_their_dtype() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with record(net, "0", grads=True) as acts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(X)
        (1024 * out.float().sum()).backward()
    (value,), (grad,) = acts["0"], acts.grads["0"]
    assert grad.dtype == value.dtype == torch.bfloat16
    assert torch.equal(grad, 1024 * (value > 0).bfloat16())


@pytest.mark.eager_only("the compiler refuses it")
def test_second_order_gradients_are_as_without_recording() -> None:
    def step(net: nn.Module) -> None:
        x = X.clone().requires_grad_()
        loss = net(x).square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()

    plain, net = Smooth(), Smooth()
    step(plain)
    with record(net, "a", grads=True) as acts:
        step(net)
    for got, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, wanted.grad)
    assert not acts.grads["a"][0].requires_grad
    x = X.clone().requires_grad_()
    a = plain.a(x)
    loss = plain.b(torch.tanh(a)).square().sum()
    (of_a, of_x) = torch.autograd.grad(loss, [a, x], create_graph=True)
    (total,) = torch.autograd.grad(loss + of_x.square().sum(), [a])
    assert torch.allclose(acts.grads["a"][0], of_a + total)


class Smooth(nn.Module):
    """Has second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_without_detach_a_gradient_can_be_differentiated() -> None:
    net = Smooth()
    with record(net, "a", grads=True, detach=False) as acts:
        out = net(X)
        torch.autograd.grad(out.sum(), net.a.weight, create_graph=True)
    assert acts.grads["a"][0].requires_grad
    acts.grads["a"][0].square().sum().backward()
    assert net.a.weight.grad is not None


def test_a_compiled_model_gives_gradients_too() -> None:
    net = torch.compile(Net(), backend="eager")
    loss_of(net(X)).backward()
    with record(net, ["a", "relu", "b"], grads=True) as acts:
        loss_of(net(X)).backward()
    assert equal(acts, expected())


# --- Activation checkpointing ----------------------------------------------------------------------------


def _without_early_stop(body: Callable[..., Tensor], x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(body, x, use_reentrant=False)


def _nested(body: Callable[..., Tensor], x: Tensor, *, outer: bool, inner: bool) -> Tensor:
    return checkpoint(partial(checkpoint, body, use_reentrant=inner), x, use_reentrant=outer)


CHECKPOINTS: dict[str, Callable[..., Tensor]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "without early stop": _without_early_stop,
    "reentrant in reentrant": partial(_nested, outer=True, inner=True),
    "reentrant in non-reentrant": partial(_nested, outer=False, inner=True),
    "non-reentrant in reentrant": partial(_nested, outer=True, inner=False),
}


@pytest.mark.eager_only(
    "refused: compiled code that runs again does not tell which call it repeats"
)
@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_gradients_of_checkpointed_layers_are_those_of_plain_ones(
    call: Callable[..., Tensor],
) -> None:
    net = Net(call)
    x, y = (factor * X.clone().requires_grad_() for factor in (1, 2))
    with record(net, grads=True) as acts:
        first, second = net(x), net(y)
        loss_of(first).backward()
        loss_of(second).backward()
    wanted = {name: grads + expected(2 * X)[name] for name, grads in expected().items()}
    assert equal(acts, wanted)
    assert acts["relu"].passes == [0, 0, 1, 1]


@pytest.mark.eager_only(
    "refused: compiled code that runs again does not tell which call it repeats"
)
@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_second_backward_through_a_checkpoint_adds(call: Callable[..., Tensor]) -> None:
    net = Net(call)
    with record(net, grads=True) as acts:
        loss = loss_of(net(X.clone().requires_grad_()))
        loss.backward(retain_graph=True)
        loss.backward()
    assert equal(acts, {name: [2 * g for g in grads] for name, grads in expected().items()})


@pytest.mark.eager_only(
    "refused: compiled code that runs again does not tell which call it repeats"
)
def test_calls_that_a_transform_skips_do_not_shift_what_checkpointing_runs_again() -> None:
    net = Net(CHECKPOINTS["reentrant"])
    skips = iter([True, False])
    with record(net, {"relu": lambda t: None if next(skips, False) else t}, grads=True) as acts:
        loss_of(net(X.clone().requires_grad_())).backward()
    assert equal(acts, {"relu": expected()["relu"][1:]})


@pytest.mark.eager_only(
    "refused: compiled code that runs again does not tell which call it repeats"
)
def test_backward_after_the_block_through_a_reentrant_checkpoint_is_warned_of() -> None:
    net = Net(CHECKPOINTS["reentrant"])
    with (
        pytest.warns(
            MissingGradientWarning, match=r"'a', 'relu', 'b': .*reentrant.*inside the with"
        ),
        record(net, grads=True) as acts,
    ):
        out = net(X.clone().requires_grad_())
    loss_of(out).backward()
    assert list(acts.grads["a"]) == [None]


# --- Where no gradient can come ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{"grads": True}, {"detach": False}], ids=str)
def test_without_a_graph_there_is_one_warning(
    mode: Callable[[], Any], options: dict[str, bool]
) -> None:
    net = Net()
    with (
        pytest.warns(
            MissingGradientWarning, match=r"3 of 3 layers of this Net.*\n.*no_grad"
        ) as caught,
        mode(),
        record(net, **options),
    ):
        net(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_frozen_part_is_warned_of_by_name() -> None:
    net = Net()
    net.a.requires_grad_(False)
    with (
        pytest.warns(MissingGradientWarning, match=r"1 of 3 layers.*\n  'a': .*a frozen part"),
        record(net, grads=True) as acts,
    ):
        loss_of(net(X)).backward()
    assert acts.grads["a"][0] is None
    assert acts.grads["b"][0] is not None


def test_a_layer_that_was_not_called_is_warned_of_once() -> None:
    net = Net()
    with pytest.warns() as caught, record(net, grads=True):
        pass
    assert [w.category for w in caught] == [UnusedLayerWarning]


def test_gradients_that_were_not_asked_for_are_explained() -> None:
    net = Net()
    with record(net) as acts:
        net(X)
    with pytest.raises(AttributeError, match=r"grads=True"):
        acts.grads  # noqa: B018  # it raises


# --- Options -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("transform", [None, lambda value: value[0] * 2])
def test_beside_a_nested_tensor_gradients_are_recorded(transform: Any) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 3, torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(2, 2)])

    net = Both()
    with record(net, "", grads=True, transform=transform) as acts:
        net(torch.ones(2, 2, requires_grad=True))[0].sum().backward()
    grad = acts.grads[""][0]
    assert torch.equal(grad[0] if transform is None else grad / 2, torch.ones(2, 2))


@pytest.mark.eager_only("compiled code runs for one after the other")
@pytest.mark.parametrize("many", ["batch", "vmap"])
def test_gradients_that_stand_for_many_are_refused_by_layer(many: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.ones(1, 3, requires_grad=True)
    one_by_one = torch.eye(2)[:, None]
    message = r"cannot keep the gradient of call 0 of layer '0': .*outside of"
    with record(net, "0", grads=True) as acts:
        output = net(x)
        with pytest.raises(CaptureError, match=message):
            if many == "batch":
                torch.autograd.grad(output, x, one_by_one, is_grads_batched=True)
            else:
                torch.func.vmap(lambda v: torch.autograd.grad(output, x, v))(one_by_one)
    assert acts.grads["0"] == [None]


def test_a_transform_takes_from_the_gradient_what_it_takes_from_the_value() -> None:
    net = Net()
    wanted = expected()
    transforms = {"a": lambda t: t[:, -1], "b": lambda t: {"mean": t.mean(1)}, "relu": None}
    with record(net, transforms, grads=True) as acts:
        loss = loss_of(net(X))
        assert (acts.grads["a"][0], acts.grads["b"][0]) == (None, {"mean": None})
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(acts.grads["a"][0], 2 * wanted["a"][0][:, -1])
    assert torch.equal(acts.grads["b"][0]["mean"], 2 * wanted["b"][0].mean(1))


def test_a_transform_that_selects_from_a_nested_value_selects_from_its_gradients() -> None:
    model = nn.LSTM(4, 5, batch_first=True)
    with record(model, "", grads=True, transform=lambda value: (value[0], value[1][1])) as acts:
        out, (hidden, cell) = model(X[None])
        (3 * out.sum() + hidden.sum() + 5 * cell.sum()).backward()
    of_out, of_cell = acts.grads[""][0]
    assert torch.equal(of_out, torch.full_like(out, 3))
    assert torch.equal(of_cell, torch.full_like(cell, 5))


def test_a_transform_that_skips_a_gradient_leaves_it_out() -> None:
    net = nn.Linear(4, 4)
    with record(net, "", grads=True, transform=lambda t: t if t.mean() != 1 else None) as acts:
        net(X).sum().backward()
    assert list(acts.grads[""]) == [None]


def test_a_transform_that_fails_on_a_gradient_says_so_where_backward_was_called() -> None:
    net = nn.Linear(4, 4)

    def only_values(t: Tensor) -> Tensor:
        if (t == 1).all():
            raise ValueError("no good")
        return t

    with (
        pytest.raises(
            TransformError, match=r"layer '' raised ValueError on the gradient of call 0: no good"
        ),
        record(net, "", grads=True, transform=only_values),
    ):
        net(X).sum().backward()


def test_dtype_and_device_hold_for_gradients() -> None:
    net = Net()
    with record(net, "a", grads=True, dtype=torch.float64) as acts:
        loss_of(net(X)).backward()
    assert torch.equal(acts.grads["a"][0], expected()["a"][0].double())
    with record(net, "a", grads=True, device="meta") as acts:
        loss_of(net(X)).backward()
    assert acts.grads["a"][0].is_meta


def test_in_a_bounded_container_late_gradients_of_dropped_calls_are_dropped() -> None:
    net = nn.Linear(4, 4)
    with record(net, "", grads=True, into=partial(deque, maxlen=2)) as acts:
        losses = [(step * net(X)).sum() for step in range(4)]
    for loss in losses:
        loss.backward()
    assert [float(grad[0, 0]) for grad in acts.grads[""]] == [2, 3]


def test_a_container_whose_items_cannot_be_replaced_is_refused() -> None:
    class Mean:
        def append(self, value: Tensor) -> None:
            """Take it."""

    net = nn.Linear(4, 4)
    with (
        pytest.raises(OptionError, match=r"grads=True, into=.*Mean"),
        record(net, "", grads=True, into=Mean),
    ):
        pass


def test_after_clear_gradients_of_earlier_calls_are_ignored() -> None:
    model = nn.LSTM(4, 5, batch_first=True)
    with record(model, "", grads=True) as acts:
        early = model(X[None])[0].sum()
        acts.clear()
        late = model(X[None])[0].sum()
        early.backward()
        assert acts.grads[""][0] == (None, (None, None))
        late.backward()
    assert len(acts.grads[""]) == 1
    assert acts.grads[""][0][0] is not None


def test_paused_calls_have_no_gradient_and_the_others_keep_theirs() -> None:
    net = Net()
    with record(net, grads=True) as acts:
        first = loss_of(net(X))
        with acts.pause():
            loss_of(net(3 * X)).backward()
            first.backward()
    assert equal(acts, expected())


# --- Leaves ------------------------------------------------------------------------------------------------


class Prompt(nn.Module):
    """Returns a parameter as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.ones(2))

    def forward(self) -> Tensor:
        return self.prompt


@pytest.mark.parametrize("when", ["inside", "after"])
def test_a_layer_that_returns_a_parameter_has_the_gradient_of_each_step(when: str) -> None:
    model = Prompt()
    with record(model, "", grads=True) as acts:
        for step in range(1, 4):
            loss = (step * model()).sum()
            if when == "inside" or step < 3:
                loss.backward()
    if when == "after":
        loss.backward(retain_graph=True)
        loss.backward()
    assert [float(grad[0]) for grad in acts.grads[""]] == [1, 2, 3 if when == "inside" else 6]
    assert not model.prompt._backward_hooks, "nothing stays on the parameter"


@pytest.mark.eager_only("refused: a leaf that is returned as it is")
def test_a_parameter_that_is_returned_twice_in_a_pass_has_its_gradient_both_times() -> None:
    prompt = Prompt()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = prompt

        def forward(self) -> Tensor:
            return self.prompt() + 2 * self.prompt()

    model = Twice()
    with record(model, "prompt", grads=True) as acts:
        for _ in range(2):
            model().sum().backward()
            copy.deepcopy(model)().sum().backward()
    assert [grad.tolist() for grad in acts.grads["prompt"]] == [[3, 3]] * 4


# --- Nothing stays ------------------------------------------------------------------------------------------


def test_a_recording_keeps_no_graph_and_a_graph_no_recording() -> None:
    net = Net()
    gc.disable()
    try:
        with record(net, grads=True) as acts:
            out = net(X)
        freed = weakref.ref(out)
        layer = weakref.ref(acts.grads["a"])
        recorder = weakref.ref(acts)
        del acts
        assert (recorder(), layer()) == (None, None)
        loss_of(out).backward()
        del out
        assert freed() is None, "nor does anything keep the graph"
    finally:
        gc.enable()


def test_gradients_of_nested_values_that_the_user_lets_go_of_are_freed() -> None:
    lstm = nn.LSTM(3, 4)
    with record(lstm, "", grads=True) as acts:
        for _ in range(2):
            output, (hidden, _) = lstm(torch.ones(5, 2, 3))
            (output.sum() + hidden.sum()).backward()
        gradients = [weakref.ref(call[0]) for call in acts.grads[""]]
        joined = acts.grads[""].cat(release=True)
        assert [gradient() for gradient in gradients] == [None, None]
    assert joined[0].shape == (10, 2, 4)


@pytest.mark.eager_only("the compiler has tensors of its own")
def test_memory_of_the_graph_is_freed_although_its_gradients_were_recorded() -> None:
    class Keeps(torch.autograd.Function):
        alive = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.token = Token()
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Token:
        def __init__(self) -> None:
            Keeps.alive += 1

        def __del__(self) -> None:
            Keeps.alive -= 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = Keeps.apply(self.layer(x))
            return y, y + 1

    model = Model()
    gc.disable()
    try:
        with record(model, "**", grads=True) as acts, record(model, "", grads=True) as whole:
            for _ in range(3):
                first, second = model(X)
                (first + second).sum().backward()
                del first, second
                assert Keeps.alive == 0
        assert len(acts.grads["layer"]) == len(whole.grads[""]) == 3
    finally:
        gc.enable()


def test_full_backward_hooks_of_others_see_what_they_would_have_seen() -> None:
    seen = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net[0].register_full_backward_hook(lambda _, inputs, outputs: seen.append(outputs[0]))
    with record(net, grads=True) as acts:
        loss_of(net(X.clone().requires_grad_())).backward()
    assert torch.equal(seen[0], acts.grads["0"][0])


# --- Without detach: losses on activations --------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [None, CHECKPOINTS["non-reentrant"]], ids=["plain", "checkpointed"]
)
@pytest.mark.parametrize(
    "options", [{}, {"transform": lambda t: t.exp().sum(1)}], ids=["whole", "transformed"]
)
def test_a_distillation_loss_on_recorded_values_trains_as_its_functional_reference(
    call: Callable[..., Tensor] | None, options: dict[str, Any]
) -> None:
    transform = options.get("transform", lambda t: t)
    net, ref = Net(call), Net()
    x = X.clone().requires_grad_()
    with record(net, ["a", "b"], detach=False, **options) as acts:
        out = net(x)
    (loss_of(out) + sum(loss_of(acts[name][0] - 0.5) for name in acts)).backward()
    a = ref.a(X)
    b = ref.b(F.relu(a))
    (loss_of(F.relu(b)) + sum(loss_of(transform(t) - 0.5) for t in (a, b))).backward()
    for got, wanted in zip(net.parameters(), ref.parameters(), strict=True):
        assert torch.allclose(got.grad, wanted.grad, rtol=1e-5, atol=1e-6)
