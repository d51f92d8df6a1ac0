"""Gradients that are recorded into a path are those that are recorded into memory, as far as they came in time."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import actrec
from actrec import MissingGradientWarning, record
from actrec.store import Folder
from tests.conftest import own_hooks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

X = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))


def loss_of(model: nn.Module, at: int) -> Tensor:
    loss: Tensor = model(X[at]).square().sum()
    return loss


def at_once(path: Path) -> Folder:
    """A path into which everything is committed as soon as it may be."""
    return Folder(path, seconds=0)


def in_memory_and_on_disk(path: Path, run: Callable[[Any], object], **options: Any) -> list[Any]:
    found: list[Any] = []
    for into in (list, at_once(path)):
        model = net()
        with record(model, ["0", "2"], grads=True, into=into, **options) as acts:
            run(model)
        assert not own_hooks(model)
        found.append(acts)
    return [*found, actrec.load(path)]


def assert_alike(found: list[Any]) -> None:
    memory, *stored = found
    for one in stored:
        assert one == memory
        assert one.grads == memory.grads
        assert all(one.grads[n].passes == memory.grads[n].passes for n in memory.grads)


# --- Backwards in time --------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.booleans(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_forwards_may_share_a_backward_or_have_several(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], twice: bool, unused: bool
) -> None:
    def run(model: nn.Module) -> None:
        for group in groups:
            losses = [loss_of(model, at) for at in range(group)]
            if unused:
                with torch.no_grad():
                    model(X[5])
            if twice:
                losses[-1].backward(retain_graph=True)
            sum(losses).backward()

    assert_alike(in_memory_and_on_disk(tmp_path_factory.mktemp("grads") / "run", run))


@pytest.mark.also_compiled
def test_what_is_committed_has_its_gradients_while_the_block_runs(tmp_path: Path) -> None:
    model = net()
    with record(model, (), grads="0", into=at_once(tmp_path / "run")) as acts:
        for at in range(4):
            loss_of(model, at).backward()
        acts.grads["0"]._stream._writer._thread.join(1.0)
        stored = actrec.load(tmp_path / "run")
        assert 0 < stored.num_passes < 4
        assert all(grad is not None for grad in stored.grads["0"])
    assert len(acts.grads["0"]) == 4


def test_a_pass_that_no_backward_reaches_is_written_without(tmp_path: Path) -> None:
    def run(model: nn.Module) -> None:
        loss_of(model, 0)
        loss_of(model, 1).backward()
        loss_of(model, 2)

    found = in_memory_and_on_disk(tmp_path / "run", run)
    assert_alike(found)
    assert [grad is None for grad in found[1].grads["0"]] == [True, False, True]


def test_a_backward_that_raises_does_not_hold_back_what_comes_after_it(tmp_path: Path) -> None:
    def run(model: nn.Module) -> None:
        def fail(_: Tensor) -> None:
            raise ZeroDivisionError

        for at in range(3):
            value = model(X[at])
            if at == 1:
                hooked = model[0].weight.register_hook(fail)
                with pytest.raises(ZeroDivisionError):
                    value.sum().backward()
                hooked.remove()
            else:
                value.sum().backward()

    assert_alike(in_memory_and_on_disk(tmp_path / "run", run))


def test_gradients_are_recorded_into_a_path_by_query_with_transforms_and_resumed(
    tmp_path: Path,
) -> None:
    expected = None
    for into in (list, at_once(tmp_path / "run"), at_once(tmp_path / "run")):
        model = net()
        with record(
            model, (), grads={"[02]": lambda g: g.sum(1)}, into=into, resume=into is not list
        ) as acts:
            for at in range(3):
                loss_of(model, at).backward()
        expected = expected or acts
    stored = actrec.load(tmp_path / "run")
    for name, layer in stored.grads.items():
        assert layer.passes == [0, 1, 2, 3, 4, 5]
        both = [*expected.grads[name]] * 2
        assert all(map(torch.equal, layer, both))


def test_passes_larger_than_the_budget_are_written_in_parts_with_their_gradients(
    tmp_path: Path,
) -> None:
    model, shared = net(), Folder(tmp_path / "run", shard_bytes=500, budget=3000)
    with record(model, grads=True, into=shared) as acts:
        for at in range(6):
            loss_of(model, at).backward()
    with record(model, grads=True) as expected:
        for at in range(6):
            loss_of(model, at).backward()
    assert acts.grads == expected.grads
    assert len([*(tmp_path / "run" / "rank-00000").iterdir()]) > 4


@pytest.mark.eager_only(
    "refused: compiled code that runs again does not tell which call it repeats"
)
def test_reentrant_checkpointing_builds_the_graph_late(tmp_path: Path) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    found = []
    for into in (list, at_once(tmp_path / "run")):
        torch.manual_seed(0)
        model = Checkpointed()
        with record(model, "inner", grads=True, into=into) as acts:
            losses = [model(X[at].clone().requires_grad_()).sum() for at in range(2)]
            sum(losses).backward()
        found.append(acts)
    assert all(grad is not None for grad in found[1].grads["inner"])
    assert found[0].grads == found[1].grads


# --- Too late -------------------------------------------------------------------------------------------------


@pytest.mark.eager_only("the compiler refuses it")
def test_a_gradient_that_comes_after_its_pass_was_written_is_left_out_and_warned_of(
    tmp_path: Path,
) -> None:
    model = net()
    with record(model, (), grads="0", into=at_once(tmp_path / "run")) as acts:
        early = loss_of(model, 0)
        loss_of(model, 1).backward()
        loss_of(model, 2).backward()
        loss_of(model, 3).backward()
        with pytest.warns(MissingGradientWarning, match="came after its pass was written"):
            early.backward(retain_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            early.backward()
            loss_of(model, 4).backward()
    assert [grad is None for grad in acts.grads["0"]] == [True, False, False, False, False]


def test_a_backward_after_the_block_is_too_late(tmp_path: Path) -> None:
    model = net()
    with (
        pytest.warns(MissingGradientWarning, match=r"no backward\(\) has reached it inside"),
        record(model, (), grads="0", into=tmp_path / "run") as acts,
    ):
        loss = loss_of(model, 0)
    with pytest.warns(MissingGradientWarning, match="after the block"):
        loss.backward()
    assert [*acts.grads["0"]] == [None]


# --- Units ------------------------------------------------------------------------------------------------------


@pytest.mark.also_compiled
def test_gradients_of_a_unit_are_written_when_it_ends_or_dropped_with_it(tmp_path: Path) -> None:
    def run(acts: Any, model: nn.Module) -> list[Tensor]:
        left = []
        for key in range(3):
            for attempt in range(2):
                try:
                    with acts.unit(key):
                        loss_of(model, key).backward()
                        left.append(loss_of(model, key + 3))
                        if key == 1 and not attempt:
                            raise ZeroDivisionError
                        left.pop().backward()
                except ZeroDivisionError:
                    continue
                break
        return left

    found = []
    for into in (list, at_once(tmp_path / "run")):
        model = net()
        with record(model, "0", grads=True, into=into) as acts:
            left = run(acts, model)
            sum(left).backward()  # of the unit that was dropped: nobody wants it
        found.append(acts)
    memory, stored = found
    assert stored.grads["0"].units == memory.grads["0"].units == [0, 0, 1, 1, 2, 2]
    assert stored.grads == memory.grads
    assert all(grad is not None for grad in stored.grads["0"])


def test_after_its_unit_a_gradient_is_too_late(tmp_path: Path) -> None:
    model = net()
    with record(model, "0", grads=True, into=tmp_path / "run") as acts:
        with acts.unit("a"):
            loss_of(model, 0).backward()
            loss = loss_of(model, 1)
        with pytest.warns(MissingGradientWarning, match="after the unit"):
            loss.backward()
    assert [grad is None for grad in acts.grads["0"]] == [False, True]


# --- Beside it --------------------------------------------------------------------------------------------------


def test_a_closed_path_expects_nothing(tmp_path: Path) -> None:
    model = net()
    with record(model, "0", grads=True, into=tmp_path / "run") as acts:
        loss_of(model, 0).backward()
        assert "recording" in repr(acts)
        with pytest.raises(actrec.ActrecError, match="being written"):
            acts.grads["0"][0]
    acts.grads["0"]._stream.keep_later()
    assert acts.grads["0"].passes == [0]
