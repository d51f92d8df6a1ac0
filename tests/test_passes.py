"""One real call, one record, and every call belongs to one outermost forward."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from actrec import _torch, load, record
from actrec._calls import own_calls as _own_calls
from actrec._calls import track as _track
from actrec.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.ones(2, 4)


class Block(nn.Module):
    """Norm, linear, in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.norm(x)))


class Stack(nn.Module):
    """Blocks, each run through ``call``."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def _nested(block: nn.Module, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return checkpoint(block, y, use_reentrant=False)

    return checkpoint(inner, x, use_reentrant=False)


def _without_early_stop(block: nn.Module, x: Tensor) -> Tensor:
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(block, x, use_reentrant=False)


CHECKPOINTS = {
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "non-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "without early stop": _without_early_stop,
    "nested": _nested,
}


@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("inputs", [False, True])
def test_what_checkpointing_recomputes_is_not_recorded_again(
    call: Callable[[nn.Module, Tensor], Tensor], inputs: bool
) -> None:
    plain = Stack(lambda block, x: block(x))
    model = Stack(call)
    model.load_state_dict(plain.state_dict())
    runs = []
    for net in (plain, model):
        net.zero_grad()
        with record(net, "**", inputs=inputs) as acts:
            for _ in range(2):
                net(X.clone().requires_grad_()).sum().backward()
        runs.append((acts, [p.grad for p in net.parameters()]))
    (expected, grads), (got, checkpointed_grads) = runs
    assert {name: layer.passes for name, layer in got.items()} == {
        n: layer.passes for n, layer in expected.items()
    }
    for name in expected:
        assert all(map(torch.equal, got[name], expected[name]))
    assert all(map(torch.equal, grads, checkpointed_grads))
    assert got.num_passes == 2


@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_the_public_fallback_finds_recomputation_too(
    call: Callable[[nn.Module, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_track, _own_calls):
        monkeypatch.setattr(module, "backward_number", _torch.recomputing_number)
    model = Stack(call)
    with record(model, "**") as acts:
        model(X.clone().requires_grad_()).sum().backward()
    assert {len(layer) for layer in acts.values()} == {1}


class Watching(TorchDispatchMode):
    """Writes down the operations that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Selective(nn.Module):
    """A region that selective checkpointing keeps every result of, in which one layer returns a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.part = nn.Unflatten(-1, (2, 2))
        self.watching = Watching()

    def region(self, x: Tensor) -> Tensor:
        with self.watching:
            x = self.second(self.first(x).relu()).clone().sin()
            return (self.part(x[:, :]).clone() * self.part(x[1:]).clone()[:1]).exp().clone().sin()

    def forward(self, x: Tensor) -> Tensor:
        keep_all = partial(
            create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE
        )
        return checkpoint(self.region, x, use_reentrant=False, context_fn=keep_all)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inputs": True},
        {"detach": False},
        {"dtype": torch.float16},
        {"transform": lambda t: t[..., 0]},
        {"transform": lambda t: t @ torch.ones(t.shape[-1], 4)},
        {"transform": lambda t: (t * 2).clone(), "detach": False},
    ],
    ids=" ".join,
)
def test_selective_checkpointing_counts_no_operation_of_ours(options: dict[str, Any]) -> None:
    model = Selective()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(X).square().sum().backward()
        return [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]

    expected = gradients()
    alone = model.watching.seen.copy()
    with record(model, **options) as acts:
        assert all(map(torch.equal, gradients(), expected))
    assert len(acts["first"]) == 1
    # Modes of others stay where they are, and see nothing of what we do.
    assert model.watching.seen == 2 * alone


@pytest.mark.eager_only("the compiler refuses it")
def test_a_forward_that_calls_autograd_itself_is_recorded() -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)
            return self.inner(grad)

    model = Penalty()
    with record(model, "inner") as acts:
        model(X).sum().backward()
    assert acts["inner"].passes == [0, 0]


@pytest.mark.also_compiled
def test_every_call_of_a_reused_module_is_a_record_of_the_same_pass() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Linear(4, 4), relu)
    with record(model) as acts:
        first, second = (relu(model[1](relu(X * step))) for step in (1, 2))
        model(X)
        model(X * 2)
    assert acts["0"].passes[-4:] == [acts.num_passes - 2] * 2 + [acts.num_passes - 1] * 2
    assert torch.equal(acts["0"][-1], second)
    assert torch.equal(acts["0"][-3], first)


class Tree(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return self.leaf(x) if depth == 0 else self(x, depth - 1) + self(x, depth - 1)


@pytest.mark.also_compiled
def test_a_module_that_calls_itself_is_one_pass_from_the_outside_and_inputs_stay_paired() -> None:
    model = Tree()
    with record(model, ["", "leaf"], inputs=True) as acts:
        for _ in range(2):
            model(X, depth=2)
    assert acts["leaf"].passes == [0] * 4 + [1] * 4
    assert acts[""].passes == [0] * 7 + [1] * 7
    depths = [given["depth"] for given in acts.inputs[""]]
    assert depths == [0, 0, 1, 0, 0, 1, 2] * 2, "in the order in which the calls end"


def test_a_call_that_is_not_recorded_ends_no_pass_that_a_call_of_the_same_module_has_begun() -> (
    None
):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, again: bool = True) -> Tensor:
            if again:
                with acts.pause():
                    self(x, again=False)
            return self.linear(x)

    model = Model()
    for options in ({}, {"inputs": True}):
        with record(model, "linear", **options) as acts:
            model(X)
            model(X)
        assert acts["linear"].passes == [0, 1]
        assert acts.num_passes == 2


def test_a_call_has_its_own_inputs_where_one_of_the_same_module_has_raised_inside_it() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, *, fail: bool = False) -> Tensor:
            if fail:
                raise ValueError
            with suppress(ValueError):
                self(x + 1, fail=True)
            return x * 2

    model = Model()
    with record(model, "", inputs=True) as acts:
        for _ in range(2):
            model(X)
    assert [[*given] for given in acts.inputs[""]] == [["x"], ["x"]]
    assert all(torch.equal(given["x"], X) for given in acts.inputs[""])


class Codec(nn.Module):
    """A model with ways in besides forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.decoder = nn.Linear(4, 4)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x))


