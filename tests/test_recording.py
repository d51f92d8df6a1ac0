"""A recording is a read-only mapping to lists of calls, which join, release, pause, and print as text."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from actrec import (
    ActrecError,
    CaptureError,
    JoinError,
    Layer,
    Opaque,
    OptionError,
    Recorder,
    Recording,
    UnknownLayerError,
    load,
    record,
)
from actrec._recordings import recording as _recording
from actrec._recordings.in_memory import ListLayer
from actrec._text import count as count_of
from actrec._text import size
from actrec._values import join as _join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(lin=nn.Linear(4, 3), act=nn.ReLU(inplace=True), head=nn.Linear(3, 2))
    )


def batches(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 4) for size in sizes]


def recorded(*sizes: int, layers: Any = None, **options: Any) -> Recorder:
    model = net()
    with record(model, layers, **options) as acts:
        for batch in batches(*sizes):
            model(batch)
    return acts


def layer(*values: Any) -> Layer:
    return ListLayer("x", values)


def test_to_ask_whether_a_layer_is_there_makes_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = recorded(1)
    monkeypatch.setattr(_recording, "no_layer", None)
    assert "conv" not in acts
    assert acts.get("conv", 3) == 3


# --- A layer is a list -------------------------------------------------------------------------------


def test_a_layer_is_a_list_of_tensors_to_everything_that_takes_one() -> None:
    acts = recorded(2, 1)
    lin = acts["lin"]
    assert isinstance(lin, list)
    assert isinstance(lin, Layer)
    assert torch.equal(torch.cat(lin), lin.cat())
    assert torch.nn.utils.rnn.pad_sequence(lin).shape == (2, 2, 3)
    first, second = lin
    assert lin[0] is first
    assert lin[-1] is second
    assert list(reversed(lin)) == [second, first]
    assert sorted(lin, key=len) == [second, first]
    assert max(lin, key=len) is first
    assert [index for index, _ in enumerate(lin)] == [0, 1]
    assert lin == [first, second]
    assert lin
    assert not layer()
    with pytest.raises(IndexError):
        lin[2]


def test_slices_sums_and_copies_of_a_layer_are_plain_lists() -> None:
    acts = recorded(2, 1, 1)
    lin = acts["lin"]
    extra = torch.zeros(1, 3)
    for new in (lin[1:], lin[::-1], lin + [extra], [extra] + lin, lin * 2, lin.copy()):  # noqa: RUF005
        assert type(new) is list
    assert torch.cat(lin[:2]).shape == (3, 3)
    assert len(lin) == 3, "and the layer is as it was"


def test_a_layer_knows_its_name_its_type_and_its_passes() -> None:
    acts = recorded(2, 1)
    assert [(one.name, one.type) for one in acts.values()] == [
        ("lin", "Linear"),
        ("act", "ReLU"),
        ("head", "Linear"),
    ]
    assert acts["lin"].passes == [0, 1]


def test_the_passes_of_a_layer_are_read_only() -> None:
    acts = recorded(2, 1)
    with pytest.raises(TypeError, match="item assignment"):
        acts["lin"].passes[0] = 7  # type: ignore[index]
    assert acts["lin"].passes == [0, 1]


# --- Joining -----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    out: Tensor
    rest: Any


JOINS: dict[str, tuple[str, int, list[Any]]] = {
    "cat": ("cat", 0, [torch.randn(2, 3), torch.randn(1, 3)]),
    "cat of one": ("cat", 0, [torch.randn(2, 3)]),
    "cat of the last dimension": ("cat", -1, [torch.randn(2, 3), torch.randn(2, 1)]),
    "cat in the middle": ("cat", 1, [torch.randn(2, n, 3) for n in (1, 2, 3)]),
    "cat of vectors": ("cat", 0, [torch.randn(2), torch.randn(3)]),
    "cat with an empty batch": ("cat", 0, [torch.randn(2, 3), torch.randn(0, 3)]),
    "cat of integers": ("cat", 0, [torch.arange(2), torch.arange(3)]),
    "cat of views": ("cat", 0, [torch.randn(3, 2).T, torch.randn(3, 4).T]),
    "cat of complex": ("cat", 0, [torch.randn(2, dtype=torch.complex64).conj()] * 2),
    "cat of bfloat16": ("cat", 0, [torch.randn(2).bfloat16()] * 2),
    "stack": ("stack", 0, [torch.randn(2, 3), torch.randn(2, 3)]),
    "stack at the end": ("stack", -1, [torch.randn(2, 3), torch.randn(2, 3)]),
    "stack in the middle": ("stack", 1, [torch.randn(2, 3), torch.randn(2, 3)]),
    "stack at the end, counted": ("stack", 2, [torch.randn(2, 3), torch.randn(2, 3)]),
    "stack of numbers": ("stack", 0, [torch.tensor(1.0), torch.tensor(2.0)]),
    "stack of booleans": ("stack", 0, [torch.tensor([True]), torch.tensor([False])]),
}


@pytest.mark.parametrize(("how", "dim", "values"), JOINS.values(), ids=JOINS)
@pytest.mark.parametrize("release", [False, True])
def test_joining_is_what_torch_does(
    how: str, dim: int, values: list[Tensor], release: bool
) -> None:
    expected = getattr(torch, how)(values, dim)
    one = layer(*values)
    joined = getattr(one, how)(dim, release=release)
    assert torch.equal(joined, expected)
    assert joined.dtype == expected.dtype
    assert len(one) == (0 if release else len(values))
    assert one.passes == ([] if release else list(range(len(values))))


def test_the_joined_tensor_is_a_new_one_also_of_a_single_call() -> None:
    one = layer(torch.zeros(2, 3))
    for joined in (one.cat(), one.stack()):
        joined.add_(1)
    assert one[0].sum() == 0


@pytest.mark.parametrize("release", [False, True])
def test_nested_values_are_joined_tensor_by_tensor_and_come_back_nested(release: bool) -> None:
    def value(size: int) -> Any:
        x = torch.randn(size, 3)
        return {
            "pair": Pair(x, [x * 2, None]),
            "name": "head",
            "cache": Opaque("Cache"),
            "again": x,
        }

    values = [value(2), value(1)]
    joined = layer(*values).cat(release=release)
    assert type(joined["pair"]) is Pair
    assert torch.equal(joined["pair"].out, torch.cat([v["pair"].out for v in values]))
    assert torch.equal(joined["pair"].rest[0], torch.cat([v["pair"].rest[0] for v in values]))
    assert joined["pair"].rest[1] is None
    assert (joined["name"], joined["cache"]) == ("head", Opaque("Cache"))
    assert joined["again"] is joined["pair"].out


def test_inputs_are_joined_by_parameter() -> None:
    acts = recorded(2, 1, layers="lin", inputs=True)
    joined = acts.inputs["lin"].cat()
    assert list(joined) == ["input"]
    assert joined["input"].shape == (3, 4)


JOIN_ERRORS: dict[str, tuple[str, int, list[Any], list[str]]] = {
    "ragged": (
        "cat", 0, [torch.zeros(8, 3)] * 3 + [torch.zeros(2, 4)],
        ["agree in every dimension but 0", "calls 0-2 are (8, 3), call 3 is (2, 4)", "one by one"],
    ),
    "ragged the other way": ("cat", -1, [torch.zeros(2, 3), torch.zeros(1, 3)], ["but -1", "(1, 3)"]),
    "ragged inside": (
        "cat", 0, [(torch.zeros(1), torch.zeros(1, n)) for n in (2, 3)],
        ["call 0 is (1, 2), call 1 is (1, 3)"],
    ),
    "ragged all over": (
        "cat", 0, [torch.zeros(1, n) for n in range(9)],
        ["call 5 is (1, 5), and 3 more changes"],
    ),
    "other number of dimensions": (
        "cat", 0, [torch.zeros(2), torch.zeros(2, 1)], ["call 0 is (2,), call 1 is (2, 1)"],
    ),
    "other batch in stack": (
        "stack", 0, [torch.zeros(2, 3), torch.zeros(1, 3)],
        ["agree in every dimension:", "call 0 is (2, 3), call 1 is (1, 3)"],
    ),
    "empty": ("cat", 0, [], ["nothing was recorded of this layer"]),
    "empty stack": ("stack", 0, [], ["nothing was recorded of this layer"]),
    "numbers": ("cat", 0, [torch.tensor(1.0)] * 2, ["single numbers", "Use stack()"]),
    "no such dimension": ("cat", 2, [torch.zeros(2, 3)], ["no dimension 2", "shape (2, 3)"]),
    "no such negative dimension": ("cat", -3, [torch.zeros(2, 3)], ["no dimension -3"]),
    "no such new dimension": ("stack", 3, [torch.zeros(2, 3)], ["no dimension 3", "(2, 3)"]),
    "devices": (
        "cat", 0, [torch.zeros(2), torch.zeros(2, device="meta")], ["several devices, cpu, meta"],
    ),
    "structure": (
        "cat", 0, [(torch.zeros(1),), [torch.zeros(1)]], ["call 1 is [a tensor]", "call 0 is (a tensor,)"],
    ),
    "sometimes nested": (
        "cat", 0, [torch.zeros(1), (torch.zeros(1),)], ["call 1 is (a tensor,)", "call 0 is a tensor"],
    ),
    "sometimes nothing": ("cat", 0, [torch.zeros(1), None], ["call 1 is None", "by hand"]),
    "other keys": (
        "cat", 0, [{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], ["{'b': a tensor}", "{'a': a tensor}"],
    ),
    "no tensors": ("stack", 0, [Opaque("Cache")] * 2, ["have no tensors", "Opaque('Cache')"]),
    "words": ("cat", 0, ["a", "b"], ["have no tensors; call 0 is 'a'"]),
    "losses": ("cat", 0, [0.1, 0.2], ["call 0 is 0.1", "torch.tensor([*acts[name]])"]),
    "long": ("cat", 0, [torch.ones(1), "long" * 200], ["call 1 is str, while call 0 is a tensor"]),
}  # fmt: skip


@pytest.mark.parametrize(("how", "dim", "values", "pieces"), JOIN_ERRORS.values(), ids=JOIN_ERRORS)
@pytest.mark.parametrize("release", [False, True])
def test_calls_that_do_not_fit_together_are_told_apart_and_nothing_is_released(
    how: str, dim: int, values: list[Any], pieces: list[str], release: bool
) -> None:
    one = layer(*values)
    with pytest.raises(JoinError) as caught:
        getattr(one, how)(dim, release=release)
    message = str(caught.value)
    assert message.startswith(f"acts['x'].{how}(dim={dim}): "), message
    assert [piece for piece in pieces if piece not in message] == [], message
    assert isinstance(caught.value, ValueError)
    assert len(one) == len(one.passes) == len(values)
    assert all(map(lambda a, b: a is b, one, values))


class Held(TorchDispatchMode):
    """The most bytes in memory at a time: those of ``values`` that are alive, and those that were written.

    What is only reserved takes no room yet.
    """

    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.alive = [(weakref.ref(value), value.nbytes) for value in values]
        self.written = 0
        self.most = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        reserves = func.is_view or func.overloadpacket is torch.ops.aten.empty
        if isinstance(out, Tensor) and not reserves:
            self.written += out.nbytes
        alive = sum(size for ref, size in self.alive if ref() is not None)
        self.most = max(self.most, alive + self.written)
        return out


@pytest.mark.parametrize("how", ["cat", "stack"])
@pytest.mark.parametrize("into", [list, deque])
def test_with_release_a_layer_is_never_in_memory_twice(how: str, into: Callable[[], Any]) -> None:
    model = nn.Linear(4, 64)

    def most(*, release: bool) -> float:
        with record(model, "", into=into) as acts:
            for batch in batches(*[8] * 40):
                model(batch)
        values = list(acts[""])
        size = sum(value.nbytes for value in values)
        with Held(values) as memory:
            values.clear()
            getattr(acts[""], how)(release=release)
        return memory.most / size

    assert most(release=True) <= 1.1
    assert most(release=False) == 2.0, "what it is without"


def test_with_release_and_a_graph_gradients_flow() -> None:
    model = net()
    with record(model, "lin", detach=False) as acts:
        for batch in batches(2, 1):
            model(batch)
    acts["lin"].cat(release=True).sum().backward()
    assert model.lin.bias.grad.tolist() == [3, 3, 3]
    assert len(acts["lin"]) == 0


def test_a_layer_that_was_released_can_be_filled_again() -> None:
    model = net()
    with record(model, "lin") as acts:
        sizes = []
        for batch in batches(2, 1, 3):
            model(batch)
            model(batch)
            sizes.append(acts["lin"].cat(release=True).shape[0])
        model(batches(5)[0])
    assert sizes == [4, 2, 6]
    assert acts["lin"].passes == [6]


# --- A recording is a mapping ------------------------------------------------------------------------


def test_a_recording_is_a_read_only_mapping() -> None:
    acts = recorded(2)
    assert isinstance(acts, Mapping)
    assert isinstance(acts, Recording)
    assert list(acts) == list(acts.keys()) == ["lin", "act", "head"]
    assert len(acts) == 3
    assert dict(acts)["lin"] is acts["lin"]
    assert "lin" in acts
    assert "conv" not in acts
    assert 3 not in acts
    assert acts.get("lin") is acts["lin"]
    assert acts.get("conv") is None
    assert acts.get("conv") is None
    with pytest.raises(TypeError, match="does not support item assignment"):
        acts["lin"] = []  # type: ignore[index]
    with pytest.raises(TypeError, match="does not support item deletion"):
        del acts["lin"]  # type: ignore[attr-defined]
    assert acts._ipython_key_completions_() == list(acts)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("li", ["acts['li']: no layer of that name was recorded.", "Did you mean 'lin'?"]),
        ("zzz", ["There are 'lin', 'act', 'head'."]),
        (3, ["acts[3]", "layers have names: acts['lin']"]),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_close_ones(name: Any, pieces: list[str]) -> None:
    acts = recorded(2)
    with pytest.raises(KeyError) as caught:
        acts[name]
    assert isinstance(caught.value, UnknownLayerError)
    assert isinstance(caught.value, ActrecError)
    message = str(caught.value)
    assert [piece for piece in pieces if piece not in message] == [], message
    assert not message.startswith('"'), "KeyError alone would quote it"


def test_inputs_that_were_not_asked_for_are_an_error_that_says_how_to_ask() -> None:
    acts = recorded(2)
    with pytest.raises(AttributeError, match=r"record\(model, layers, inputs=True\)"):
        acts.inputs  # noqa: B018
    assert not hasattr(acts, "inputs")


def test_a_copy_of_a_recording_is_as_good_as_the_original() -> None:
    acts = recorded(2, 1, inputs=True)
    twin = copy.copy(acts)
    assert list(twin) == list(acts)
    assert twin["lin"] == acts["lin"]
    one = copy.deepcopy(acts["lin"])
    assert isinstance(one, Layer)
    assert (one.name, one.type, one.passes) == ("lin", "Linear", [0, 1])
    assert all(map(torch.equal, one, acts["lin"]))
    one[0].zero_()
    assert acts["lin"][0].any()


# --- Passes, memory ----------------------------------------------------------------------------------


def test_memory_that_calls_share_counts_once() -> None:
    model = nn.Sequential(
        nn.Linear(8, 1024), nn.Identity(), nn.Flatten(0), nn.Unflatten(0, (8, 1024))
    )
    with record(model, device=None) as acts:
        model(torch.randn(8, 8))
    size = 8 * 1024 * 4
    assert [acts[name].nbytes for name in "013"] == [size] * 3
    assert acts["2"].nbytes == size, "a vector is cloned"
    assert acts.nbytes == 2 * size


def test_memory_counts_what_is_recorded_beside_the_values(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Identity())
    x = torch.randn(16, 8)
    with record(model, inputs=True, grads=True, device=None) as acts:
        model(x).square().sum().backward()
    received, returned = 16 * 8 * 4, 16 * 4 * 4
    assert acts["0"].nbytes == acts["1"].nbytes == acts.grads["0"].nbytes == returned
    # The Identity received and returned what the Linear had returned.
    assert acts.inputs.nbytes == received + returned
    assert acts.nbytes == acts.inputs.nbytes + acts.grads.nbytes
    title = f"recorded Sequential: 2 layers, 1 pass, {size(acts.nbytes)} with inputs and gradients"
    assert repr(acts).splitlines()[0] == title
    acts.save(tmp_path / "saved")
    alone = received + 5 * returned  # on disk each value lies for itself
    assert load(tmp_path / "saved").nbytes == alone
    with record(model, inputs=True, into=tmp_path / "run") as stored:
        model(x)
    assert stored.nbytes == received + 3 * returned
    assert repr(stored).splitlines()[0].endswith(f", {size(stored.nbytes)} with inputs")


def test_memory_of_every_kind_of_value_is_counted() -> None:
    model = nn.Identity()
    values = [
        torch.zeros(3),
        (torch.zeros(2), {"a": torch.zeros(1)}),
        "word",
        None,
        Opaque("Cache"),
    ]
    with record(model, "") as acts:
        for value in values:
            model(value)
    assert acts.nbytes == acts[""].nbytes == 24


# Sparse layouts warn that they are new, when the first one is made.
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_memory_of_sparse_tensors_is_that_of_their_parts(layout: str) -> None:
    eye = torch.eye(4)
    to_sparse = getattr(eye, "to_sparse" if layout == "coo" else f"to_sparse_{layout}")
    tensor = to_sparse((2, 2)) if layout.startswith("b") else to_sparse()
    indices = {"coo": 2 * 4, "csr": 5 + 4, "csc": 5 + 4, "bsr": 3 + 2, "bsc": 3 + 2}[layout]
    numbers = 8 if layout.startswith("b") else 4
    model = nn.Identity()
    with record(model, "") as acts:
        model(tensor)
    assert acts.nbytes == indices * 8 + numbers * 4


# --- Pause -------------------------------------------------------------------------------------------


def test_nothing_is_recorded_while_paused_and_passes_do_not_count() -> None:
    model = net()
    with record(model, "lin", inputs=True) as acts:
        model(batches(2)[0])
        with acts.pause():
            model(batches(3)[0])
            acts.add("label", 1)
        model(batches(1)[0])
    assert [len(value) for value in acts["lin"]] == [2, 1]
    assert acts["lin"].passes == acts.inputs["lin"].passes == [0, 1]
    assert acts.num_passes == 2
    assert "label" not in acts


def test_pauses_nest_and_end_with_an_exception() -> None:
    model = net()
    with record(model, "lin") as acts:
        with acts.pause():
            with pytest.raises(ZeroDivisionError), acts.pause():
                1 / 0  # noqa: B018
            model(batches(2)[0])
        model(batches(1)[0])
    assert [len(value) for value in acts["lin"]] == [1]


def test_a_pause_holds_for_all_threads_and_ends_with_the_last() -> None:
    model = net()
    paused, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with acts.pause():
            paused.set()
            go_on.wait(60)

    with record(model, "lin") as acts:
        thread = threading.Thread(target=hold)
        thread.start()
        paused.wait(60)
        with acts.pause():
            model(batches(2)[0])
        model(batches(2)[0])
        go_on.set()
        thread.join()
        model(batches(1)[0])
    assert [len(value) for value in acts["lin"]] == [1]


def test_a_pause_that_outlasts_the_block_does_not_wake_it() -> None:
    model = net()
    with record(model, "lin") as acts:
        model(batches(2)[0])
        pause = acts.pause()
        pause.__enter__()
    pause.__exit__(None, None, None)
    model(batches(2)[0])
    assert len(acts["lin"]) == 1


# --- Values of one's own -----------------------------------------------------------------------------


def test_added_values_stand_beside_the_layers_with_their_passes() -> None:
    model = net()
    with record(model, "lin", dtype=torch.float16) as acts:
        for step, batch in enumerate(batches(2, 1)):
            loss = model(batch).sum()
            labels = torch.full((len(batch),), step)
            acts.add("label", labels)
            labels.fill_(-1)
            if step:
                acts.add("loss", loss)
                acts.add("note", {"step": step, "loss": loss})
    assert list(acts) == ["lin", "label", "loss", "note"]
    assert acts["label"].cat().tolist() == [0, 0, 1]
    assert acts["label"].passes == acts["lin"].passes == [0, 1]
    assert acts["loss"].passes == acts["note"].passes == [1]
    assert not acts["loss"][0].requires_grad
    assert acts["loss"][0].dtype == torch.float32, "what is added is not cast"
    assert acts["note"][0]["step"] == 1
    assert acts["label"].type == "added"


def test_an_object_that_is_added_is_kept_as_it_is() -> None:
    model = net()
    tokens = {"a", "b"}
    with record(model, "lin") as acts:
        model(batches(2)[0])
        acts.add("tokens", tokens)
    assert acts["tokens"][0] is tokens


def test_added_tensors_of_a_graph_are_detached_also_where_layers_are_not() -> None:
    model = net()
    with record(model, "lin", detach=False, device="meta") as acts:
        acts_loss = model(batches(2)[0]).sum()
        acts.add("loss", acts_loss)
    assert acts["lin"][0].requires_grad
    assert not acts["loss"][0].requires_grad
    assert acts["loss"][0].is_meta


def test_values_cannot_be_added_before_a_pass_nor_to_a_layer_nor_afterwards() -> None:
    model = nn.Sequential(net())
    with record(model, ["0.lin", "0"]) as acts:
        with pytest.raises(ActrecError, match=r"acts.add\('label'\): there was no pass yet.*first"):
            acts.add("label", 1)
        model(batches(2)[0])
        for name in ("0.lin", "0"):
            with pytest.raises(ActrecError, match="name of a recorded layer"):
                acts.add(name, 1)
        acts.add("label", 1)
        acts.add("label", 2)
    with pytest.raises(ActrecError, match=r"acts.add\('label'\): the recording has ended.*inside"):
        acts.add("label", 3)
    assert acts["label"] == [1, 2]
    assert acts["label"].passes == [0, 0]


def test_a_value_that_could_not_be_added_leaves_no_layer() -> None:
    model = nn.Linear(4, 3)
    with record(model, "") as acts:
        model(torch.randn(2, 4))
        with pytest.raises(CaptureError, match=r"acts.add\('label'\)"):
            torch.vmap(lambda row: acts.add("label", row))(torch.randn(2, 4))
    assert list(acts) == [""]


def test_values_cannot_be_added_under_another_name_of_a_layer() -> None:
    model = nn.DataParallel(net())
    with record(model, "lin") as acts:
        model(batches(2)[0])
        with pytest.raises(ActrecError, match="name of a recorded layer"):
            acts.add("module.lin", 1)


# --- Clear -------------------------------------------------------------------------------------------


def test_clearing_forgets_everything_and_recording_goes_on_from_pass_0() -> None:
    model = net()
    with record(model, ["lin", "head"], inputs=True) as acts:
        kept = []
        for portion in range(3):
            for batch in batches(2, 1):
                model(batch)
                acts.add("label", portion)
            kept.append((acts["lin"].cat(), acts["lin"].passes, acts["label"][:], acts.num_passes))
            acts.clear()
            assert [len(one) for one in (*acts.values(), *acts.inputs.values())] == [0] * 5
            assert (acts.num_passes, acts.nbytes, acts.inputs.nbytes) == (0, 0, 0)
            with pytest.raises(ActrecError, match="no pass yet"):
                acts.add("label", 7)
        model(batches(1)[0])
    assert [(tuple(x.shape), *rest) for x, *rest in kept] == [
        ((3, 3), [0, 1], [portion] * 2, 2) for portion in range(3)
    ]
    assert acts["head"].passes == acts.inputs["head"].passes == [0]


def test_a_finished_recording_can_be_cleared() -> None:
    acts = recorded(2, 1)
    acts.clear()
    assert (acts.num_passes, acts.nbytes, len(acts["lin"])) == (0, 0, 0)


# --- Containers of one's own -------------------------------------------------------------------------


def test_a_bounded_deque_keeps_the_latest_calls_and_their_passes() -> None:
    acts = recorded(1, 2, 3, 4, into=partial(deque, maxlen=2), layers="lin", inputs=True)
    lin = acts["lin"]
    assert isinstance(lin, Layer)
    assert [len(value) for value in lin] == [3, 4]
    assert lin.passes == acts.inputs["lin"].passes == [2, 3]
    assert len(lin) == 2
    assert lin[-1] is list(lin)[1]
    assert lin[:1] == [lin[0]]
    assert lin.cat().shape == (7, 3)
    assert lin.maxlen == 2  # type: ignore[attr-defined]
    assert lin.nbytes == 7 * 3 * 4
    assert repr(lin) == "Layer 'lin' (Linear): 2 calls, (3-4, 3) float32, 84 B"
    joined = lin.cat()
    assert torch.equal(lin.cat(release=True), joined)
    assert len(lin) == 0
    assert lin.passes == []


def test_every_layer_has_a_container_of_its_own() -> None:
    made: list[deque[Any]] = []

    def into() -> deque[Any]:
        made.append(deque())
        return made[-1]

    acts = recorded(2, layers=["lin", "head"], into=into, inputs=True)
    assert sorted(map(len, made)) == [1] * 4
    acts.clear()
    assert sorted(map(len, made)) == [0] * 4
    assert [one.passes for one in acts.values()] == [[], []]


class Mean:
    """Keeps a number instead of the values."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def append(self, value: Tensor) -> None:
        self.sum += float(value.sum())
        self.count += value.numel()

    @property
    def mean(self) -> float:
        return self.sum / self.count


