"""When the block ends, however it ends, the model is as it was; elsewhere a hook is nothing."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from actrec import (
    ActrecError,
    Recorder,
    SelectionError,
    TransformError,
    record,
)
from actrec._calls import hooks as _hooks
from tests.conftest import own_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator


class Net(nn.Module):
    """Two layers, the second used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.b(self.a(x)))


def tables(model: nn.Module) -> list[tuple[dict[int, Any], ...]]:
    """All that says which hooks a model has, and in which order."""
    names = (
        "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
    )  # fmt: skip
    return [tuple(dict(vars(module)[name]) for name in names) for module in model.modules()]


@pytest.fixture
def model() -> Net:
    net = Net()
    net.a.register_forward_hook(lambda *_: None)
    net.b.register_forward_pre_hook(lambda *_: None)
    return net


X = torch.ones(2, 4)


class Boom(Exception):
    """Raised by a test."""


def test_the_hooks_are_as_before_after_a_normal_exit(model: Net) -> None:
    before = tables(model)
    with record(model, inputs=True):
        assert tables(model) != before
        model(X)
    assert tables(model) == before


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_hooks_are_as_before_after_an_exception_and_it_passes_through(
    model: Net, error: type[BaseException]
) -> None:
    before = tables(model)
    with pytest.raises(error), record(model, inputs=True) as acts:
        model(X)
        raise error
    assert tables(model) == before
    assert len(acts["a"]) == 1, "and what was recorded stays"


