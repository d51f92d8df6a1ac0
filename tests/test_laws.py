"""Laws that hold for every model: what is recorded is right, and recording is not felt.

Models are generated: trees of modules that nest, share and call each other again, return tuples and
dicts, and write in place to what they received and returned, directly, through views and behind
autograd's back. Nothing here trusts actrec: references are clones made by plain hooks in the same
forward, and all comparisons are of bytes, so that NaN equals NaN and 0.0 differs from -0.0.

The same laws hold of models that are compiled, and stay so with ``compiled=True``. There plain hooks would run in
the compiled code as well, so they are on a second model that is not compiled.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from actrec import record
from actrec._values import snapshot as _snapshot

from .sweep import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from actrec import Recorder

pytestmark = [
    pytest.mark.sweep,
    # Keeping a graph where there is none is told, and not what these laws are about.
    pytest.mark.filterwarnings("ignore::actrec.MissingGradientWarning"),
    # The compiler warns about its own deprecations when it is first used.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    # Its own question, of what a forward returns.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

WIDTH = 4

#: The same examples in every run; no database of failures, for there is nothing random to remember.
MOST = 100 if WHOLE else 40
LAW = settings(derandomize=True, max_examples=MOST, deadline=None, database=None)

#: On so many models that are compiled, which takes a second for each, a law is tried; ``nox -s compiled`` tries more.
FEW = settings(
    LAW,
    max_examples=int(os.environ.get("ACTREC_COMPILED", "2")),
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)


# --- What models are made of -------------------------------------------------------------------------


class Counts(nn.Module):
    """Changes a buffer, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.seen.expand_as(x) + x


class Reuses(nn.Module):
    """Writes every result into the same memory, and returns a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.memory.shape[1:] != x.shape:
                self.memory = torch.zeros(2, *x.shape)
            self.memory[0].copy_(x).neg_()
        return self.memory[0].detach()


class Draws(nn.Module):
    """Takes from the global random stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "relu_": lambda: nn.ReLU(inplace=True),
    "silu_": lambda: nn.SiLU(inplace=True),
    "hardtanh_": lambda: nn.Hardtanh(-0.5, 0.5, inplace=True),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout_": lambda: nn.Dropout(0.5, inplace=True),
    "identity": nn.Identity,
    "flatten": lambda: nn.Flatten(1),
    "counts": Counts,
    "reuses": Reuses,
    "draws": Draws,
}


def _set_column(x: Tensor) -> Tensor:
    x[:, 0] = 3
    return x


def _through_view(x: Tensor) -> Tensor:
    x[:, 1:3].mul_(-1)
    return x


def _through_data(x: Tensor) -> Tensor:
    x.data.add_(1)
    return x


def _through_numpy(x: Tensor) -> Tensor:
    x.detach().numpy()[...] *= 2
    return x


def _as_out(x: Tensor) -> Tensor:
    torch.neg(x.detach(), out=x.detach())
    return x


#: What a model does between the calls of its modules: to the value ``x`` that it has, which it began with ``start``.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "residual": lambda x, start: x.add_(start),
    "residual out of place": lambda x, start: x + start,
    "+= 1": lambda x, _: x.add_(1),
    "*= -2": lambda x, _: x.mul_(-2),
    "start += x": lambda x, start: start.add_(x),
    "F.relu_": lambda x, _: F.relu_(x),
    "clamp_": lambda x, _: x.clamp_(-1, 1),
    "zero_": lambda x, _: x.detach().zero_(),
    "F.dropout_": lambda x, _: F.dropout(x, 0.5, training=True, inplace=True),
    "set column": lambda x, _: _set_column(x),
    "view": lambda x, _: _through_view(x),
    "data": lambda x, _: _through_data(x),
    "numpy": lambda x, _: _through_numpy(x),
    "out": lambda x, _: _as_out(x),
    "transposed": lambda x, _: x.t().contiguous().t(),
    "reversed": lambda x, _: x.flip(0),
    "of a larger one": lambda x, _: torch.cat([x, x], dim=1)[:, :WIDTH],
    "copy": lambda x, _: x.clone(),
}

#: How a module returns its value.
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, x[:, :1], None),
    "list": lambda x: [x],
    "dict": lambda x: {"out": x, "more": (x, [x * 2])},
}


def first(value: Any) -> Tensor:
    """The tensor in a value that comes first."""
    return tree_flatten(value)[0][0]


