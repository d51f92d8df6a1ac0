"""With ``compiled=True`` compiled code stays compiled: recorded is what it computes, and it is compiled once more at most."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from actrec import CaptureError, MissingGradientWarning, OptionError, record
from actrec._values.spec import same

# The compiler warns about its own deprecations when it is first used.
pytestmark = [
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
    [*((form, Net) for form in FORMS), *((form, of_torch) for form in [*FORMS][:3:2])],
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
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    recordings = []
    for compiled in (False, True):
        model.zero_grad()
        with record(model, ["**", ""], inputs=True, grads=True, compiled=compiled) as acts:
            for x in (X, X + 1):
                run(x).square().sum().backward()
        recordings.append((acts, [parameter.grad for parameter in model.parameters()]))
    (eager, expected), (acts, gradients) = recordings
    assert same(gradients, expected)
    assert [*acts] == [*eager]
    for name in eager:
        assert acts[name].passes == eager[name].passes, name
        assert same([*acts[name]], [*eager[name]]), name
        assert same([*acts.inputs[name]], [*eager.inputs[name]]), name
        assert same([*acts.grads[name]], [*eager.grads[name]]), name


def test_a_view_that_is_written_in_place_has_no_gradient_in_compiled_code_and_that_is_told() -> (
    None
):
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.ReLU(inplace=True))
    run = torch.compile(model, backend="aot_eager")
    with (
        pytest.warns(
            MissingGradientWarning, match=r"1 of 3 .*\n  '1': no gradient has come of 1 tensor"
        ),
        record(model, grads=True, compiled=True) as acts,
    ):
        run(X).sum().backward()
    assert acts.grads["1"] == [None]
    assert acts.grads["0"][0] is not None


def test_a_leaf_that_is_returned_as_it_is_has_no_gradient_in_compiled_code() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    run = torch.compile(model, backend="aot_eager")
    told = pytest.raises(CaptureError, match="layer '0': what it returned is a leaf")
    with told, record(model, grads=True, compiled=True):
        run(X.clone().requires_grad_())


@pytest.mark.parametrize("options", [{"stop_early": True}, {"detach": False}])
def test_what_cannot_be_in_compiled_code_is_refused_before_the_block(options: Any) -> None:
    with pytest.raises(OptionError, match=rf"record\(compiled=True, {next(iter(options))}="):
        record(Net(), compiled=True, **options)
    with pytest.raises(OptionError, match=r"record\('blocks.0:add', compiled=True\)"):
        record(Net(), "blocks.0:add", compiled=True)
