"""Units: whatever is called inside is one pass, which is kept whole or dropped whole."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actrec import load, record, reduce, save, verify
from actrec.errors import ActrecError, OptionError
from actrec.store import Folder
from tests.stand_in import StandIn, standing_in

if TYPE_CHECKING:
    from pathlib import Path

X = torch.ones(2, 4)


class Model(nn.Module):
    """Two layers, one of them in place; ``steps`` calls the whole more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        if self.fails:
            message = "no memory"
            raise MemoryError(message)
        return self.act(hidden)  # type: ignore[no-any-return]

    def steps(self, many: int = 2) -> Tensor:
        for _ in range(many):
            y = self(X)
        return y  # type: ignore[no-any-return]


@pytest.fixture(params=["memory", "path"])
def into(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Into memory and into a path, of such a small budget that a unit is written in parts."""
    if request.param == "memory":
        return list
    return Folder(tmp_path / "run", shard_bytes=2000, budget=8000)


@pytest.mark.also_compiled
def test_whatever_is_called_in_a_unit_is_one_pass(into):
    model = Model()
    with record(model, inputs=True, into=into) as acts:
        for key in ("a", "b"):
            with acts.unit(key):
                acts.add("early", 1)
                model.steps(2)
                model.linear(X)
                acts.add("late", X)
                assert acts["linear"].units[-1] == key
        model(X)
    assert acts["linear"].passes == [0, 0, 0, 1, 1, 1, 2]
    assert acts["linear"].units == ["a", "a", "a", "b", "b", "b", None]
    assert acts.inputs["linear"].units == acts["linear"].units
    assert acts["early"].units == acts["late"].units == ["a", "b"] == acts.units
    assert acts.num_passes == 3
    assert "2 units" in repr(acts)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, GeneratorExit])
def test_a_unit_whose_block_raises_leaves_nothing_behind_and_its_key_is_free(into, error):
    model = Model()
    with record(model, inputs=True, into=into) as acts:
        with acts.unit(0):
            model(X)
            acts.add("x", 0)
        with pytest.raises(error), acts.unit(1):
            model.steps(20)  # more than the budget
            acts.add("x", 1)
            acts.add("new", 1)
            raise error
        assert acts.done == {0}
        assert list(acts) == ["linear", "act", "x"]
        with acts.unit(1):
            model(X)
            acts.add("x", 2)
    assert acts.failed_passes == [1]
    assert acts.units == [0, 1]
    for layer in (acts["linear"], acts["act"], acts["x"], acts.inputs["act"]):
        assert layer.passes == [0, 2]
        assert layer.units == [0, 1]
    assert list(acts["x"]) == [0, 2]
    if isinstance(into, Folder):
        assert verify(into) == []
        assert load(into)["linear"].units == [0, 1]


def test_an_error_that_is_caught_inside_leaves_a_unit_that_is_kept(into):
    model = Model()
    with record(model, into=into) as acts, acts.unit("a"):
        model.fails = True
        with pytest.raises(MemoryError):
            model(X)
        model.fails = False
        model(X)
    assert acts["linear"].units == ["a", "a"]
    assert acts.failed_passes == [0]  # as of any pass in which a forward has raised


def test_a_forward_that_was_interrupted_in_a_unit_goes_on_in_none(into):
    model = Model()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with record(model, into=into) as acts:
        with (
            acts.unit("a"),
            model.act.register_forward_pre_hook(interrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            model(X)
        with acts.unit("b"):
            model(X)
    assert acts["linear"].units == ["a", "b"]
    assert acts.failed_passes == [0]


# --- Gradients -----------------------------------------------------------------------------------------


@pytest.mark.also_compiled
def test_a_copy_made_inside_a_unit_and_cleared_takes_nothing_from_it() -> None:
    with record(model := Model(), "linear", into=deque) as acts:
        with acts.unit("a"):
            model(X)
            copy.copy(acts["linear"]).clear()
        assert len(acts["linear"]) == 1


@pytest.mark.parametrize("into", [list, deque])
def test_gradients_stay_with_their_calls_when_a_unit_is_dropped(into):
    model = Model()
    with record(model, "linear", grads=True, into=into) as acts:
        with acts.unit(0):
            first = model(X)
        outputs = []
        with pytest.raises(MemoryError), acts.unit(1):
            outputs = [model(X), model(X)]
            outputs[0].sum().backward()
            raise MemoryError
        with acts.unit(2):
            last = [model(X), model(X)]
            (3 * last[0]).sum().backward()
        outputs[1].sum().backward()  # of nothing that is recorded
        (2 * first).sum().backward()
        (4 * last[1]).sum().backward()
    grads = [None if grad is None else grad.max().item() for grad in acts.grads["linear"]]
    assert grads == [2, 3, 4]
    assert acts.grads["linear"].units == acts["linear"].units == [0, 2, 2]


def test_what_overflowed_in_a_unit_that_was_dropped_is_not_counted():
    model = nn.Sequential(nn.Linear(4, 4))
    with record(model, dtype=torch.float16) as acts:
        with pytest.raises(MemoryError), acts.unit(0):
            model(X * 1e8)
            raise MemoryError
        model(X)
    assert acts["0"]._overflows.counts() == {}


# --- Containers ----------------------------------------------------------------------------------------


def test_a_container_gets_the_calls_of_a_unit_when_it_has_ended():
    model = Model()
    with record(model, "linear", into=partial(deque, maxlen=3)) as acts:
        model.steps(2)
        with pytest.raises(MemoryError), acts.unit("a"):
            model.steps(3)
            assert len(acts["linear"]) == 2
            raise MemoryError
        assert acts["linear"].passes == [0, 1]
        with acts.unit("b"):
            model.steps(2)
            assert acts["linear"].units == [None, None]
    assert acts["linear"].units == [None, "b", "b"]


def test_a_copy_made_in_a_unit_has_what_the_container_has():
    with record(model := Model(), "linear", into=deque) as acts, acts.unit(0):
        model(X)
        copied = copy.deepcopy(acts)["linear"]
    assert (len(copied), len(acts["linear"])) == (0, 1)


# --- Values on their way from a device ---------------------------------------------------------------------


def test_what_is_on_its_way_when_a_unit_fails_comes_to_no_layer(into):
    model = Model()
    with standing_in(StandIn()), record(model, into=into) as acts:
        with acts.unit("a"):
            model(X)
        with (
            pytest.raises(KeyboardInterrupt),
            acts.unit("b"),
            model.act.register_forward_hook(_interrupt),
        ):
            model(X)
        with acts.unit("b"):
            model(X)
            model.linear(X)
    assert acts["linear"].units == ["a", "b", "b"]
    assert acts["act"].units == ["a", "b"]


def test_a_forked_process_leaves_the_units_alone(into, monkeypatch):
    model = Model()
    with record(model, into=into) as acts:
        for raises in (False, True):
            with monkeypatch.context() as patch, suppress(MemoryError), acts.unit(raises * 1):
                model(X)
                patch.setattr("os.getpid", lambda: -1)
                if raises:
                    raise MemoryError
            assert len(acts["linear"]) == 1
            acts._unit_recorder.drop_open()
        model(X)
    assert acts["linear"].units == [None]


# --- Threads and tasks -----------------------------------------------------------------------------------


def test_calls_in_other_threads_belong_to_the_unit_that_is_open(into):
    model = Model()
    with record(model, into=into) as acts, ThreadPoolExecutor(2) as pool:
        for key in range(3):
            with acts.unit(key):
                list(pool.map(model, [X] * 4))
                pool.submit(acts.add, "x", key).result()
    assert acts["act"].units == [0] * 4 + [1] * 4 + [2] * 4
    assert acts["x"].units == list(acts["x"]) == [0, 1, 2]


def test_each_thread_has_units_of_its_own(into):
    model, both = Model(), threading.Barrier(2)

    def work(key: str) -> None:
        for number in range(3):
            try:
                with acts.unit(f"{key}{number}"):
                    both.wait()
                    model.steps(2)
                    acts.add("key", f"{key}{number}")
                    both.wait()
                    if (key, number) == ("b", 1):
                        raise MemoryError
            except MemoryError:
                pass

    with record(model, into=into) as acts, ThreadPoolExecutor(2) as pool:
        list(pool.map(work, "ab"))
        assert acts.done == {"a0", "a1", "a2", "b0", "b2"}
    assert sorted(acts["act"].units) == sorted(2 * [*acts.units])
    assert list(acts["key"]) == acts["key"].units
    assert len(acts.failed_passes) == 1


def test_where_several_units_are_open_a_call_elsewhere_is_a_pass_of_its_own():
    model, opened, ended = Model(), threading.Barrier(3), threading.Event()

    def open_unit(key: int) -> None:
        with acts.unit(key):
            opened.wait()
            ended.wait()

    with record(model) as acts:
        threads = [threading.Thread(target=open_unit, args=(key,)) for key in range(2)]
        for thread in threads:
            thread.start()
        opened.wait()
        model(X)
        with pytest.raises(ActrecError, match="2 units are open, and this thread is inside none"):
            acts.add("x", 1)
        with (
            pytest.raises(ActrecError, match="another thread or task is inside a unit with that"),
            acts.unit(1),
        ):
            pass
        ended.set()
        for thread in threads:
            thread.join()
    assert acts["act"].units == [None]
    assert acts.done == {0, 1}


def test_each_asyncio_task_has_units_of_its_own():
    model = Model()

    async def work(key: int) -> None:
        with acts.unit(key):
            for _ in range(2):
                await asyncio.sleep(0)
                model(X)
                acts.add("key", key)

    async def main() -> None:
        await asyncio.gather(*map(work, range(3)))

    with record(model) as acts:
        asyncio.run(main())
    assert sorted(acts["act"].units) == [0, 0, 1, 1, 2, 2]
    assert list(acts["key"]) == acts["key"].units


@pytest.mark.eager_only("the compiler warns that it cannot read it")
def test_a_unit_that_ends_while_a_thread_is_in_a_forward_of_it_is_dropped_whole(into):
    model, inside, go_on = Model(), threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait()

    with record(model, into=into) as acts:
        model(X)
        with model.act.register_forward_pre_hook(wait):
            thread = threading.Thread(target=model, args=(X,))
            with (
                pytest.raises(ActrecError, match="while 1 other thread were in a forward"),
                acts.unit("a"),
            ):
                thread.start()
                inside.wait()
            go_on.set()
            thread.join()
        with acts.unit("a"):
            model(X)
    assert acts["linear"].passes == acts["act"].passes == [0, 2]
    assert acts.failed_passes == [1]


def test_a_unit_that_is_open_when_the_block_ends_is_dropped(into):
    model, opened, ended = Model(), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with acts.unit("a"):
                model(X)
                opened.set()
                ended.wait()
        except ActrecError as error:
            errors.append(error)

    with record(model, into=into) as acts:
        thread = threading.Thread(target=work)
        thread.start()
        opened.wait()
    ended.set()
    thread.join()
    assert (len(acts["act"]), acts.units, acts.failed_passes) == (0, [], [0])
    assert "ended before the unit did" in str(errors[0])


def test_a_forward_that_has_not_run_when_its_unit_ends_is_a_pass_of_its_own():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            yield self.linear(x)
            yield self.linear(x)

    model = Lazy()
    with record(model, "linear") as acts:
        with acts.unit("a"):
            steps = model(X)
            next(steps)
        next(steps)
    assert acts["linear"].units == ["a", None]


# --- Keys ------------------------------------------------------------------------------------------------


def test_keys_are_integers_of_any_kind_and_text(into):
    keys = [0, -1, (1 << 63) - 1, np.int64(7), "", "7", "naïve ✓", np.str_("s")]
    with record(model := Model(), "linear", into=into) as acts:
        for key in keys:
            with acts.unit(key):
                model(X)
    assert acts.units == acts["linear"].units == keys
    assert {type(key) for key in acts.units} == {int, str}
    assert acts.missing([5, "x", *keys, 5]) == [5, "x"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (1.0, "the key 1.0 is a float"),
        (True, "the key True is a bool"),
        (None, "is a NoneType"),
        (torch.tensor(1), "is a Tensor"),
        (1 << 63, "too large for 64 bits"),
        ("\udc80", "cannot be stored as text"),
    ],
)
def test_anything_else_is_no_key(key, message):
    with record(model := Model()) as acts:
        with pytest.raises(OptionError, match=message), acts.unit(key):
            pass
        with pytest.raises(OptionError, match=message):
            list(acts.remaining([(key, 0)]))
        with pytest.raises(OptionError, match=message):
            acts.missing([key])
        model(X)


def test_a_key_is_used_once_and_units_do_not_nest():
    model = Model()
    with record(model) as acts:
        with acts.unit("a"):
            model(X)
            with pytest.raises(ActrecError, match="units do not nest"), acts.unit("b"):
                pass
            with pytest.raises(ActrecError, match="a unit is open"):
                acts.clear()
        with pytest.raises(ActrecError, match="skips the keys that are done"), acts.unit("a"):
            pass
        with pytest.raises(ActrecError, match="the unit has ended"):
            acts.add("x", 1)
        model(X)
        acts.add("x", 1)
        acts.clear()
        assert (acts.done, acts.units) == (set(), [])
        with acts.unit("a"):
            model(X)
    with pytest.raises(ActrecError, match="the recording has ended"), acts.unit("c"):
        pass
    assert acts["linear"].passes == [0]


def test_a_unit_cannot_begin_inside_a_forward():
    model = Model()

    def begin(*_: object) -> None:
        with acts.unit("a"):
            pass

    with record(model) as acts:
        with (
            model.act.register_forward_pre_hook(begin),
            pytest.raises(ActrecError, match="inside a forward"),
        ):
            model(X)
        with pytest.raises(KeyboardInterrupt), model.act.register_forward_pre_hook(_interrupt):
            model(X)
        with acts.unit("a"):  # what the interrupt left behind is no forward
            model(X)
    assert acts["linear"].units == [None, None, "a"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_in_a_pause_nothing_is_recorded_of_a_unit_and_its_key_is_not_done():
    model = Model()
    with record(model) as acts:
        with acts.pause(), acts.unit("a"):
            model(X)
        assert acts.done == set()
        with acts.unit("a"):
            model(X)
    assert acts["linear"].units == ["a"]


def test_recordings_that_are_nested_have_units_of_their_own():
    model = Model()
    with record(model, "linear") as outer, record(model, "act") as inner:
        with outer.unit("a"), inner.unit("b"):
            model.steps(2)
        with inner.unit("a"):
            model(X)
    assert outer["linear"].units == ["a", "a", None]
    assert inner["act"].units == ["b", "b", "a"]


# --- What remains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda acts: pickle.loads(pickle.dumps(acts))]
)
@pytest.mark.parametrize("into", [list, reduce.Moments])
def test_a_copy_that_is_made_in_the_block_stays_as_it_is(how: Any, into: Any) -> None:
    model = Model()
    with record(model, "linear", inputs=True, into=into) as acts:
        with acts.unit("a"):
            model(X)
        copied = how(acts)
        with acts.unit("b"):
            model(X)
    for one in (copied, copied.inputs):
        assert (len(one["linear"]), one["linear"].units, one.units) == (1, ["a"], ["a"])
    assert acts["linear"].units == ["a", "b"]


def test_a_copy_that_is_made_in_the_block_leaves_the_units_of_the_recorder_alone() -> None:
    model = Model()
    with record(model, "linear") as acts:
        for key in ("a", "b", "c"):
            copy.copy(acts)
            with acts.unit(key):
                model(X)
    assert acts["linear"].units == ["a", "b", "c"]


def test_what_is_done_is_left_out_and_pairs_are_gone_through_one_by_one():
    model, seen = Model(), []

    def pairs() -> Any:
        for key in "abcd":
            seen.append(key)
            yield key, key.upper()

    with record(model) as acts:
        with acts.unit("b"):
            model(X)
        for key, item in acts.remaining(pairs()):
            assert (key, item) == (seen[-1], key.upper())
            with acts.unit(key):
                model(X)
        assert list(acts.remaining(pairs())) == []
    assert acts.units == ["b", "a", "c", "d"]


@pytest.mark.parametrize(
    ("pairs", "divide", "message"),
    [
        (3, False, "expected pairs of key and item, such as enumerate"),
        ([(0, 1)], 2, "divide is True or False"),
        ([(0, 1)], 1, "divide is True or False"),
        ([(0, 1)], [], "divide is True or False"),
        ([X], False, r"item 0 is a Tensor, not a \(key, item\) pair"),
        (["ab"], False, r"item 0 is a str, not a \(key, item\) pair"),
        ([(0, 1), (0, 2)], False, "the key 0 occurs twice, again at item 1"),
    ],
)
def test_what_are_no_pairs_is_said(pairs, divide, message):
    with record(model := Model()) as acts:
        with pytest.raises(OptionError, match=message):
            list(acts.remaining(pairs, divide=divide))
        model(X)


# --- Copies and saved recordings -----------------------------------------------------------------------------


def test_layers_that_are_made_of_others_know_their_units(into):
    model = Model()
    with record(model, into=into) as acts:
        for key in "ab":
            with acts.unit(key):
                model.steps(2)
    assert acts["linear"].nth(0).units == ["a", "b"]
    for copied in (copy.deepcopy(acts), pickle.loads(pickle.dumps(acts))):
        assert copied.units == ["a", "b"]
        assert copied["linear"].nth(1).units == ["a", "b"]
    part = acts.select("linear")
    for some in (part, pickle.loads(pickle.dumps(part))):
        assert some.units == ["a", "b"]
        assert some["linear"].units == ["a", "a", "b", "b"]
    layer = copy.copy(acts["linear"])
    assert layer.units == ["a", "a", "b", "b"]


def test_units_are_saved(tmp_path):
    model = Model()
    with record(model, inputs=True) as acts:
        model(X)
        for key in (5, "b"):
            with acts.unit(key):
                model.steps(2)
    save(acts, tmp_path / "run")
    found = load(tmp_path / "run")
    assert found.units == [5, "b"]
    assert found["linear"].units == found.inputs["act"].units == [None, 5, 5, "b", "b"]
    assert verify(tmp_path / "run") == []


def test_units_of_several_ranks_are_saved_with_passes_of_their_own(tmp_path):
    model = Model()
    for rank in range(2):
        folder = Folder(tmp_path / "run", rank=rank, world_size=2, run="r")
        with record(model, into=folder) as acts:
            for key in range(2):
                with acts.unit(f"{rank}{key}"):
                    model.steps(2)
                    acts.add("key", f"{rank}{key}")
            with pytest.raises(MemoryError), acts.unit("x"):
                raise MemoryError
    found = load(tmp_path / "run")
    assert found.units == ["00", "10", "01", "11"] == found["key"].units
    save(found, tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert saved["key"].units == list(saved["key"]) == ["00", "10", "01", "11"]
    assert saved["linear"].passes == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (saved.num_passes, saved.failed_passes) == (6, [4, 5])