def test_without_a_call_of_the_root_the_outermost_call_on_the_way_is_the_pass() -> None:
    model = Codec()
    with record(model) as acts:
        model.encode(X)
        model(X)
        model.encode(X)
        model.decoder(X)
    assert acts["encoder.0"].passes == acts["encoder.1"].passes == [0, 1, 2]
    assert acts["decoder"].passes == [1, 3]
    assert acts.num_passes == 4


def test_a_pass_in_which_no_chosen_layer_runs_counts() -> None:
    class Branch(Codec):
        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x) if x.sum() > 0 else self.decoder(x)

    model = Branch()
    with record(model, "decoder") as acts:
        model(X)
        model(-X)
    assert acts["decoder"].passes == [1]
    assert acts.num_passes == 2


def test_inputs_are_named_after_the_parameters_of_forward() -> None:
    class Many(nn.Module):
        def forward(
            self,
            x: Tensor,
            y: Tensor | None = None,
            *rest: Tensor,
            scale: float = 1.0,
            **more: Tensor,
        ) -> Tensor:
            return x

    model = Many()
    with record(model, "", inputs=True) as acts:
        model(X)
        model(X, X, X, X, scale=2.0, z=X)
        model(x=X)
    assert [list(given) for given in acts.inputs[""]] == [
        ["x"],
        ["x", "y", "rest", "scale", "z"],
        ["x"],
    ]
    assert acts.inputs[""][1]["scale"] == 2.0
    assert len(acts.inputs[""][1]["rest"]) == 2


def test_inputs_that_a_later_pre_hook_replaces_stay_paired_with_their_call() -> None:
    model = nn.Linear(4, 4)
    with record(model, "", inputs=True) as acts:
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] * 2,), {}), with_kwargs=True
        )
        model(X)
        handle.remove()
    assert torch.equal(acts.inputs[""][0]["input"], X * 2), "what forward received"


def test_a_call_that_had_begun_before_it_was_hooked_has_no_inputs() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_forward_hook(
                lambda *_: None
            )  # or else torch leaves out all hooks of this call

        def forward(self, x: Tensor) -> Tensor:
            self.block = record(self, "", inputs=True)
            self.acts = self.block.__enter__()
            return x

    model = Late()
    model(X)
    model.block.__exit__(None, None, None)
    assert len(model.acts[""]) == 1
    assert list(model.acts.inputs[""]) == [None]


