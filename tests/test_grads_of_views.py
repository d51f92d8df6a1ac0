"""Gradients of views, whatever is written in place: right, or left out with a warning that names the layer.

Programs are generated. Each runs twice: on tensors that share memory, and out of place, on a model of memory
in which every variable has a value of its own.
"""

from __future__ import annotations

import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from actrec import CaptureError, MissingGradientWarning, _torch, record
from actrec._calls import views as _views

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

X = torch.linspace(-1, 1, 24).reshape(3, 2, 4)


# --- Layers: views of what they make, or of what they receive -------------------------------------------


class Views(nn.Module):
    """Returns views of what ``make`` makes of the input; without it, of the input itself."""

    def __init__(
        self,
        make: Callable[[Tensor], Tensor] | None,
        views: Callable[[Tensor], Sequence[Tensor]],
        *,
        writable: bool = True,
    ) -> None:
        super().__init__()
        self.make = make
        self.views = views
        self.writable = writable

    def forward(self, x: Tensor) -> Any:
        views = self.views(x if self.make is None else self.make(x))
        return views[0] if len(views) == 1 else {"views": views, "label": torch.arange(3)}


class Tokens(nn.Linear):
    """``nn.Linear``, whose output is a view if its input has three dimensions."""

    writable = True

    def __init__(self) -> None:
        super().__init__(4, 4)

    def views(self, h: Tensor) -> Sequence[Tensor]:
        return [h]

    def make(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clone())  # it keeps its input, which may be overwritten


def doubled(x: Tensor) -> Tensor:
    return x * 2


#: Layers whose views are all that is left of the memory that they made.
OWNERS: dict[str, Callable[[], Any]] = {
    "tokens": Tokens,
    "fresh": lambda: Views(doubled, lambda h: [h]),
    "turned": lambda: Views(doubled, lambda h: [h.transpose(0, -1)]),
    "view of view": lambda: Views(doubled, lambda h: [h.transpose(0, -1)[None].squeeze(0)]),
    "part": lambda: Views(doubled, lambda h: [h[:1]]),
    "parts": lambda: Views(doubled, lambda h: [h[:1], h[1:]]),
    "chunks": lambda: Views(doubled, lambda h: h.chunk(2), writable=False),
}

#: Layers that return the same memory twice, or again.
SHARERS: dict[str, Callable[[], Any]] = {
    "overlapping": lambda: Views(doubled, lambda h: [h[:2], h[1:]]),
    "twice": lambda: Views(doubled, lambda h: [h, h.transpose(0, -1)]),
    "turned input": lambda: Views(None, lambda h: [h.transpose(0, -1)]),
    "part of input": lambda: Views(None, lambda h: [h[1:]]),
    "parts of input": lambda: Views(None, lambda h: [h[:1], h[1:]]),
    "chunks of input": lambda: Views(None, lambda h: h.chunk(2), writable=False),
}

WRITES = ["scaled", "residual", "relu", "part", "no_grad"]


# --- Programs ---------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """``what`` is done to variable ``at``, perhaps with variable ``other``."""

    what: str
    at: int
    other: int


@dataclass(eq=False)
class Variable:
    """A variable of the reference: its value, and where in which memory it lies."""

    value: Tensor
    memory: int
    index: Tensor
    writable: bool
    usable: bool = True


def used(value: Tensor, step: int) -> Tensor:
    """A part of the loss. It keeps a clone, for the value may be overwritten."""
    return (value.clone() + step).square().sum()