@dataclass(frozen=True)
class Plan:
    """What a tree of modules is built from."""

    parts: tuple[
        Plan | str | int, ...
    ]  # a subtree, a leaf or a step, or a module that was built before
    form: str
    repeats: int  # how often it calls itself


class Tree(nn.Module):
    """Runs its parts one after the other, and then perhaps itself again."""

    def __init__(self, plan: Plan, built: list[nn.Module]) -> None:
        super().__init__()
        self.form = plan.form
        self.repeats = plan.repeats
        self.inner = nn.ModuleList()
        self.order: list[str | int] = []
        for part in plan.parts:
            if isinstance(part, str) and part not in LEAVES:
                self.order.append(part)
            else:
                self.order.append(len(self.inner))
                self.inner.append(self.made(part, built))

    @staticmethod
    def made(part: Plan | str | int, built: list[nn.Module]) -> nn.Module:
        if isinstance(part, int):
            return built[part % len(built)] if built else nn.Identity()
        built.append(LEAVES[part]() if isinstance(part, str) else Tree(part, built))
        return built[-1]

    def forward(self, x: Tensor, repeats: int | None = None) -> Any:
        start = x
        for part in self.order:
            x = STEPS[part](x, start) if isinstance(part, str) else first(self.inner[part](x))
        repeats = self.repeats if repeats is None else repeats
        if repeats:
            x = first(self(x, repeats=repeats - 1))
        return FORMS[self.form](x)


# --- Strategies --------------------------------------------------------------------------------------


def _plans(parts: st.SearchStrategy[Plan | str | int]) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        st.lists(parts, min_size=1, max_size=4).map(tuple),
        st.sampled_from(list(FORMS)),
        st.sampled_from([0, 0, 0, 1]),
    )


SIMPLE = st.sampled_from([*LEAVES, *STEPS]) | st.integers(0, 20)
PLANS = _plans(st.recursive(SIMPLE, lambda inner: _plans(inner | SIMPLE), max_leaves=8))
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@dataclass(frozen=True)
class Case:
    """A model, what it is given, and how it is run and recorded."""

    plan: Plan
    sizes: tuple[int, ...]
    mode: str
    train: bool
    shared: bool  # copy-on-write also where tensors are small, or never
    options: dict[str, bool]
    chosen: int  # bits: which of the modules
    compiled: bool = False

    def model(self) -> Tree:
        torch.manual_seed(1)
        return Tree(self.plan, []).train(self.train)

    def batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [torch.randn(size, WIDTH, generator=generator) for size in self.sizes]

    def layers(self, model: nn.Module) -> list[str]:
        """Names of called modules, at least one: subsets of all sizes, with their aliases."""
        names = [n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)]
        picked = [name for bit, name in enumerate(names) if self.chosen >> bit % 16 & 1]
        return picked or names

    def runs(self, model: Tree) -> Callable[[Tensor], Any]:
        """What a user calls: the model, or what is compiled of it."""
        if not self.compiled:
            return model
        torch._dynamo.reset()
        return torch.compile(model, backend="aot_eager")

    def record(self, model: Tree) -> Any:
        if not self.compiled:
            return record(model, self.layers(model), **self.options)
        return record(model, self.layers(model), inputs=self.options["inputs"], compiled=True)

    def watched(self, model: Tree, reference: Reference) -> Tree:
        """A model with the hooks of a reference: this one, or one like it that is not compiled."""
        watched = self.model() if self.compiled else model
        reference.watch(watched)
        return watched

    def draws(self) -> bool:
        """Whether it may take random numbers, which are others where it is compiled."""

        def parts(plan: Plan) -> Iterator[str | int]:
            for part in plan.parts:
                yield from parts(part) if isinstance(part, Plan) else [part]

        return any("drop" in str(part) or part == "draws" for part in parts(self.plan))

    @contextmanager
    def snapshots(self) -> Iterator[None]:
        with mock.patch.object(
            _snapshot, "lazy_clone", _snapshot.lazy_clone if self.shared else None
        ):
            yield


CASES = st.builds(
    Case,
    plan=PLANS,
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    mode=st.sampled_from(list(MODES)),
    train=st.booleans(),
    shared=st.booleans(),
    options=st.fixed_dictionaries({"inputs": st.booleans(), "detach": st.booleans()}),
    chosen=st.integers(1, 2**16 - 1),
)


# --- References --------------------------------------------------------------------------------------


def content(value: Any) -> Any:
    """What is in a value, as bytes; and its structure."""
    leaves, structure = tree_flatten(value)
    texts = [
        (leaf.dtype, tuple(leaf.shape), leaf.detach().numpy().tobytes())
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves
    ]
    return texts, structure