def test_an_input_that_cannot_be_kept_uses_up_no_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with record(model, "0", inputs=True) as acts:
        with pytest.raises(CaptureError, match="vmap"):
            torch.vmap(model[0])(X)  # outside of a pass
        model(X)
    assert acts.num_passes == 1
    assert acts["0"].passes == [0]


def test_a_forward_written_in_c_names_its_inputs_args() -> None:
    model = nn.Module()
    model.forward = torch.relu  # type: ignore[assignment]
    with record(model, "", inputs=True) as acts:
        model(X)
    assert torch.equal(acts.inputs[""][0]["args"][0], X)


def test_hooks_run_after_those_that_were_there_and_see_what_they_return() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].register_forward_hook(lambda *_: torch.full((1,), 5.0))
    with record(model, "0") as acts:
        model(X)
    before.remove()
    assert acts["0"][0].tolist() == [5.0]


# --- Forwards that share their work among threads, and forwards that go on later ----------------------


def in_a_pool(branches: nn.ModuleList, h: Tensor) -> list[Tensor]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda branch: branch(h), branches))


def with_arguments_of_their_own(branches: nn.ModuleList, h: Tensor) -> list[Tensor]:
    with ThreadPoolExecutor(2) as pool:
        parts = list(torch.stack([h] * (len(branches) + 1)).unbind())
        waiting = [pool.submit(*call) for call in zip(branches, parts[1:], strict=True)]
        return [one.result() for one in waiting]


def in_threads(branches: nn.ModuleList, h: Tensor) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def run(at: int, branch: nn.Module) -> None:
        found[at] = branch(h)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(branches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[at] for at in range(len(branches))]


POOLS = {f.__name__: f for f in (in_a_pool, with_arguments_of_their_own, in_threads)}


class Branches(nn.Module):
    """Runs branches in threads, each of them perhaps with branches of its own; all of them only pass on."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], list[Tensor]], depth: int) -> None:
        super().__init__()
        self.stem = nn.Identity()
        inner = [Branches(run, depth - 1) if depth else nn.Identity() for _ in range(3)]
        self.branches = nn.ModuleList(inner)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.run(self.branches, self.stem(x) * 1)).mean(0)


@pytest.mark.eager_only("the compiler warns that it cannot read it")
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("run", POOLS.values(), ids=POOLS)
def test_what_a_forward_runs_in_threads_belongs_to_its_pass(
    run: Callable[[nn.ModuleList, Tensor], list[Tensor]], depth: int
) -> None:
    model = Branches(run, depth)
    with record(model, "**", inputs=True) as acts:
        for step in range(3):
            model(torch.full((2,), float(step)))
    assert acts.num_passes == 3
    for name, layer in acts.items():
        assert [float(t[0]) for t in layer] == layer.passes, name
        assert acts.inputs[name].passes == layer.passes


def test_a_call_that_began_before_the_block_is_no_part_of_a_pass_in_another_thread() -> None:
    entered, left = threading.Event(), threading.Barrier(2)

    class Waits(Codec):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                entered.set()
                left.wait()
            else:
                left.wait()
                left.wait()
            return super().forward(x)

    model = Waits()
    model.encoder.register_forward_hook(lambda *_: None)
    thread = threading.Thread(target=model, args=(X,))
    thread.start()
    entered.wait()
    with record(model, "encoder.0") as acts:
        other = threading.Thread(target=model, args=(-X,))
        other.start()
        thread.join()
        left.wait()
        other.join()
    assert sorted(acts["encoder.0"].passes) == [0, 1]


def test_threads_that_call_parts_of_a_model_on_their_own_have_passes_of_their_own() -> None:
    model = Codec()
    barrier = threading.Barrier(3)

    def call(_: int) -> None:
        for _ in range(5):
            barrier.wait()
            model.encode(X)

    with record(model, "encoder.0") as acts, ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(3)))
    assert sorted(acts["encoder.0"].passes) == list(range(15))


def test_the_main_thread_is_no_part_of_a_forward_in_another_thread() -> None:
    entered, left = threading.Event(), threading.Event()

    class Waits(Codec):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            left.wait()
            return super().forward(x)

    model = Waits()
    with record(model) as acts:
        thread = threading.Thread(target=model, args=(X,))
        thread.start()
        entered.wait()
        model.encode(X)
        left.set()
        thread.join()
    assert acts["encoder.0"].passes == [1, 0]


def test_the_worker_of_two_forwards_that_share_their_input_has_passes_of_its_own() -> None:
    inside = threading.Barrier(3)

    class Waits(Codec):
        def forward(self, x: Tensor) -> Tensor:
            inside.wait()
            inside.wait()
            return x

    model = Waits()
    with record(model, "encoder.0") as acts:
        threads = [threading.Thread(target=model, args=(X,)) for _ in range(2)]
        threads.append(
            threading.Thread(target=lambda: (inside.wait(), model.encode(X), inside.wait()))
        )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert acts["encoder.0"].passes == [2]


class Streams(nn.Module):
    """A forward that is a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, steps: int = 3) -> Any:
        for _ in range(steps):
            x = self.block(x)
            yield self.head(x)