@dataclass
class Reference:
    """Runs a program out of place, and notes the steps that can be done."""

    layers: nn.ModuleDict
    variables: list[Variable] = field(default_factory=list)
    done: list[Step] = field(default_factory=list)
    returned: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    memories: count[int] = field(default_factory=count)

    def run(self, program: Sequence[Step]) -> None:
        """Run what is possible of it, and what a layer returns is used in the end."""
        self.add([doubled(X.clone().requires_grad_())], next(self.memories), writable=True)
        for what, at, other in program:
            usable = [i for i, v in enumerate(self.variables) if v.usable]
            self.step(Step(what, usable[at % len(usable)], usable[other % len(usable)]))

    def step(self, step: Step) -> None:
        variable = self.variables[step.at]
        if step.what == "use":
            self.loss = self.loss + used(variable.value, len(self.done))
        elif step.what in WRITES:
            if not variable.writable:
                return
            self.write(
                variable, written(step.what, variable.value, self.variables[step.other].value)
            )
        else:
            if variable.value.shape[0] < 3 and step.what not in {"tokens", "fresh", "turned"}:
                return
            if step.what == "tokens" and variable.value.shape[-1] != 4:
                return
            self.call(step.what, variable)
        self.done.append(step)

    def call(self, name: str, variable: Variable) -> None:
        layer: Any = self.layers[name]
        if layer.make is None:
            values, index = layer.views(variable.value), layer.views(variable.index)
            memory = variable.memory
        else:
            made = layer.make(variable.value) * 1
            values, memory = layer.views(made), next(self.memories)
            index = layer.views(torch.arange(made.numel()).view(made.shape))
        # Each is a value of its own, but what a layer returns beside its views has the views' uses, too.
        values = [value if layer.make and value is made else value * 1 for value in values]
        writable = variable.writable if layer.make is None else True
        self.add(values, memory, index, writable=writable and layer.writable)
        for value in values:
            value.retain_grad()
        self.returned.setdefault(name, []).append(values)

    def add(
        self,
        values: Sequence[Tensor],
        memory: int,
        index: Sequence[Tensor] | None = None,
        *,
        writable: bool,
    ) -> None:
        index = index or [torch.arange(v.numel()).view(v.shape) for v in values]
        pairs = zip(values, index, strict=True)
        self.variables += [Variable(v, memory, i, writable) for v, i in pairs]

    def write(self, variable: Variable, new: Tensor) -> None:
        """What shares memory with ``variable`` changes where it does."""
        where = torch.full((X.numel(),), -1)
        where[variable.index.flatten()] = torch.arange(new.numel())
        for other in self.variables:
            if other.memory == variable.memory:
                at = where[other.index]
                changed = new.flatten()[at.clamp(min=0)]
                other.value = torch.where(at >= 0, changed, other.value)
                other.usable = other.writable  # PyTorch refuses what it calls a multi-output view


def written(what: str, value: Tensor, other: Tensor) -> Tensor:
    match what:
        case "scaled":
            return value * 3
        case "residual":
            return value + other.mean()
        case "relu":
            return value * (value > 0)
        case "part":
            return torch.cat([value[:1] * 2, value[1:]])
    return value + value.detach()  # no_grad


class Program(nn.Module):
    """Runs the steps as a model would, in place."""

    def __init__(self, layers: nn.ModuleDict, steps: Sequence[Step]) -> None:
        super().__init__()
        self.layers = layers
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        variables, loss = [doubled(x)], torch.zeros(())
        for number, (what, at, other) in enumerate(self.steps):
            if what == "use":
                loss = loss + used(variables[at], number)
            elif what in WRITES:
                self.write(what, variables[at], variables[other])
            else:
                output = self.layers[what](variables[at])
                variables += [output] if isinstance(output, Tensor) else output["views"]
        return loss

    def write(self, what: str, value: Tensor, other: Tensor) -> None:
        match what:
            case "scaled":
                value *= 3
            case "residual":
                value += other.mean()
            case "relu":
                value *= value > 0
            case "part":
                value[:1] *= 2
            case "no_grad":
                with torch.no_grad():
                    value *= 2


def programs(*layers: str) -> st.SearchStrategy[list[Step]]:
    what = st.sampled_from([*layers, *WRITES, *WRITES, "use", "use", "use"])
    numbers = st.integers(0, 20)
    return st.lists(st.builds(Step, what, numbers, numbers), max_size=12)


