"""Recorded values are exactly what the layer returned, whatever is written to that tensor later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from actrec import CaptureError, TransformError, record
from actrec._values import snapshot as _snapshot

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True, params=["shared", "cloned"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds for tensors that are shared copy-on-write, and for those that are cloned."""
    if request.param == "cloned":
        monkeypatch.setattr(_snapshot, "lazy_clone", None)


def _set_item(t: Tensor) -> object:
    t[:] = 7
    return t


def _through_data(t: Tensor) -> object:
    return t.data.add_(3)


def _through_numpy(t: Tensor) -> object:
    t.detach().numpy()[...] = 5
    return t


def _through_view(t: Tensor) -> object:
    return t.view(-1)[::2].fill_(9)


def _as_out(t: Tensor) -> object:
    return torch.exp(torch.ones_like(t), out=t)


def _optimizer_step(t: Tensor) -> object:
    parameter = nn.Parameter(t)
    parameter.grad = torch.ones_like(t)
    return torch.optim.SGD([parameter], lr=1.0).step()


MUTATORS: dict[str, Callable[[Tensor], object]] = {
    "relu_": F.relu_,
    "inplace-module": nn.SiLU(inplace=True),
    "add_": lambda t: t.add_(1),
    "mul_": lambda t: t.mul_(-2),
    "setitem": _set_item,
    "zero_": Tensor.zero_,
    "data": _through_data,
    "numpy": _through_numpy,
    "view": _through_view,
    "out": _as_out,
    "dropout_": lambda t: F.dropout(t, 0.9, training=True, inplace=True),
    "optimizer": _optimizer_step,
    "resize_": lambda t: t.resize_(1).fill_(8),
}


