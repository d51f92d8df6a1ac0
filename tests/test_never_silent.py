"""When something that was asked for is not recorded, a warning or an error says so, and why."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module, make_boxed_func
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from actrec import (
    ActrecError,
    IncompleteLayerWarning,
    Opaque,
    SelectionError,
    UnsupportedModelError,
    UnusedLayerWarning,
    record,
)

X = torch.ones(2, 4)


class Roundabout(nn.Module):
    """Uses its layers without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b.forward(self.a(x)), self.c.weight)


def test_layers_that_are_used_without_being_called_are_named_in_one_warning() -> None:
    model = Roundabout()
    with (
        pytest.warns(
            UnusedLayerWarning,
            match=r"3 of 4 layers of this Roundabout.\n  'b', 'c', 'unused'.*\.forward\(\)",
        ) as caught,
        record(model) as acts,
    ):
        model(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the with block"
    assert (len(acts["a"]), len(acts["b"])) == (1, 0)


def test_the_modules_of_a_model_are_listed_once_however_many_layers_were_not_called() -> None:
    class Counting(nn.ModuleList):
        listed = 0

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            self.listed += 1
            return super().named_modules(*args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)  # type: ignore[no-any-return]

    listed = []
    for size in (10, 100):
        model = Counting(nn.Linear(4, 4) for _ in range(size))
        with pytest.warns(UnusedLayerWarning, match=f"{size - 1} of {size} layers"), record(model):
            model(X)
        listed.append(model.listed)
    assert listed[0] == listed[1]


def test_a_model_that_was_not_called_is_said_once() -> None:
    with (
        pytest.warns(UnusedLayerWarning, match="this Linear was not called inside") as caught,
        record(nn.Linear(4, 4)),
    ):
        pass
    assert len(caught) == 1


def test_no_warning_hides_the_error_that_ended_the_block() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), record(nn.Linear(4, 4)):
            1 / 0  # noqa: B018  # it raises


@pytest.mark.parametrize("train", [True, False])
def test_the_projection_inside_attention_is_explained(train: bool) -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).train(train)
    with (
        torch.set_grad_enabled(train),
        pytest.warns(
            UnusedLayerWarning,
            match=r"'self_attn.out_proj': nn.MultiheadAttention uses its weights",
        ),
        record(model, [None, "self_attn.out_proj"]) as acts,
    ):
        model(X[None])
    assert len(acts["linear1"]) == 1, "recording turns the fused path off"


@pytest.mark.parametrize("train", [True, False])
def test_the_attention_is_recorded_in_place_of_the_projection_that_nobody_chose(
    train: bool,
) -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).train(train)
    with record(model) as acts:
        model(X[None])
    assert "self_attn.out_proj" not in acts
    assert len(acts["self_attn"]) == 1


def test_layers_without_weights_that_nobody_chose_are_said_by_the_table_alone() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.dropout = nn.Dropout()
            self.pool = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    model = Spare()
    with (
        pytest.warns(UnusedLayerWarning, match="of 1 of 3 layers.*\n.*'pool'"),
        record(model) as acts,
    ):
        model(X)
    assert len(acts["dropout"]) == 0
    assert "never called" in repr(acts).splitlines()[3]
    del model.pool
    with record(model):
        model(X)
    for query in (nn.Dropout, [None, "dropout"]):
        with pytest.warns(UnusedLayerWarning, match="'dropout'"), record(model, query):
            model(X)
    with pytest.warns(UnusedLayerWarning, match="was not called inside"), record(model):
        pass
    with (
        pytest.warns(UnusedLayerWarning, match="the transform returned None"),
        record(model, transform=lambda _: None),
    ):
        model(X)


def test_a_layer_whose_weights_others_use_is_said_by_the_table_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("tied", nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.forward = model[0].__call__  # type: ignore[method-assign]
    with record(model) as acts:
        model(X)
    assert (len(acts["0"]), len(acts["tied"])) == (1, 0)


def test_numbered_layers_with_one_cause_are_one_name() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)])
    outer = nn.ModuleDict({"h": model, "head": nn.Linear(4, 4)})
    outer.forward = outer["head"].__call__  # type: ignore[method-assign]
    with (
        pytest.warns(
            UnusedLayerWarning, match=r"of 12 of 13 layers.*\n  'h\.\*': it was never called"
        ),
        record(outer),
    ):
        outer(X)