def test_a_container_may_keep_what_it_likes_and_the_layer_leads_to_it() -> None:
    model = net()
    with record(model, "lin", into=Mean) as acts, record(model, "lin") as plain:
        for batch in batches(2, 1):
            model(batch)
    expected = float(plain["lin"].cat().mean())
    assert acts["lin"].mean == pytest.approx(expected, abs=1e-6)  # type: ignore[attr-defined]
    assert acts["lin"].passes == [0, 1]
    assert len(acts["lin"]) == 2
    for read in (list, Layer.cat, lambda layer: layer[0]):
        with pytest.raises(ActrecError, match=r"acts\['lin'\]"):
            read(acts["lin"])
    assert "2 calls" in repr(acts["lin"])
    assert acts.nbytes == 0
    assert "lin" in repr(acts)
    with pytest.raises(AttributeError, match="median"):
        acts["lin"].median  # type: ignore[attr-defined]  # noqa: B018


def test_a_layer_in_a_container_can_be_copied() -> None:
    acts = recorded(2, 1, layers="lin", into=deque)
    twin = copy.deepcopy(acts["lin"])
    assert all(map(torch.equal, twin, acts["lin"]))
    assert (twin.name, twin.passes) == ("lin", [0, 1])


# --- Text --------------------------------------------------------------------------------------------

