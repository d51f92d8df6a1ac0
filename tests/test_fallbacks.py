"""What rarely runs: other versions of PyTorch, a compiler not yet imported, recorders that are gone."""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from actrec import ActrecError, UnusedLayerWarning, _torch, record
from actrec._calls import hooks as _hooks
from actrec._calls import session as _session
from actrec._calls import track as _track
from actrec._calls.hooks import Hook
from actrec._values import memory as _memory
from actrec._values import snapshot as _snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = torch.ones(2, 4)


# --- Snapshots ---------------------------------------------------------------------------------------


def test_where_pytorch_cannot_share_memory_values_are_cloned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_snapshot, "lazy_clone", None)
    assert _snapshot.twin(X) is None
    model = nn.Identity()
    with record(model, "") as acts:
        model(X)
    assert torch.equal(acts[""][0], X)
    assert acts[""][0].data_ptr() != X.data_ptr()


def test_memory_that_cannot_be_shared_is_cloned(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.ones(2, 3).share_memory_()
    model = nn.Identity()
    with record(model, "") as acts:
        model(shared)
    shared.zero_()
    assert acts[""][0].sum() == 6


def test_without_an_address_every_tensor_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "data_address", None)
    model = nn.Sequential(nn.Linear(4, 4096), nn.Identity())
    with record(model) as acts:
        model(X)
    assert acts.nbytes == 2 * 2 * 4096 * 4, "shared, but that cannot be seen"


# --- The compiler ------------------------------------------------------------------------------------


# The compiler warns about its own deprecations when it is first used.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_block_that_is_made_outside_and_entered_in_a_compiled_function_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    block = record(model)

    def step(x: Tensor) -> Tensor:
        with block:
            return model(x)

    with pytest.raises(ActrecError, match=r"torch\.compile is compiling"):
        torch.compile(step, backend="eager")(X)
    with record(model) as acts:
        model(X)
    assert len(acts["0"]) == 1, "and the next block works"


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_where_the_stance_cannot_be_replaced_the_public_one_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    monkeypatch.delattr(torch._dynamo.eval_frame, "_set_stance")
    with record(model) as acts:
        assert stance() == "force_eager"
        with record(model) as inner:
            compiled(X)
        compiled(X)
    assert stance() == "default"
    assert (len(inner["0"]), len(acts["0"])) == (1, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_where_operators_do_not_say_that_they_compile_themselves_everything_is_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._higher_order_ops.utils, "_in_hop_compile", None)
    model = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager")
    with record(model) as acts:
        compiled(X)
    assert len(acts["0"]) == 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Nobody has imported the compiler, until this is called."""
    compiler = torch._dynamo
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    yield lambda: sys.modules.update({"torch._dynamo": compiler})
    sys.modules["torch._dynamo"] = compiler


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiler_that_comes_inside_the_block_runs_eagerly_from_the_next_pass_on(
    late: Callable[[], None],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with record(model) as acts:
        model(X)
        late()
        assert stance() == "default"
        model(X)
        assert stance() == "force_eager"
        torch.compile(model, backend="eager", fullgraph=True)(X)
    assert stance() == "default"
    assert len(acts["0"]) == 3


def test_a_compiler_that_comes_behind_the_block_is_left_alone(late: Callable[[], None]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with record(model) as acts:
        model(X)
    late()
    assert stance() == "default"
    assert len(acts["0"]) == 1


class TestWhatTheCompilerReads:
    """The compiler reads hooks, it does not run them: here they are run as it reads them."""

    @pytest.fixture(autouse=True)
    def _reading(self, monkeypatch: pytest.MonkeyPatch) -> None:

        answers = itertools.cycle([True, False])  # the second time it runs what it had read
        monkeypatch.setattr(_hooks, "is_dynamo_compiling", lambda: next(answers))

    @pytest.mark.parametrize(
        "options",
        [{}, {"inputs": True}, {"stop_early": True}, {"layers": ["0", "1"], "stop_early": True}],
    )
    def test_it_runs_the_hooks_that_it_comes_across(self, options: dict[str, Any]) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        with record(model, **{"layers": "0", **options}) as acts:
            model(X)
            model(X)
        assert acts["0"].passes == [0, 1]

    def test_operators_do_without_and_it_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_hooks, "is_dynamo_compiling", lambda: True)
        for module in (_track, _session):
            monkeypatch.setattr(module, "compiles_itself", lambda: True)
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.warns(UnusedLayerWarning), record(model) as acts:
            model(X)
        assert len(acts["0"]) == 0

    def test_an_export_is_no_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_hooks, "is_dynamo_compiling", lambda: True)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.warns(UnusedLayerWarning), record(model) as acts:
            model(X)
        assert len(acts["0"]) == 0


def test_a_trace_in_one_thread_is_none_of_the_business_of_another() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with record(model) as acts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            thread = threading.Thread(target=torch.jit.trace, args=(model, X))
            thread.start()
            thread.join()
        model(X)
    assert acts["0"].passes == [0]


# --- Recorders that are gone -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_recorder_that_is_dropped_during_a_call_does_no_harm_to_it(when: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    kept: list[object] = []

    def drop(*_: object) -> None:
        kept.clear()

    if when == "before":
        model.register_forward_pre_hook(drop)
        model[0].register_forward_pre_hook(drop)
    else:
        model[0].register_forward_hook(drop)
    expected = model(X)
    block = record(model, ["", "0"])
    kept += [block, block.__enter__()]
    del block
    assert torch.equal(model(X), expected)
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(isinstance(hook, Hook) for table in tables for hook in table.values())


def test_in_a_forked_process_every_open_recorder_stops() -> None:
    model = nn.Linear(4, 4)
    with record(model, "") as acts:
        model(X)
        _session._end_all()  # what a fork runs in the child
        model(X)
    assert len(acts[""]) == 1


# --- Errors ------------------------------------------------------------------------------------------


class Stubborn(Tensor):
    """A tensor that cannot be detached."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.detach:
            raise NotImplementedError("no")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("inputs", [False, True])
