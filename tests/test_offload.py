"""Values that come from a device while the model goes on: never unfinished, never another call's, never lost.

There is no GPU here. A stand-in copies only when somebody waits, and poisons what nobody waited for.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import deque
from contextlib import nullcontext
from functools import partial
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from actrec import CaptureError, OverflowWarning, TransformError, WriteError, load, record
from actrec._calls import device as cuda
from actrec._calls import transfer
from actrec._calls.passes import Passes
from actrec._calls.sink import SinkLayer
from actrec._calls.transfer import Offload
from actrec.store.writer import Writer
from tests.stand_in import POISON, StandIn, standing_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = torch.linspace(-1, 1, 12).reshape(3, 4)
CPU = torch.device("cpu")


@pytest.fixture
def device() -> StandIn:
    return StandIn()


@pytest.fixture
def _stands_in(device: StandIn) -> Iterator[None]:
    with standing_in(device):
        yield


in_place_of_a_gpu = pytest.mark.usefixtures("_stands_in")


class Net(nn.Module):
    """Writes in place to whatever its layers return, right behind them, also past PyTorch's counters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.pair = Pair()
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh()))
        self.one = One()
        self.fail = False
        self.between: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        x.data.mul_(-2)
        self.between()
        x = self.relu(x)
        y, rest = self.pair(x)
        y += 1
        rest["x"].zero_()
        self.between()
        if self.fail:
            message = "the model fails"
            raise ValueError(message)
        self.one(y)
        z = self.tail(y)
        z.detach().exp_()
        return z


class Pair(nn.Module):
    """Returns nested tensors: one of no elements, one twice, one that is not contiguous, one expanded."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        wide = x.new_ones(4, 1).expand(4, 5) * 1
        rest = {"x": x * 3, "t": (x * 2).t(), "empty": x[:0], "wide": wide[:, :1].expand(4, 7)}
        return x + 1, {**rest, "again": rest["x"], "name": "pair"}


class One(nn.Module):
    """Returns one dimension: for the stand-in, a tensor on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


def assert_same(acts: Any, reference: Any) -> None:
    for name in reference:
        assert acts[name].passes == reference[name].passes, name
        assert same([*acts[name]], [*reference[name]]), name


def interrupt() -> None:
    raise KeyboardInterrupt


# --- Right values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("budget", [100, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"inputs": True}, {"dtype": torch.float64}])
def test_values_are_what_the_layers_returned_whatever_the_model_does_to_them_at_once(
    mode: Any, quick: bool, budget: int, options: dict[str, Any], device: StandIn
) -> None:
    device.is_quick = lambda: quick
    net = Net()
    with mode(), record(net, "**", **options) as reference:
        outputs = [net(X), net(2 * X)]
    with standing_in(device, budget), mode(), record(net, "**", **options) as acts:
        assert same([net(X), net(2 * X)], outputs)
        assert_same(acts, reference)
    assert_same(acts, reference)
    if options == {"inputs": True}:
        assert_same(acts.inputs, reference.inputs)
    assert 0 < device.peak <= budget
    assert device.pinned_bytes == 0
    assert not any(t.is_inference() for t in acts["a"])
    before = acts["tail.1"][0].clone()  # which is what tail returned, and tail.1.0
    acts["tail"][0].zero_()
    assert torch.equal(acts["tail.1"][0], before)


LAYERS = ["a", "relu", "tail", "tail.**", "one", "pair"]
STEPS = ["pass", "fail", "look", "pause", "clear", "thread", "outside"]


