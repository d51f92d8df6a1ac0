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

from actrec import (
    CaptureError,
    OverflowWarning,
    TransformError,
    WriteError,
    load,
    record,
)
from actrec._calls import device as _device
from actrec._calls import transfer as _offload
from actrec._calls.arriving import ArrivingList, ArrivingSink
from actrec._calls.staging import BLOCK, Staging
from actrec._calls.transfer import Offload
from actrec._recordings.recording import ListLayer, SinkLayer
from actrec.store.writer import Writer
from tests.stand_in import POISON, StandIn, StandInStream, standing_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = torch.linspace(-1, 1, 12).reshape(3, 4)


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


def names(acts: Any) -> dict[str, list[Any]]:
    return {name: [*layer] for name, layer in acts.items()}


# --- Right values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("budget", [16, 1 << 20])
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
    assert device.pinned_bytes <= budget
    assert not any(t.is_inference() for t in acts["a"])
    acts["a"][0].zero_()
    assert acts["a"][1].any()


LAYERS = ["a", "relu", "tail", "tail.**", "one", "pair"]
STEPS = ["pass", "fail", "look", "held", "pause", "clear", "thread", "outside"]


class Schedule:
    """Does to a recording, step by step, what a user may do, and notes what can be seen."""

    def __init__(self, net: Net, acts: Any, between: str) -> None:
        self.net, self.acts = net, acts
        self.held = [acts["a"], acts["tail"]]
        self.seen: list[Any] = []
        net.between = {
            "nothing": lambda: None,
            "look": self.look,
            "held": self.look_at_held,
            "torch": self.read_as_torch_does,
        }[between]

    def look(self) -> None:
        self.seen.append(names(self.acts))

    def look_at_held(self) -> None:
        self.seen.append([[len(layer), *layer, layer.passes] for layer in self.held])

    def read_as_torch_does(self) -> None:
        for value in list.__iter__(self.held[0]):
            assert value.shape == X.shape

    def run(self, steps: list[str]) -> list[Any]:
        for number, step in enumerate(steps):
            getattr(self, f"do_{step}")(X * (number + 1))
            # Without asking: the lists are complete whenever no pass is running.
            self.seen.append([[*list.__iter__(layer)] for layer in self.held])
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

    def do_held(self, _: Tensor) -> None:
        self.look_at_held()

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
    st.sampled_from(["nothing", "look", "held", "torch"]),
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
    assert device.pinned_bytes <= budget


@in_place_of_a_gpu
def test_the_models_results_and_its_gradients_are_the_same() -> None:
    net = Net()
    net.relu = nn.ReLU()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    expected = plain(X).sum()
    gradient = torch.autograd.grad(expected, plain[0].weight)
    with record(plain, grads=True) as acts:
        layer = acts.grads["0"]
        loss = plain(X).sum()
        assert torch.equal(torch.autograd.grad(loss, plain[0].weight)[0], gradient[0])
        assert layer[0].shape == (3, 4)  # moved at once: a backward has no end to wait at
    assert torch.equal(loss, expected)
    assert acts.grads["0"][0].shape == acts["0"][0].shape


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


# --- When they can be seen ---------------------------------------------------------------------------


@in_place_of_a_gpu
def test_inside_a_pass_a_list_that_is_held_has_no_unfinished_call_and_a_look_completes_it() -> None:
    net = Net()
    seen = []

    def look() -> None:
        seen.append((list.__len__(layer), len(layer), list.__len__(layer)))

    with record(net, ["a", "tail"]) as acts:
        layer = acts["a"]
        net.between = look
        net(X)
    assert seen == [(0, 1, 1), (1, 1, 1)]
    assert torch.cat(layer).shape == (3, 4)