def test_no_hook_is_placed_if_a_query_is_wrong(model: Net) -> None:
    before = tables(model)
    with pytest.raises(SelectionError), record(model, ["a", "b", "c"]):
        pass
    assert tables(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_all_hooks_are_placed_or_none(
    model: Net, error: type[BaseException], monkeypatch: Any
) -> None:
    before = tables(model)

    def fail(*_: object, **__: object) -> RemovableHandle:
        raise error

    monkeypatch.setattr(model.b, "register_forward_hook", fail)
    with pytest.raises(error), record(model):
        pass
    assert tables(model) == before


def test_an_interrupt_between_a_hook_and_its_handle_leaves_no_hook(
    model: Net, monkeypatch: Any
) -> None:
    before = tables(model)
    register = model.b.register_forward_hook

    def interrupted(*args: Any, **options: Any) -> RemovableHandle:
        register(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.b, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), record(model):
        pass
    assert tables(model) == before


def test_an_interrupt_while_hooks_come_off_leaves_none(model: Net, monkeypatch: Any) -> None:
    before = tables(model)
    delete, calls = _hooks.delete, []

    def interrupted(module: nn.Module, hook: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt
        delete(module, hook)

    monkeypatch.setattr(_hooks, "delete", interrupted)
    with pytest.raises(KeyboardInterrupt), record(model):
        model(X)
    assert tables(model) == before


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_failing_remove_does_not_keep_the_others_and_is_told(
    model: Net, monkeypatch: Any, error: type[BaseException]
) -> None:
    before = tables(model)
    remove = RemovableHandle.remove
    failed: list[RemovableHandle] = []

    def fail_once(handle: RemovableHandle) -> None:
        if not failed:
            failed.append(handle)
            raise error
        remove(handle)

    with pytest.raises(error), record(model):
        model(X)
        monkeypatch.setattr(RemovableHandle, "remove", fail_once)
    assert [entry[:2] for entry in tables(model)] == [entry[:2] for entry in before]


def test_hooks_are_found_again_when_somebody_replaced_the_table(model: Net) -> None:
    with record(model, "a"):
        model(X)
        model.a._forward_hooks = OrderedDict(model.a._forward_hooks)
        model._forward_pre_hooks = OrderedDict(model._forward_pre_hooks)
    assert not any(own_hooks(module) for module in model.modules())


def test_a_cleared_table_does_no_harm(model: Net) -> None:
    with record(model, "a"):
        model(X)
        model.a._forward_hooks.clear()
    assert not model.a._forward_hooks


def test_a_dropped_generator_takes_its_hooks_off(model: Net) -> None:
    before = tables(model)

    def steps() -> Iterator[Recorder]:
        with record(model) as acts:
            model(X)
            yield acts

    generator = steps()
    next(generator)
    assert tables(model) != before
    del generator
    assert tables(model) == before


def test_a_block_that_is_dropped_without_being_left_takes_its_hooks_off(model: Net) -> None:
    before = tables(model)
    block = record(model)
    acts = block.__enter__()
    model(X)
    values = weakref.ref(acts["a"][0])
    del block, acts
    assert tables(model) == before
    assert values() is None


@pytest.mark.parametrize(
    "options", [{"inputs": True}, {"grads": True}, {"stop_early": True}], ids=" ".join
)
def test_recorder_values_and_model_die_without_the_garbage_collector(
    options: dict[str, Any],
) -> None:
    model = Net()
    gc.disable()
    try:
        with record(model, **options) as acts:
            model(X)
        dying = [weakref.ref(thing) for thing in (acts, acts["a"], acts["a"][0], model)]
        del model
        assert dying[-1]() is None, "a recording does not keep the model"
        del acts
        assert [ref() for ref in dying] == [None] * 4
    finally:
        gc.enable()


def test_other_peoples_hooks_keep_their_place_and_their_ids() -> None:
    model = Net()
    calls: list[str] = []
    model.a.register_forward_hook(lambda *_: calls.append("before"))
    with record(model):
        handle = model.a.register_forward_hook(lambda *_: calls.append("inside"))
        model(X)
    model(X)
    assert calls == ["before", "inside"] * 2
    handle.remove()
    model(X)
    assert calls == ["before", "inside"] * 2 + ["before"]


def test_a_hook_that_a_pickled_model_brought_along_is_not_replaced() -> None:
    model = Net()
    seen: list[str] = []
    # What unpickling in a fresh process leaves: hooks with ids that the process will count up to.
    for ahead in range(5):
        model.a._forward_hooks[RemovableHandle.next_id + ahead] = lambda *_: seen.append("theirs")
    before = tables(model)
    with record(model, "a") as acts:
        model(X)
    assert len(seen) == 5
    assert len(acts["a"]) == 1
    assert tables(model) == before


def test_nested_recorders_of_one_model_do_not_disturb_each_other(model: Net) -> None:
    before = tables(model)
    with record(model, "a") as outer:
        model(X)
        with record(model, ["a", "b"]) as inner:
            model(X)
        model(X)
    assert (len(outer["a"]), len(inner["a"]), len(inner["b"])) == (3, 1, 2)
    assert tables(model) == before


def test_recorders_that_end_in_the_wrong_order_do_not_disturb_each_other(model: Net) -> None:
    before = tables(model)
    first, second = record(model, "a"), record(model, "a")
    one, two = first.__enter__(), second.__enter__()
    model(X)
    first.__exit__(None, None, None)
    model(X)
    second.__exit__(None, None, None)
    assert (len(one["a"]), len(two["a"])) == (1, 2)
    assert tables(model) == before


def test_a_block_is_entered_once(model: Net) -> None:
    block = record(model, "a")
    with block:
        model(X)
    with pytest.raises(ActrecError, match="entered before"), block:
        pass


# --- Inert elsewhere ---------------------------------------------------------------------------------


def test_a_copy_of_a_model_that_is_being_recorded_records_nothing(model: Net) -> None:
    with record(model, inputs=True) as acts:
        model(X)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(Plain.from_net(model)))):
            clone(X)
            assert not any(own_hooks(module) for module in clone.modules())
        assert len(acts["a"]) == 1


class Plain(Net):
    """A model without hooks that pickle cannot take."""

    @classmethod
    def from_net(cls, net: Net) -> Plain:
        plain = cls()
        plain.a, plain.b = net.a, net.b
        for layer in (plain.a, plain.b):
            for table in (layer._forward_hooks, layer._forward_pre_hooks):
                for key in [key for key, hook in table.items() if hook not in own_hooks(layer)]:
                    del table[key]
        return plain