class Schedule:
    """Does to a recording, step by step, what a user may do, and notes what can be seen."""

    def __init__(self, net: Net, acts: Any, between: str) -> None:
        self.net, self.acts = net, acts
        self.held = [acts["a"], acts["tail"]]
        self.seen: list[Any] = []
        net.between = {"nothing": lambda: None, "look": self.look, "held": self.look_at_held}[
            between
        ]

    def look(self) -> None:
        self.seen.append({name: [*layer] for name, layer in self.acts.items()})

    def look_at_held(self) -> None:
        """Inside a pass its latest calls may be missing in a list that one holds, and none is unfinished."""
        for value in self.held[0]:
            assert value.shape == X.shape

    def run(self, steps: list[str]) -> list[Any]:
        for number, step in enumerate(steps):
            getattr(self, f"do_{step}")(X * (number + 1))
            # Without asking: the lists are complete whenever no pass is running.
            self.seen.append([[*layer, layer.passes] for layer in self.held])
        return self.seen

    def do_pass(self, x: Tensor) -> None:
        self.net(x)

    def do_fail(self, x: Tensor) -> None:
        self.net.fail = True
        with pytest.raises(ValueError, match="the model fails"):
            self.net(x)
        self.net.fail = False

    def do_look(self, _: Tensor) -> None:
        self.look()

    def do_pause(self, x: Tensor) -> None:
        with self.acts.pause():
            self.net(x)

    def do_clear(self, _: Tensor) -> None:
        self.acts.clear()

    def do_thread(self, x: Tensor) -> None:
        inference = torch.is_inference_mode_enabled()

        def work() -> None:
            with torch.inference_mode(inference):
                self.net(x)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    def do_outside(self, x: Tensor) -> None:
        self.net.a(x)


@given(
    st.lists(st.sampled_from(STEPS), max_size=8),
    st.sampled_from([16, 64, 100, 4096]),
    st.sampled_from(["nothing", "look", "held"]),
    st.one_of(st.none(), st.integers(0, 1000)),
    st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]),
)
@example(["pass"], 4096, "nothing", 0, torch.inference_mode)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_one_does_one_sees_what_one_would_see_without_a_device(
    steps: list[str], budget: int, between: str, seed: int | None, mode: Any
) -> None:
    device, random = StandIn(), Random(seed)  # noqa: S311  # a schedule, no secret
    device.is_quick = lambda: seed is not None and random.random() < 0.5
    net = Net()
    with mode(), record(net, LAYERS) as reference:
        net(X)
        expected = Schedule(net, reference, between).run(steps)
    net.between = lambda: None
    with standing_in(device, budget), mode(), record(net, LAYERS) as acts:
        net(X)
        assert same(Schedule(net, acts, between).run(steps), expected)
    assert_same(acts, reference)
    assert device.peak <= budget


@in_place_of_a_gpu
def test_the_models_results_and_its_gradients_are_the_same() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    expected = net(X).sum()
    gradient = torch.autograd.grad(expected, net[0].weight)
    with record(net, grads=True) as acts:
        layer = acts.grads["0"]
        loss = net(X).sum()
        assert torch.equal(torch.autograd.grad(loss, net[0].weight)[0], gradient[0])
        assert layer[0].shape == (3, 4)  # moved at once: a backward has no end to wait at
    assert torch.equal(loss, expected)
    assert acts.grads["0"][0].shape == acts["0"][0].shape
    assert not acts["0"][0].requires_grad


@in_place_of_a_gpu
def test_a_gradient_inside_a_pass_comes_to_its_own_call() -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.layer(x), self.layer(2 * x)
            torch.autograd.grad((3 * first + 5 * second).sum(), self.layer.weight)
            return first

    net = Penalized()
    with record(net, "layer", grads=True) as acts:
        net(X)
        net(X)
    assert [float(grad.mean()) for grad in acts.grads["layer"]] == [3, 5, 3, 5]
    assert torch.equal(acts["layer"][1], acts["layer"][3])