@in_place_of_a_gpu
@pytest.mark.parametrize(
    "look",
    [
        lambda acts, layer: acts["a"],
        lambda acts, layer: len(layer),
        lambda acts, layer: [*layer],
        lambda acts, layer: layer[0],
        lambda acts, layer: layer.passes,
        lambda acts, layer: layer.nbytes,
        lambda acts, layer: repr(layer),
        lambda acts, layer: layer.cat(),
        lambda acts, layer: [*reversed(layer)],
        lambda acts, layer: layer.copy(),
        lambda acts, layer: layer * 2,
        lambda acts, layer: layer == [],
        lambda acts, layer: repr(acts),
        lambda acts, layer: acts.nbytes,
        lambda acts, layer: acts.stats(),
        lambda acts, layer: acts.execution_order,
        lambda acts, layer: acts.pause().__enter__(),
        lambda acts, layer: copy.deepcopy(acts),
        lambda acts, layer: pickle.dumps(layer),
    ],
)
def test_every_look_from_python_completes_the_lists(look: Callable[..., Any]) -> None:
    net = Net()
    with record(net, ["a", "relu"]) as acts:
        layer = acts["a"]
        lengths = []
        net.between = lambda: (
            lengths.append(list.__len__(layer)),
            look(acts, layer),
            lengths.append(list.__len__(layer)),
        )
        net(X)
    assert lengths[:2] == [0, 1]


@in_place_of_a_gpu
def test_clear_inside_a_pass_forgets_what_is_on_its_way_too() -> None:
    net = Net()
    with record(net, ["a", "tail"]) as acts:
        layer = acts["a"]
        net.between = acts.clear
        net(X)
        assert (len(layer), len(acts["tail"])) == (0, 1)


@in_place_of_a_gpu
def test_an_interrupted_pass_is_complete_at_the_end_of_the_block_and_before_the_next(
    device: StandIn,
) -> None:
    net = Net()

    def interrupt() -> None:
        raise KeyboardInterrupt

    net.between = interrupt
    with record(net, ["a", "tail"]) as acts:
        layer = acts["a"]
        with pytest.raises(KeyboardInterrupt):
            net(X)
        assert list.__len__(layer) == 0
        net.between = lambda: None
        net(X)
        assert [*list.__iter__(layer)] == [*layer]
        net.between = interrupt
        with pytest.raises(KeyboardInterrupt):
            net(X)
    assert list.__len__(layer) == 3
    assert layer.passes == [0, 1, 2]
    assert acts["tail"].passes == [1]


@in_place_of_a_gpu
def test_what_is_copied_or_pickled_is_a_plain_layer() -> None:
    net = Net()
    with record(net, ["a", "tail"], inputs=True) as acts:
        net(X)
        copies = [copy.deepcopy(acts), pickle.loads(pickle.dumps(acts)), copy.copy(acts)]
        assert type(pickle.loads(pickle.dumps(acts["a"]))) is ListLayer
    for other in copies[:2]:
        assert type(other["a"]) is ListLayer
        assert_same(other, acts)
        assert_same(other.inputs, acts.inputs)


@in_place_of_a_gpu
def test_a_container_of_the_users_gets_finished_values_and_is_complete_when_looked_at() -> None:
    class Mean:
        """A container that keeps no items."""

        def __init__(self) -> None:
            self.mean, self.values = 0.0, []

        def append(self, value: Tensor) -> None:
            assert value.numel()
            self.values.append(value.mean().item())
            self.mean = sum(self.values) / len(self.values)

    net = Net()
    with record(net, "a") as reference:
        net(X)
    with record(net, "a", into=partial(deque, maxlen=2)) as bounded:
        layer = bounded["a"]
        lengths = []
        net.between = lambda: lengths.append(
            (len(layer.sink), len(layer), len(layer.passes), layer.maxlen, len([*layer]))
        )
        net(X)
        assert type(layer) is ArrivingSink
        plain = copy.deepcopy(bounded)["a"]
        assert type(plain) is SinkLayer
        assert same([*plain], [*reference["a"]])
    assert lengths[0] == (0, 1, 1, 2, 1)
    with record(net, "a", into=Mean) as means:
        layer = means["a"]
        found = []
        net.between = lambda: found.append((layer.sink.mean, layer.mean))
        net(X)
    expected = reference["a"][0].mean().item()
    assert found[0] == (0.0, expected)
    assert torch.equal(reference["a"][0], bounded["a"][0])


