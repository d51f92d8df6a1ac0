"""With ``stop_early=True`` a forward ends with its last chosen layer, and nobody is left in a bad state."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actrec import (
    ActrecError,
    OptionError,
    UnsupportedModelError,
    UnusedLayerWarning,
    record,
)
from tests.conftest import own_hooks
from tests.test_grads import distributed, process_group

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module):
    """Five layers, one of them called twice; counts how many calls of its layers there were."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)
        self.calls = 0
        for layer in self.children():
            layer.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        """Run all of them."""
        return self.c(self.relu(self.b(self.relu(self.a(x)))))


def test_nothing_behind_the_last_chosen_layer_is_computed_and_the_call_returns_none() -> None:
    net = Net()
    with record(net) as whole:
        net(X)
    net.calls = 0
    with record(net, ["b", "a"], stop_early=True) as acts:
        assert [net(X), net(2 * X), net(x=X)] == [None] * 3
    assert net.calls == 3 * 3
    assert acts["a"].passes == acts["b"].passes == [0, 1, 2]
    assert torch.equal(acts["b"][0], whole["b"][0])
    assert net(X) is not None


def test_a_layer_that_is_called_several_times_is_recorded_until_the_last_layer_has_run_once() -> (
    None
):
    net = Net()
    with record(net, ["relu", "b"], stop_early=True) as acts:
        net(X)
    assert (len(acts["relu"]), len(acts["b"])) == (1, 1)
    with record(net, "relu", stop_early=True) as acts:
        net(X)
    assert len(acts["relu"]) == 1


def test_a_forward_in_which_a_chosen_layer_does_not_run_goes_on_to_its_end() -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) if x.sum() > 100 else self.b(x))

    net = Branch()
    with record(net, ["a"], stop_early=True) as acts:
        assert net(X).shape == X.shape
        assert net(X + 100) is None
    assert acts["a"].passes == [1]


def test_the_model_itself_among_the_chosen_layers_means_that_it_runs_to_its_end() -> None:
    net = Net()
    with record(net, ["", "a"], stop_early=True) as acts:
        out = net(X)
    assert torch.equal(acts[""][0], out)