def test_many_threads_do_not_mix_up_their_values(device: StandIn) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    expected = {n: net[0](X * n) for n in range(40)}
    device.on_wait = lambda: threading.Event().wait(1e-5)

    def work(numbers: range) -> None:
        for n in numbers:
            net(X * n)

    with standing_in(device, budget=256), torch.no_grad(), record(net) as acts:
        threads = [threading.Thread(target=work, args=(range(i, 40, 4),)) for i in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert all(t.numel() for t in [*acts["0"]])
        for thread in threads:
            thread.join()
    assert sorted(acts["0"].passes) == [*range(40)]
    for values, relus in zip(acts["0"], acts["1"], strict=True):
        assert values.shape == relus.shape
    found = {tuple(t.flatten().tolist()) for t in acts["0"]}
    assert found == {tuple(t.flatten().tolist()) for t in expected.values()}


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4, dtype=torch.complex64).conj(),
        torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 4)[:, ::2],
        torch.randn(3, 1).expand(3, 9),
        torch.tensor(3.0),
        torch.randn(3, 0),
        torch.randn(3, 3) > 0,
        torch.randn(3, 3).bfloat16(),
        torch.randn(3, 3).to(torch.float8_e4m3fn),
        nn.Parameter(torch.randn(2, 2)),
    ],
)
def test_every_kind_of_plain_tensor_arrives_as_it_was_and_as_small_as_it_is(
    value: Tensor, device: StandIn
) -> None:
    with standing_in(device), record(nn.Identity(), "") as acts:
        acts._tracks.of[""].keep(value, 0)
    with record(nn.Identity(), "") as reference:
        reference._tracks.of[""].keep(value, 0)
    (arrived,), (expected,) = acts[""], reference[""]
    assert arrived.stride() == expected.stride()
    assert arrived.dtype == expected.dtype
    assert str(arrived) == str(expected)
    assert arrived.untyped_storage().nbytes() <= max(expected.untyped_storage().nbytes(), 0)
    assert not arrived.requires_grad
    assert sum(device.copied) == arrived.untyped_storage().nbytes()


@in_place_of_a_gpu
def test_what_does_not_fit_into_the_dtype_is_counted() -> None:
    net = nn.Sequential(nn.Identity())
    with (
        pytest.warns(OverflowWarning, match="1 value"),
        record(net, "0", dtype=torch.float16) as acts,
    ):
        net(torch.tensor([[1e5, 1.0]]))
    assert "1 value too large for float16" in repr(copy.deepcopy(acts))


# --- When they can be seen ---------------------------------------------------------------------------


@in_place_of_a_gpu
@pytest.mark.parametrize(
    "look",
    [
        lambda acts: acts["a"],
        lambda acts: acts.get("a"),
        lambda acts: acts.inputs,
        repr,
        lambda acts: acts.nbytes,
        lambda acts: acts.stats(),
        lambda acts: acts.execution_order,
        lambda acts: acts.pause().__enter__(),
        copy.deepcopy,
        pickle.dumps,
    ],
)
def test_inside_a_pass_a_list_has_no_unfinished_call_and_a_look_at_the_recording_completes_it(
    look: Callable[..., Any],
) -> None:
    net = Net()
    with record(net, ["a", "relu"], inputs=True) as acts:
        layer = acts["a"]
        lengths = []
        net.between = lambda: (lengths.append(len(layer)), look(acts), lengths.append(len(layer)))
        net(X)
    assert lengths == [0, 1, 1, 1]
    assert torch.cat(layer).shape == (3, 4)
    assert len(acts.inputs["a"]) == 1


@in_place_of_a_gpu
def test_clear_inside_a_pass_forgets_what_is_on_its_way_too() -> None:
    net = Net()
    with record(net, ["a", "tail"]) as acts:
        layer = acts["a"]
        net.between = acts.clear
        net(X)
        assert (len(layer), len(acts["tail"])) == (0, 1)


