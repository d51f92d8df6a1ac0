"""Whatever others do to the model inside the block: what is recorded is what a layer received and returned, or it is said."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import IncompleteLayerWarning, TransformError, UnusedLayerWarning, record

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.arange(8.0).reshape(2, 4) - 3


class Told(nn.Module):
    """A layer that writes down what its forward receives and what a call of it returns."""

    def __init__(self, *inner: nn.Module, before: Callable[[Told], None] | None = None) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)
        self.before = before
        self.received: list[Tensor] = []
        self.returned: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        self.returned.append(output.clone())
        return output

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.received.append(x.clone())
        if self.before is not None:
            self.before(self)
        for module in self.inner:
            x = module(x)
        return x * scale + 1


def steer(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output * 2


def steer_with_kwargs(_module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
    return output - 1


def steer_in_place(_module: nn.Module, _args: Any, output: Tensor) -> None:
    output.add_(0.5)


def shift(_module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] + 3


def shift_with_kwargs(_module: nn.Module, args: Any, _kwargs: Any) -> Any:
    return args, {"scale": 0.5}


def shift_in_place(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].sub_(0.25)


def look(*_: object) -> None:
    pass


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "steer": lambda m: m.register_forward_hook(steer),
    "steer, first": lambda m: m.register_forward_hook(steer, prepend=True),
    "steer, with kwargs": lambda m: m.register_forward_hook(steer_with_kwargs, with_kwargs=True),
    "steer in place": lambda m: m.register_forward_hook(steer_in_place),
    "look": lambda m: m.register_forward_hook(look),
    "shift": lambda m: m.register_forward_pre_hook(shift),
    "shift, with kwargs": lambda m: m.register_forward_pre_hook(
        shift_with_kwargs, with_kwargs=True
    ),
    "shift in place": lambda m: m.register_forward_pre_hook(shift_in_place),
    "look before": lambda m: m.register_forward_pre_hook(look),
    "nobody": lambda m: m.register_full_backward_hook(look),
}

#: A model, and its layers but for the root.
NAMES = ["inner.0", "inner.0.inner.0", "inner.1", "inner.1.inner.0"]


def told() -> Told:
    return Told(Told(Told()), Told(Told()))


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["", *NAMES]), st.sampled_from(sorted(HOOKS))),
            st.sampled_from(["call", "remove the first", "another block"]),
        ),
        min_size=2,
        max_size=12,
    ),
    inputs=st.booleans(),
)
def test_what_is_recorded_is_what_the_layer_received_and_returned_whatever_hooks_are_added(
    steps: list[Any], inputs: bool
) -> None:
    model = told()
    modules = dict(model.named_modules())
    handles: list[Any] = []
    blocks: list[Any] = []
    inner: list[Any] = []
    with torch.no_grad(), record(model, NAMES, inputs=inputs) as acts:
        for step in [*steps, "call"]:
            match step:
                case "call":
                    model(X.clone())
                case "remove the first":
                    if handles:
                        handles.pop(0).remove()
                case "another block":
                    blocks.append(record(model, NAMES, inputs=inputs))
                    inner.append(blocks[-1].__enter__())
                case name, hook:
                    handles.append(HOOKS[hook](modules[name]))
        for block in reversed(blocks):
            block.__exit__(None, None, None)
    for name, one in ((name, one) for name in NAMES for one in (acts, *inner)):
        assert same(one[name], modules[name].returned[-len(one[name]) :])
        if inputs:
            received = [given["x"] for given in one.inputs[name]]
            assert same(received, modules[name].received[-len(one[name]) :])
    assert [len(acts[name]) for name in NAMES] == [len(modules[name].returned) for name in NAMES]


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("hook", ["steer", "steer, with kwargs", "steer in place"])
@pytest.mark.parametrize("options", [{}, {"inputs": True}, {"grads": True}], ids=str)
def test_a_hook_that_a_forward_adds_further_in_is_seen_in_that_forward(
    hook: str, options: dict[str, Any]
) -> None:
    def before(module: Told) -> None:
        HOOKS[hook](module.get_submodule("inner.0.inner.0"))

    model = Told(Told(Told()), before=before)
    with record(model, NAMES[:2], **options) as acts:
        for _ in range(3):
            model(X.clone().requires_grad_() * 1)
    for name in NAMES[:2]:
        assert same(acts[name], model.get_submodule(name).returned)


@pytest.mark.parametrize("options", [{}, {"inputs": True}], ids=str)
@pytest.mark.parametrize("hook", ["steer", "steer in place", "look"])
def test_a_hook_that_comes_too_late_to_be_seen_is_said_and_seen_from_the_next_call_on(
    hook: str, options: dict[str, Any]
) -> None:
    def before(module: Told) -> None:
        if len(module.received) == 2:
            HOOKS[hook](module.inner[0])

    model = Told(Told(), before=before)
    with (
        pytest.warns(
            IncompleteLayerWarning,
            match=r"1 of 1 layer of this Told.\n  'inner.0': .*of 1 forward,",
        ) as caught,
        record(model, "inner.0", **options) as acts,
    ):
        for _ in range(4):
            model(X.clone())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    returned = model.inner[0].returned
    assert same([acts["inner.0"][i] for i in (0, 2, 3)], [returned[i] for i in (0, 2, 3)])


@pytest.mark.parametrize(
    ("hook", "is_sure"),
    [("shift", True), ("look before", True), ("shift in place", False)],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_replaced_too_late_is_what_forward_received_or_it_is_said(
    hook: str, is_sure: bool, mode: Any
) -> None:
    model = Told()
    with (
        nullcontext()
        if is_sure and mode is torch.no_grad
        else pytest.warns(IncompleteLayerWarning),
        mode(),
        record(model, "", inputs=True) as acts,
    ):
        model(X.clone())
        HOOKS[hook](model)  # too late: the outermost call looks up its hooks before it calls ours
        model(X.clone())
        model(X.clone())
    assert same([given["x"] for given in acts.inputs[""]], model.received)


def test_hooks_of_others_keep_their_order_and_ours_stay_last_in_every_block() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    others = [lambda *_: None for _ in range(4)]
    order = lambda: [h for h in model[0]._forward_hooks.values() if h in others]  # noqa: E731
    model[0].register_forward_hook(others[0])
    with record(model, "0", stop_early=True) as outer:
        model[0].register_forward_hook(others[1])
        with record(model, "0") as inner:
            model[0].register_forward_hook(others[2])
            model(X)
            model[0].register_forward_hook(others[3], prepend=True)
            model(X)
        model(X)
        assert order() == [others[3], *others[:3]]
    assert [*model[0]._forward_hooks.values()] == [others[3], *others[:3]]
    assert len(outer["0"]) == 3
    assert len(inner["0"]) == 2


# --- Layers that are replaced ---------------------------------------------------------------------------


class Nested(nn.Module):
    """Layers in a container that is called, and in one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.parts = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](self.seq(x))