LINES: dict[str, tuple[list[Any], str]] = {
    "empty": ([], "Layer 'x' (Tensor): 0 calls, 0 B"),
    "one call": ([torch.zeros(2, 3)], "Layer 'x' (Tensor): 1 call, (2, 3) float32, 24 B"),
    "ragged": (
        [torch.zeros(n, 3) for n in (4, 4, 1)],
        "Layer 'x' (Tensor): 3 calls, (1-4, 3) float32, 108 B",
    ),
    "ragged in two": (
        [torch.zeros(1, 3), torch.zeros(2, 2)],
        "Layer 'x' (Tensor): 2 calls, (1-2, 2-3) float32, 28 B",
    ),
    "vector": ([torch.zeros(5)], "Layer 'x' (Tensor): 1 call, (5,) float32, 20 B"),
    "number": ([torch.tensor(1)], "Layer 'x' (Tensor): 1 call, () int64, 8 B"),
    "number of dimensions": (
        [torch.zeros(5), torch.zeros(1, 5), torch.zeros(2, 5)],
        "Layer 'x' (Tensor): 3 calls, (5,) | (1-2, 5) float32, 80 B",
    ),
    "dtypes": (
        [torch.zeros(2), torch.zeros(2).bfloat16(), torch.zeros(2)],
        "Layer 'x' (Tensor): 3 calls, (2,) float32, bfloat16, 20 B",
    ),
    "tuple": (
        [(torch.zeros(2), torch.arange(2))],
        "Layer 'x' (Tensor): 1 call, (2,) x 2 float32, int64, 24 B",
    ),
    "named tuple": (
        [Pair(torch.zeros(2), None)],
        "Layer 'x' (Tensor): 1 call, Pair((2,), None) float32, 8 B",
    ),
    "dict": ([{"a": torch.zeros(2)}], "Layer 'x' (Tensor): 1 call, {a: (2,)} float32, 8 B"),
    "mixed": (
        [torch.zeros(2), None, None, [torch.zeros(2)]],
        "Layer 'x' (Tensor): 4 calls, (2,) | None | [(2,)] float32, 16 B",
    ),
    "opaque": (
        [Opaque("transformers.cache_utils.DynamicCache")],
        "Layer 'x' (Tensor): 1 call, DynamicCache, 0 B",
    ),
    "words": (["a", "b"], "Layer 'x' (Tensor): 2 calls, str, 0 B"),
    "meta": (
        [torch.zeros(10**9, device="meta")],
        "Layer 'x' (Tensor): 1 call, (1000000000,) float32, 0 B",
    ),
    "thousands": (
        [torch.zeros(1000)] * 1234,
        "Layer 'x' (Tensor): 1,234 calls, (1000,) float32, 4.0 kB",
    ),
}