def test_the_fast_path_is_left_and_the_numbers_are_the_same() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    with torch.no_grad():
        expected = model(X[None])
        with record(model, "layers.*.linear1") as acts:
            got = model(X[None])
    assert [len(layer) for layer in acts.values()] == [1, 1]
    assert torch.allclose(got, expected, atol=1e-6)


def test_dropout_inside_fused_attention_is_explained() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout.p)

    model = Attention()
    with (
        pytest.warns(UnusedLayerWarning, match="attention often computes dropout itself, fused"),
        record(model, nn.Dropout),
    ):
        model(X[None])


def test_a_module_that_was_replaced_inside_the_block_is_explained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with (
        pytest.warns(UnusedLayerWarning, match="'0': another module was put in its place"),
        record(model),
    ):
        model[0] = nn.Linear(4, 4)
        model(X)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    with (
        pytest.warns(UnusedLayerWarning, match="'0.0': another module was put in its place"),
        record(model, ["0.0", "1"]),
    ):
        del model[0]
        model(X)


def test_a_transform_that_never_returns_a_value_is_explained() -> None:
    def forgets_to_return(t: Tensor) -> None:
        t.mean()

    model = nn.Linear(4, 4)
    with (
        pytest.warns(
            UnusedLayerWarning, match="returned None, which skips a call, for all of its 2 calls"
        ),
        record(model, transform=forgets_to_return),
    ):
        model(X)
        model(X)


def test_a_transform_that_returns_none_skips_that_call_only() -> None:
    model = nn.Linear(4, 4)
    with record(model, transform=lambda t: t if t.shape[0] == 2 else None, inputs=True) as acts:
        for size in (2, 3, 2):
            model(torch.ones(size, 4))
    assert acts[""].passes == acts.inputs[""].passes == [0, 2]


def test_calls_that_only_ran_inside_backward_are_explained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def hook(grad: Tensor) -> None:
        model[1](X)

    x = X.clone().requires_grad_()
    with (
        pytest.warns(
            UnusedLayerWarning,
            match=r"'1': all of its 1 call ran inside backward\(\), where calls are not",
        ),
        record(model, ["0", "1"]),
    ):
        out = model[0](x)
        out.register_hook(hook)
        out.sum().backward()
    with (
        pytest.warns(UnusedLayerWarning, match="'1': all of its 1 call ran inside backward"),
        record(model, "1"),
    ):
        y = x * 1
        y.register_hook(hook)
        y.sum().backward()


class Adjoint(torch.autograd.Function):
    """Calls a module again where its gradient is asked for, as ODE solvers do."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.module(grad) + ctx.module(grad * 2)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_calls_inside_backward_that_repeat_no_checkpoint_are_said(checkpointed: bool) -> None:
    class Solver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(4, 4)
            self.step = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            run = (
                (lambda x: checkpoint(self.before, x, use_reentrant=False))
                if checkpointed
                else self.before
            )
            return Adjoint.apply(self.step, run(x))

    model = Solver()
    with (
        pytest.warns(
            IncompleteLayerWarning,
            match=r"1 of 2 layers of this Solver.\n  'step': 4 calls of it ran inside backward\(\)",
        ) as caught,
        record(model) as acts,
    ):
        for _ in range(2):
            model(X).sum().backward()
    assert len(caught) == 1
    assert [layer.passes for layer in acts.values()] == [[0, 1], [0, 1]]


def test_calls_inside_pause_are_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with (
        pytest.warns(
            UnusedLayerWarning, match=r"\n  '0', '1': all of its 2 calls ran inside acts.pause\(\)"
        ),
        record(model) as acts,
        acts.pause(),
    ):
        model(X)
        model(X)
    with (
        pytest.warns(
            UnusedLayerWarning,
            match=r"was not called inside the with block, except in acts.pause\(\)",
        ),
        record(nn.ModuleDict({"a": nn.Linear(4, 4)}), "a") as acts,
        acts.pause(),
    ):
        pass


class Callable(nn.Module):
    """Has a way of its own to be called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)

    forward = __call__


def test_a_class_with_a_call_of_its_own_is_named() -> None:
    model = nn.Sequential(Callable(), nn.ReLU())
    with (
        pytest.warns(UnusedLayerWarning, match="'0': its class Callable defines __call__"),
        record(model, ["0", "0.inner"]) as acts,
    ):
        model(X)
    assert len(acts["0.inner"]) == 1