class Lora(nn.Module):
    """Puts itself in the place of a layer, and calls it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 1


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = module

    def forward(self, x: Tensor) -> Tensor:
        return self._checkpoint_wrapped_module(x)


SWAPS: dict[str, tuple[str, Callable[[Nested], Any]]] = {
    "an item of a Sequential": ("seq.0", lambda n: n.seq.__setitem__(0, nn.Linear(4, 4))),
    "an item of a list": ("parts.0", lambda n: n.parts.__setitem__(0, nn.Linear(4, 4))),
    "a module around it": ("seq.0", lambda n: setattr(n, "seq", nn.Linear(4, 4))),
    "a list around it": (
        "parts.0",
        lambda n: setattr(n, "parts", nn.ModuleList([nn.Linear(4, 4)])),
    ),
    "by what calls it": ("seq.0", lambda n: n.seq.__setitem__(0, Lora(n.seq[0]))),
    "in the table": ("seq.0", lambda n: n.seq._modules.update({"0": nn.Linear(4, 4)})),
}


@pytest.mark.parametrize(("name", "swap"), SWAPS.values(), ids=SWAPS)
def test_a_layer_that_is_replaced_after_its_first_call_is_named(
    name: str, swap: Callable[[Nested], Any]
) -> None:
    model = Nested()
    with (
        pytest.warns(IncompleteLayerWarning, match=rf"1 of 2 layers.*\n  '{name}': from pass 2 on"),
        record(model, [name, ""]),
    ):
        for step in range(4):
            if step == 2:
                swap(model)
            model(X)


def test_a_layer_that_is_replaced_for_one_pass_is_named() -> None:
    model = Nested()
    layer = model.seq[0]
    with (
        pytest.warns(IncompleteLayerWarning, match="'seq.0': from pass 1 on"),
        record(model, nn.Linear),
    ):
        for other in (layer, nn.Linear(4, 4), layer):
            model.seq[0] = other
            model(X)


def test_a_model_whose_recorded_layers_stay_may_change_as_it_likes() -> None:
    model = Nested()
    with record(model, ["seq.0", "parts.0"]) as acts:
        model(X)
        model.seq[1] = nn.Tanh()
        model.extra = nn.Linear(2, 2)
        model.parts.append(nn.Linear(4, 4))
        model(X)
        model.seq[0] = Wrapper(Wrapper(model.seq[0]))
        model.parts[0] = nn.DataParallel(model.parts[0])
        model(X)
        with acts.pause():
            layer, model.seq[0] = model.seq[0], nn.Identity()
            model(X)
            model.seq[0] = layer
        model(X)
        model.seq[0] = model.parts[0] = nn.Linear(4, 4)  # after the last pass
    assert [len(layer) for layer in acts.values()] == [4, 4]


def test_a_layer_that_had_no_call_at_all_is_named_once() -> None:
    model = Nested()
    with (
        pytest.warns(UnusedLayerWarning, match="another module was put in its place") as caught,
        record(model, "seq.0"),
    ):
        model.seq[0] = nn.Linear(4, 4)
        model(X)
    assert len(caught) == 1


def test_a_copy_of_a_model_that_is_recorded_has_nothing_of_this() -> None:
    model = Nested()
    with record(model, nn.Linear):
        model(X)
        other = copy.deepcopy(model)
    other.seq[0] = nn.Linear(4, 4)
    other(X)


@pytest.mark.parametrize("inputs", [False, True])
def test_a_hook_that_comes_too_late_inside_a_pause_is_nothing_to_say(inputs: bool) -> None:
    def before(module: Told) -> None:
        if len(module.received) == 2:
            HOOKS["look"](module.inner[0])

    model = Told(Told(), before=before)
    with record(model, "inner.0", inputs=inputs) as acts:
        model(X.clone())
        with acts.pause():
            model(X.clone())
        model(X.clone())
    assert len(acts["inner.0"]) == 2


@pytest.mark.parametrize("inputs", [False, True])
def test_a_copy_of_the_hooks_alone_records_nothing(inputs: bool) -> None:
    model = nn.Identity()
    with record(model, "", inputs=inputs) as acts:
        for hook in copy.deepcopy(dict(model._forward_hooks)).values():
            assert hook(model, (X,), X) is None
        model(X)
    assert len(acts[""]) == 1


def test_an_input_transform_that_fails_on_what_a_late_hook_put_in_place_is_named() -> None:
    def refuse_shifted(given: dict[str, Tensor]) -> Tensor:
        if given["x"].sum() > 1000:
            raise ValueError("shifted")
        return given["x"]

    model = Told()
    with (
        pytest.raises(TransformError, match="ValueError") as raised,
        record(model, (), inputs={"": refuse_shifted}),
    ):
        model(X.clone())
        model.register_forward_pre_hook(lambda _module, args: (args[0] + 1000,))
        model(X.clone())  # too late: the outermost call looks up its hooks before it calls ours
    assert str(raised.value.__cause__) == "shifted"
