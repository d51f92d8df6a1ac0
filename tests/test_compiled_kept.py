"""With ``compiled=True`` compiled code stays compiled: recorded is what it computes, and it is compiled once more at most."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actrec import (
    CaptureError,
    MissingGradientWarning,
    Opaque,
    OptionError,
    TransformError,
    UnusedLayerWarning,
    load,
    record,
)
from actrec._calls import options, session
from actrec._calls.hooks import Event
from actrec._calls.in_graph import hook as in_graph
from actrec._calls.in_graph import self_test, trial
from actrec._calls.in_graph.operator import TOKEN, tell
from actrec._calls.in_graph.outline import encode, values
from actrec._values.spec import same

if TYPE_CHECKING:
    from pathlib import Path

# The compiler warns about its own deprecations when it is first used.
pytestmark = [
    pytest.mark.skipif(torch.__version__ < (2, 13), reason="compiled=True needs torch 2.13"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    # Its own question, of the outputs of compiled blocks.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

X = torch.randn(2, 4)


def graphs() -> int:
    """How many graphs were compiled, by whom ever."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.fixture(autouse=True)
def _fresh() -> None:
    record(nn.ReLU(), compiled=True)  # which tests itself, the first time
    torch._dynamo.reset()
    torch._dynamo.utils.counters["graph_break"].clear()  # of other tests


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x)) + x