@pytest.mark.parametrize(("values", "text"), LINES.values(), ids=LINES)
def test_a_layer_is_one_line_without_data(values: list[Any], text: str) -> None:
    assert repr(layer(*values)) == str(layer(*values)) == text


# PyTorch's prototype of nested tensors says so.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_shown_without_a_shape() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert repr(layer(nested)) == "Layer 'x' (Tensor): 1 call, (nested,) float32, 36 B"
    assert "(nested,) | (2,)" in repr(layer(nested, torch.zeros(2)))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (4_900_000, "4.9 MB"), (2 * 10**9, "2.0 GB"), (10**15, "1.0 PB"), (10**19, "10000.0 PB")],
)  # fmt: skip
def test_sizes_are_short(nbytes: int, text: str) -> None:

    assert size(nbytes) == text


def test_a_recording_is_a_table() -> None:
    model = net()
    with record(model, ["", "lin", nn.ReLU]) as acts:
        for batch in batches(2, 2, 1):
            model(batch)
            acts.add("label", torch.arange(len(batch)))
            acts.add("note", "text")
        running = repr(acts)
    expected = """\
recorded Sequential: 5 layers, 3 passes, 200 B
layer  type        calls  shape     dtype    memory
''     Sequential      3  (1-2, 2)  float32    40 B
lin    Linear          3  (1-2, 3)  float32    60 B
act    ReLU            3  (1-2, 3)  float32    60 B
label  added           3  (1-2,)    int64      40 B
note   added           3  str                   0 B"""
    assert repr(acts) == str(acts) == expected
    assert running == expected.replace("recorded", "recording")