def all_hooks(module: nn.Module) -> list[Any]:
    """All that a module and those inside it know of hooks."""
    return [
        (name, list(value.items()))
        for inside in module.modules()
        for name, value in vars(inside).items()
        if "hooks" in name and value
    ]


@pytest.mark.filterwarnings("ignore:record.* was not called inside")
@pytest.mark.parametrize("options", [{}, {"inputs": True}, {"stop_early": True}], ids=str)
def test_a_copy_made_inside_is_as_one_that_was_made_before(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()))
    before = copy.deepcopy(model)
    with record(model, ["0", "1"], **options), record(model, "1.0", **options):
        handle = model[0].register_forward_hook(print)  # somebody else's
        copies = [
            copy.deepcopy(model),
            AveragedModel(model).module,
            copy.deepcopy({"m": [model]})["m"][0],
        ]
        part, several = copy.deepcopy(model[1]), copy.deepcopy([model[0], model])
        handle.remove()
    for one in copies:
        assert [hook for _, table in all_hooks(one) for hook in table] == [(handle.id, print)]
        assert vars(one).keys() == vars(before).keys()
    assert all_hooks(part) == []
    assert several[0] is several[1][0]
    assert len(all_hooks(several[1])) == 1
    copies[0][0]._forward_hooks.clear()
    assert torch.equal(copies[0](X), before(X))
    assert copy.deepcopy(copies[0])(X) is not None