class Net(nn.Module):
    """Blocks that write in place, in a model with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scale(nn.Module):
    def forward(self, x: Tensor, factor: float) -> tuple[Tensor, float]:
        return x * factor, -factor


Run = Callable[[Tensor], Any]


def _wrapped(model: nn.Module, **options: Any) -> tuple[Run, nn.Module]:
    compiled = torch.compile(model, **options)
    return compiled, compiled


def _inner(model: nn.Module, **options: Any) -> tuple[Run, nn.Module]:
    return torch.compile(model, **options), model


def _method(model: nn.Module, **options: Any) -> tuple[Run, nn.Module]:
    model.compile(**options)
    return model, model


def _function(model: nn.Module, **options: Any) -> tuple[Run, nn.Module]:
    return torch.compile(lambda x: model(x) * 2, **options), model


def _blocks(model: nn.Module, **options: Any) -> tuple[Run, nn.Module]:
    for block in model.blocks:
        block.compile(**options)
    return model, model


def _wrapped_blocks(model: nn.Module, **options: Any) -> tuple[Run, nn.Module]:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = torch.compile(block, **options)
    return model, model


FORMS = {
    "torch.compile(model)": _wrapped,
    "torch.compile(model), and the model is recorded": _inner,
    "model.compile()": _method,
    "a compiled function": _function,
    "block.compile()": _blocks,
    "torch.compile(block)": _wrapped_blocks,
}


def of_torch() -> nn.Module:
    """A model whose forward is PyTorch's: what was compiled of it is kept with that of all such models."""
    return nn.Sequential(Block(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("form", "kind"),
    [*((form, Net) for form in FORMS), *((form, of_torch) for form in [*FORMS][:1])],
)
def test_it_is_recorded_as_in_eager_mode_and_compiled_once_more(form: str, kind: Any) -> None:
    model = kind()
    run, recorded = FORMS[form](model, backend="aot_eager", fullgraph=True)
    with record(recorded, ["**", ""], inputs=True) as eager:  # all as one would without a compiler
        run(X)
        run(X + 1)
    run(X)
    own = graphs()
    for again in range(2):
        with record(recorded, ["**", ""], inputs=True, compiled=True) as acts:
            output = run(X)
            run(X + 1)
        if not again:
            more = graphs()
        assert torch.equal(run(X), output)
        assert graphs() == more, "the user's code is used again, and so is the recorded one"
    assert more - own <= max(own, 1)
    assert breaks() == 0
    assert acts.num_passes == 2
    assert [*acts] == [*eager]
    for name in eager:
        assert acts[name].passes == eager[name].passes, name
        assert same([*acts[name]], [*eager[name]]), name
        assert same([*acts.inputs[name]], [*eager.inputs[name]]), name


class Pair(nn.Module):
    """Returns containers, of its own tensor and of views of it, with numbers and words."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return (
            ModelOutput(y, hidden=[y, (y.chunk(2, 1), None)]),
            x.shape,
            Named(y, 1.5),
            {"a": x.dtype},
        )


class Named(NamedTuple):
    tensor: Tensor
    number: float


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """As transformers has them: the fields are items, too."""

    last: Tensor | None = None
    hidden: Any = None
    more: Any = None

    def __post_init__(self) -> None:
        for name in ("last", "hidden"):
            OrderedDict.__setitem__(self, name, getattr(self, name))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.relu = Pair(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first, _, _, _ = self.pair(x)
        _, _, second, _ = self.pair(self.relu(first["hidden"][0] + 1))  # called twice in a pass
        return second.tensor


def test_nested_values_inputs_and_gradients_are_those_of_eager_mode() -> None:
    model = Nested()
    run = compiled(model, fullgraph=True)
    gradients = []

    def work(_: object) -> None:
        for x in (X, X + 1):
            run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])

    both(model, ["**", ""], work, inputs=True, grads=True)
    assert same(*gradients)


def test_a_view_that_is_written_in_place_has_no_gradient_in_compiled_code_and_that_is_told() -> (
    None
):
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.ReLU(inplace=True))
    run = torch.compile(model, backend="aot_eager")
    with (
        pytest.warns(
            MissingGradientWarning, match=r"1 of 3 .*\n  '1': no gradient has arrived for 1 tensor"
        ),
        record(model, grads=True, compiled=True) as acts,
    ):
        run(X).sum().backward()
    assert acts.grads["1"] == [None]
    assert acts.grads["0"][0] is not None


def test_a_leaf_that_is_returned_as_it_is_has_no_gradient_in_compiled_code() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    run = torch.compile(model, backend="aot_eager")
    told = pytest.raises(CaptureError, match="layer '0': it returned a leaf")
    with told, record(model, grads=True, compiled=True):
        run(X.clone().requires_grad_())


# --- The same as in eager mode -----------------------------------------------------------------------------


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """A compiled function that calls the model: all hooks are read by the compiler then."""

    def run(*args: Any) -> Any:
        return model(*args)

    return torch.compile(run, backend="aot_eager", **options)


def both(model: nn.Module, layers: Any, work: Callable[[Any], object], **options: Any) -> Any:
    """Record ``work(acts)`` in eager mode and in compiled code, and compare the recordings. Return the latter."""
    recordings = []
    for kept in (False, True):
        model.zero_grad()
        into = {name: value() if name == "into" else value for name, value in options.items()}
        with record(model, layers, compiled=kept, **into) as acts:
            work(acts)
        recordings.append(load(into["into"]) if "into" in into else acts)
    alike(*recordings)
    return recordings[1]


def alike(eager: Any, acts: Any) -> None:
    assert [*acts] == [*eager]
    assert (acts.num_passes, acts.failed_passes) == (eager.num_passes, eager.failed_passes)
    for beside in ("", "inputs", "grads"):
        one, other = (getattr(of, beside, None) if beside else of for of in (acts, eager))
        for name in [] if other is None else other:
            assert [*one[name].passes] == [*other[name].passes], (beside, name)
            assert same([*one[name]], [*other[name]]), (beside, name)


MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_in_every_mode(mode: str) -> None:
    model = Net()
    run = compiled(model, fullgraph=True)
    with MODES[mode]():
        acts = both(model, ["**", ""], lambda _: run(X))
    assert not acts["head"][0].is_inference()
    assert acts["head"][0].dtype == (torch.bfloat16 if mode == "autocast" else torch.float32)


def test_with_other_shapes_from_call_to_call() -> None:
    model = Net()
    run = compiled(model, dynamic=True, fullgraph=True)
    acts = both(
        model, ["**", ""], lambda _: [run(torch.ones(n, 4)) for n in (2, 3, 5)], inputs=True
    )
    assert [t.shape[0] for t in acts["head"]] == [2, 3, 5]
    assert graphs_of(lambda: run(torch.ones(7, 4))) == 1, "and the user's own code is one graph"


def test_numbers_that_change_from_call_to_call_and_are_not_finite() -> None:
    model = nn.Sequential(Scale())
    run = compiled(model[0])
    factors = (0.5, 0.7, 0.9, math.inf, math.nan)
    with record(model, "0", inputs=True, compiled=True) as acts:
        for factor in factors:
            run(X, factor)
    assert repr([given["factor"] for given in acts.inputs["0"]]) == repr([*factors])
    assert repr([number for _, number in acts["0"]]) == repr([-factor for factor in factors])


def graphs_of(work: Callable[[], object]) -> int:
    before = graphs()
    work()
    return graphs() - before


def test_transforms_casts_units_and_gradients_to_disk(tmp_path: Path) -> None:
    model = Net()
    run = compiled(model)
    folders = iter([tmp_path / "eager", tmp_path / "compiled"])

    def work(acts: Any) -> None:
        for key in "ab":
            with acts.unit(key):
                run(X).sum().backward()
                run(X + 1).sum().backward()
            with acts.pause():
                run(X)
        with pytest.raises(ZeroDivisionError), acts.unit("failed"):
            run(X / 0)
            raise ZeroDivisionError

    layers = {"blocks.*": lambda t: t.mean(1), "head": None}
    options: dict[str, Any] = {"inputs": "head", "grads": True, "dtype": torch.bfloat16}
    acts = both(model, layers, work, into=lambda: next(folders), **options)
    assert acts["head"].units == ["a", "a", "b", "b"]


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        x = self.linear(x)
        return self(x, times - 1) if times else x


@pytest.mark.parametrize("form", ["a compiled function", "model.compile()"])
def test_a_model_that_calls_itself_is_in_one_pass(form: str) -> None:
    model = Recursive()
    run, _ = FORMS[form](model, backend="aot_eager")
    both(model, ["", "linear"], lambda _: [run(X), run(X)])


class Breaks(nn.Module):
    """Cannot be one graph, in the middle of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), Broken(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        torch._dynamo.graph_break()
        return self.linear(x)


@pytest.mark.parametrize("form", ["a compiled function", "torch.compile(model)"])
def test_a_model_that_cannot_be_one_graph(form: str) -> None:
    run, model = FORMS[form](Breaks(), backend="aot_eager")
    both(model, ["**", ""], lambda _: [run(X), run(X)], inputs=True)


def test_gradients_come_from_the_graphs_of_several_blocks_and_forwards() -> None:
    model = Net()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    gradients = []

    def work(_: object) -> None:
        (model(X) * model(X + 1)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])

    both(model, "**", work, grads=True)
    assert same(*gradients)


