"""One real call, one record, and every call belongs to one outermost forward."""

from __future__ import annotations

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

from actrec import _passes, record

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
    monkeypatch.setattr(_passes, "backward_number", _passes._is_recomputing)
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
    # Modes of others stay where they are, and see what we do.
    assert len(model.watching.seen) > 2 * len(alone)


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


def test_a_module_that_calls_itself_is_one_pass_from_the_outside_and_inputs_stay_paired() -> None:
    model = Tree()
    with record(model, ["", "leaf"], inputs=True) as acts:
        for _ in range(2):
            model(X, depth=2)
    assert acts["leaf"].passes == [0] * 4 + [1] * 4
    assert acts[""].passes == [0] * 7 + [1] * 7
    depths = [given["depth"] for given in acts.inputs[""]]
    assert depths == [0, 0, 1, 0, 0, 1, 2] * 2, "in the order in which the calls end"


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