def test_a_value_that_cannot_be_copied_is_an_error_that_says_where_it_came_from(
    inputs: bool,
) -> None:
    model = nn.Sequential(nn.Identity())
    with (
        pytest.raises(NotImplementedError, match="no") as caught,
        record(model, "0", inputs=inputs) as acts,
    ):
        model(X)
        model(X.as_subclass(Stubborn))
    assert caught.value.__notes__ == ["raised while actrec recorded call 1 of layer '0'"]
    assert len(acts["0"]) == 1


def test_of_several_errors_that_a_model_swallows_the_first_is_raised() -> None:
    class Swallows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                with suppress(RuntimeError):
                    self.layer(x)
            return x

    calls: list[int] = []

    def fail(_: Tensor) -> None:
        calls.append(len(calls))
        raise ValueError(f"number {len(calls)}")

    model = Swallows()
    with (
        pytest.raises(RuntimeError, match="call 0: number 1"),
        record(model, "layer", transform=fail),
    ):
        model(X)
    assert calls == [0, 1]


def test_after_an_interrupt_inside_that_the_model_itself_caught_the_pass_goes_on() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            raise KeyboardInterrupt

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Interrupted()
            self.last = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except KeyboardInterrupt:
                return self.last(x)

    model = Catches()
    with record(model, ["inner.layer", "last"]) as acts:
        model(X)
        model(X)
    assert acts["inner.layer"].passes == acts["last"].passes == [0, 1]
    assert acts.num_passes == 2


def test_a_transform_of_a_tensor_on_another_device_runs_there() -> None:
    model = nn.Identity()
    with record(model, "", transform=lambda t: t.sum(0)) as acts:
        model(torch.empty(2, 4, device="meta"))
    assert acts[""][0].is_meta
    assert acts[""][0].shape == (4,)


# --- The end of a backward -----------------------------------------------------------------------------


def test_where_pytorch_does_not_say_when_a_backward_ends_it_counts_as_ended_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", None)
    called: list[int] = []
    _torch.at_end_of_backward(lambda: called.append(1))
    assert called == [1]