def test_methods_other_than_forward_are_not_stopped() -> None:
    class Codec(Net):
        def encode(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    net = Codec()
    with record(net, "a", stop_early=True) as acts:
        assert net.encode(X).shape == X.shape
        assert net(X) is None
    assert acts["a"].passes == [0, 1]


def test_a_model_that_catches_every_exception_is_stopped_all_the_same() -> None:
    class Stubborn(Net):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return x

    net = Stubborn()
    with record(net, "a", stop_early=True):
        assert net(X) is None
    assert net.calls == 1


def test_modes_that_the_model_has_entered_are_left() -> None:
    class Modal(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    net = Modal()
    with record(net, "a", stop_early=True) as acts:
        net(X)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert acts["a"][0].dtype == torch.bfloat16


def test_a_model_that_calls_itself_is_stopped_from_the_outside() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = nn.Linear(4, 4)
            self.after = nn.Linear(4, 4)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self.after(self(x, depth - 1) if depth else self.leaf(x))

    tree = Tree()
    with record(tree, "leaf", stop_early=True) as acts:
        assert tree(X) is None
        assert tree(X) is None
    assert acts["leaf"].passes == [0, 1]


def test_while_paused_forwards_run_to_their_end() -> None:
    net = Net()
    with record(net, "a", stop_early=True) as acts:
        with acts.pause():
            assert net(X) is not None
        assert net(X) is None
    assert len(acts["a"]) == 1


def test_calls_that_a_transform_skips_count_as_run() -> None:
    net = Net()
    with (
        pytest.warns(UnusedLayerWarning, match="returned None"),
        record(net, "a", stop_early=True, transform=lambda t: None),
    ):
        assert net(X) is None
    assert net.calls == 1


# --- The model is as it was ---------------------------------------------------------------------------------


class Boom(Exception):
    """Raised by a test."""


@pytest.mark.parametrize("error", [None, Boom, KeyboardInterrupt])
def test_forward_is_as_before_on_every_path(error: type[BaseException] | None) -> None:
    net = Plain()
    before = dict(vars(net))
    try:
        with record(net, "a", stop_early=True):
            assert "forward" in vars(net)
            net(X)
            if error:
                raise error
    except (Boom, KeyboardInterrupt):
        pass
    assert vars(net) == before


def test_forward_is_as_before_if_the_hooks_cannot_be_placed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net()

    def fail(*_: object, **__: object) -> None:
        raise Boom

    monkeypatch.setattr(net.a, "register_forward_hook", fail)
    with pytest.raises(Boom), record(net, "a", stop_early=True):
        pass
    assert "forward" not in vars(net)


def test_a_forward_that_was_set_on_the_model_is_set_again() -> None:
    net = Net()
    mine = types.MethodType(lambda self, x: self.b(self.a(x)), net)
    net.forward = mine
    with record(net, "a", stop_early=True):
        assert net(X) is None
    assert net.forward is mine


def test_a_forward_that_somebody_sets_meanwhile_stays_and_works() -> None:
    net = Net()
    with record(net, "a", stop_early=True) as acts:
        inner = net.forward

        def wrapped(x: Tensor) -> Tensor:
            return inner(x)

        net.forward = wrapped  # as accelerate does
        assert net(X) is None
    assert net(X).shape == X.shape
    assert len(acts["a"]) == 1
    assert net.forward is wrapped


def test_the_signature_of_forward_can_still_be_read() -> None:
    net = Net()
    signature = inspect.signature(net.forward)
    with record(net, "a", stop_early=True):
        assert inspect.signature(net.forward) == signature
        assert net.forward.__doc__ == "Run all of them."
        net(X)


class Plain(nn.Module):
    """Can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class PlainWithOwn(Plain):
    """Has a forward of its own, set on the object."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.other

    def other(self, x: Tensor) -> Tensor:
        return self.a(x) * 0


@pytest.mark.parametrize("make", [Plain, PlainWithOwn])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own_forward_to_the_end(
    make: type[nn.Module], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = make()
    out = model(X)
    with record(model, "a", stop_early=True) as acts:
        clone = copied(model)
        assert torch.equal(clone(X), out)
        nn.init.zeros_(clone.a.weight)
        nn.init.zeros_(clone.a.bias)
        assert torch.equal(clone(X), clone.b(torch.zeros(3, 4)) if make is Plain else out)
        model(X)
        assert len(acts["a"]) == 1
    assert torch.equal(copied(clone)(X), clone(X))


def test_a_block_that_is_dropped_gives_the_forward_back() -> None:
    net = Net()
    block = record(net, "a", stop_early=True)
    acts = block.__enter__()
    assert net(X) is None
    del block, acts
    assert net(X) is not None
    assert "forward" not in vars(net)


def test_recorders_inside_each_other_each_stop_their_own() -> None:
    net = Net()
    with record(net, "b", stop_early=True) as outer:
        with record(net, "a", stop_early=True) as inner:
            assert net(X) is None
        assert (len(outer["b"]), len(inner["a"])) == (0, 1)
        assert net(X) is None
    assert len(outer["b"]) == 1
    assert "forward" not in vars(net)


@pytest.mark.parametrize("options", [{}, {"stop_early": True}, {"inputs": True}], ids=" ".join)
def test_a_recorder_inside_records_the_layer_that_the_outer_one_stops_at(
    options: dict[str, Any],
) -> None:
    net = Net()
    with record(net, ["a", "b"], stop_early=True) as outer:
        with record(net, "b", **options) as inner:
            assert net(X) is None
        assert net(X) is None
    assert torch.equal(inner["b"][0], outer["b"][0])
    assert (len(outer["b"]), len(inner["b"])) == (2, 1)


def test_of_recorders_that_end_in_the_wrong_order_no_forward_stays() -> None:
    net = Net()
    net.forward = own = net.forward  # type: ignore[method-assign]
    blocks = [record(net, "b", stop_early=True) for _ in range(4)]
    recorders = [block.__enter__() for block in blocks]
    for number in (1, 0, 3, 2):
        assert net(X) is None
        blocks[number].__exit__(None, None, None)
    assert [len(recorder["b"]) for recorder in recorders] == [2, 1, 4, 3]
    assert vars(net)["forward"] is own
    assert net(X) is not None


def test_blocks_of_several_threads_leave_nothing_and_miss_nothing() -> None:
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)])
    failures: list[object] = []

    def work(*, stop_early: bool) -> None:
        for _ in range(40):
            try:
                with record(net, ["3", "9"], stop_early=stop_early) as acts:
                    net(torch.zeros(1, 2))
            except Exception as error:  # told below
                failures.append(error)
            if not all(len(layer) for layer in acts.values()):
                failures.append(acts)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=work, kwargs={"stop_early": number % 2 == 0})
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    assert "forward" not in vars(net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_hooks_of_others_work_on_and_the_one_on_the_model_sees_none() -> None:
    net = Net()
    seen: list[Any] = []
    net.a.register_forward_hook(lambda *_: seen.append("a"))
    net.c.register_forward_pre_hook(lambda *_: seen.append("c"))
    net.register_forward_hook(lambda _, args, out: seen.append(out))
    with record(net, "b", stop_early=True):
        net(X)
    assert seen == ["a", None]
    net(X)
    assert seen[2:4] == ["a", "c"]
    assert seen[4] is not None


# --- Wrapped models ------------------------------------------------------------------------------------------


def test_a_compiled_model_is_stopped_and_compiled_again_afterwards() -> None:
    net = Plain()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for compiled in (torch.compile(net, backend=backend), _compiled_in_place(backend)):
        torch._dynamo.reset()
        graphs = 0
        out = compiled(X)
        for _ in range(5):
            with record(compiled, "a", stop_early=True) as acts:
                assert compiled(X) is None
            assert len(acts["a"]) == 1
            assert torch.equal(compiled(X), out)
        assert graphs == 1


def _compiled_in_place(backend: Callable[..., Any]) -> nn.Module:
    net = Plain()
    net.compile(backend=backend)
    return net


@pytest.mark.parametrize("stopped", ["wrapper", "inside"])
def test_distributed_data_parallel_trains_on_afterwards(stopped: str) -> None:
    with process_group():
        net = distributed(Plain())
        plain = copy.deepcopy(net.module)
        for grad in (True, False, True):
            with (
                torch.set_grad_enabled(grad),
                record(net if stopped == "wrapper" else net.module, "a", stop_early=True) as acts,
            ):
                for _ in range(2):
                    assert net(X) is None
            assert len(acts["a"]) == 2
            for model in (net, plain):
                model.zero_grad()
                model(X).square().sum().backward()
            for got, wanted in zip(net.parameters(), plain.parameters(), strict=True):
                assert torch.equal(got.grad, wanted.grad)


def test_the_replicas_of_data_parallel_compute_with_their_own_weights() -> None:
    model = Plain()
    outs: dict[int, Any] = {}
    with record(model, "a", stop_early=True) as acts:
        replica = model._replicate_for_data_parallel()
        for name in ("a", "b"):
            layer = getattr(model, name)._replicate_for_data_parallel()
            for key, parameter in getattr(model, name)._parameters.items():
                setattr(layer, key, parameter.detach() * 2)
            replica._modules[name] = layer
        plain = copy.deepcopy(model)
        plain.load_state_dict({name: 2 * one for name, one in model.state_dict().items()})
        with acts.pause():
            assert torch.equal(replica(X), plain(X))
        threads = [
            threading.Thread(target=lambda n, m: outs.update({n: m(X)}), args=item)
            for item in enumerate((replica, model))
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert outs == {0: None, 1: None}
    assert torch.allclose(acts["a"][0], 2 * acts["a"][1])


def test_a_forward_that_another_module_calls_without_calling_the_model_is_the_models() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net.forward(x)

    outer = Outer()
    with record(outer.net, "a", stop_early=True) as acts:
        assert outer(X) is None
    assert len(acts["a"]) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_stopping_inside_a_checkpoint_leaves_training_as_it_was(reentrant: bool) -> None:
    class Checkpointed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    net, plain = Checkpointed(), Plain()
    plain.load_state_dict(net.state_dict())
    x = X.clone().requires_grad_()
    saved: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        with record(net, "a", stop_early=True) as acts:
            assert net(x) is None
        before = len(saved)
        (x * x).sum()
        assert len(saved) > before, "the hooks that were there are in force again"
    assert len(acts["a"]) == 1
    for model in (net, plain):
        model(x).square().sum().backward()
    for got, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, wanted.grad)


def test_a_sharded_model_is_refused_before_anything_happens() -> None:
    from torch.distributed.fsdp import fully_shard

    with process_group():
        net = Plain()
        fully_shard(net.b)
        with pytest.raises(
            UnsupportedModelError, match=r"stop_early=True\): 'b' is sharded by FSDP"
        ):
            record(net, "a", stop_early=True)
    assert "forward" not in vars(net)
    assert not any(own_hooks(module) for module in net.modules())


def test_gradients_of_what_was_computed_flow_without_the_rest() -> None:
    net = Net()
    with record(net, ["a", "b"], stop_early=True, grads=True, detach=False) as acts:
        net(X)
    acts["b"][0].sum().backward()
    assert acts.grads["a"][0] is not None
    assert net.a.weight.grad is not None
    assert net.c.weight.grad is None


def test_gradients_of_a_forward_without_a_loss_are_refused_before_anything_happens() -> None:
    net = Net()
    with pytest.raises(OptionError, match=r"grads=True, stop_early=True\).*detach=False"):
        record(net, "a", stop_early=True, grads=True)
    assert "forward" not in vars(net)
    assert not any(own_hooks(module) for module in net.modules())


class Stubborn(nn.Module):
    """Goes on whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.a(x)
        except:  # noqa: E722
            x = torch.zeros_like(x)
        return self.b(x)


def test_a_model_that_catches_everything_is_named_and_its_result_is_none() -> None:
    model = Stubborn()
    with (
        pytest.warns(UserWarning, match="2 forwards of this Stubborn ran to the end") as one,
        record(model, "a", stop_early=True) as acts,
    ):
        assert model(X) is None
        assert model(X) is None
    assert len(one) == 1
    assert (len(acts["a"]), acts.num_passes) == (2, 2)
    with pytest.warns(UserWarning, match="a forward of"), record(model, "a", stop_early=True):
        model(X)
    with record(model, "b", stop_early=True):
        assert model(X) is None


def test_an_error_of_the_model_passes_through() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            raise Boom

    net = Fails()
    with pytest.raises(Boom), record(net, ["a", "b"], stop_early=True) as acts:
        net(X)
    assert len(acts["a"]) == 1
    assert issubclass(UnsupportedModelError, ActrecError)