def test_gradients_of_gradients_are_refused_where_they_would_be_wrong() -> None:
    model = nn.Linear(4, 3)
    run = torch.compile(lambda x: model(x).exp(), backend="eager")
    told = pytest.raises(CaptureError, match="gradients of gradients")
    with told, record(model, "", grads=True, compiled=True):
        torch.autograd.grad(run(X).sum(), model.weight, create_graph=True)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), nn.Embedding(3, 4)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return self.linear(x) + self.table(at)


def test_a_pass_that_raises_in_compiled_code_is_one_that_failed() -> None:
    model = Lookup()
    run = compiled(model)

    def work(_: object) -> None:
        for at in (0, 7, 1, 7):
            with suppress(IndexError, RuntimeError):
                run(X, torch.tensor([0, at]))

    assert both(model, ["", "table"], work).failed_passes == [1, 3]


def test_what_a_transform_raises_comes_out_of_the_compiled_model() -> None:
    model = Net()
    run = compiled(model)
    told = pytest.raises(TransformError, match="layer 'head' raised ZeroDivisionError on call 0")
    with told, record(model, "head", transform=lambda _: 1 // 0, compiled=True):
        run(X)
    both(model, "head", lambda _: run(X))


def test_blocks_that_overlap_end_in_any_order() -> None:
    model = Net()
    run = compiled(model)
    with record(model, "**") as expected:
        run(X)
    first, second = record(model, "**", compiled=True), record(model, "head", compiled=True)
    acts, more = first.__enter__(), second.__enter__()
    run(X)
    first.__exit__(None, None, None)
    run(X)
    second.__exit__(None, None, None)
    alike(expected, acts)
    assert len(more["head"]) == 2
    with record(model, "**", compiled=True) as outer, record(model, "head") as eager:
        run(X)
    assert same(outer["head"][0], eager["head"][0])
    assert not any("forward" in vars(module) for module in model.modules())


def test_threads_record_into_one_compiled_block() -> None:
    model = Net()
    run = compiled(model)
    with record(model, ["**", ""], compiled=True) as acts:
        run(X)
        work = partial(lambda: [run(X) for _ in range(10)])
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert acts.num_passes == 31
    assert all(sorted(layer.passes) == [*range(31)] for layer in acts.values())


def test_copies_of_a_model_that_is_recorded_have_nothing_of_the_recording() -> None:
    model = Net()
    model.head.forward = partial(type(model.head).forward, model.head)  # as users patch it
    run = compiled(model)
    with record(model, ["**", ""], compiled=True) as acts:
        run(X)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)]
        copies.append(model.blocks[0].linear._replicate_for_data_parallel())
        for one in copies[:3]:
            one(X)
    assert len(acts["head"]) == 1 + 1, "the shallow copy has the layers of the model"
    for one in [*copies, model]:
        for name, module in one.named_modules():
            assert ("forward" in vars(module)) == (name == "head"), name
            assert not {"__getstate__", "_replicate_for_data_parallel"} & {*vars(module)}