@pytest.mark.filterwarnings("ignore:record.* was not called inside")
@pytest.mark.parametrize("options", [{}, {"inputs": True}, {"stop_early": True}], ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_a_file_of_a_model_can_be_read_where_actrec_is_not(
    options: dict[str, Any], own: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    if own:
        model.forward = model[0].forward  # type: ignore[method-assign]
    out = model(X)
    with record(model, "0", **options), record(model, ["0", ""], **options):
        data = pickle.dumps(model)
    assert b"actrec" not in data
    assert torch.equal(pickle.loads(data)(X), out)


def test_neither_a_copy_nor_a_file_of_the_model_carries_the_recording() -> None:
    model = nn.Linear(4, 4)
    size = len(pickle.dumps(model))
    with record(model, "") as acts:
        for _ in range(100):
            model(torch.ones(100, 4))
        assert acts.nbytes > 100_000
        assert len(pickle.dumps(model)) < size + 2_000
        file = io.BytesIO()
        torch.save(model, file)
        assert file.tell() < size + 10_000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded(torch.ones(1, 4))
    assert torch.equal(loaded.weight, model.weight)


def _call_and_count(model: nn.Module, queue: Any) -> None:
    model(X)
    queue.put(sum(len(own_hooks(module)) for module in model.modules()))


@pytest.mark.parametrize("method", ["spawn", "fork"])
# Python warns of every fork in a process that has threads, as torch's does.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_in_another_process_the_hooks_do_nothing(method: str) -> None:
    if method == "fork":
        model = nn.Linear(4, 4)
        with record(model, "") as acts:
            model(X)
            child = os.fork()
            if child == 0:
                model(X)
                os._exit(len(acts[""]))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
            model(X)
        assert len(acts[""]) == 2
        return
    context = multiprocessing.get_context(method)
    model = nn.Linear(4, 4)
    with record(model, "") as acts:
        queue = context.Queue()
        process = context.Process(target=_call_and_count, args=(model, queue))
        process.start()
        assert queue.get(timeout=120) == 0
        process.join()
        model(X)
    assert len(acts[""]) == 1


# --- Errors inside -----------------------------------------------------------------------------------


class Fails(nn.Module):
    """Raises on demand between its layers, and may swallow what its layers raise."""

    def __init__(self, *, swallow: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.swallow = swallow
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.a(x)
            if self.error is not None:
                raise self.error
            return self.b(x)
        except Exception:
            if self.swallow:
                return x
            raise


def _fails_on(value: float) -> Any:
    def transform(t: Tensor) -> Tensor:
        if value in t:
            raise ValueError("no good")
        return t

    return transform


def test_a_transform_that_raises_names_layer_and_call_and_keeps_what_came_before() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with (
        pytest.raises(
            TransformError, match=r"layer '1' raised ValueError on call 2: no good"
        ) as caught,
        record(model, {"0": None, "1": _fails_on(2.0)}) as acts,
    ):
        for step in range(4):
            model(torch.full((1,), float(step)))
    assert isinstance(caught.value.__cause__, ValueError)
    assert (len(acts["0"]), len(acts["1"])) == (3, 2)
    assert acts["1"].passes == [0, 1]
    assert not any(own_hooks(module) for module in model.modules())
    assert "interrupted" in repr(acts)


def test_a_transforms_error_that_the_model_swallows_is_raised_at_the_end() -> None:
    model = Fails(swallow=True)
    with (
        pytest.raises(TransformError, match="layer 'a' raised ValueError on call 0"),
        record(model, "a", transform=lambda t: _fails_on(1.0)(torch.ones_like(t))),
    ):
        model(X)


def test_an_error_of_the_block_names_the_transforms_error_that_the_model_swallowed() -> None:
    model = Fails(swallow=True)
    with pytest.raises(KeyError) as caught, record(model, transform=lambda t: t[:, 9]):
        model(torch.zeros(2, 4))
        raise KeyError
    (note,) = caught.value.__notes__
    assert "raised IndexError on call 0" in note


class Full(list[Any]):
    """Takes no second item."""

    def append(self, item: Any) -> None:
        if len(self) == 1 and not hasattr(self, "refused"):
            self.refused = True
            raise OSError("the container is full")
        super().append(item)


@pytest.mark.parametrize("options", [{}, {"inputs": True}], ids=str)
def test_an_error_of_the_users_container_that_the_model_swallows_is_raised_at_the_end(
    options: dict[str, bool],
) -> None:
    class Swallows(nn.Linear):
        def __call__(self, x: Tensor) -> Any:
            with contextlib.suppress(OSError):
                return super().__call__(x)
            return x

    model = nn.Sequential(Swallows(4, 4), nn.ReLU())
    with (
        pytest.raises(OSError, match="the container is full") as caught,
        record(model, "0", into=Full, **options) as acts,
    ):
        for _ in range(3):
            model(torch.randn(2, 4))
    assert caught.value.__notes__ == ["raised while actrec recorded call 1 of layer '0'"]
    assert len(acts["0"]) == 2
    assert acts["0"].passes == [0, 2]


def test_a_transforms_error_that_the_caller_handled_is_not_raised_again() -> None:
    model = Fails()
    with record(
        model, "a", transform=lambda t: t if t.shape[0] == 2 else t.no_such_thing()
    ) as acts:
        model(X)
        with pytest.raises(TransformError):
            model(torch.ones(3, 4))
        model(X)
    assert len(acts["a"]) == 2
    assert acts["a"].passes == [0, 2]


def test_a_failed_pass_keeps_the_layers_joinable_through_their_passes() -> None:
    model = Fails()
    with record(model, ["a", "b"], inputs=True) as acts:
        for step in range(3):
            model.error = Boom() if step == 1 else None
            with contextlib.suppress(Boom):
                model(X + step)
    assert acts["a"].passes == acts.inputs["a"].passes == [0, 1, 2]
    assert acts["b"].passes == acts.inputs["b"].passes == [0, 2]
    assert torch.equal(acts.inputs["b"][1]["input"], acts["a"][2])


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_after_an_interrupt_that_was_caught_the_next_call_is_a_new_pass(
    error: type[BaseException],
) -> None:
    model = Fails()
    outer = nn.Sequential(model)
    with record(outer, ["0.a", "0.b"]) as acts:
        for step in range(3):
            model.error = error() if step == 0 else None
            with contextlib.suppress(error):
                outer(X)
    assert acts["0.a"].passes == [0, 1, 2]
    assert acts["0.b"].passes == [1, 2]
    assert acts.num_passes == 3


def test_the_models_own_error_is_never_masked() -> None:
    model = Fails()
    model.error = Boom("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Boom, match="mine"), record(model, "b"):
            model(X)


# --- Threads -----------------------------------------------------------------------------------------


def test_eight_threads_through_one_model_give_one_record_for_each_call_with_its_pass() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity())
    nn.init.ones_(model[0].weight)
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for step in range(50):
            model(torch.full((1, 1), float(number * 50 + step)))

    with record(model, inputs=True) as acts:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert acts.num_passes == 400
    by_pass = [
        dict(zip(acts[name].passes, map(float, acts[name]), strict=True)) for name in ("0", "1")
    ]
    assert by_pass[0] == by_pass[1]
    assert sorted(by_pass[0].values()) == [float(i) for i in range(400)]
    assert [float(given["input"]) for given in acts.inputs["1"]] == [
        float(value) for value in acts["1"]
    ]


def test_the_replicas_of_data_parallel_are_recorded_by_layer_name_in_the_callers_pass() -> None:
    model = Net()

    class Parallel(nn.Module):
        """What DataParallel does, on CPU: replicas that share the hooks, each in a thread of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, x: Tensor) -> Tensor:
            outs: dict[int, Tensor] = {}

            def run(number: int, chunk: Tensor) -> None:
                outs[number] = replicas[number](chunk)

            replicas = []
            for _ in range(2):
                replica = model._replicate_for_data_parallel()
                for name in ("a", "b"):
                    replica._modules[name] = getattr(model, name)._replicate_for_data_parallel()
                    for key, parameter in getattr(model, name)._parameters.items():
                        setattr(replica._modules[name], key, parameter.detach())
                replicas.append(replica)
            threads = [threading.Thread(target=run, args=item) for item in enumerate(x.chunk(2))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return torch.cat([outs[0], outs[1]])

    wrapper = Parallel()
    with record(wrapper, ["a", "b"]) as acts:
        for _ in range(3):
            wrapper(torch.randn(4, 4))
    assert acts.num_passes == 3
    assert acts["a"].passes == [0, 0, 1, 1, 2, 2]
    assert sorted(acts["b"].passes) == [0] * 4 + [1] * 4 + [2] * 4


def test_tasks_of_asyncio_have_passes_of_their_own() -> None:
    model = Net()

    async def work(step: int) -> None:
        for _ in range(3):
            model(X * step)
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(work(1), work(2))

    with record(model, "a") as acts:
        asyncio.run(main())
    assert acts["a"].passes == list(range(6))


# --- A block that ends during a call -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"inputs": True}, {"stop_early": True}], ids=" ".join)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_recorder_that_is_dropped_during_a_call_does_no_harm_to_it(
    when: str, whole: bool, options: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    kept: list[object] = []
    register = (
        model[0].register_forward_pre_hook if when == "before" else model[0].register_forward_hook
    )
    register(lambda *_: kept.clear())
    expected = model(X)
    block = record(model, ["", "0"], **options)
    kept += [block, block.__enter__()]
    del block
    assert torch.equal((model if whole else model[0])(X), expected)


def test_a_block_that_is_left_during_a_call_does_no_harm_to_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    block = record(model, "0", inputs=True)
    handle = model[0].register_forward_hook(lambda *_: block.__exit__(Boom, Boom(), None))
    acts = block.__enter__()
    model(X)
    handle.remove()
    assert len(acts["0"]) == 0


def test_a_block_that_could_not_be_entered_can_be_entered_later(monkeypatch: Any) -> None:
    model = Net()

    def fail(*_: object, **__: object) -> RemovableHandle:
        raise Boom

    block = record(model, "a")
    with monkeypatch.context() as patch:
        patch.setattr(model.a, "register_forward_hook", fail)
        with pytest.raises(Boom), block:
            pass
    with block as acts:
        model(X)
    assert len(acts["a"]) == 1


def test_python_may_end_while_a_block_is_open_and_nothing_is_said() -> None:
    code = """
import torch, actrec
model = torch.nn.Linear(4, 3)
block = actrec.record(model, "")
acts = block.__enter__()
model(torch.ones(2, 4))
"""
    child = [sys.executable, "-W", "error", "-c", code]
    ended = subprocess.run(child, check=True, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("", "")
