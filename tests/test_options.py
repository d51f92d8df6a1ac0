"""The options of ``record()``: what they do, and what is said of values that cannot be meant."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from actrec import ActrecError, Opaque, OptionError, TransformError, record
from actrec._values.modes import UNCONCERNED
from tests.conftest import own_hooks

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.arange(8.0).reshape(2, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))


class Two(nn.Module):
    """Returns a tensor and something beside it."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"double": x * 2}


# --- Values that cannot be meant ---------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "transform": (
        {"transform": 3},
        ["transform=3", "function of the value", "lambda t: t.mean(1)"],
    ),
    "flag by word": ({"detach": "no"}, ["detach='no'", "expected True or False"]),
    "transform by name": ({"transform": "mean"}, ["transform='mean'", "function of the value"]),
    "into a container": ({"into": []}, ["into=[]", "function that makes a container", "append()"]),
    "into a number": ({"into": 3}, ["into=3", "such as list", "or a path"]),
    "into a set": ({"into": set}, ["into=<class 'set'>", "append()", "deque, maxlen=10"]),
    "into nothing": ({"into": None}, ["into=None", "append()"]),
    "device": ({"device": "gpu"}, ["device='gpu'", "None keeps values where they are"]),
    "device of another kind": ({"device": 1.5}, ["device=1.5", "None keeps values where they are"]),
    "dtype of integers": ({"dtype": torch.int8}, ["dtype=torch.int8", "torch.float16, or None"]),
    "dtype of complex": ({"dtype": torch.cfloat}, ["dtype=torch.complex64", "floating-point"]),
    "dtype by name": ({"dtype": "float16"}, ["dtype='float16'", "such as torch.float16"]),
    "dtype of Python": ({"dtype": float}, ["dtype=<class 'float'>", "such as torch.float16"]),
}


@pytest.mark.parametrize(("options", "pieces"), WRONG.values(), ids=WRONG)
def test_a_value_that_cannot_be_meant_is_refused_before_a_hook_is_placed(
    options: dict[str, Any], pieces: list[str]
) -> None:
    model = net()
    with pytest.raises(OptionError) as caught, record(model, **options):
        pytest.fail("entered")
    message = str(caught.value)
    assert message.startswith("record("), message
    assert [piece for piece in pieces if piece not in message] == [], message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ActrecError)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"record\(device='cuda:99'\): .*[^.]\. None keeps values"
    ):
        record(net(), device="cuda:99")


@pytest.mark.parametrize("device", ["gpu", "GPU:1", "nvidia"])
def test_a_gpu_has_another_name(device: str) -> None:
    with pytest.raises(OptionError, match=r"PyTorch calls the first GPU 'cuda'\. None keeps"):
        record(net(), device=device)


def test_options_have_names() -> None:
    with pytest.raises(OptionError, match="options by name, such as transform="):
        record(net(), None, torch.relu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer'"):
        record(net(), layer="0")  # type: ignore[call-arg]


def test_what_a_factory_raises_passes_through_and_no_hook_stays() -> None:
    model = net()
    with pytest.raises(ZeroDivisionError), record(model, into=lambda: 1 / 0):
        pytest.fail("entered")
    assert not any(module._forward_hooks for module in model.modules())


# --- transform ---------------------------------------------------------------------------------------

TRANSFORMS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "pooling": (lambda v: v[0].mean(1), X.mean(1)),
    "slicing": (lambda v: v[0][:, -1], X[:, -1]),
    "selecting": (lambda v: v[1]["double"], X * 2),
    "many": (lambda v: {"first": v[0][0], "last": v[0][1]}, {"first": X[0], "last": X[1]}),
    "number": (lambda v: v[0].sum().item(), 28.0),
    "nothing but numbers": (lambda v: tuple(v[0].shape), (2, 4)),
    "itself": (lambda v: v[0], X),
    "casting": (lambda v: v[0].half(), X.half()),
}