def test_what_is_said_about_an_error_is_said_once() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).resize_(8, 8).add_(1)

    model = nn.Sequential(nn.Sequential(nn.Sequential(Grows())))
    with torch.no_grad(), pytest.raises(RuntimeError) as caught, record(model, "**.layer"):
        model(X)
    assert len(caught.value.__notes__) == 1


# --- Other forms of a graph --------------------------------------------------------------------------


# As long as torch has it. The kind of the warning differs from version to version.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
class TestTorchScript:
    """TorchScript runs no Python hooks."""

    @pytest.mark.parametrize(
        "make", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["script", "trace"]
    )
    def test_a_scripted_model_is_refused_with_advice(self, make: object) -> None:
        scripted = make(nn.Sequential(nn.Linear(4, 4)))  # type: ignore[operator]
        with pytest.raises(UnsupportedModelError, match="Record the original module"):
            record(scripted)
        with pytest.raises(SelectionError, match="TorchScript"):
            record(nn.Sequential(scripted), "0")

    @pytest.mark.parametrize("query", ["1", "**"])
    def test_what_stands_beside_a_scripted_module_is_recorded(self, query: str) -> None:
        model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
        with record(model, query) as acts:
            out = model(X)
        assert [*acts] == ["1"]
        assert torch.equal(acts["1"][0], out)

    def test_tracing_inside_the_block_is_not_recorded_and_traces_what_it_would(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        plain = torch.jit.trace(model, X)
        with record(model) as acts:
            traced = torch.jit.trace(model, X)
            torch.jit.trace(model[0], X)
            model(X)
        assert [len(layer) for layer in acts.values()] == [1, 1]
        assert acts["0"].passes == acts["1"].passes == [0]
        assert acts.num_passes == 1
        assert [node.kind() for node in traced.inlined_graph.nodes()] == [
            node.kind() for node in plain.inlined_graph.nodes()
        ]

    def test_scripting_inside_the_block_says_what_to_do(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        with record(model):
            model(X)
            with pytest.raises(AttributeError, match="before the block or after it"):
                torch.jit.script(model)
        torch.jit.script(model)

    def test_a_layer_that_was_only_traced_was_not_called(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        model.append(nn.Linear(4, 4))
        with (
            pytest.warns(UnusedLayerWarning, match=r"'1': all of its \d calls were made by.*trace"),
            record(model),
        ):
            model[0](X)
            torch.jit.trace(model, X)


def _aot(model: nn.Module) -> object:
    function = aot_module(model, fw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    return function(X)


READERS = {
    "make_fx": lambda model: make_fx(model)(X),
    "make_fx, before dispatch": lambda model: make_fx(model, pre_dispatch=True)(X),
    "make_fx, symbolic": lambda model: make_fx(
        lambda x, weights: torch.func.functional_call(model, weights, (x,)), tracing_mode="symbolic"
    )(X, dict(model.named_parameters())),
    "AOT autograd": _aot,
    "export": lambda model: torch.export.export(model, (X,), strict=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("reader", READERS)
def test_what_reads_the_model_reads_nothing_of_the_recorder_and_is_not_recorded(
    reader: str,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 2))
    model[2].flatten_parameters = lambda: None  # type: ignore[method-assign,assignment]
    if reader != "make_fx":
        del model[2]
    plain = READERS[reader](model)
    with record(model, inputs=True, grads=True) as acts:
        read = READERS[reader](model)
        model(X).sum().backward() if len(model) == 2 else model(X)
    assert [len(layer) for layer in acts.values()] == [1] * len(model)
    assert [len(layer) for layer in acts.inputs.values()] == [1] * len(model)
    assert acts.num_passes == 1
    if hasattr(plain, "graph"):
        assert [node.target for node in read.graph.nodes] == [
            node.target for node in plain.graph.nodes
        ]


def test_a_block_inside_of_what_is_read_is_refused() -> None:
    model = nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        with record(model):
            return model(x)

    with pytest.raises(ActrecError, match="Open the block outside of the compiled function"):
        make_fx(forward)(X)


class Branching(nn.Module):
    """Has a submodule with submodules, which tracing inlines."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Roundabout()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.inner(x))


def test_in_a_traced_graph_modules_it_calls_are_recorded_and_inlined_ones_refused() -> None:
    graph = torch.fx.symbolic_trace(Branching())
    with record(graph) as acts:
        graph(X)
    assert sorted(acts) == ["inner.a", "relu"]
    with pytest.raises(SelectionError, match="does not call it"):
        record(graph, "inner")


def test_tracing_a_graph_inside_the_block_records_no_proxies() -> None:
    model = Branching()
    with record(model, ["inner", "relu"], inputs=True) as acts:
        torch.fx.symbolic_trace(model)
        model(X)
    assert [len(layer) for layer in acts.values()] == [1, 1]
    assert not isinstance(acts["inner"][0], Opaque)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x=x)


def test_tracing_a_layer_that_is_called_by_keyword_is_no_pass() -> None:
    model = ByKeyword()
    with record(model, "inner", inputs=True) as acts:
        torch.fx.symbolic_trace(model)
        model(X)
    assert acts.num_passes == 1
    assert acts["inner"].passes == acts.inputs["inner"].passes == [0]


# torch.export.unflatten uses what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_an_exported_program_is_refused_with_advice_and_an_unflattened_one_recorded() -> None:
    program = torch.export.export(Branching(), (X,))
    with pytest.raises(UnsupportedModelError, match=r"torch.export.unflatten\(program\)"):
        record(program)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="unflatten"):
        record(program.module(), "relu")
    with pytest.raises(SelectionError, match="unflatten"):
        record(program.module())
    model = torch.export.unflatten(program)
    with record(model, ["inner", "relu"]) as acts:
        model(X)
    assert [len(layer) for layer in acts.values()] == [1, 1]


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_inside_the_block_records_nothing_of_it(strict: bool) -> None:
    model = Branching()
    with record(model, ["relu", "inner.a"]) as acts:
        torch.export.export(model, (X,), strict=strict)
        model(X)
    assert [len(layer) for layer in acts.values()] == [1, 1]
    assert acts.num_passes == 1


# --- Mistakes in using it ----------------------------------------------------------------------------


def test_a_block_in_the_place_of_its_recording_is_explained() -> None:
    block = record(nn.Linear(4, 4))
    mistakes = [lambda: block[""], lambda: block.num_passes, lambda: block(X), lambda: [*block]]  # type: ignore[index,attr-defined,operator,misc]

    def explained(words: str) -> None:
        for mistake in mistakes:
            with pytest.raises((ActrecError, AttributeError), match=words):
                mistake()

    explained(r"Did you forget the with\? Write: with record\(model, ...\) as acts:")
    assert repr(block) == "<record() of Linear, not entered: with record(model, ...) as acts:>"
    with pytest.warns(UnusedLayerWarning), block:
        assert repr(block) == "<record() of Linear, entered>"
    explained("this is the block, not the recording. Use acts")
    assert not hasattr(block, "_repr_html_")


def test_lazy_modules_are_recorded_from_their_first_call() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        lazy = nn.Sequential(nn.LazyLinear(3), nn.ReLU(inplace=True))
    with record(lazy, nn.Linear) as acts:
        lazy(X)
        lazy(X)
    assert len(acts["0"]) == 2


def test_an_unused_layer_whose_name_has_a_dot_was_not_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model._modules["a.b"] = nn.Linear(4, 4)
    model.forward = model[0].forward  # type: ignore[method-assign]
    with pytest.warns(UnusedLayerWarning, match="'0', 'a.b': it was never called"), record(model):
        model(X)


def test_pytorchs_error_about_shared_memory_that_grew_says_what_it_is_about() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.zeros(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.seen.resize_(len(self.seen) + len(x), 4)[-len(x) :] = x
            return self.seen

    model = nn.Sequential(Growing())
    with torch.no_grad(), record(model) as acts:
        model(torch.ones(2, 4))
        with pytest.raises(RuntimeError) as caught:
            model(torch.ones(2, 4))
    assert ["clone()" in note for note in caught.value.__notes__] == [True]
    assert len(acts["0"]) == 1


def test_a_layer_that_only_a_checkpoint_of_before_the_block_called_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh())
    output = checkpoint(model, torch.ones(2, 4, requires_grad=True), use_reentrant=False)
    with (
        pytest.warns(
            UnusedLayerWarning,
            match="inside backward\\(\\), where activation checkpointing recomputes what was recorded before",
        ),
        record(model, ["0", "1"]) as acts,
    ):
        output.sum().backward()
    assert len(acts["0"]) == 0