def test_a_recording_says_what_state_it_is_in() -> None:
    model = net()
    with pytest.raises(ZeroDivisionError), record(model, "lin", inputs=True) as acts:
        assert repr(acts) == (
            "recording Sequential: 1 layer, 0 passes, 0 B with inputs\n"
            "layer  type    calls  shape  dtype  memory  note\n"
            "lin    Linear      0                   0 B  no call yet"
        )
        model(batches(1)[0])
        1 / 0  # noqa: B018
    assert (
        repr(acts).splitlines()[0]
        == "recorded Sequential (interrupted, partial): 1 layer, 1 pass, 28 B with inputs"
    )
    assert repr(acts.inputs).splitlines() == [
        "recorded inputs of Sequential (interrupted, partial): 1 layer, 1 pass, 16 B",
        "layer  type    calls  shape            dtype    memory",
        "lin    Linear      1  {input: (1, 4)}  float32    16 B",
    ]


def test_a_table_of_odd_names_stays_a_table() -> None:
    names = ["a*", "two words", "[0]", "a.b", "ä"]
    model = nn.Module()
    for name in names:
        model._modules[name] = nn.Identity()
    model.forward = lambda x: [child(x) for child in model.children()]  # type: ignore[method-assign]
    with record(model) as acts:
        model(torch.zeros(1))
    lines = repr(acts).splitlines()
    assert len(lines) == 2 + len(names)
    assert [line[:9].strip() for line in lines[2:]] == names
    assert len({line.index("Identity") for line in lines[2:]}) == 1