# --- What is compiled --------------------------------------------------------------------------------------


def test_what_was_compiled_is_kept_for_the_latest_selections_and_the_limits_have_room_for_it() -> (
    None
):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    run = compiled(model, fullgraph=True)
    run(X)
    limit = torch._dynamo.config.recompile_limit
    for _ in range(2):
        for at in range(3):
            with record(model, str(at), compiled=True):
                assert torch._dynamo.config.recompile_limit > limit
                new = graphs_of(lambda: run(X))
        assert graphs_of(lambda: run(X)) == 0
    assert new == 0
    assert torch._dynamo.config.recompile_limit == limit + 3
    for at in range(4):
        with record(model, f"{at + 1}", inputs=True, compiled=True):
            run(X)
    torch._dynamo.config.recompile_limit = limit


def test_where_weights_are_constants_of_the_graph_a_block_compiles_nothing_again() -> None:
    model = Net()
    run = compiled(model, fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        expected = run(X)
        for new in (1, 0):
            with record(model, ["**", ""], inputs=True, compiled=True) as acts:
                assert graphs_of(lambda: run(X)) == new
            assert torch.equal(acts[""][0], expected)


def joining(graphs: list[torch.fx.Graph], *, writes: bool = False) -> Any:
    """A backend that changes its graphs as Inductor does while a block is open, and runs them; some write in place."""

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        graph_pass = torch._inductor.config.post_grad_custom_post_pass
        if graph_pass is not None:
            if writes:
                _, first, *_, last = (node for node in module.graph.nodes if tell in node.args)
                first.meta.pop("eager_input_vals")  # as in a version that has none
                with module.graph.inserting_before(last):
                    add = torch.ops.aten.add_.Scalar, (first.kwargs["tensors"][0], 0)
                    module.graph.call_function(*add)
            graph_pass(module.graph)
            module.recompile()
            graphs.append(module.graph)
        return torch._functorch.aot_autograd.make_boxed_func(module.forward)

    return torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler)


def told(graph: torch.fx.Graph) -> list[int]:
    """How much each call of the operator passes on."""
    return [len(node.kwargs["keys"]) for node in graph.nodes if tell in node.args]