class MutatesItsResult(nn.Module):
    """Writes to what its layer returned, and to what its layer received."""

    def __init__(self, mutate: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.mutate = mutate

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.mutate(out)
        self.mutate(x)
        return x


@pytest.mark.parametrize("mutate", MUTATORS.values(), ids=MUTATORS)
def test_outputs_and_inputs_stay_what_they_were_whatever_writes_to_them(
    mutate: Callable[[Tensor], object],
) -> None:
    model = MutatesItsResult(mutate)
    x = torch.randn(3, 4)
    expected_input = x.clone()
    with torch.no_grad():
        expected = F.linear(x, model.layer.weight, model.layer.bias)
        with record(model, "layer", inputs=True) as acts:
            model(x)
    assert torch.equal(acts["layer"][0], expected)
    assert torch.equal(acts.inputs["layer"][0]["input"], expected_input)


@pytest.mark.parametrize("mutate", MUTATORS.values(), ids=MUTATORS)
def test_writing_to_a_recorded_value_changes_nothing_else(
    mutate: Callable[[Tensor], object],
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Identity())
    x = torch.randn(3, 4)
    with torch.no_grad(), record(model) as acts:
        out = model(x)
    expected = out.clone()
    mutate(acts["0"][0])
    assert torch.equal(out, expected)
    assert torch.equal(acts["1"][0], expected)


class Returns(nn.Module):
    """Returns something of its own that the next step writes to."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.register_buffer("running", torch.zeros(2))
        self.buffer = torch.empty(2)

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "parameter":
                return self.weight
            case "buffer":
                self.running += 1
                return self.running
            case "reused out":
                return torch.mul(x, 2, out=self.buffer)
        return x


@pytest.mark.parametrize("what", ["parameter", "buffer", "reused out", "input"])
def test_a_layer_that_returns_its_own_state_is_recorded_step_by_step(what: str) -> None:
    model = Returns(what)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.zeros(2)
    seen: list[list[float]] = []
    with record(model, "") as acts:
        for _ in range(3):
            with torch.set_grad_enabled(what == "parameter"):
                seen.append(model(x).detach().clone().tolist())
            model.weight.grad = torch.ones(2)
            optimizer.step()
            x += 1
    assert [value.tolist() for value in acts[""]] == seen
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Identity(),
        nn.Dropout(0.5).eval(),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Sequential(),
        nn.ReLU(inplace=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_returns_its_input_is_recorded_as_a_value_of_its_own(layer: nn.Module) -> None:
    x = torch.randn(3, 4)
    with record(nn.Sequential(layer), "0") as acts:
        out = layer(x)
    expected = out.clone()
    x.fill_(5)
    assert torch.equal(acts["0"][0], expected)


def _held(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class Takes(nn.Module):
    """Returns a part or a view of a larger tensor."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        return self.view(x)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda t: t[:, 0],
    "last token": lambda t: t[:, -1:],
    "chunk": lambda t: t.chunk(4)[0],
    "strided": lambda t: t[..., ::3],
    "transposed": lambda t: t.mT,
    "permuted slice": lambda t: t.permute(2, 0, 1)[1:3],
    "as_strided overlap": lambda t: t.as_strided((2, 3), (1, 1)),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_part_of_a_tensor_is_kept_without_the_rest(view: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 10, 6)
    model = Takes(view)
    expected = view(x).clone()
    with record(model, "") as acts:
        model(x)
    x.zero_()
    (value,) = acts[""]
    assert torch.equal(value, expected)
    assert value.stride() == expected.stride()
    assert _held(value) == value.nbytes == acts.nbytes


def test_a_transform_that_takes_a_slice_keeps_only_the_slice() -> None:
    model = nn.Linear(6, 6)
    with record(model, "", transform=lambda t: t[:, -1]) as acts:
        model(torch.randn(4, 10, 6))
    assert _held(acts[""][0]) == 4 * 6 * 4


def test_an_expanded_tensor_is_kept_at_the_size_of_what_it_repeats() -> None:
    x = torch.randn(1, 8)
    model = Takes(lambda t: t.expand(100_000, 8))
    with record(model, "") as acts:
        model(x)
    expected = x.clone()
    x.zero_()
    assert torch.equal(acts[""][0], expected.expand(100_000, 8))
    assert _held(acts[""][0]) == 32


def test_numpy_arrays_that_share_the_tensor_cannot_reach_the_record() -> None:
    array = np.zeros(3, dtype=np.float32)
    out = torch.zeros(3)
    alias = out.numpy()
    for tensor, writer in ((torch.from_numpy(array), array), (out, alias)):
        model = nn.Identity()
        with record(model, "") as acts:
            model(tensor)
        writer[:] = 7
        assert acts[""][0].tolist() == [0, 0, 0]
        assert tensor.tolist() == [7, 7, 7], "and the array still writes to the tensor"


def test_memory_that_other_processes_share_is_recorded() -> None:
    shared = torch.ones(3).share_memory_()
    model = nn.Identity()
    with record(model, "") as acts:
        model(shared)
    shared.zero_()
    assert acts[""][0].tolist() == [1, 1, 1]


EXOTIC: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.randn(3, 3).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(3, 2), 0.1, 0, torch.qint8),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.randn(2, 3), torch.randn(1, 3)], layout=torch.jagged
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)]),
    "conj": lambda: torch.randn(3, 2, dtype=torch.complex64).conj(),
    "neg": lambda: torch.randn(3, 2, dtype=torch.complex64).conj().imag,
    "bool": lambda: torch.tensor([[True, False]]),
    "int": lambda: torch.arange(6).view(2, 3),
    "0-dim": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 3),
    "bfloat16": lambda: torch.randn(3, 2).bfloat16(),
    "float8": lambda: torch.randn(3, 2).to(torch.float8_e4m3fn),
    "complex": lambda: torch.randn(3, 2, dtype=torch.complex64),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "negative zero and NaN": lambda: torch.tensor([[-0.0, float("nan"), float("inf")]]),
    "vector": lambda: torch.randn(3),
    "neg of the whole": lambda: torch._neg_view(torch.randn(2, 3)),
}


def _dense(tensor: Tensor) -> list[Tensor]:
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_quantized:
        return [tensor.int_repr()]
    return [tensor.to_dense() if tensor.layout is not torch.strided else tensor]


def _bits(tensor: Tensor) -> list[int]:
    """Every byte, so that -0.0 is not 0.0 and NaN equals itself."""
    resolved = tensor.resolve_conj().resolve_neg().contiguous()
    return resolved.flatten().view(torch.uint8).tolist() if resolved.numel() else []


# torch announces with these that it will drop or change the feature; it is recorded while it is there.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("make", EXOTIC.values(), ids=EXOTIC)
def test_a_tensor_of_any_kind_is_recorded_as_it_is(make: Callable[[], Tensor]) -> None:
    tensor = make()
    model = nn.Identity()
    with record(model, "") as acts:
        model(tensor)
    (value,) = acts[""]
    assert (value.dtype, value.layout) == (tensor.dtype, tensor.layout)
    for recorded, returned in zip(_dense(value), _dense(tensor), strict=True):
        assert _bits(recorded) == _bits(returned)
    assert repr(acts).count("\n") == 2
    assert acts.nbytes >= 0