@in_place_of_a_gpu
def test_a_container_that_looks_at_its_layer_while_it_is_given_a_call_does_not_mix_up_the_order() -> (
    None
):
    class Curious(list[Any]):
        def append(self, value: Any) -> None:
            seen.append(len(acts["a"]))
            super().append(value)

    seen: list[int] = []
    net = Net()
    with record(net, ["a", "relu"], into=Curious) as acts:
        net(X)
    assert seen[0] == 0
    assert acts["relu"].passes == [0, 0]
    assert same([*acts["relu"]], [*acts["relu"].sink])


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
def test_what_goes_to_the_disk_is_finished_and_a_pass_is_committed_only_when_it_is_there(
    tmp_path: Any,
) -> None:
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


class Kept:
    """Looks over the shoulder of the writer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.late: list[int] = []
        keep = Writer.keep

        def watched(writer: Writer, call: Any, complete: Callable[[], int]) -> None:
            if call.number < complete():
                self.late.append(call.number)
            keep(writer, call, complete)

        monkeypatch.setattr(Writer, "keep", watched)


@in_place_of_a_gpu
def test_no_value_reaches_the_writer_after_its_pass_counts_as_complete(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(monkeypatch)
    net = Net()

    def interrupt() -> None:
        raise KeyboardInterrupt

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
    assert kept.late == []
    assert acts["a"].passes == [0, 1, 2, 3, 4]


# --- Once over the link ------------------------------------------------------------------------------


class Inside(nn.Module):
    """Returns what its layer returned, after ``change``."""

    def __init__(self, change: Callable[[Tensor], object] = lambda _: None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.change(x)
        return x


@in_place_of_a_gpu
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_container_and_its_last_child_are_moved_once_and_do_not_alias(
    mode: Any, quick: bool, device: StandIn
) -> None:
    device.is_quick = lambda: quick
    net = nn.Sequential(nn.Sequential(nn.Tanh(), Inside()), nn.Identity())
    with mode(), record(net, ["0.1.layer", "0.1", "0", "1", ""]) as acts:
        net(X)
    assert device.copied == [X.nbytes, 1, 1, 1, 1]
    values = [layer[0] for layer in acts.values()]
    assert all(torch.equal(values[0], value) for value in values)
    values[1].zero_()
    assert all(value.any() for value in [values[0], *values[2:]])


@in_place_of_a_gpu
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("change", "counted"),
    [
        (lambda t: t.data.mul_(2), False),
        (lambda t: t.mul_(2), True),
        (lambda t: t.numpy().fill(3), False),
    ],
)
def test_a_tensor_that_was_written_to_is_moved_again_also_if_nothing_counted_the_write(
    change: Any, counted: bool, mode: Any, quick: bool, device: StandIn
) -> None:
    device.is_quick = lambda: quick
    net = nn.Sequential(Inside(change), nn.Tanh())
    with mode():
        expected = net[0](X), net[0].layer(X)
        with record(net, ["0", "0.layer", "1"]) as acts:
            net(X)
    assert torch.equal(acts["0"][0], expected[0])
    assert torch.equal(acts["0.layer"][0], expected[1])
    assert sum(n for n in device.copied if n > 1) == 3 * X.nbytes
    if counted and mode is torch.no_grad:
        assert device.copied == [X.nbytes] * 3  # without asking


@in_place_of_a_gpu
def test_another_tensor_with_the_id_of_one_that_is_gone_is_not_compared(
    device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_offload, "id", lambda _: 1, raising=False)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with torch.no_grad(), record(net):
        net(X)
    assert device.copied == [X.nbytes] * 2


def test_nan_is_the_same_as_itself_and_small_tensors_are_not_compared(device: StandIn) -> None:
    net = Inside(lambda t: t.fill_(torch.nan) if t.isnan().any() else None)
    x = torch.full((3, 4), torch.nan)
    for small, copied in [(0, [X.nbytes, 1]), (1 << 16, [X.nbytes] * 2)]:
        device.copied.clear()
        net.change = lambda _: None
        with standing_in(device, small=small), torch.no_grad(), record(net, ["layer", ""]) as acts:
            net(x)
        assert device.copied == copied
        assert acts[""][0].isnan().all()


@in_place_of_a_gpu
def test_a_comparison_on_another_stream_waits_for_the_first_snapshot(device: StandIn) -> None:
    def change_stream(_: Tensor) -> None:
        device.compute = StandInStream(device)

    net = Inside(change_stream)
    with torch.no_grad(), record(net, ["layer", ""]):
        net(X)
    assert device.copied == [X.nbytes, 1]
    assert device.compute.seen == 1  # when the first snapshot was there


def test_odd_sizes_are_compared_byte_by_byte() -> None:
    one = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert _offload._equal(one, one.clone()).item()
    assert not _offload._equal(one, one + 1).item()


# --- Staging -----------------------------------------------------------------------------------------


def test_pinned_memory_is_got_in_blocks_up_to_the_budget_and_used_again() -> None:
    got = []

    def pinned(nbytes: int) -> Tensor:
        got.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    staging = Staging(pinned, budget=16 * 128)
    pieces = [staging.take(100) for _ in range(16)]
    assert all(piece is not None and len(piece.memory) == 100 for piece in pieces)
    assert staging.take(100) is None
    pieces[3].give_back()
    again = staging.take(1000)
    assert again is not None
    assert len(again.memory) == 128
    assert again.memory.data_ptr() == pieces[3].memory.data_ptr()
    again.give_back()
    one = [staging.take(10), staging.take(65), staging.take(64)]
    assert one[1] is None  # that would have been a byte too much
    assert one[2] is not None
    one[0].give_back()
    one[2].give_back()
    small = [staging.take(10), staging.take(10)]
    assert small[1].memory.data_ptr() - small[0].memory.data_ptr() == 64
    small[0].give_back()
    assert staging.take(128) is None
    small[1].give_back()
    assert staging.take(128) is not None
    assert got == [128] * 16


def test_the_default_budget_is_half_a_gigabyte_in_blocks_of_a_power_of_two() -> None:
    assert _offload.BUDGET == 512 << 20
    assert BLOCK & (BLOCK - 1) == 0
    assert Staging(torch.empty, _offload.BUDGET)._size == BLOCK


@pytest.mark.parametrize("most", [0, 8])
def test_where_the_system_pins_no_memory_values_are_moved_the_plain_way(
    most: int, device: StandIn
) -> None:
    device.most_pinned = most
    net = Net()
    with record(net, "**") as reference:
        net(X)
    with standing_in(device, budget=64), record(net, "**") as acts:
        net(X)
    assert_same(acts, reference)
    assert device.pinned_bytes <= most


def test_the_plain_way_waits_for_the_stream_that_made_the_snapshot(device: StandIn) -> None:
    device.most_pinned = 0
    waited = []
    device.on_wait = lambda: waited.append(True)
    net = nn.Tanh()
    with standing_in(device), record(net, "") as acts:
        expected = net(X)
    assert waited
    assert torch.equal(acts[""][0], expected)


def test_a_value_larger_than_the_staging_memory_goes_through_it_piece_by_piece(
    device: StandIn,
) -> None:
    net = nn.Tanh()
    x = torch.randn(100, 10)
    with standing_in(device, budget=256), record(net, "") as acts:
        expected = net(x)
    assert torch.equal(acts[""][0], expected)
    assert max(device.copied) == 16
    assert sum(device.copied) == x.nbytes  # nothing took the plain way
    assert device.pinned_bytes == 256


# --- What goes wrong ---------------------------------------------------------------------------------


def fail_from(device: StandIn, number: int, error: Exception) -> None:
    """Let waiting number ``number``, and all later ones, fail."""
    waits = count()

    def on_wait() -> None:
        if next(waits) >= number:
            raise error

    device.on_wait = on_wait


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("budget", [16, 1 << 20])
@pytest.mark.parametrize("share", [n / 16 for n in range(16)])
def test_a_copy_that_fails_is_said_and_no_unfinished_value_is_seen(
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
        fail_from(device, number, RuntimeError("the device is gone"))
        for _ in range(2):
            net(X)
    for name, layer in acts.items():
        assert same([*layer], reference[name][: len(layer)])
    with pytest.raises(ValueError, match="the model fails"):
        net.fail = True
        net(X)


def test_what_was_lost_does_not_turn_up_later(device: StandIn) -> None:
    failures = iter([RuntimeError("a hiccup")])

    def on_wait() -> None:
        for failure in failures:
            raise failure

    net = Net()
    device.on_wait = on_wait
    with (
        standing_in(device),
        pytest.raises(CaptureError, match="a hiccup"),
        record(net, "a") as acts,
    ):
        net(X)
    assert not acts["a"]
    assert not acts["a"]._offload._queue


@pytest.mark.parametrize("budget", [16, 160])
def test_after_a_copy_has_failed_every_further_call_fails_and_the_model_is_as_it_was(
    budget: int, device: StandIn
) -> None:
    net = Net()
    expected = net(X)
    surfaced = pytest.raises(CaptureError, match="layer 'a'")
    with standing_in(device, budget), surfaced, record(net) as acts:
        fail_from(device, 0, RuntimeError("out of memory"))
        for _ in range(2):
            with pytest.raises(CaptureError, match="out of memory"):
                net(X)
        with pytest.raises(CaptureError, match="nothing more is recorded"):
            net.one(X)
        assert not [*acts["a"]]
        net(X)
    assert torch.equal(net(X), expected)


@in_place_of_a_gpu
def test_an_error_at_the_end_of_the_block_is_raised_by_it_or_noted_on_the_users_own(
    device: StandIn,
) -> None:
    net = Net()

    def interrupt() -> None:
        fail_from(device, 0, RuntimeError("the device is gone"))
        raise KeyboardInterrupt

    net.between = interrupt
    with (
        pytest.raises(
            CaptureError, match=r"The 1 calls .* device is gone|device is gone.* 1 calls"
        ),
        record(net, "a"),
        pytest.raises(KeyboardInterrupt),
    ):
        net(X)
    device.on_wait = lambda: None
    with pytest.raises(KeyboardInterrupt) as caught, record(net, "a"):
        net(X)
    assert "device is gone" in caught.value.__notes__[0]


@in_place_of_a_gpu
def test_what_a_container_raises_comes_out_of_the_pass_and_nothing_else_is_lost(
    device: StandIn,
) -> None:
    class Full(deque[Any]):
        def append(self, value: Any) -> None:
            if len(self):
                message = "full"
                raise OverflowError(message)
            super().append(value)

    net = Net()
    with record(net, ["a", "tail"], into=Full) as acts:
        net(X)
        with pytest.raises(OverflowError, match="full"):
            net(X)
        acts.clear()
        net(X)
    assert [len(layer) for layer in acts.values()] == [1, 1]


@in_place_of_a_gpu
def test_an_error_of_one_container_does_not_come_out_of_a_look_from_inside_another() -> None:
    class Curious(list[Any]):
        def append(self, value: Any) -> None:
            len(acts["relu"])
            if self is acts._layers["a"].sink:
                message = "full"
                raise OverflowError(message)
            super().append(value)

    net = Net()
    with record(net, ["a", "relu"], into=Curious) as acts:
        with pytest.raises(OverflowError, match="full"):
            net(X)
        assert len(acts["relu"]) == 2


@in_place_of_a_gpu
def test_what_the_writer_raises_comes_out_of_the_pass(tmp_path: Any, monkeypatch: Any) -> None:
    net = Net()

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    full = pytest.raises(WriteError, match="No space left")
    with full, record(net, ["a", "tail"], into=tmp_path / "run"):
        net(X)
        monkeypatch.setattr("actrec.store.shard.write", broken)
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


@in_place_of_a_gpu
def test_where_the_device_has_no_memory_for_a_snapshot_the_value_is_moved_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net()
    with record(net, "**", dtype=torch.float64) as reference:
        net(X)

    def full(*_: object) -> Tensor:
        message = "CUDA out of memory"
        raise torch.OutOfMemoryError(message)

    snapshot = _offload._on_device
    snapshots = iter([snapshot] * 3 + [full] * 2 + [snapshot] * 3 + [full] * 99)

    def sometimes(*args: Any) -> Tensor:
        return next(snapshots)(*args)

    monkeypatch.setattr(_offload, "_on_device", sometimes)
    with record(net, "**", dtype=torch.float64) as acts:
        net(X)
    assert_same(acts, reference)


@in_place_of_a_gpu
def test_where_not_even_that_is_possible_the_error_says_what_to_do_and_the_block_ends_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> Tensor:
        message = "CUDA out of memory"
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(_offload, "_on_device", full)
    net = Net()
    expected = net(X)
    with record(net, "one") as acts:  # of which the stand-in takes nothing
        net(X)
        monkeypatch.setattr(Tensor, "to", full)
        with pytest.raises(CaptureError, match=r"no memory left on cpu .*\(3, 4\).* transform"):
            Offload(StandIn()).start(X)
        monkeypatch.undo()
    assert len(acts["one"]) == 1
    assert torch.equal(net(X), expected)


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

    def interrupt() -> None:
        raise KeyboardInterrupt

    generator = steps()
    alive = next(generator)
    stream = device.streams[0]
    assert stream.done < len(stream.work)
    del generator
    gc.collect()
    assert stream.done == len(stream.work)
    assert alive() is None


@in_place_of_a_gpu
def test_a_recording_dies_with_its_last_name_and_lets_go_of_the_staging_memory() -> None:
    net = Net()
    with record(net, "**", inputs=True) as acts:
        net(X)
        offload = acts["a"]._offload
        assert offload._staging._blocks
    assert not offload._staging._blocks
    assert not offload._sent
    assert not offload._queue
    watched = [weakref.ref(acts), weakref.ref(acts["a"][0]), weakref.ref(offload)]
    gc.disable()
    try:
        del acts, offload
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


@in_place_of_a_gpu
def test_the_originals_and_the_snapshots_are_let_go_of_as_soon_as_they_are_here(
    device: StandIn,
) -> None:
    originals: list[Any] = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh())
    net[0].register_forward_hook(lambda _m, _a, output: originals.append(weakref.ref(output)))
    device.is_quick = lambda: True
    with torch.no_grad(), record(net) as acts:
        net[2].register_forward_hook(lambda *_: originals.append(list.__len__(acts._layers["0"])))
        net(X)
    assert originals[0]() is None
    assert originals[1] == 1  # what was there was worked off while the pass was running


# --- What is not moved like that ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"device": None}, {"detach": False}, {"device": "meta"}])
def test_what_stays_where_it_is_or_keeps_its_graph_is_not_moved_asynchronously(
    options: dict[str, Any], device: StandIn
) -> None:
    net = Net()
    with standing_in(device), record(net, "a", **options) as acts:
        net(X)
        assert type(acts["a"]) is ListLayer
    assert not device.copied


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_plain_tensors_are_taken(device: StandIn) -> None:
    class Special(Tensor):
        pass

    offload = Offload(device)
    assert offload.takes(X)
    assert offload.takes(nn.Parameter(X))
    assert not offload.takes(X[0])
    assert not offload.takes(X.as_subclass(Special))
    assert not offload.takes(X.to_sparse())
    assert not offload.takes(torch.quantize_per_tensor(X, 0.1, 0, torch.quint8))
    assert not offload.takes(torch.nested.nested_tensor([X[:, :1], X[:, :2]]))


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
    ids=str,
)
def test_every_kind_of_plain_tensor_arrives_as_it_was_and_as_small_as_it_is(
    value: Tensor, device: StandIn
) -> None:
    with standing_in(device), record(nn.Identity(), "") as acts:
        acts._tracks[0].end(nn.Identity(), (), None, value)
    with record(nn.Identity(), "") as reference:
        reference._tracks[0].end(nn.Identity(), (), None, value)
    (arrived,), (expected,) = acts[""], reference[""]
    assert arrived.stride() == expected.stride()
    assert arrived.dtype == expected.dtype
    assert str(arrived) == str(expected)
    assert arrived.untyped_storage().nbytes() <= max(expected.untyped_storage().nbytes(), 0)
    assert not arrived.requires_grad
    assert sum(device.copied) == arrived.untyped_storage().nbytes()


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
    cuda = _device.Cuda()
    gpu = torch.device("cuda", 1)
    assert cuda.current_stream(gpu) == ("current", gpu)
    assert cuda.new_stream(gpu) == ("new", gpu)
    memory = cuda.pinned(4)
    assert (memory.dtype, len(memory), memory.device.type) == (torch.uint8, 4, "cpu")
    source = torch.arange(8, dtype=torch.uint8)
    cuda.copy("side", memory, source, 3)
    assert memory.tolist() == [3, 4, 5, 6]
    assert calls == [True, ("enter", "side"), "exit"]
    assert not cuda.has(X)


def test_copies_are_asynchronous_only_if_asked_for_and_if_pytorch_was_built_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.delenv(_device.SWITCH, raising=False)
    assert _device.with_streams() is None, "not yet checked on a GPU"
    monkeypatch.setenv(_device.SWITCH, "1")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert _device.with_streams() is None
    net = Net()
    with record(net, "a") as acts:
        net(X)
        assert type(acts["a"]) is ListLayer
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert type(_device.with_streams()) is _device.Cuda
    with record(net, "**") as acts:  # of tensors on the CPU, on a machine with a GPU
        net(X)
        assert type(acts["a"]) is ArrivingList
    monkeypatch.undo()
    with record(net, "**") as reference:
        net(X)
    assert_same(acts, reference)


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


def test_outside_of_a_capture_a_value_on_the_gpu_stays_where_it_is_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nn.Sequential(nn.Identity())
    with FakeTensorMode():
        x = torch.empty(2, 2, device="cuda")
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with record(net, "0", device=None) as acts:
            net(x)
        assert acts["0"][0].device.type == "cuda"


@in_place_of_a_gpu
def test_what_is_moved_while_the_model_goes_on_is_counted() -> None:
    net = nn.Sequential(nn.Identity())
    with (
        pytest.warns(OverflowWarning, match="1 value"),
        record(net, "0", dtype=torch.float16) as acts,
    ):
        net(torch.tensor([1e5, 1.0]))
    assert "1 value too large for float16" in repr(copy.deepcopy(acts))


def test_the_stand_in_notices_what_it_is_there_to_notice(device: StandIn) -> None:
    source = torch.arange(4, dtype=torch.uint8)
    stream, memory = device.new_stream(torch.device("cpu")), device.pinned(4)
    stream.wait_event(device.compute.record_event())
    device.copy(stream, memory, source, 0)
    event = stream.record_event()
    assert memory.tolist() == [POISON] * 4  # nobody has waited
    assert not event.query()
    event.synchronize()
    assert memory.tolist() == [0, 1, 2, 3]
    device.clock += 1  # the model has computed something that the stream does not wait for
    device.copy(stream, memory, source, 0)
    stream.record_event().synchronize()
    assert memory.tolist() == [POISON] * 4
    stream.wait_event(device.compute.record_event())
    device.copy(stream, memory, source, 0)
    del source  # and the copy with it
    stream.record_event().synchronize()
    assert memory.tolist() == [POISON] * 4