@in_place_of_a_gpu
def test_an_interrupted_pass_is_complete_at_the_end_of_the_block_and_before_the_next() -> None:
    net = Net()
    net.between = interrupt
    with record(net, ["a", "tail"]) as acts:
        layer = acts["a"]
        with pytest.raises(KeyboardInterrupt):
            net(X)
        assert len(layer) == 0
        net.between = lambda: None
        net(X)
        assert len(layer) == 2
        net.between = interrupt
        with pytest.raises(KeyboardInterrupt):
            net(X)
    assert layer.passes == [0, 1, 2]
    assert acts["tail"].passes == [1]


@in_place_of_a_gpu
def test_a_container_of_the_users_gets_finished_values() -> None:
    class Mean:
        """A container that keeps no items."""

        def __init__(self) -> None:
            self.mean, self.values = 0.0, []

        def append(self, value: Tensor) -> None:
            self.values.append(value.mean().item())
            self.mean = sum(self.values) / len(self.values)

    net = Net()
    with record(net, "a") as reference:
        net(X)
    with record(net, "a", into=partial(deque, maxlen=2)) as bounded:
        net.between = lambda: lengths.append((len(layer), len(bounded["a"]), layer.passes))
        lengths: list[Any] = []
        layer = bounded["a"]
        net(X)
        assert type(layer) is SinkLayer
    assert lengths[0] == (0, 1, [0])
    assert torch.equal(reference["a"][0], bounded["a"][0])
    with record(net, "a", into=Mean) as means:
        found = []
        net.between = lambda: found.append(means["a"].mean)
        net(X)
    assert found[0] == reference["a"][0].mean().item()


@in_place_of_a_gpu
def test_a_container_that_calls_a_recorded_layer_while_it_is_given_a_call_loses_and_adds_nothing() -> (
    None
):
    class Calling(list[Any]):
        def append(self, value: Any) -> None:
            super().append(value)
            if len(self) == 1:
                net.a(X)

    net = Net()
    with record(net, ["a", "tail"], into=Calling) as acts:
        net(X)
    assert (len(acts["a"]), len(acts["tail"])) == (1, 1)
    assert all(value.shape == (3, 4) for value in acts["a"])


@in_place_of_a_gpu
def test_what_goes_to_the_disk_is_finished(tmp_path: Any) -> None:
    net = Net()
    with record(net, ["a", "tail", "one"]) as reference:
        for n in range(5):
            net(X * n)
    with record(net, ["a", "tail", "one"], into=tmp_path / "run") as acts:
        for n in range(5):
            net(X * n)
            acts.add("label", torch.ones(2, 2))
    assert_same(acts, reference)
    assert_same(load(tmp_path / "run"), reference)
    assert torch.equal(acts["label"][0], torch.ones(2, 2))


@in_place_of_a_gpu
def test_no_value_reaches_the_writer_after_its_pass_counts_as_complete(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[int] = []
    keep = Writer.keep

    def watched(writer: Writer, call: Any) -> None:
        if call.number < writer._complete():
            late.append(call.number)
        keep(writer, call)

    monkeypatch.setattr(Writer, "keep", watched)
    net = Net()

    def another() -> None:
        net.between = lambda: None
        thread = threading.Thread(target=net, args=(X,))
        thread.start()
        thread.join()

    with record(net, ["a", "tail"], into=tmp_path / "run") as acts:
        for between in (interrupt, another, interrupt):
            net.between = between
            with nullcontext() if between is another else pytest.raises(KeyboardInterrupt):
                net(X)
        net.between = lambda: None
        net(X)
    assert late == []
    assert acts["a"].passes == [0, 1, 2, 3, 4]


# --- The budget --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 100])
def test_where_the_system_pins_no_memory_values_are_moved_while_the_model_waits(
    most: int, device: StandIn
) -> None:
    device.most_pinned = most
    net = Net()
    with record(net, "**") as reference:
        net(X)
    with standing_in(device), record(net, "**") as acts:
        net(X)
    assert_same(acts, reference)
    assert device.peak <= most


def test_a_value_larger_than_the_budget_is_moved_while_the_model_waits_in_its_order(
    device: StandIn,
) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 100), nn.Linear(100, 4))
    with standing_in(device, budget=100), torch.no_grad(), record(net) as acts:
        expected = net[0](X)
        net(X)
        assert torch.equal(acts["0"][1], expected)
    assert [len(layer) for layer in acts.values()] == [2, 1, 1]
    assert torch.equal(acts["2"][0], net[2](acts["1"][0]))
    assert device.copied == [48, 48, 48]