class Awaits(Streams):
    async def forward(self, x: Tensor, steps: int = 3) -> list[Tensor]:  # type: ignore[override]
        outputs = []
        for _ in range(steps):
            await asyncio.sleep(0)
            x = self.block(x)
            outputs.append(self.head(x))
        return outputs


class StreamsToAwait(Streams):
    async def forward(self, x: Tensor, steps: int = 3) -> Any:
        for _ in range(steps):
            await asyncio.sleep(0)
            x = self.block(x)
            yield self.head(x)


def test_the_calls_of_a_forward_that_is_a_generator_belong_to_its_pass() -> None:
    model = Streams()
    with record(model, ["block.linear", "head"], inputs=True) as acts:
        list(model(X))
        for _ in zip(model(X), model(X), strict=True):  # two that take turns
            model.block(X)
        next(model(X))  # one that is not run to its end
        model.head(X)
    assert acts["head"].passes == [0] * 3 + [1, 2] * 3 + [6, 7]
    assert acts["block.linear"].passes == [0] * 3 + [1, 2, 3, 1, 2, 4, 1, 2, 5] + [6]
    assert acts.num_passes == 8


class Yields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        for _ in range(3):
            x = self.linear(x)
            yield x


@pytest.mark.parametrize("is_enabled", [False, True])
def test_forwards_that_have_not_run_yet_when_the_next_begins_are_passes_of_their_own(
    is_enabled: bool,
) -> None:
    model = Yields()
    with torch.set_grad_enabled(is_enabled), record(model, "linear") as acts:
        begun = [model(X) for _ in range(8)]
        for forward in begun:
            list(forward)
    assert acts["linear"].passes == [number for number in range(8) for _ in range(3)]


def test_the_calls_of_a_forward_that_is_awaited_belong_to_its_pass() -> None:
    async def streamed(model: nn.Module) -> None:
        async for _ in model(X):
            pass

    async def main(model: nn.Module) -> None:
        run = streamed if isinstance(model, StreamsToAwait) else model
        await asyncio.gather(*(run(X if run is model else model) for _ in range(3)))

    for model in (Awaits(), StreamsToAwait()):
        with record(model, ["block.linear", "head"]) as acts:
            asyncio.run(main(model))
        assert acts["head"].passes == [0, 1, 2] * 3
        assert acts["block.linear"].passes == [0, 1, 2] * 3


def test_a_pass_that_goes_on_later_is_stored_whole(tmp_path: Any) -> None:
    model = Streams()
    with record(model, ["head"], into=tmp_path / "run") as acts:
        first = model(X)
        next(first)
        for _ in range(3):
            list(model(X))
        rest = list(first)
    stored = load(tmp_path / "run")
    assert len(rest) == 2
    assert sorted(stored["head"].passes) == [n for n in range(4) for _ in range(3)]
    assert acts.num_passes == 4


def test_one_call_of_each_pass_is_selected_from_a_container_too() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, relu)
    with record(model, "1", into=deque) as acts:
        model(torch.ones(2, 4))
        model(torch.zeros(2, 4))
    last = acts["1"].nth(-1)
    assert last.passes == [0, 1]
    assert torch.equal(last[1], acts["1"][3])