@pytest.mark.parametrize(("count", "folded"), [(60, 0), (61, 1), (1500, 1440)])
def test_a_long_table_is_folded(count: int, folded: int) -> None:
    model = nn.Sequential(*[nn.Identity() for _ in range(count)])
    with record(model) as acts:
        model(torch.zeros(1))
    lines = repr(acts).splitlines()
    assert lines[0].startswith(f"recorded Sequential: {count:,} layers")
    if not folded:
        assert len(lines) == 62
        return
    assert len(lines) == 63
    assert lines[52] == f"... {count_of(folded, 'more layer')} ..."
    rows = [line.split()[0] for line in lines[2:52] + lines[53:]]
    assert rows == [str(i) for i in [*range(50), *range(count - 10, count)]]


def test_text_never_shows_data_and_never_ends_the_sharing_of_memory() -> None:
    model = nn.Linear(64, 128)
    with record(model, "") as acts:
        out = model(torch.full((64, 64), 0.123))
    text = repr(acts) + repr(acts[""]) + str(acts.nbytes)
    assert "0.1" not in text
    address = torch._C._data_address
    assert address(acts[""][0]) == address(out)


# --- Structures that must not be joined, and what must not be lost ---------------------------------------


def test_structures_that_differ_are_never_joined() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    for values in ([(x,), x], [None, x], [(x, x), (x, y)], [(x, 1), (x, 2)]):
        with pytest.raises(JoinError, match=r"call 1 is .*, while call 0 is"):
            ListLayer("x", values).cat()