@pytest.mark.parametrize(("transform", "expected"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_a_transform_returns_is_recorded_in_place_of_the_value(
    transform: Callable[[Any], Any], expected: Any
) -> None:
    model = Two()
    with record(model, "", transform=transform) as acts:
        out, more = model(X)
    (value,) = acts[""]
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert out is X
    assert torch.equal(more["double"], X * 2), "the model's result is its own"


def test_a_transform_applies_to_outputs_alone_and_comes_before_device_and_dtype() -> None:
    seen: list[tuple[torch.device, torch.dtype]] = []

    def transform(t: Tensor) -> Tensor:
        seen.append((t.device, t.dtype))
        return t[0]

    model = nn.Identity()
    with record(
        model, "", transform=transform, inputs=True, dtype=torch.float64, device="meta"
    ) as acts:
        model(X)
    assert seen == [(torch.device("cpu"), torch.float32)]
    assert (acts[""][0].shape, acts[""][0].dtype) == ((4,), torch.float64)
    assert acts[""][0].is_meta
    assert acts.inputs[""][0]["input"].shape == X.shape


def test_what_a_transform_keeps_for_itself_does_not_change_with_the_model() -> None:
    kept: list[Tensor] = []
    model = net()
    with record(model, "0", transform=lambda t: kept.append(t) or t.sum()) as acts:
        model(X)
    assert torch.equal(kept[0].sum(), acts["0"][0])
    assert (kept[0] < 0).any(), "the model has set those to 0"


def test_a_transform_that_returns_what_it_returned_before_is_recorded_each_time() -> None:
    total = torch.zeros(3)
    model = net()
    with record(model, "0", transform=lambda t: total.add_(t.sum(0))) as acts:
        model(X)
        model(X)
    assert torch.equal(acts["0"][1], total)
    assert torch.equal(acts["0"][0] * 2, total), "as it was then"


def test_a_transform_counts_its_calls_by_layer() -> None:
    calls = 0

    def third_time(t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise IndexError("third")
        return t

    model = net()
    with record(model, {"0": None, "2": third_time}) as acts:
        model(X)
        model(X)
        with pytest.raises(TransformError, match="layer '2' raised IndexError on call 2: third"):
            model(X)
    assert [len(one) for one in acts.values()] == [3, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_a_transform_passes_through_as_it_is(
    error: type[BaseException],
) -> None:
    def interrupt(t: Tensor) -> Tensor:
        raise error

    model = net()
    with pytest.raises(error), record(model, {"0": None, "2": interrupt}) as acts:
        model(X)
    assert [len(one) for one in acts.values()] == [1, 0]


def test_a_method_a_class_and_a_module_may_be_transforms() -> None:
    model = net()
    for transform in (Tensor.sum, torch.sum, nn.Flatten(0), partial(torch.mean, dim=0)):
        with record(model, "0", transform=transform) as acts:
            model(X)
        with record(model, "0") as plain:
            model(X)
        assert torch.equal(acts["0"][0], transform(plain["0"][0]))


def test_with_detach_off_a_transform_is_part_of_the_graph() -> None:
    model = net()
    with record(model, "0", transform=lambda t: t.square().mean(), detach=False) as acts:
        model(X)
    (grad,) = torch.autograd.grad(acts["0"][0], [model[0].weight])
    expected = nn.functional.linear(X, model[0].weight, model[0].bias).square().mean()
    assert torch.allclose(grad, torch.autograd.grad(expected, [model[0].weight])[0])


# --- inputs ------------------------------------------------------------------------------------------


def test_inputs_are_values_of_their_own_and_line_up_with_the_outputs() -> None:
    model = net()
    x = X.clone()
    with record(model, ["1", "2"], inputs=True) as acts:
        for step in range(2):
            model(x + step)
    x.zero_()
    assert list(acts.inputs) == ["1", "2"]
    assert all(map(torch.equal, (i["input"].relu() for i in acts.inputs["1"]), acts["1"]))
    assert all(map(torch.equal, (i["input"] for i in acts.inputs["2"]), acts["1"]))
    assert (acts.inputs["1"][0]["input"] < 0).any(), "from before the in-place ReLU"
    assert acts.inputs["1"].passes == acts["1"].passes == [0, 1]


def test_inputs_are_found_under_every_name_of_a_layer() -> None:
    model = nn.DataParallel(net())
    with record(model, "0", inputs=True) as acts:
        model(X)
    assert acts.inputs["module.0"] is acts.inputs["0"]


def test_a_skipped_call_has_no_inputs_either() -> None:
    model = net()
    with record(
        model, "2", transform=lambda t: None if t.shape[0] == 1 else t, inputs=True
    ) as acts:
        for batch in (X, X[:1], X):
            model(batch)
    assert [len(given["input"]) for given in acts.inputs["2"]] == [2, 2]


def test_inputs_that_are_objects_become_placeholders() -> None:
    class TakesAny(nn.Module):
        def forward(self, x: Tensor, cache: object, flag: bool = True) -> Tensor:
            return x

    model = TakesAny()
    with record(model, "", inputs=True) as acts:
        model(X, object(), flag=False)
    given = acts.inputs[""][0]
    assert (given["cache"], given["flag"]) == (Opaque("object"), False)


def test_inputs_keep_the_graph_where_outputs_do() -> None:
    model = net()
    for detach in (True, False):
        with record(model, "2", inputs=True, detach=detach) as acts:
            model(X)
        assert acts.inputs["2"][0]["input"].requires_grad is not detach
        assert acts["2"][0].requires_grad is not detach


# --- detach, device, dtype ---------------------------------------------------------------------------


def test_detached_is_the_default_and_keeps_nothing_of_the_graph() -> None:
    model = net()
    with record(model) as acts:
        model(X)
    for one in acts.values():
        assert not one[0].requires_grad
        assert one[0].grad_fn is None
        assert one[0].is_leaf


def test_kept_graphs_give_the_gradients_of_the_model_and_do_not_change_them() -> None:
    model = net()
    model(X).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with record(model, detach=False) as acts:
        model(X)
    acts["2"][0].sum().backward()
    assert all(map(torch.equal, (p.grad for p in model.parameters()), expected))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta", None])
def test_a_device_may_be_named_in_every_way(device: Any) -> None:
    model = net()
    with record(model, "0", device=device) as acts:
        model(X)
    assert acts["0"][0].device == torch.device(device or "cpu")


def test_meta_tensors_stay_where_they_are_whatever_the_device() -> None:
    model = nn.Identity()
    with record(model, "", device="cpu", dtype=torch.float16) as acts:
        model(torch.empty(3, device="meta"))
    assert acts[""][0].is_meta
    assert acts[""][0].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_floating_point_values_are_cast_and_others_are_not(dtype: torch.dtype) -> None:
    others = [torch.arange(2), torch.tensor([True]), torch.zeros(1, dtype=torch.complex64)]
    model = nn.Identity()
    with record(model, "", dtype=dtype, inputs=True) as acts:
        for value in (X, X.half(), *others):
            model(value)
    dtypes = [dtype, dtype, torch.int64, torch.bool, torch.complex64]
    assert [value.dtype for value in acts[""]] == dtypes
    assert [given["input"].dtype for given in acts.inputs[""]] == dtypes
    assert torch.equal(acts[""][0], X.to(dtype))


def test_a_cast_value_is_compact_and_safe_too() -> None:
    x = torch.randn(4, 1000)
    model = nn.Identity()
    with record(model, "", dtype=torch.float64) as acts:
        model(x[:, 0])
    expected = x[:, 0].double()
    x.zero_()
    assert torch.equal(acts[""][0], expected)
    assert acts.nbytes == 4 * 8


def test_under_inference_mode_cast_values_are_normal_tensors() -> None:
    model = net()
    with torch.inference_mode(), record(model, "0", dtype=torch.float64) as acts:
        model(X)
    assert not acts["0"][0].is_inference()
    acts["0"][0].requires_grad_().sum().backward()


# --- into --------------------------------------------------------------------------------------------


class Printer(list):
    """A list subclass, which is a container like any other."""


@pytest.mark.parametrize("into", [list, deque, partial(deque, maxlen=5), Printer])
def test_any_factory_of_anything_with_append_will_do(into: Callable[[], Any]) -> None:
    model = net()
    with record(model, "0", into=into, inputs=True) as acts:
        model(X)
        model(X)
    assert len(acts["0"]) == len(acts.inputs["0"]) == 2
    assert acts["0"].cat().shape == (4, 3)
    assert acts["0"].passes == [0, 1]


def test_values_reach_a_container_as_they_are_computed() -> None:
    seen: list[int] = []

    class Counts:
        def append(self, value: Tensor) -> None:
            seen.append(len(value))

    model = net()
    with record(model, ["0", "2"], into=Counts):
        model(X)
        assert seen == [2, 2]
        model(X[:1])
    assert seen == [2, 2, 1, 1]


# --- What is not chosen ------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts the operations that copy a tensor."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        copies = {torch.ops.aten.clone, torch.ops.aten._lazy_clone, torch.ops.aten._to_copy}
        self.count += func.overloadpacket in copies
        return func(*args, **(kwargs or {}))


UNCONCERNED.add(Copies)  # or else it would see nothing of what actrec does


@pytest.mark.parametrize(
    ("layers", "parents"), [("2.0", {"", "2"}), (["0", "3"], {""}), ("**", {"", "2"})]
)
def test_a_layer_that_is_not_chosen_is_not_copied_and_hooked_only_on_the_way_to_one(
    layers: Any, parents: set[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)), nn.ReLU())
    with record(model, layers) as acts:
        hooked = {name for name, module in model.named_modules() if own_hooks(module)}
        with Copies() as copies:
            model(X)
    assert hooked == {*acts} | parents
    assert copies.count == len(acts)


def test_a_container_that_holds_something_already_is_refused() -> None:
    with (
        pytest.raises(OptionError, match=r"the list that it made holds 1 items already"),
        record(nn.Linear(4, 4), "", into=lambda: [1]),
    ):
        pass


def test_a_transform_takes_out_of_an_object_what_is_wanted() -> None:
    class Cache:
        def __init__(self, x: torch.Tensor) -> None:
            self.keys = [x]

    class Caching(nn.Module):
        def forward(self, x: torch.Tensor) -> Cache:
            return Cache(x)

    model = Caching()
    with record(model, "", transform=lambda cache: cache.keys) as acts:
        model(torch.ones(2))
    assert acts[""][0][0].tolist() == [1, 1]


def test_a_function_that_makes_lists_makes_real_lists() -> None:
    model = nn.Linear(4, 4)
    with record(model, "", into=lambda: []) as acts:  # noqa: PIE807  # not list itself
        model(torch.ones(2, 4))
    assert torch.equal(torch.cat(acts[""]), acts[""].cat())  # type: ignore[arg-type]


def test_inputs_of_a_call_outside_of_any_forward_are_a_pass_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with record(model, "0", inputs=True) as acts:
        model[0](torch.ones(2, 4))
        model(torch.ones(2, 4))
    assert acts.inputs["0"].passes == acts["0"].passes == [0, 1]