def run(program: Sequence[Step]) -> tuple[dict[str, list[Tensor]], dict[str, list[Any]], str]:
    """Return the gradients by layer as they should be, and as they are, and what was warned of."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: make() for name, make in (OWNERS | SHARERS).items()})
    reference = Reference(layers)
    reference.run(program)
    if not reference.returned or not reference.loss.requires_grad:
        return {}, {}, ""
    reference.loss.backward()
    wanted = {
        name: [torch.zeros_like(v) if v.grad is None else v.grad for call in calls for v in call]
        for name, calls in reference.returned.items()
    }
    model = Program(layers, reference.done)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with record(model, [f"layers.{name}" for name in wanted], grads=True) as acts:
            loss = model(X.clone().requires_grad_())
        loss.backward()
    assert torch.allclose(loss, reference.loss), "the programs are the same"
    assert all(w.category is MissingGradientWarning for w in caught)
    got = {
        name: [
            grad
            for call in acts.grads[f"layers.{name}"]
            for grad in (call["views"] if isinstance(call, dict) else [call])
        ]
        for name in wanted
    }
    return wanted, got, " ".join(str(w.message) for w in caught)


def is_right(got: Tensor | None, wanted: Tensor) -> bool:
    return not wanted.any() if got is None else torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(programs(*OWNERS))
def test_gradients_of_views_that_are_written_in_place_are_right(program: list[Step]) -> None:
    wanted, got, warned = run(program)
    assert not warned
    for name, grads in wanted.items():
        assert all(map(is_right, got[name], grads)), name


@settings(max_examples=300, deadline=None, derandomize=True)
@given(programs(*OWNERS, *SHARERS, *SHARERS))
def test_a_gradient_that_cannot_be_told_is_left_out_with_a_warning_that_names_the_layer(
    program: list[Step],
) -> None:
    wanted, got, warned = run(program)
    for name, grads in wanted.items():
        for gradient, right in zip(got[name], grads, strict=True):
            left_out = gradient is None and f"'layers.{name}'" in warned
            assert left_out or is_right(gradient, right), name


# --- By name ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Uses what ``layer`` returns, and then writes to it."""

    def __init__(self, layer: nn.Module, pick: Callable[[Any], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.layer = layer
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        y = self.pick(self.layer(x))
        gate = y.sigmoid()
        y += x
        return gate * y


class Attention(nn.Module):
    """Self-attention, which returns weights beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x, x, x)


def true_gradient(model: Residual, x: Tensor) -> Tensor:
    value = model.pick(model.layer(x)).detach().requires_grad_()
    (value.sigmoid() * (value + x)).square().sum().backward()
    assert value.grad is not None
    return value.grad


def first(output: tuple[Tensor, ...]) -> Tensor:
    return output[0]


RESIDUALS: dict[str, Callable[[], Residual]] = {
    "Linear": lambda: Residual(nn.Linear(4, 4)),
    "behind an operation": lambda: Residual(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))),
    "InstanceNorm1d": lambda: Residual(nn.InstanceNorm1d(2, affine=True)),
    "MultiheadAttention": lambda: Residual(Attention(), first),
    "TransformerEncoderLayer": lambda: Residual(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True)
    ),
    "GRU": lambda: Residual(nn.GRU(4, 4, batch_first=True), first),
}


@pytest.mark.parametrize("make", RESIDUALS.values(), ids=RESIDUALS)
@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: model(x),
        partial(checkpoint, use_reentrant=False),
        partial(checkpoint, use_reentrant=True),
    ],
    ids=["plain", "checkpoint", "reentrant checkpoint"],
)
def test_the_gradient_of_an_in_place_residual_is_that_of_the_value_as_the_layer_returned_it(
    make: Callable[[], Residual], call: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    model, x = make(), X.clone().requires_grad_()
    with (
        record(model, "layer", grads=True) as acts,
        record(model, "layer", grads=True, dtype=torch.float64) as others,
    ):
        loss = call(model, x).square().sum()
        loss.backward(retain_graph=True)
        grad = model.pick(acts.grads["layer"][0])
        assert torch.allclose(grad, true_gradient(model, X), atol=1e-5)
        assert torch.allclose(model.pick(others.grads["layer"][0]), grad.double(), atol=1e-5)
        loss.backward()
    assert torch.allclose(model.pick(acts.grads["layer"][0]), 2 * grad, atol=1e-5)


@pytest.mark.parametrize(
    "turn", [lambda x: x, lambda x: x.transpose(0, 1)], ids=["rows", "columns"]
)
def test_where_the_base_was_used_elsewhere_uses_of_the_view_before_the_write_are_enough(
    turn: Callable[[Tensor], Tensor],
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unflatten = nn.Unflatten(-1, (2, 2))

        def forward(self, x: Tensor) -> Tensor:
            h = turn(x) * 2
            loss = (self.unflatten(h) * 3).sum()
            h += 1  # what was returned is not used any more
            return loss

    model = Model()
    with record(model, "unflatten", grads=True) as acts:
        model(X.clone().requires_grad_()).backward()
    assert torch.equal(acts.grads["unflatten"][0], torch.full_like(acts["unflatten"][0], 3))


class Written(nn.Module):
    """Writes to the base of what ``layer`` returns, or else to that, and uses what it returns."""

    def __init__(self, view: Callable[[Tensor], Any], write: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.layer = Views(None, view)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        y = self.layer(h)
        self.write(h, y)
        return (y if isinstance(y, Tensor) else y["views"][0]).abs().sum()


def assert_left_out(model: nn.Module) -> None:
    """The gradient of the layer is left out, with a warning."""
    with record(model, "layer", grads=True) as acts:
        output = model(X.clone().requires_grad_()).sum()
    with pytest.warns(MissingGradientWarning, match=r"layer 'layer' is left out"):
        output.backward(retain_graph=True)
    output.backward()  # said once
    (grad,) = acts.grads["layer"]
    assert (grad["views"][0] if isinstance(grad, dict) else grad) is None


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "of another shape": nn.Flatten(),
    "expanded": lambda h: h[None].expand(2, -1, -1, -1),
    "overlapping windows": lambda h: h.unfold(-1, 2, 1),
    "of another dtype": lambda h: torch.view_as_complex(h.view(3, 2, 2, 2)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_of_what_the_model_goes_on_with_has_no_gradient_but_a_warning(
    view: Callable[[Tensor], Tensor],
) -> None:
    assert_left_out(Written(lambda h: [view(h)], lambda h, _: h.add_(1)))


def read_by_another(x: Tensor) -> Sequence[Tensor]:
    h = x * 2
    return h[:], h.sum()


def among_many(x: Tensor) -> Sequence[Tensor]:
    h = x * 2
    for _ in range(100):
        x = x + 1
    return h[:], x


def made_in_another_thread(x: Tensor) -> Sequence[Tensor]:
    now = (x * 1).grad_fn._sequence_nr()

    def make() -> Tensor:
        while (h := x * 2).grad_fn._sequence_nr() <= now:
            pass
        return h

    with ThreadPoolExecutor(1) as thread:
        return [thread.submit(make).result()[:]]


def beside_an_expanded_one(x: Tensor) -> Sequence[Tensor]:
    h = x * 2
    return h[:], h[None].expand(2, -1, -1, -1)


@pytest.mark.parametrize(
    "layer", [read_by_another, among_many, made_in_another_thread, beside_an_expanded_one]
)
def test_where_a_layer_may_have_used_the_base_elsewhere_there_is_no_gradient_but_a_warning(
    layer: Callable[[Tensor], Sequence[Tensor]],
) -> None:
    def write(_: Tensor, y: Any) -> None:
        (y if isinstance(y, Tensor) else y["views"][0]).add_(1)

    assert_left_out(Written(layer, write))


class Reversed(torch.autograd.Function):
    """Returns a view, and has a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def test_gradients_of_a_view_with_a_backward_of_its_own_are_what_reached_it() -> None:
    class Reversal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Reversed.apply(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.reversal = Reversal()

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            loss = (self.reversal(y) * 3).sum()
            y += x
            return loss + y.sum()

    model = Model()
    with record(model, grads=True) as acts:
        model(X).backward()
    assert torch.equal(acts.grads["reversal"][0], torch.full_like(X, 3))
    assert torch.equal(acts.grads["linear"][0], torch.full_like(X, -2))


def test_views_that_pytorch_lets_nobody_use_any_more_do_not_stop_the_model() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = x * 2
            halves = h.chunk(2, -1)
            h += 1
            return h, *halves

    model = Model()
    with record(model, "", grads=True) as acts:
        model(X.clone().requires_grad_())[0].sum().backward()
    assert torch.equal(acts.grads[""][0][0], torch.ones_like(X))
    assert acts.grads[""][0][1:] == (None, None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_views_of_nested_tensors_have_gradients(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor(
        [torch.ones(3, 4), torch.ones(2, 4)], layout=layout, requires_grad=True
    )
    model = Views(lambda t: t * 2, lambda h: [h.transpose(1, 2)])
    with record(model, "", grads=True) as acts:
        (model(x).transpose(1, 2) * 3).backward(torch.ones_like(x))
    (grad,) = acts.grads[""]
    assert torch.equal(grad.transpose(1, 2)[1], torch.full((2, 4), 3.0))


def test_the_gradient_of_a_view_can_be_differentiated_without_detach() -> None:
    model = Residual(nn.Linear(4, 4))
    with record(model, "layer", grads=True, detach=False) as acts:
        torch.autograd.grad(model(X).square().sum(), model.layer.weight, create_graph=True)
    (grad,) = acts.grads["layer"]
    assert torch.allclose(grad, true_gradient(model, X), atol=1e-5)
    grad.square().sum().backward()
    assert model.layer.weight.grad is not None


def test_gradients_of_a_written_view_that_stand_for_many_are_refused_by_layer() -> None:
    model = Residual(nn.Linear(4, 4))
    with record(model, "layer", grads=True):
        output = model(X)
        with pytest.raises(CaptureError, match=r"the gradient of call 0 of layer 'layer'"):
            torch.autograd.grad(
                output, model.layer.bias, torch.stack([output, output]), is_grads_batched=True
            )


def test_the_memory_of_a_view_is_freed_with_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y += 1
            bases.append(weakref.ref(y._base))
            return y.sum()

    bases: list[Any] = []
    model = Model()
    with record(model, "linear", grads=True, transform=lambda y: y.sum()) as acts:
        loss = model(X)
        assert bases[0]() is None, "long before the graph"
        loss.backward()
    assert acts.grads["linear"][0] == X.numel()


# --- Without PyTorch's private names ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_creation", "next_number"])
def test_where_pytorch_does_not_tell_who_uses_a_base_gradients_of_written_views_are_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _torch.owners_of_one_view() != (0, 0), "this version tells"
    monkeypatch.setattr(_torch, name, None)
    assert _torch.owners_of_one_view() == (0, 0)
    monkeypatch.setattr(_views, "_FROM_PYTHON", 0)
    assert_left_out(Residual(nn.Linear(4, 4)))


def test_a_view_of_a_leaf_and_a_view_of_nothing_have_their_gradients_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.weight[:1], (x * self.weight)[:0]

    model = nn.Sequential(Both())
    with record(model, "0", grads=True) as acts:
        row, nothing = model(torch.ones(2, 3))
        ((row * 2).sum() + nothing.sum()).backward()
    of_row, of_nothing = acts.grads["0"][0]
    assert torch.equal(of_row, torch.full((1, 3), 2.0))
    assert of_nothing.shape == (0, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own imports
def test_the_gradient_of_a_view_comes_also_after_the_compiler_has_met_a_limit() -> None:
    """From then on a call of a function holds its arguments once more, and references are what tells who uses a base."""
    add = torch.compile(lambda x, number: x + number, backend="eager", fullgraph=True)
    with (
        torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1),
        pytest.raises(Exception, match=r"failure|limit"),
    ):
        for number in range(3):
            add(X, number)
    model = RESIDUALS["Linear"]()
    with record(model, "layer", grads=True) as acts:
        model(X.clone().requires_grad_()).sum().backward()
    assert acts.grads["layer"][0] is not None