def test_packed_sequences_are_not_joined_into_nonsense() -> None:
    calls = [pack_sequence([torch.ones(n, 2)]) for n in (3, 2)]
    with pytest.raises(JoinError, match="pad_packed_sequence"):
        ListLayer("x", calls).cat()


def test_dataclasses_that_do_not_compare_are_joined() -> None:
    @dataclasses.dataclass(eq=False)
    class Pair:
        first: torch.Tensor

    joined = ListLayer("x", [Pair(torch.ones(2)), Pair(torch.zeros(2))]).cat()
    assert joined.first.tolist() == [1, 1, 0, 0]


def test_arrays_are_joined_if_all_calls_have_the_same() -> None:
    x = torch.ones(2)
    assert ListLayer("x", [(x, np.ones(2))] * 2).cat()[0].shape == (4,)
    with pytest.raises(JoinError):
        ListLayer("x", [(x, np.ones(2)), (x, np.zeros(2))]).cat()


def test_dtypes_that_differ_are_named() -> None:
    with pytest.raises(JoinError, match=r"several dtypes, torch\.float32, torch\.float64.*dtype="):
        ListLayer("x", [torch.ones(2), torch.ones(2).double()]).cat()


class Sub(torch.Tensor):
    """A tensor subclass."""


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        lambda: torch.ones(2).as_subclass(Sub),
    ],
    ids=["sparse", "quantized", "subclass"],
)
def test_release_gives_what_it_would_give_without_and_loses_nothing(make: Any) -> None:
    tensor = make()
    layer = ListLayer("x", [tensor, tensor.clone()])
    expected = layer.cat()
    got = layer.cat(release=True)
    assert type(got) is type(expected)
    assert (got.layout, got.shape, got.dtype) == (expected.layout, expected.shape, expected.dtype)
    assert len(layer) == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    tensor = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)], layout=layout)
    with pytest.raises(JoinError, match="nested tensors"):
        ListLayer("x", [tensor, tensor]).cat()


# --- Copies, and changes that the user makes --------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda acts: pickle.loads(pickle.dumps(acts))])
def test_a_recording_can_be_copied_and_pickled(copied: Any) -> None:
    model = net()
    with record(model, ["lin", "act"], inputs=True, grads=True) as acts:
        for batch in batches(2, 1):
            model(batch).sum().backward()
        acts.add("label", 3)
    twin = copied(acts)
    assert list(twin) == list(acts)
    assert all(map(torch.equal, twin["lin"], acts["lin"]))
    assert all(map(torch.equal, twin.grads["lin"], acts.grads["lin"]))
    assert torch.equal(twin.inputs["lin"][1]["input"], acts.inputs["lin"][1]["input"])
    assert twin["lin"][0] is not acts["lin"][0]
    assert (twin.num_passes, twin["lin"].passes, list(twin["label"])) == (2, [0, 1], [3])
    assert twin.execution_order == acts.execution_order
    assert repr(twin).splitlines()[1:] == repr(acts).splitlines()[1:]
    assert twin.nbytes >= acts.nbytes, "what the recording shares is copied for each"


def test_a_name_or_a_dimension_of_another_kind_is_refused() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        model(torch.zeros(2))
        with pytest.raises(
            OptionError, match=r"acts\.add\(5, \.\.\.\): expected a string as the name"
        ):
            acts.add(5, 1)  # type: ignore[arg-type]
    for dim in ("batch", None, 1.0):
        with pytest.raises(OptionError, match=rf"cat\(dim={dim!r}\): expected the number"):
            acts[""].cat(dim)  # type: ignore[arg-type]


REARRANGED: dict[str, tuple[Callable[[Any], Any], list[int], list[int]]] = {
    "insert": (lambda calls: calls.insert(1, 9), [2, 9, 3, 1], [0, -1, 1, 2]),
    "remove": (lambda calls: calls.remove(3), [2, 1], [0, 2]),
    "reverse": (lambda calls: calls.reverse(), [1, 3, 2], [2, 1, 0]),
    "sort": (lambda calls: calls.sort(), [1, 2, 3], [2, 0, 1]),
    "sort by key": (lambda calls: calls.sort(key=abs, reverse=True), [3, 2, 1], [1, 0, 2]),
    "replace": (lambda calls: calls.__setitem__(1, 9), [2, 9, 1], [0, 1, 2]),
    "replace some": (lambda calls: calls.__setitem__(slice(0, 2), [7]), [7, 1], [-1, 2]),
    "copy": (lambda calls: copy.copy(calls).pop(), [2, 3, 1], [0, 1, 2]),
}


@pytest.mark.parametrize(("change", "calls", "passes"), REARRANGED.values(), ids=REARRANGED)
def test_passes_stay_with_their_calls_when_the_list_is_rearranged(
    change: Callable[[Any], Any], calls: list[int], passes: list[int]
) -> None:
    net = nn.Identity()
    with record(net, "") as acts:
        for value in (2, 3, 1):
            net(torch.zeros(1))
            acts.add("loss", value)
    change(acts["loss"])
    assert list(acts["loss"]) == calls
    assert acts["loss"].passes == passes