@pytest.mark.parametrize("grad", [False, True])
def test_inductor_is_told_to_join_what_is_kept_anyway(grad: bool) -> None:
    model = Nested()
    graphs: list[torch.fx.Graph] = []
    run = torch.compile(lambda x: model(x), backend=joining(graphs))  # noqa: PLW0108
    with torch.set_grad_enabled(grad):
        both(model, ["**", ""], lambda _: [run(X), run(X + 1)], inputs=True)
        (graph,) = graphs
        first, rest = told(graph)
        assert first == 1, "the pass has begun before anything runs"
        assert rest > 10
        both(model, {"relu": torch.clone, "pair": None}, lambda _: run(X))
        assert len(told(graphs[1])) == 3, "what is not kept is told before what follows"
    assert torch._inductor.config.post_grad_custom_post_pass is None


def test_what_is_told_is_not_joined_across_what_writes_in_place() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    graphs: list[torch.fx.Graph] = []
    run = torch.compile(model, backend=joining(graphs, writes=True))
    with torch.no_grad():
        both(model, "*", lambda _: run(X))
    # The beginning of the pass, the values, and its end, which is behind the write.
    assert told(graphs[0]) == [1, 4, 1]


def test_a_pass_of_the_users_own_stays() -> None:
    def own(_: torch.fx.Graph) -> None:
        pass

    with torch._inductor.config.patch(post_grad_custom_post_pass=own):
        with pytest.warns(UnusedLayerWarning), record(Net(), compiled=True):
            assert torch._inductor.config.post_grad_custom_post_pass is own
        assert torch._inductor.config.post_grad_custom_post_pass is own


def test_the_limits_of_each_thread_are_as_before_when_blocks_of_several_end() -> None:
    limit = torch._dynamo.config.recompile_limit
    blocks = [record(Net(), compiled=True) for _ in range(3)]
    blocks[0].__enter__()

    def work() -> tuple[int, int]:
        own = torch._dynamo.config.recompile_limit
        with pytest.warns(UnusedLayerWarning):
            blocks[1].__enter__()
            inside = torch._dynamo.config.recompile_limit
            blocks[1].__exit__(None, None, None)
            blocks[2].__exit__(None, None, None)  # which another thread has entered
        return inside - own, torch._dynamo.config.recompile_limit - own

    blocks[2].__enter__()
    with ThreadPoolExecutor() as pool:
        inside, behind = pool.submit(work).result()
    assert inside > 0
    assert behind == 0
    with pytest.warns(UnusedLayerWarning):
        blocks[0].__exit__(None, None, None)
    assert torch._dynamo.config.recompile_limit >= limit


# --- What the compiler reads -------------------------------------------------------------------------------