class Call(NamedTuple):
    """What a plain hook saw."""

    batch: int
    received: Any
    returned: Any


@dataclass
class Reference:
    """Plain hooks that write down, as bytes, what each module receives and returns."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    batch: int = -1
    begun: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            self.calls[module] = []
            module.register_forward_pre_hook(self.begins, with_kwargs=True)
            module.register_forward_hook(self.ends)

    def begins(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.begun.append((module, content([*args, kwargs])))

    def ends(self, module: nn.Module, _: Any, output: Any) -> None:
        while (begun := self.begun.pop())[0] is not module:
            pass  # it ended by an exception
        self.calls[module].append(Call(self.batch, begun[1], content(output)))


def received(inputs: dict[str, Any]) -> Any:
    """Recorded inputs, as the reference writes them down."""
    positional = [value for name, value in inputs.items() if name != "repeats"]
    return content([*positional, {k: v for k, v in inputs.items() if k == "repeats"}])


def check(acts: Recorder, model: nn.Module, reference: Reference, layers: list[str]) -> None:
    """What was recorded is what the plain hooks saw: every call, in order, with its pass."""
    modules = dict(model.named_modules())
    assert list(acts) == layers
    for name in layers:
        calls = reference.calls[modules[name]]
        assert [content(value) for value in acts[name]] == [call.returned for call in calls]
        assert acts[name].passes == [call.batch for call in calls]
        if hasattr(acts, "inputs"):
            got = [received(inputs) for inputs in acts.inputs[name]]
            assert got == [call.received for call in calls]
            assert acts.inputs[name].passes == acts[name].passes
    aliases = dict(model.named_modules(remove_duplicate=False))
    for alias, module in aliases.items():
        if alias in acts and alias not in layers:
            assert acts[alias] is acts[next(name for name in layers if modules[name] is module)]


def hooks_of(model: nn.Module) -> list[dict[int, Any]]:
    return [
        dict(table)
        for module in model.modules()
        for name, table in vars(module).items()
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    ]


# --- The laws ----------------------------------------------------------------------------------------

#: Large models take a minute to compile, with their gradients.
COMPILED_CASES = CASES.filter(lambda case: len([*case.model().modules()]) < 8).map(
    lambda case: replace(case, compiled=True)
)


def law(*more: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[[bool], None]]:
    """Make a test of what holds of a case, and of ``more``: it is tried on many models, and on some that are compiled."""

    def of(holds: Callable[..., None]) -> Callable[[bool], None]:
        @pytest.mark.eager_only("it compiles by itself")
        @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
        def test(compiled: bool) -> None:
            examples, cases = (FEW, COMPILED_CASES) if compiled else (LAW, CASES)
            examples(given(cases, *more)(holds))()

        return test

    return of


#: Some models cannot be compiled with gradients, recorded or not: then nothing of them runs.
may_not_compile = pytest.mark.filterwarnings("ignore::actrec.UnusedLayerWarning")


@law()
def test_what_is_recorded_is_what_the_layers_returned(case: Case) -> None:
    assume(not (case.compiled and case.draws()))
    model, reference = case.model(), Reference()
    watched, run = case.watched(model, reference), case.runs(model)
    hooks = hooks_of(model)
    with case.snapshots(), MODES[case.mode](), case.record(model) as acts:
        for reference.batch, batch in enumerate(case.batches()):
            if watched is not model:
                watched(batch.clone())
            run(batch)
            batch.fill_(7)
    check(acts, watched, reference, case.layers(model))
    assert acts.num_passes == len(case.sizes)
    assert hooks_of(model) == hooks


def outcome(model: Tree, case: Case, mode: str) -> Any:
    """All that can be seen of a run: outputs, gradients, buffers, the random stream; or why it failed."""
    torch.manual_seed(3)
    seen: list[Any] = []
    run = case.runs(model)
    with MODES[mode]():
        for batch in case.batches():
            leaf = batch.requires_grad_(mode == "grad")
            try:
                out = run(leaf * 1)
                seen.append(content(out))
                if mode == "grad":
                    first(out).sum().backward()
                    event("backward ran")
            except RuntimeError as error:  # some models write to what autograd has saved
                # Asking for the graph of a view can name the operation differently that made it.
                text = str(error)
                seen.append(text if case.options["detach"] else text.partition(":")[0])
                event("backward failed")
            seen.append(content(leaf.grad))
    seen += [content(parameter.grad) for parameter in model.parameters()]
    seen.append(content(model.state_dict()))
    seen.append(content(torch.get_rng_state()))
    return seen


@may_not_compile
@law()
def test_a_model_computes_the_same_bits_recorded_or_not(case: Case) -> None:
    expected = outcome(case.model(), case, case.mode)
    model = case.model()
    hooks = hooks_of(model)
    with case.snapshots(), case.record(model):
        got = outcome(model, case, case.mode)
    assert got == expected
    assert hooks_of(model) == hooks


@may_not_compile
@law()
def test_gradients_are_the_same_bits_in_models_that_have_them(case: Case) -> None:
    expected = outcome(case.model(), case, "grad")
    model = case.model()
    with case.snapshots(), case.record(model):
        got = outcome(model, case, "grad")
    assert got == expected


@law(st.integers(0, 2), st.integers(1, 2**16 - 1))
def test_recorders_that_nest_record_what_each_would_alone(
    case: Case, begin: int, chosen: int
) -> None:
    assume(not (case.compiled and case.draws()))
    model, reference = case.model(), Reference()
    inner_case = replace(case, chosen=chosen, options={"inputs": False, "detach": True})
    watched, run = case.watched(model, reference), case.runs(model)
    hooks = hooks_of(model)
    with case.snapshots(), MODES[case.mode](), case.record(model) as outer:
        for reference.batch, batch in enumerate(case.batches()):
            if watched is not model:
                watched(batch.clone())
            if reference.batch == begin % len(case.sizes):
                with inner_case.record(model) as inner:
                    run(batch)
            else:
                run(batch)
    check(outer, watched, reference, case.layers(model))
    for calls in reference.calls.values():
        calls[:] = [c._replace(batch=0) for c in calls if c.batch == begin % len(case.sizes)]
    check(inner, watched, reference, inner_case.layers(model))
    assert hooks_of(model) == hooks


class Stop(Exception):
    """Raised somewhere inside a forward."""


def stop_after(calls: int, model: nn.Module) -> None:
    """Let ``model`` raise once, in front of the call of a module."""
    begun = 0

    @torch.compiler.disable
    def stop(*_: object) -> None:
        nonlocal begun
        begun += 1
        if begun == calls + 1:
            raise Stop

    for module in model.modules():
        module.register_forward_pre_hook(stop)


@law(st.integers(0, 30))
def test_after_an_exception_at_any_point_everything_before_it_is_there_and_passes_stay_aligned(
    case: Case, calls_before: int
) -> None:
    assume(not (case.compiled and case.draws()))
    model, reference = case.model(), Reference()
    watched, run = case.watched(model, reference), case.runs(model)
    models = {id(one): one for one in (watched, model)}
    for one in models.values():
        stop_after(calls_before, one)
    hooks = hooks_of(model)
    stopped = 0
    acts = None
    try:
        with case.snapshots(), MODES[case.mode](), case.record(model) as acts:
            for reference.batch, batch in enumerate([*case.batches(), torch.ones(1, WIDTH)]):
                if watched is not model:
                    with suppress(Stop):
                        watched(batch.clone())
                try:
                    run(batch)
                except Stop:
                    stopped += 1
            raise Stop
    except Stop:
        assert hooks_of(model) == hooks
    assert stopped <= 1
    event(f"stopped: {bool(stopped)}")
    assert acts is not None
    check(acts, watched, reference, case.layers(model))
    assert acts.num_passes == len(case.sizes) + 1


def test_the_generated_models_have_what_the_laws_are_about() -> None:
    """Or else the laws would hold for want of anything that could break them."""
    seen: set[str] = set()

    @settings(LAW, max_examples=200)
    @given(CASES)
    def look(case: Case) -> None:
        model = case.model()
        names = list(model.named_modules(remove_duplicate=False))
        trees = [module for _, module in names if isinstance(module, Tree)]
        found = {
            "shared modules": len(names) > len(list(model.modules())),
            "nesting": len(trees) > 2,
            "calls of itself": any(tree.repeats for tree in trees),
            "nested outputs": any(tree.form != "tensor" for tree in trees),
            "several batches": len(case.sizes) > 1,
        }
        seen.update(what for what, there in found.items() if there)
        seen.update(type(module).__name__ for _, module in names)
        seen.update(str(part) for tree in trees for part in tree.order)

    look()
    assert seen >= {"shared modules", "nesting", "calls of itself", "nested outputs", *STEPS}
    assert seen >= {type(make()).__name__ for make in LEAVES.values()}