def test_a_recording_to_disk_does_not_keep_the_calls_of_a_pass_until_its_end(
    tmp_path: Any, device: StandIn
) -> None:
    net = nn.Sequential(*[nn.Tanh() for _ in range(10)])
    kept: list[int] = []
    net[9].register_forward_pre_hook(lambda *_: kept.append(len(acts._layers["0"])))
    with standing_in(device, budget=100), record(net, into=tmp_path / "run") as acts:
        net(X)
    assert kept == [1]


# --- What goes wrong ---------------------------------------------------------------------------------


def fail_from(device: StandIn, number: int) -> None:
    """Let waiting number ``number``, and all later ones, fail."""
    waits = count()

    def on_wait() -> None:
        if next(waits) >= number:
            message = "the device is gone"
            raise RuntimeError(message)

    device.on_wait = on_wait


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("budget", [64, 1 << 20])
@pytest.mark.parametrize("share", [n / 8 for n in range(8)])
def test_a_copy_that_fails_is_said_once_and_no_unfinished_value_is_seen(
    share: float, budget: int, mode: Any, device: StandIn
) -> None:
    net = Net()
    waits = count()
    device.on_wait = lambda: next(waits) and None
    with standing_in(device, budget), mode(), record(net, LAYERS) as reference:
        net(X)
        net(X)
    number = int(share * next(waits))
    gone = pytest.raises(CaptureError, match="the device is gone")
    with standing_in(device, budget), mode(), gone, record(net, LAYERS) as acts:
        fail_from(device, number)
        net(X)
        net(X)
    for name, layer in acts.items():
        assert same([*layer], reference[name][: len(layer)])
    assert acts.failed_passes == [acts.num_passes - 1]


@pytest.mark.parametrize("budget", [64, 1 << 20])
def test_after_a_copy_has_failed_every_further_call_fails_and_the_model_is_as_it_was(
    budget: int, device: StandIn
) -> None:
    net = Net()
    expected = net(X)
    surfaced = pytest.raises(CaptureError, match="layer 'a'")
    with standing_in(device, budget), surfaced, record(net) as acts:
        fail_from(device, 0)
        for _ in range(2):
            with pytest.raises(CaptureError, match="device is gone"):
                net(X)
        with pytest.raises(CaptureError, match="nothing more is recorded"):
            net.one(X)
        assert not [*acts["a"]]
        device.on_wait = lambda: None
        net(X)
    assert torch.equal(net(X), expected)


@in_place_of_a_gpu
def test_an_error_at_the_end_of_the_block_is_raised_by_it_or_noted_on_the_users_own(
    device: StandIn,
) -> None:
    net = Net()

    def go() -> None:
        fail_from(device, 0)
        raise KeyboardInterrupt

    net.between = go
    gone = pytest.raises(CaptureError, match=r"device is gone.* 1 calls")
    with gone, record(net, "a"), pytest.raises(KeyboardInterrupt):
        net(X)
    device.on_wait = lambda: None
    with pytest.raises(KeyboardInterrupt) as caught, record(net, "a"):
        net(X)
    assert "device is gone" in caught.value.__notes__[0]


@in_place_of_a_gpu
def test_an_error_beside_one_of_the_model_is_raised_by_the_next_look(device: StandIn) -> None:
    net = Net()
    net.fail = True
    with record(net, "a") as acts:
        fail_from(device, 0)
        with pytest.raises(ValueError, match="the model fails"):
            net(X)
        with pytest.raises(CaptureError, match="device is gone"):
            acts["a"]
        assert not acts["a"]