def test_what_the_compiler_reads_in_the_place_of_a_hook_tells_the_same_where_python_runs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(in_graph, "is_dynamo_compiling", lambda: True)
    for model in (Nested(), Net(), nn.Sequential(nn.Unflatten(1, (2, 2)))):
        both(model, ["**", ""], lambda _, model=model: model(X), inputs=True)
        options = {"inputs": True, "grads": any(True for _ in model.parameters())}
        if options["grads"]:
            both(model, ["**", ""], lambda _, model=model: model(X).sum().backward(), **options)
    model = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 2))
    with pytest.warns(MissingGradientWarning, match="no gradient can reach 1 of 3"):
        both(model, ["**", ""], lambda _: model(X).sum().backward(), grads=True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.warns(UnusedLayerWarning), record(model, compiled=True) as acts:
        model(X)
    assert all(len(layer) == 0 for layer in acts.values()), "an exported model tells nobody"


ALONE = "(1, 0, ('tensor', 0))"


def test_what_is_told_for_a_block_that_is_gone_is_told_to_nobody() -> None:
    model, target, heard = nn.Linear(4, 4), session.Session(), []
    hook = in_graph.HookInGraph(Event.LEAVE, target, lambda *_: heard.append(1))
    handle = hook.register(model)
    model(X)
    tell([X], [], ALONE, [hook.key], False, TOKEN)
    assert heard == [1, 1]
    del target
    model(X)
    tell([X], [], ALONE, [hook.key], False, TOKEN)
    hook.is_in_body()
    handle.remove()
    key = hook.key
    del hook, handle
    tell([X], [], ALONE, [key], False, TOKEN)
    assert heard == [1, 1]


@pytest.mark.parametrize("read", [False, True])
def test_a_part_that_is_not_recorded_has_no_gradients_and_its_leaves_are_not_refused(
    read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_graph, "is_dynamo_compiling", lambda: read)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    run = model if read else torch.compile(model, backend="aot_eager")
    x = X.clone().requires_grad_()
    with record(model, grads=True, compiled=True) as acts:
        with acts.pause():
            run(x).sum().backward()
        run(x * 2).sum().backward()
    torch.testing.assert_close(x.grad, 3 * model[1].weight.sum(0).expand(2, 4))
    assert [len(grads) for grads in acts.grads.values()] == [1, 1]
    assert acts.grads["1"][0].tolist() == [[1, 1, 1]] * 2


class Words(list[Any]):
    pass


@dataclass(frozen=True)
class Record:
    tensor: Tensor
    size: int = 3


def test_values_come_back_as_they_were() -> None:
    def local() -> type:
        class Same(NamedTuple):
            tensor: Tensor

        return Same

    tensor = torch.ones(2)
    returned = [
        *(
            tensor,
            None,
            3,
            1.5,
            -math.inf,
            complex(1, -math.inf),
            "a'b",
            b"c",
            True,
            2j,
            ...,
            slice(1, 2),
            torch.float16,
            nn.Linear,
        ),
        *((tensor, [tensor, torch.zeros(1)]), X.shape, X.max(0), Words([tensor]), Record(tensor)),
        *({"a": tensor, 3: (1, 2)}, OrderedDict(a=tensor), ModelOutput(tensor, [tensor])),
        *(local()(tensor), local()(tensor), (), [], {}, torch.device("cpu"), torch.strided),
    ]
    for value in returned:
        tensors: list[Tensor] = []
        numbers: list[int] = []
        outline = encode(value, tensors, numbers)
        (again,) = values(outline, tensors, numbers)
        assert same(again, value), outline
        assert type(again) is type(value), outline
    assert [*values(encode(object(), [], []), [], [])] == [Opaque("object")]


@pytest.mark.parametrize("kinds", [*itertools.product([False, True], repeat=3)])
def test_blocks_end_in_any_order_and_some_of_them_may_stop_early(kinds: list[bool]) -> None:
    for order in itertools.permutations(range(3)):
        model = Net()
        blocks = [
            record(model, "head", stop_early=True)
            if is_early
            else record(model, ["head", ""], compiled=True)
            for is_early in kinds
        ]
        entered = [block.__enter__() for block in blocks]
        for at in order:
            model(X)
            blocks[at].__exit__(None, None, None)
            assert not is_marked(copy.deepcopy(model))
        assert [len(acts["head"]) for acts in entered] == [order.index(at) + 1 for at in range(3)]
        assert not is_marked(model)
        assert model(X).shape == (2, 3)


def is_marked(model: nn.Module) -> bool:
    names = {name for module in model.modules() for name in vars(module)}
    return bool({"forward", "__getstate__", "_replicate_for_data_parallel"} & names)


class Compact(nn.Linear):
    """Its state is no dict."""

    def __getstate__(self) -> Any:
        return self.weight, self.bias

    def __setstate__(self, state: Any) -> None:
        super().__init__(4, 4)
        self.weight, self.bias = state


def test_a_module_whose_state_is_no_dict_is_copied_as_it_says() -> None:
    model = nn.Sequential(Compact(4, 4))
    with record(model, compiled=True) as acts:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(torch.equal(one(X), model(X)) for one in copies)
    assert len(acts["0"]) == len(copies)
    assert not any(map(is_marked, copies))


# --- What cannot be ----------------------------------------------------------------------------------------


class Controlled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cond(x.sum() > -99, lambda x: self.body(1 * x), lambda x: -x, (x,))


def test_a_layer_in_the_body_of_an_operator_is_named() -> None:
    model = Controlled()
    run = compiled(model, fullgraph=True)
    expected = run(X)
    told = partial(pytest.warns, UnusedLayerWarning, match=r"1 of 2 .*\n  'body': .*torch\.cond")
    for _ in range(2):  # the second time, nothing is compiled
        with told(), record(model, compiled=True) as acts:
            assert torch.equal(run(X), expected)
        assert len(acts["stem"]) == 1


def test_a_layer_under_vmap_is_refused_by_name() -> None:
    model = Net()

    def run(x: Tensor) -> Tensor:
        return torch.vmap(model)(x)

    told = pytest.raises(
        Exception, match=r"record\(compiled=True\): a layer is called inside torch\.func"
    )
    with told as info, record(model, compiled=True):
        torch.compile(run, backend="aot_eager")(X)
    assert "Record without compiled=True" in str(info.value.__notes__)


AGAIN = partial(
    pytest.raises, CaptureError, match="activation checkpointing runs compiled code again"
)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList([Block(), Block()]), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_checkpointing_inside_compiled_code_records_each_call_once_and_refuses_gradients() -> None:
    model = Checkpointed(reentrant=False)
    run = compiled(model, fullgraph=True)
    both(model, None, lambda _: run(X).sum().backward())
    told = r"grads=...\): a layer is called inside a checkpoint\(\) that is compiled"
    for _ in range(2):  # and no backward behind the block would tell anybody
        with pytest.raises(Exception, match=told), record(model, grads=True, compiled=True):
            run(X)
    paused = pytest.warns(UnusedLayerWarning, match=r"ran inside acts\.pause")
    with paused, record(model, grads=True, compiled=True) as acts, acts.pause():
        run(X).sum().backward()
    with AGAIN(), record(model, grads=True, compiled=True) as acts:
        with acts.pause():
            run(X)  # which compiles it
        run(X).sum().backward()


def test_compiled_code_that_runs_again_in_a_backward_may_have_run_for_other_forwards_meanwhile() -> (
    None
):
    model = Checkpointed(reentrant=False)
    run = compiled(model, fullgraph=True)

    def work(_: object) -> None:
        losses = [run(x).sum() for x in (X, X + 1)]
        for loss in (*losses, losses[0]):
            loss.backward(retain_graph=True)

    both(model, None, work)


def test_checkpointing_around_compiled_blocks() -> None:
    for reentrant in (True, False):
        model = Checkpointed(reentrant=reentrant)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        both(
            model,
            "**",
            lambda _, model=model: model(X.clone().requires_grad_()).sum().backward(),
            grads=reentrant,
        )
    with AGAIN(), record(model, grads=True, compiled=True):
        model(X).sum().backward()


def test_a_pytorch_in_which_it_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("no\nmore")

    test: Any = self_test._failure.__wrapped__
    for failure, told in {fail: "RuntimeError: no", lambda: "1, not 2": "1, not 2"}.items():
        monkeypatch.setattr(self_test, "_failure", cache(test))
        monkeypatch.setattr(trial, "failure", failure)
        for _ in range(2):
            with pytest.raises(
                OptionError, match=rf"on torch {torch.__version__[0]}.*\({told}\).*Without"
            ):
                record(Net(), compiled=True)


def test_the_trial_finds_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trial.Marks, "__enter__", lambda _: None)
        assert "was recorded instead of" in str(trial.failure()), "nothing misses"
    with monkeypatch.context() as patch:
        patch.setattr(trial, "count_graphs", iter(range(99)).__next__)
        assert "graphs were compiled" in str(trial.failure())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda run, **_: lambda x: run(x) + 1)
        assert "something else" in str(trial.failure())


def test_gradients_need_a_pytorch_that_compiles_their_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "compiles_tensor_hooks", lambda: False)
    with pytest.raises(OptionError, match=r"grads=...\): torch .* cannot compile hooks on tensors"):
        record(Net(), grads=True, compiled=True)


@pytest.mark.parametrize("options", [{"stop_early": True}, {"detach": False}])
def test_what_cannot_be_in_compiled_code_is_refused_before_the_block(options: Any) -> None:
    with pytest.raises(OptionError, match=rf"record\(compiled=True, {next(iter(options))}="):
        record(Net(), compiled=True, **options)
    with pytest.raises(OptionError, match=r"record\('blocks.0:add', compiled=True\)"):
        record(Net(), "blocks.0:add", compiled=True)