def test_meta_tensors_are_kept_as_shapes() -> None:
    model = nn.Linear(4, 3, device="meta")
    with record(model, "") as acts:
        model(torch.empty(2, 4, device="meta"))
    assert acts[""][0].device.type == "meta"
    assert acts[""][0].shape == (2, 3)


class Scaled(torch.Tensor):
    """A tensor subclass, as libraries have them."""


def test_a_tensor_subclass_stays_one() -> None:
    tensor = torch.ones(3).as_subclass(Scaled)
    model = nn.Identity()
    with record(model, "") as acts:
        model(tensor)
    tensor.zero_()
    assert type(acts[""][0]) is Scaled
    assert acts[""][0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_probe_can_train_on_what_was_recorded_in_any_mode(mode: Callable[[], Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0), nn.Unflatten(0, (5, 3)))
    with mode(), record(model, inputs=True) as acts:
        model(torch.randn(5, 4))
    for value in (*(acts[name][0] for name in acts), acts.inputs["0"][0]["input"]):
        assert not value.is_inference()
        assert not value.requires_grad
        probe = nn.Linear(value.shape[-1], 1)
        probe(value).sum().backward()
        value.add_(1).requires_grad_()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_transform_runs_in_a_clean_room(mode: Callable[[], Any]) -> None:
    seen = []

    def transform(t: Tensor) -> Tensor:
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )
        return t.float() @ t.float().T

    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0), nn.Unflatten(0, (5, 3)))[:1]
    with (
        mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        record(model, "0", transform=transform) as acts,
    ):
        model(torch.randn(5, 4))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False, False)]
    assert acts["0"][0].dtype == torch.float32
    assert not acts["0"][0].is_inference()