class Full(deque[Any]):
    def append(self, value: Any) -> None:
        if len(self):
            message = "full"
            raise OverflowError(message)
        super().append(value)


@in_place_of_a_gpu
def test_what_a_container_raises_comes_out_of_the_pass_once_and_nothing_else_is_lost() -> None:
    net = Net()
    with record(net, ["a", "tail"], into=Full, inputs=True) as acts:
        net(X)
        with pytest.raises(OverflowError, match="full") as caught:
            net(X)
        assert caught.value.__notes__ == ["raised while actrec kept call 1 of layer 'a'"]
        assert acts.failed_passes == [1]
        assert [len(layer) for layer in acts.inputs.values()] == [1, 1]
        acts.clear()
        net(X)
        with pytest.raises(OverflowError, match="full"):
            net.a(X)  # outside of a pass
    assert [len(layer) for layer in acts.values()] == [1, 1]


@in_place_of_a_gpu
def test_a_container_that_looks_at_another_layer_neither_mixes_up_the_order_nor_hears_of_its_errors() -> (
    None
):
    class Curious(list[Any]):
        def append(self, value: Any) -> None:
            seen.append(len(acts["relu"]))
            if self is acts._layers["a"].sink:
                message = "full"
                raise OverflowError(message)
            super().append(value)

    seen: list[int] = []
    net = Net()
    with record(net, ["a", "relu"], into=Curious) as acts:
        with pytest.raises(OverflowError, match="full"):
            net(X)
        assert acts["relu"].passes == [0, 0]
    assert seen == [0, 0, 1]


@in_place_of_a_gpu
def test_what_the_writer_raises_comes_out_of_the_pass(tmp_path: Any, monkeypatch: Any) -> None:
    net = Net()

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    full = pytest.raises(WriteError, match="No space left")
    with full, record(net, ["a", "tail"], into=tmp_path / "run"):
        net(X)
        monkeypatch.setattr("actrec.store.new_shard.write", broken)
        net(X)


@in_place_of_a_gpu
def test_a_transform_that_raises_leaves_nothing_behind() -> None:
    def picky(value: Tensor) -> Tensor:
        if value.sum() > 1e6:
            message = "too large"
            raise ValueError(message)
        return value[:, :2]

    net = nn.Sequential(nn.Identity(), nn.Tanh())
    with record(net, "0", transform=picky) as acts:
        net(X)
        with pytest.raises(TransformError, match="too large"):
            net(X + 1e6)
        net(2 * X)
    assert same([*acts["0"]], [X[:, :2], 2 * X[:, :2]])


def full(*_: object, **__: object) -> Tensor:
    message = "CUDA out of memory"
    raise torch.OutOfMemoryError(message)


@in_place_of_a_gpu
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_where_the_device_has_no_memory_for_a_copy_the_value_is_moved_while_the_model_waits(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    with record(net, "**", dtype=dtype) as reference:
        net(X)
    on_device = transfer._on_device
    ways = iter([on_device] * 3 + [full] * 2 + [on_device] * 3 + [full] * 99)

    def sometimes(*args: Any) -> Tensor:
        return next(ways)(*args)

    monkeypatch.setattr(transfer, "_on_device", sometimes)
    with record(net, "**", dtype=dtype) as acts:
        net(X)
    assert_same(acts, reference)


def test_where_not_even_that_is_possible_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, device: StandIn
) -> None:
    monkeypatch.setattr(transfer, "_on_device", full)
    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(CaptureError, match=r"no memory left on cpu .*\(3, 4\).* transform"):
        Offload(Passes(), device).start(X)


@in_place_of_a_gpu
def test_inside_a_vmap_the_error_names_the_layer() -> None:
    net = nn.Sequential(nn.Tanh())
    with pytest.raises(CaptureError, match=r"layer '0'.*vmap"), record(net, "0", dtype=torch.half):
        torch.func.vmap(net)(X[None])