def test_passes_follow_what_the_user_takes_out_and_puts_in() -> None:
    model = net()
    with record(model, "lin") as acts:
        layer = acts["lin"]
        for batch in batches(1, 1, 1, 1):
            model(batch)
        layer.pop(0)  # type: ignore[attr-defined]
        assert layer.passes == [1, 2, 3]
        del layer[0:2]  # type: ignore[attr-defined]
        assert layer.passes == [3]
        layer.append(torch.zeros(1))  # type: ignore[attr-defined]
        model(batches(1)[0])
    assert layer.passes == [3, -1, 4]


def test_a_bounded_container_remembers_no_more_passes_than_it_needs() -> None:
    model = nn.Identity()
    with record(model, "", into=partial(deque, maxlen=2)) as acts:
        for _ in range(200):
            model(torch.zeros(1))
    assert acts[""].passes == [198, 199]
    assert len(acts[""]._passes) < 100  # type: ignore[attr-defined]


def test_a_container_without_clear_is_replaced_by_a_new_one() -> None:
    model = net()
    with record(model, "lin", into=Mean) as acts:
        model(batches(1)[0])
        acts.clear()
        assert (acts.num_passes, len(acts["lin"])) == (0, 0)
        model(batches(1)[0])
    assert len(acts["lin"]) == 1


def test_inputs_have_as_many_passes_as_the_recording() -> None:
    model = net()
    with record(
        model, "lin", inputs=True, transform=lambda t: t if t.shape[0] > 1 else None
    ) as acts:
        for batch in batches(2, 1):
            model(batch)
    assert acts.inputs.num_passes == acts.num_passes == 2


@pytest.mark.parametrize("how", ["cat", "stack"])
def test_joining_reads_each_call_once(how: str) -> None:
    class Counting(ListLayer):
        reads = 0

        def __iter__(self) -> Iterator[Tensor]:
            for value in super().__iter__():
                self.reads += 1
                yield value

    layer = Counting("a", [torch.full((2, 3), i) for i in range(4)])
    assert getattr(layer, how)().sum() == 6 * (0 + 1 + 2 + 3)
    assert layer.reads == 4


def test_with_release_the_memory_is_given_back_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(_join, "give_back", given.append)
    monkeypatch.setattr(_join, "WORTH_IT", 100)
    calls = [torch.zeros(10, 8) for _ in range(40)]  # 320 bytes each, 12,800 in all
    ListLayer("a", calls).cat(release=True)
    assert given == [960] * 13, "a sixteenth of the layer each time, and the last is not worth it"
    given.clear()
    monkeypatch.setattr(_join, "WORTH_IT", 10_000)
    ListLayer("a", calls).stack(release=True)
    assert given == [10_240]


# --- Equality and copies ------------------------------------------------------------------------------


X = torch.arange(20.0).reshape(5, 4) - 9


class Returns(nn.Module):
    """Returns values of several kinds."""

    def forward(self, x: Tensor) -> Any:
        return {"x": x, "more": (x.numpy(force=True) * 1, None, [x * 2]), "n": len(x)}


def several(x: Tensor) -> dict[str, Any]:
    """Recordings of one model, in every place."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), Returns())
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.fill_(0.1)
    found: dict[str, Any] = {}
    for name, into in {"list": list, "deque": deque}.items():
        with torch.no_grad(), record(model, inputs=True, into=into) as found[name]:
            model(x)
            model(x + 1)
    return found


def test_recordings_are_equal_if_their_values_are(tmp_path: Path) -> None:
    one, other, different = several(X), several(X), several(X * 2)
    for acts in (one["list"], other["list"]):
        acts.save(tmp_path / str(len(list(tmp_path.iterdir()))))
    one["disk"], other["disk"] = (load(tmp_path / str(at)) for at in range(2))
    for name, acts in one.items():
        assert acts == copy.copy(acts)
        for key in ("0", "1"):
            assert acts[key] == other["list"][key] == [*acts[key]]
            assert acts.inputs[key] == other[name].inputs[key]
            assert acts[key] != different["list"][key]
            assert acts[key] != acts[key][:1]
            assert acts[key] != "a string"
            assert acts[key] in [different["list"][key], other[name][key]]
            assert acts[key] not in [different["list"][key], [1, 2], 3]
        assert acts != different["list"]
        assert acts not in [different["list"], None]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_values_of_every_kind_are_compared() -> None:
    one, other = several(X)["list"]["2"], several(X)["list"]["2"]
    assert one == other
    kept = other[0].copy()
    for key, value in {"n": 3, "x": X.double(), "more": (), "y": 1}.items():
        other[0] = {**kept, key: value}
        assert one != other
    other[0] = {**kept, "more": (kept["more"][0] + 1, *kept["more"][1:])}
    assert one != other
    nested = torch.nested.nested_tensor([X[0], X[1]])  # of a kind that cannot be compared
    assert layer(nested) == layer(nested)
    assert layer(nested) != layer(nested.clone())


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("inside", [True, False])
def test_every_part_of_a_recording_can_be_copied(copied: Any, inside: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    block = record(model, inputs=True, grads=True)
    with block as acts:
        model(X).sum().backward()
        if inside:
            copies = [copied(part) for part in (acts, acts.inputs, acts.grads)]
        model(X)
    if not inside:
        copies = [copied(part) for part in (acts, acts.inputs, acts.grads)]
    for part, other in zip((acts, acts.inputs, acts.grads), copies, strict=True):
        for name, layer in part.items():
            assert other[name] == layer or (inside and other[name] == layer[:1])
            assert other[name].passes == layer.passes[: len(other[name])]
    if copied is not copy.copy:
        assert [other.num_passes for other in copies] == [1 if inside else 2] * 3


def test_shapes_of_many_kinds_are_counted_and_not_listed() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        for dimensions in range(1, 6):
            model(torch.ones((2,) * dimensions))
    assert "5 kinds of shapes" in str(acts)
    assert "5 kinds of shapes" in str(acts[""])