def test_under_autocast_the_dtype_is_the_one_that_was_produced() -> None:
    model = nn.Linear(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), record(model, "") as acts:
        out = model(torch.randn(5, 4))
    assert acts[""][0].dtype == out.dtype == torch.bfloat16
    assert torch.equal(acts[""][0], out)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_transform_may_write_to_a_value_that_was_copied_for_it(
    mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(5, 4)
    with mode():
        expected = model(x)
        with record(model, "", transform=lambda t: t.relu_()) as acts:
            assert torch.equal(model(x), expected)
    assert torch.equal(acts[""][0], expected.relu())


def _less_five(t: Tensor) -> Tensor:
    array = t.numpy()
    array -= 5
    return t


@pytest.mark.parametrize(
    "write", [_less_five, lambda t: t.data.sub_(5), lambda t: t.sub_(5)], ids=["numpy", "data", "_"]
)
@pytest.mark.parametrize(
    "view", [Tensor.flatten, lambda t: t[:, :90], lambda t: t], ids=["vector", "slice", "whole"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_transform_cannot_write_to_what_the_model_goes_on_with(
    mode: Callable[[], Any], view: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]
) -> None:
    model = Takes(view)
    x = torch.randn(100, 100)
    with mode():
        expected = model(x).clone()
        with record(model, "", transform=write) as acts:
            assert torch.equal(model(x), expected)
    assert torch.equal(acts[""][0], expected - 5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_transform_that_writes_to_the_models_own_tensor_on_a_device_is_an_error(
    mode: Callable[[], Any],
) -> None:
    model = Takes(lambda t: t[:, :2])
    with (
        mode(),
        pytest.raises(TransformError, match="layer ''"),
        record(model, "", transform=torch.relu_),
    ):
        model(torch.randn(5000, 4, device="meta"))


def test_a_transform_reads_a_large_value_on_a_device_as_it_is() -> None:
    model = Takes(lambda t: t[:, :2])
    with record(model, "", transform=torch.t) as acts:
        model(torch.randn(5000, 4, device="meta"))
    assert acts[""][0].shape == (2, 5000)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_transform_reads_a_large_slice(
    mode: Callable[[], Any],
) -> None:
    model = Takes(lambda t: t[:, :2])
    x = torch.randn(5000, 4)
    with mode(), record(model, "", transform=torch.sum) as acts:
        model(x)
    assert torch.equal(acts[""][0], x[:, :2].clone().sum())


def test_a_transform_that_draws_random_numbers_leaves_the_models_stream_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(5, 4)
    torch.manual_seed(1)
    expected = [model(x), model(x)]
    torch.manual_seed(1)
    with record(model, transform=lambda t: t[torch.randperm(5)]):
        assert all(torch.equal(model(x), one) for one in expected)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
@pytest.mark.parametrize(
    "options", [{}, {"transform": torch.sum}, {"dtype": torch.float64}, {"inputs": True}]
)
def test_inside_torch_func_recording_refuses_by_name(
    transform: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]],
    options: dict[str, Any],
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(CaptureError, match="call 0 of layer '1'"), record(model, "1", **options):
        transform(lambda x: model(x).sum())(
            torch.randn(3) if transform is torch.func.grad else torch.randn(2, 3)
        )


def test_device_and_dtype_say_where_and_as_what_values_are_kept() -> None:
    model = nn.Sequential(
        nn.Linear(4, 3), Takes(lambda t: (t, t > 0, t.to(torch.complex64), torch.arange(3)))
    )  # type: ignore[arg-type,return-value]
    with record(model, dtype=torch.float16) as acts:
        model(torch.randn(5, 4))
    assert acts["0"][0].dtype == torch.float16
    assert [t.dtype for t in acts["1"][0]] == [
        torch.float16,
        torch.bool,
        torch.complex64,
        torch.int64,
    ]
    with record(model, "0", device="meta", inputs=True) as acts:
        model(torch.randn(5, 4))
    assert acts["0"][0].device.type == acts.inputs["0"][0]["input"].device.type == "meta"
    with record(model, "0", device=None) as acts:
        model(torch.randn(5, 4))
    assert acts["0"][0].device.type == "cpu"


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float64}, {"dtype": torch.float32}, {}], ids=str
)
def test_without_detach_gradients_flow_through_recorded_values(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    with record(model, "0", detach=False, **options) as acts:
        model(x)
    reference = F.linear(x, model[0].weight, model[0].bias).square().sum()
    expected = torch.autograd.grad(reference, [model[0].weight])[0]
    (got,) = torch.autograd.grad(acts["0"][0].square().sum(), [model[0].weight])
    assert torch.allclose(got, expected)


def test_sharing_memory_does_not_get_in_the_way_of_any_backward() -> None:
    # The backward of ctc_loss is the one operator that cannot read memory that is shared.
    loss = nn.CTCLoss(reduction="none")
    x = torch.randn(10, 3, 5, requires_grad=True)
    with record(loss, "", inputs=True, transform=torch.clone) as acts:
        out = loss(x.log_softmax(-1), torch.randint(1, 5, (3, 4)), (10,) * 3, (4,) * 3)
    out.sum().backward()
    assert torch.equal(acts[""][0], out)


def test_a_tensor_that_fills_its_memory_is_shared_until_somebody_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    model = nn.Linear(64, 128)
    with record(model, "") as acts:
        out = model(torch.randn(64, 64))
    address = torch._C._data_address  # data_ptr() would end the sharing
    assert address(acts[""][0]) == address(out)
    out.detach().add_(1)
    assert address(acts[""][0]) != address(out)
    assert not torch.equal(acts[""][0], out)


# --- Modes ---------------------------------------------------------------------------------------------


class Twice(TorchFunctionMode):
    """Doubles what functions return, and counts them."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.doubled(func(*args, **(kwargs or {})))

    @classmethod
    def doubled(cls, result: Any) -> Any:
        is_number = isinstance(result, Tensor) and result.is_floating_point()
        cls.count += is_number
        return result * 2 if is_number else result


class TwiceBelow(TorchDispatchMode):
    """Doubles what operators return, and counts them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Twice.doubled(func(*args, **(kwargs or {})))


class InMode(nn.Module):
    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            return self.linear(x).relu().tanh()


@pytest.mark.parametrize("mode", [Twice, TwiceBelow])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float64},
        {"transform": lambda t: t.add(0)},
        {"detach": False},
        {"grads": True},
    ],
    ids=["as it is", "cast", "transformed", "in the graph", "gradients"],
)
def test_modes_of_the_users_neither_see_nor_change_what_is_recorded(
    mode: Any, options: dict[str, Any]
) -> None:
    model, x, held = InMode(mode), torch.randn(2, 3), []
    handle = model.linear.register_forward_hook(lambda _, __, out: held.append(out.tolist()))
    before = Twice.count
    output = model(x)
    alone = Twice.count - before
    handle.remove()
    with record(model, ["linear", ":relu"], inputs=True, **options) as acts:
        assert torch.equal(model(x), output)
    assert Twice.count - before == 2 * alone
    assert acts["linear"][0].tolist() == held[0]
    assert torch.equal(acts.inputs["linear"][0]["input"].to(x.dtype), x)