# --- Ends --------------------------------------------------------------------------------------------


@in_place_of_a_gpu
def test_a_dropped_block_waits_for_its_copies_and_everything_dies(device: StandIn) -> None:
    net = Net()

    def steps() -> Iterator[Any]:
        with record(net, ["a", "tail"]) as acts:
            net.between = interrupt
            with pytest.raises(KeyboardInterrupt):
                net(X)
            yield weakref.ref(acts)

    generator = steps()
    alive = next(generator)
    stream = device.streams[0]
    assert stream.done < len(stream.work)
    del generator
    gc.collect()
    assert stream.done == len(stream.work)
    assert alive() is None


@in_place_of_a_gpu
def test_a_recording_dies_with_its_last_name() -> None:
    net = Net()
    with record(net, "**", inputs=True) as acts:
        net(X)
    watched = [weakref.ref(x) for x in (acts, acts["a"][0], acts._session.offload)]
    gc.disable()
    try:
        del acts
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


@in_place_of_a_gpu
def test_the_originals_and_what_has_arrived_are_let_go_of_while_the_pass_runs(
    device: StandIn,
) -> None:
    originals: list[Any] = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh())
    net[0].register_forward_hook(lambda _m, _a, output: originals.append(weakref.ref(output)))
    net[2].register_forward_hook(lambda *_: originals.append(device.pinned_bytes))
    device.is_quick = lambda: True
    with torch.no_grad(), record(net):
        net(X)
    assert originals[0]() is None
    assert originals[1] == X.nbytes


# --- Which values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"device": None}, {"detach": False}, {"device": "meta"}])
def test_what_stays_where_it_is_or_keeps_its_graph_is_not_moved_asynchronously(
    options: dict[str, Any], device: StandIn
) -> None:
    net = Net()
    with standing_in(device), record(net, "a", **options) as acts:
        net(X)
        assert acts.transfers == {}
    assert not device.copied


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_plain_tensors_are_taken(device: StandIn) -> None:
    class Special(Tensor):
        pass

    offload = Offload(Passes(), device)
    assert offload.takes(X)
    assert offload.takes(nn.Parameter(X))
    assert not offload.takes(X[0])
    assert not offload.takes(X.as_subclass(Special))
    assert not offload.takes(X.to_sparse())
    assert not offload.takes(torch.quantize_per_tensor(X, 0.1, 0, torch.quint8))
    assert not offload.takes(torch.nested.nested_tensor([X[:, :1], X[:, :2]]))


# --- The self-test -----------------------------------------------------------------------------------


def test_the_first_value_from_a_device_has_it_tested_once_in_a_process(device: StandIn) -> None:
    device.tested.clear()
    net = Net()
    with standing_in(device), torch.inference_mode():
        with record(net, "a") as acts:
            assert not device.copied
            net(X)
        assert acts.transfers == {"cpu": "asynchronous"}
        copies = len(device.copied)
        assert copies > 40
        with record(net, "a") as acts:
            net(X)
    assert len(device.copied) == copies + 1
    assert device.tested == {CPU: True}


@pytest.mark.parametrize("fault", ["no wait", "an alias", "late", "raises", "too short"])
def test_a_device_that_fails_the_test_is_not_trusted_and_values_are_right_all_the_same(
    fault: str, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.tested.clear()
    net = Net()
    with record(net, "**") as reference:
        net(X)
    if fault == "no wait":
        monkeypatch.setattr("tests.stand_in.StandInEvent.synchronize", lambda _: None)
    elif fault == "an alias":
        monkeypatch.setattr(transfer, "_on_device", lambda tensor, _: tensor)
    elif fault == "late":
        monkeypatch.setattr("tests.stand_in.StandInStream.wait_event", lambda *_: None)
    elif fault == "raises":
        fail_from(device, 7)
    else:
        copy_all = device.copy
        device.copy = (
            lambda stream, to, source: copy_all(  # type: ignore[method-assign]
                stream, to[: len(to) // 2], source[: len(to) // 2]
            )
        )
    with standing_in(device), record(net, "**") as acts:
        net(X)
    assert device.tested == {CPU: False}
    assert acts.transfers == {"cpu": "blocking"}
    assert_same(acts, reference)


def test_the_stand_in_notices_what_it_is_there_to_notice(device: StandIn) -> None:
    source = torch.arange(4, dtype=torch.uint8)
    stream, memory = device.new_stream(CPU), device.pinned(4)
    stream.wait_event(device.compute.record_event())
    device.copy(stream, memory, source)
    event = stream.record_event()
    assert memory.tolist() == [POISON] * 4  # nobody has waited
    assert not event.query()
    event.synchronize()
    assert memory.tolist() == [0, 1, 2, 3]
    device.clock += 1  # the model has computed something that the stream does not wait for
    device.copy(stream, memory, source)
    stream.record_event().synchronize()
    assert memory.tolist() == [POISON] * 4
    stream.wait_event(device.compute.record_event())
    device.copy(stream, memory, source)
    del source  # and the copy with it
    stream.record_event().synchronize()
    assert memory.tolist() == [POISON] * 4


# --- The real device, as far as it can be seen from here ---------------------------------------------


def test_the_seam_asks_torch_cuda_for_the_very_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Entered:
        def __init__(self, stream: object) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            calls.append(("enter", self.stream))

        def __exit__(self, *_: object) -> None:
            calls.append("exit")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("current", device))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("new", device))
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda n, *, pin_memory, **k: calls.append(pin_memory) or empty(n, **k)
    )
    gpu = torch.device("cuda", 1)
    assert cuda.CUDA.current_stream(gpu) == ("current", gpu)
    assert cuda.CUDA.new_stream(gpu) == ("new", gpu)
    memory = cuda.CUDA.pinned(4)
    assert (memory.dtype, len(memory), memory.device.type) == (torch.uint8, 4, "cpu")
    cuda.CUDA.copy("side", memory, torch.arange(4, dtype=torch.uint8))
    assert memory.tolist() == [0, 1, 2, 3]
    assert calls == [True, ("enter", "side"), "exit"]
    assert not cuda.CUDA.has(X)


@pytest.mark.parametrize("is_used", [False, True])
def test_on_a_machine_with_a_gpu_what_is_on_the_cpu_is_recorded_as_ever(
    is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    with record(net, "**", inputs=True) as reference:
        net(X)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_used)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with record(net, "**", inputs=True) as acts:
        net(X)
        assert (acts._session.offload is not None) == is_used
    assert_same(acts, reference)
    assert_same(acts.inputs, reference.inputs)
    assert acts.transfers == {}


@pytest.mark.parametrize(
    "options", [{}, {"device": None}, {"inputs": True}, {"transform": lambda t: t + 1}]
)
def test_while_a_cuda_graph_is_captured_the_error_names_the_layer(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Identity())
    with FakeTensorMode():
        x = torch.empty(2, 2, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refused = pytest.raises(CaptureError, match=r"layer '0'.*CUDA graph.*outside of the capture")
    with refused, record(net, "0", **options):
        net(x)


@pytest.mark.parametrize("is_used", [False, True])
def test_outside_of_a_capture_a_value_on_the_gpu_stays_where_it_is_on_request(
    is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Identity())
    with FakeTensorMode():
        x = torch.empty(2, 2, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_used)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with record(net, "0", device=None) as acts:
        net(x)
    assert acts["0"][0].device.type == "cuda"


@in_place_of_a_gpu
def test_inputs_alone_arrive_too() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with record(net, (), inputs="1") as acts:
        net(X)
    assert torch.equal(acts.inputs["1"][0]["input"], net[0](X))
