"""PyTorch's private names do what ``actrec/_torch.py`` says of them, and stand nowhere else."""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

import actrec
from actrec import _torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(actrec.__file__).parent
X = torch.ones(2, 4)


# --- They stand nowhere else -----------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


#: Of the standard library, which everybody uses, and of fsspec, which its documentation tells backends to have.
STANDARD = {"_asdict", "_fields", "_getframe", "_replace", "_put_file"}
#: What could be mistaken for names of actrec's.
THEIRS = {name for holder in (Tensor, nn.Module()) for name in dir(holder) if is_private(name)}
TREES = {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a module of actrec gives to functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


OURS = {name for tree in TREES.values() for name in defined(tree)} - THEIRS | STANDARD


def private_uses(tree: ast.AST) -> Iterator[str]:
    """The private names of others that a module uses."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).partition(".")[0]
            is_own = owner == ast.unparse(node.value) and owner in {"self", "cls"}
            is_own |= owner not in {"torch", "nn"} and node.attr in OURS
            names = [] if is_own else [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch."):
            names = str(node.value).split(".") if " " not in str(node.value) else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr"}:
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
            names = [name for name in names if name not in OURS]
        yield from filter(is_private, names)


def test_private_names_of_others_stand_in_one_module() -> None:
    found = {path.relative_to(ROOT).as_posix(): {*private_uses(TREES[path])} for path in TREES}
    assert {path: names for path, names in found.items() if names}.keys() == {"_torch.py"}, found


@pytest.mark.parametrize(
    "code",
    [
        "t._version",
        "self.probe._base",
        "import torch._dynamo",
        "from torch.utils import _pytree",
        "from torch._guards import TracingContext",
        'sys.modules.get("torch._dynamo")',
        'getattr(module, "_is_replica", False)',
        'hasattr(t, "_lazy_clone")',
    ],
)
def test_private_names_are_found(code: str) -> None:
    assert [*private_uses(ast.parse(code))]


def test_every_private_name_that_is_asked_for_is_one_that_pytorch_has() -> None:
    """A name that is mistyped, or gone, would quietly be the fallback for ever."""
    for name in ("data_address", "PYTREE_NODES", "CALL_CODE", "DROPOUTS", "_creation", "_DEFAULT"):
        assert getattr(_torch, name), name
    for name, function in vars(_torch).items():
        is_fallback = getattr(function, "__name__", "") == "<lambda>"
        assert not is_fallback, name
    assert _torch.InferenceMode is not _torch.PublicInferenceMode
    assert _torch.backward_number is not _torch.recomputing_number


# --- Tensors -------------------------------------------------------------------------------------------


def test_a_lazy_clone_is_a_copy_that_shares_memory_until_one_side_is_written() -> None:
    assert _torch.lazy_clone is not None
    assert _torch.data_address is not None
    original = torch.ones(2, 3)
    shared = _torch.lazy_clone(original)
    address = _torch.data_address(original)
    assert _torch.data_address(shared) == address, "and asking does not end it"
    original.add_(1)
    assert _torch.data_address(original) != _torch.data_address(shared)
    assert (shared.sum(), original.sum()) == (6, 12)
    shared.add_(2)
    assert (shared.sum(), original.sum()) == (18, 12)


def test_a_lazy_clone_that_does_not_work_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("not implemented")

    assert _torch.sharing()
    for broken in (fail, Tensor.detach):
        monkeypatch.setattr(Tensor, "_lazy_clone", broken)
        assert _torch.sharing() is None
    monkeypatch.setattr(_torch, "Tensor", object)
    assert _torch.sharing() is None


def test_the_address_is_that_of_the_storage() -> None:
    assert _torch.data_address is not None
    tensor = torch.ones(4, 4)
    assert _torch.data_address(tensor) == tensor.data_ptr()
    assert _torch.data_address(tensor[1:]) == tensor.untyped_storage().data_ptr()


def test_the_count_of_writes_goes_back() -> None:
    tensor = torch.ones(2).mul_(2)
    rewind = _torch.rewinding(tensor)
    tensor.mul_(2)
    rewind()
    assert _torch.version(tensor) == 1


def test_versions_count_writes_of_all_that_share_the_memory() -> None:
    tensor = torch.ones(2)
    alias = tensor.detach()
    before = _torch.version(tensor)
    alias.add_(1)
    assert _torch.version(tensor) == _torch.version(alias) == before + 1
    alias.data = torch.empty(0)
    tensor.add_(1)
    assert _torch.version(alias) == before + 2, "also where only the count is shared"


def test_the_base_of_a_view() -> None:
    tensor = torch.ones(4)
    assert _torch.base_of(tensor) is None
    assert _torch.base_of(tensor[1:][1:]) is tensor
    assert _torch.base_of(tensor.detach()) is None


def test_the_parts_of_a_sparse_tensor_that_is_not_coalesced() -> None:
    twice = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=False)
    indices, values = _torch.sparse_parts(twice)
    assert (indices.shape, values.shape) == ((1, 2), (2,))


# --- Modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [_torch.InferenceMode, _torch.PublicInferenceMode])
def test_a_guard_ends_inference_mode_while_it_lives(kind: Any) -> None:
    off = False
    with torch.inference_mode():
        guard = kind(off)
        assert not torch.ones(2).is_inference()
        del guard
        assert torch.ones(2).is_inference()
        with kind(off):
            assert not torch.ones(2).is_inference()
        assert torch.ones(2).is_inference()


class Dispatch(TorchDispatchMode):
    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError


def test_dispatch_modes_are_a_stack_of_the_thread() -> None:
    assert _torch.count_dispatch_modes() == 0
    with Dispatch() as lower, Dispatch() as upper:
        assert _torch.count_dispatch_modes() == 2
        assert _torch.dispatch_modes() == [lower, upper]
        assert _torch.pop_dispatch_mode(None) is upper
        assert _torch.pop_dispatch_mode(None) is lower
        X + 1
        for mode in (lower, upper):
            _torch.push_dispatch_mode(mode)


class Names(TorchFunctionMode):
    """Writes down the names of the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_function_modes_are_a_stack_of_the_thread() -> None:
    assert _torch.count_function_modes() == 0
    with Names() as lower, Names() as upper:
        assert _torch.function_modes() == [lower, upper]
        assert _torch.function_mode_at(1) is upper
        assert _torch.count_function_modes() == 2


def test_distributions_draw_by_the_private_names() -> None:
    with Names() as mode:
        torch.distributions.Gamma(1.0, 1.0).sample()
        torch.distributions.Dirichlet(torch.ones(2)).rsample()
    assert mode.seen >= _torch.PRIVATE_DRAWS


def test_tensors_in_transforms_are_wrapped() -> None:
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((_torch.is_wrapped(x), _torch.is_batch(x)))
        assert (_torch.transform_depth() is not None) == _torch.is_wrapped(x)
        return x.sum()

    for function in (look, torch.func.vmap(look), torch.func.grad(look)):
        function(torch.ones(2))
    assert seen == [(False, False), (True, False), (True, False)]


def test_a_batch_of_gradients_is_one() -> None:
    seen: list[tuple[bool, bool]] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append((_torch.is_wrapped(grad), _torch.is_batch(grad))))
    for batched in (False, True):
        torch.autograd.grad(
            x.exp(),
            x,
            torch.ones(3, 2)[: None if batched else 1].squeeze(0),
            is_grads_batched=batched,
        )
    assert seen[0] == (False, False)
    assert any(seen[1])


# --- Modules -------------------------------------------------------------------------------------------


def test_the_tables_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_module("nothing", None)
    assert _torch.children_of(model) == {"0": model[0], "nothing": None}
    behind = model.register_forward_hook(print)
    before = model.register_forward_pre_hook(print)
    pre_hooks, hooks = _torch.forward_pre_hooks(model), _torch.forward_hooks(model)
    assert ([*hooks.items()], [*pre_hooks.items()]) == ([(behind.id, print)], [(before.id, print)])
    assert _torch.hook_tables(model) == (hooks, pre_hooks)


def test_the_frame_of_a_modules_call() -> None:
    class Model(nn.Module):
        def forward(self) -> bool:
            frame = inspect.currentframe()
            assert frame is not None
            assert frame.f_back is not None
            return frame.f_back.f_code is _torch.CALL_CODE and frame.f_back.f_locals["self"] is self

    assert Model()()


def test_kinds_of_modules() -> None:
    assert isinstance(nn.Dropout(), _torch.DROPOUTS)
    assert isinstance(nn.Dropout2d(), _torch.DROPOUTS)
    assert not isinstance(nn.Linear(1, 1), _torch.DROPOUTS)
    assert not _torch.is_replica(nn.Linear(1, 1))
    assert _torch.is_replica(nn.Linear(1, 1)._replicate_for_data_parallel())


def test_the_method_that_makes_a_replica_is_the_one_that_is_asked() -> None:
    assert f"module.{_torch.REPLICATE}()" in inspect.getsource(
        sys.modules["torch.nn.parallel.replicate"]
    )


@pytest.mark.parametrize("prepend", [False, True])
def test_a_hook_is_given_another_number_and_nothing_else_of_it_changes(prepend: bool) -> None:
    module, calls = nn.Linear(4, 4), []
    module.register_forward_hook(lambda *_: calls.append("other"))
    handle = module.register_forward_hook(
        lambda _, __, kwargs, ___: calls.append(*kwargs),
        with_kwargs=True,
        always_call=True,
        prepend=prepend,
    )
    handle.id = _torch.renumber(module, handle.id, -7)
    module(input=X)
    assert calls == (["input", "other"] if prepend else ["other", "input"])
    with pytest.raises(RuntimeError):
        module(input=X[:, :2])
    assert calls[2:] == ["input"], "it is called also where the module raises"
    handle.remove()
    assert not any(isinstance(table, dict) and -7 in table for table in vars(module).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_guards_of_an_exported_model() -> None:
    model = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (X,)).module()
    guards = [name for name, child in model.named_modules() if _torch.is_export_guard(child)]
    assert guards in ([], ["_guards_fn"]), "by the version"
    assert bool(guards) == ("_guards_fn" in dict(model.named_children()))


def test_nodes_of_the_pytree_say_what_is_in_them() -> None:
    class Node:
        item = X

    def flatten(node: Node) -> tuple[list[Tensor], str]:
        return [node.item], "context"

    def keys(node: Node) -> tuple[list[tuple[Any, Tensor]], str]:
        return [(_pytree.GetAttrKey("item"), node.item)], "context"

    assert Node not in _torch.PYTREE_NODES
    torch.utils._pytree.register_pytree_node(
        Node, flatten, lambda _, __: Node(), flatten_with_keys_fn=keys
    )
    found = _torch.PYTREE_NODES[Node]
    assert found.flatten_fn(Node()) == ([X], "context")
    assert type(found.unflatten_fn([X], "context")) is Node
    [(key, _)] = found.flatten_with_keys_fn(Node())[0]
    assert key.name == "item"


# --- The graph of autograd -------------------------------------------------------------------------


def test_a_hook_on_a_tensor_is_called_and_takes_no_number_of_a_handle() -> None:
    came: list[Tensor] = []
    tensor = torch.ones(2, requires_grad=True) * 2
    numbers = RemovableHandle.next_id
    _torch.listen(tensor, came.append)
    _torch.listen(tensor, came.append)
    assert RemovableHandle.next_id == numbers
    tensor.register_hook(came.append)  # beside those of others
    tensor.sum().backward()
    assert [grad.tolist() for grad in came] == [[1, 1]] * 2


def test_a_hook_on_a_tensor_is_registered_where_the_names_are_gone() -> None:
    came: list[Tensor] = []

    class Without:
        register_hook = came.append

    _torch.listen(Without(), "hook")  # type: ignore[arg-type]
    assert came == ["hook"]


def test_what_may_be_written_in_place() -> None:
    tensor = X.clone().requires_grad_().exp()
    assert _torch.is_writable_view(tensor.view(-1))
    assert not _torch.is_writable_view(tensor.unbind()[0])


def test_nodes_are_numbered_by_thread() -> None:
    x = X.clone().requires_grad_()
    first = _torch.next_number()
    nodes = [x.exp().grad_fn, x.sin().grad_fn]
    assert [_torch.number_of(node) for node in nodes] == [first, first + 1]
    assert _torch.next_number() == first + 2


def test_references_are_counted() -> None:
    python, anywhere = _torch.owners_of_one_view()
    view: Any = X.clone().requires_grad_().exp().view(-1)
    base = _torch.base_of(view)
    assert _torch.owners(base) == (python, anywhere)
    other = view.view(-1)
    assert _torch.owners(base) == (python, anywhere + 1)
    kept = [base]
    assert _torch.owners(base)[0] == python + 1
    del other, kept


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (torch.ops.aten.clamp.Tensor, [["self", "min", "max"]]),
        (torch.ops.aten.relu, [["self"], ["self"]]),
        (torch.relu, [["self"], ["self"]]),
        (Tensor.__add__, []),
        (nn.functional.scaled_dot_product_attention.__class__, []),
    ],
)
def test_operators_say_what_their_parameters_are(function: Any, names: list[list[str]]) -> None:
    schemas = _torch.schemas_of(function)
    assert [[one.name for one in schema.arguments][: len(names[0])] for schema in schemas] == names


# --- What this thread is doing -----------------------------------------------------------------------


def selective() -> Any:
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ({"use_reentrant": True}, [["forward"], ["backward"]]),
        ({"use_reentrant": False}, [[], ["unpack_hook"]]),
        ({"use_reentrant": False, "context_fn": selective}, [[], ["unpack_hook"]]),
    ],
    ids=["reentrant", "not reentrant", "selective"],
)
def test_checkpointing_is_seen_on_the_stack(kind: dict[str, Any], names: list[list[str]]) -> None:
    seen: list[list[str]] = []
    again: list[bool] = []

    def region(x: Tensor) -> Tensor:
        seen.append([name for name, _ in _torch.checkpoint_frames()])
        again.append(_torch.is_recomputing())
        assert (_torch.backward_number() != -1) == _torch.is_recomputing()
        assert _torch.recomputing_number() == again[-1] - 1
        assert all(
            "ctx" in frame.f_locals
            for name, frame in _torch.checkpoint_frames()
            if name != "unpack_hook"
        )
        return x.exp()

    output: Tensor = checkpoint(region, X.clone().requires_grad_(), **kind)  # type: ignore[no-untyped-call]
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert seen == names
    assert again == [False, True]


def test_the_number_of_a_backward() -> None:
    seen: list[int] = []
    x = X.clone().requires_grad_()
    x.register_hook(lambda _: seen.append(_torch.backward_number()))
    for _ in range(2):
        x.exp().sum().backward()  # type: ignore[no-untyped-call]
    assert _torch.backward_number() == -1
    assert -1 < seen[0] < seen[1]


def test_the_end_of_a_backward_is_told() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda _: _torch.at_end_of_backward(lambda: seen.append(x.grad)))
    (x * 2).sum().backward()
    assert len(seen) == 1
    assert seen[0] is x.grad  # which was there by then


def test_traces_are_told_and_so_is_their_comparison() -> None:
    seen: list[tuple[bool, bool]] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((_torch.is_jit_tracing(), _torch.is_jit_comparing()))
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Model(), X)  # type: ignore[no-untyped-call]
    assert seen[0] == (True, False)
    assert (False, True) in seen
    seen.clear()
    Model()(X)
    assert seen == [(False, False)]


@pytest.mark.parametrize("options", [{}, {"pre_dispatch": True}, {"tracing_mode": "symbolic"}])
def test_a_model_that_is_read_is_told(options: dict[str, Any]) -> None:
    seen: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(_torch.is_read())
        return x + 1

    make_fx(forward, **options)(X)
    forward(X)
    assert seen == [True, False]


def test_a_model_that_aot_autograd_reads_is_told() -> None:
    seen: list[bool] = []
    context = torch._guards.TracingContext(None)  # type: ignore[no-untyped-call]
    with torch._guards.tracing(context):
        seen.append(_torch.is_read())
    assert [*seen, _torch.is_read()] == [True, False]


# --- The compiler --------------------------------------------------------------------------------------


def marked_by_them(function: Any) -> Any:
    import torch._dynamo

    return torch._dynamo.assume_constant_result(function)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (_torch.as_constant, marked_by_them),
        (_torch.never_compiled("why"), partial(torch.compiler.disable, reason="why")),
    ],
)
def test_marks_are_those_of_the_compiler(
    ours: Callable[[Any], Any], theirs: Callable[[Any], Any]
) -> None:
    def one() -> None: ...

    def other() -> None: ...

    marks = {name for name in vars(theirs(one)) if "dynamo" in name}
    assert vars(ours(other)).keys() & marks, marks
    assert {vars(other)[name] for name in vars(other)} <= {True, "why"}


def test_the_stance_of_the_compiler_can_be_replaced() -> None:
    import torch._dynamo

    assert _torch.is_compiler_loaded()
    before, setter = _torch.stance(), _torch.stance_setter()
    assert setter is not None
    with torch.compiler.set_stance("force_eager"):
        assert _torch.stance().stance == "force_eager"
        assert _torch.stance() is not before
    assert setter(before).stance == before.stance
    assert _torch.stance() is before


def test_the_compiler_is_loaded_when_all_of_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert not _torch.is_compiler_loaded()
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    assert not _torch.is_compiler_loaded(), "somebody is importing it"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_operators_that_compile_themselves_say_so() -> None:
    seen: list[bool] = []

    @torch.compiler.assume_constant_result
    def ask() -> int:
        seen.append(_torch.compiles_itself())
        return 1

    torch.cond(X.sum() > 0, lambda x: x + ask(), lambda x: x - 1, (X.clone().requires_grad_(),))
    assert set(seen) == {True}
    assert not _torch.compiles_itself()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_what_the_compiler_is_reading_is_told() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    @_torch.as_constant
    def ask() -> int:
        seen.append(
            (_torch.is_in_body(), _torch.is_in_checkpoint(), _torch.transform_depth() is not None)
        )
        return 1

    def add(x: Tensor) -> Tensor:
        return x + ask()

    def branch(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, add, lambda x: x - 1, (x,))

    def region(x: Tensor) -> Any:
        return checkpoint(add, x, use_reentrant=False)

    expected = {
        add: {(False, False, False)},
        branch: {(True, False, False)},
        region: {(False, True, False)},
        torch.vmap(add): {(True, False, True), (False, False, True)},
    }
    for function, told in expected.items():
        compiled(function)(X)
        assert {*seen} <= told, function
        assert seen, function
        seen.clear()
    assert not _torch.is_in_body()
    torch.vmap(add)(X)
    assert seen == [(False, False, True)]


def compiled(function: Any, backend: Any = "eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def test_views_are_compared_in_code_that_is_compiled() -> None:
    def is_view(x: Tensor) -> Tensor:
        y = x + 1
        return x + (_torch.base_of(y.view(-1)) is y)

    assert _torch.base_of(X) is None
    assert _torch.base_of(X.view(-1)) is X
    assert torch.equal(compiled(is_view)(X), X + 1)


def test_graphs_are_counted_and_limited() -> None:
    function = compiled(lambda x, number: x + number)
    before = _torch.count_graphs()
    for number in (1, 1, 2):
        function(X, number)
    assert _torch.count_graphs() == before + 2
    for limit in _torch.LIMITS:
        with (
            _torch.compiler_config().patch({limit: 2}),
            pytest.raises(Exception, match=r"failure|limit") as info,
        ):
            function(X, 3)
        assert _torch.is_of_compiler(info.value)
    function(X, 3)  # and there is room again


def test_what_the_compiler_raises_is_told() -> None:
    with pytest.raises(Exception, match="graph_break") as info:
        compiled(torch._dynamo.graph_break)()
    assert _torch.is_of_compiler(info.value)
    assert not _torch.is_of_compiler(RuntimeError())


def test_what_torch_compile_returns_is_a_wrapper() -> None:
    model = nn.Linear(4, 4)
    assert _torch.is_compiled_wrapper(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    assert not _torch.is_compiled_wrapper(model)


def test_a_function_that_is_not_compiled_alone_is_compiled_as_part_of_others() -> None:
    def one(x: Tensor) -> Tensor:
        return x + 1

    def other(x: Tensor) -> Tensor:
        return x + 1

    @torch.compiler.disable(recursive=False)
    def between(function: Any, x: Tensor) -> Any:
        return function(x)

    def around(function: Any, x: Tensor) -> Any:
        return between(function, x)

    def alone(function: Any, x: Tensor) -> Any:
        return function(x)

    torch._dynamo.reset()  # which forgets the mark, of what it has compiled
    _torch.not_compiled_alone(other)
    for caller, function, graphs in ((around, one, 1), (around, other, 0), (alone, other, 1)):
        before = _torch.count_graphs()
        assert torch.equal(torch.compile(caller, backend="eager")(function, X), X + 1)
        assert _torch.count_graphs() == before + graphs


def test_hooks_on_tensors_are_compiled_where_that_is_said() -> None:
    def watched(x: Tensor) -> Tensor:
        y = x + 1
        y.register_hook(lambda grad: grad * 2)
        return y * 3

    x = X.clone().requires_grad_()
    if _torch.compiles_tensor_hooks():
        compiled(watched, "aot_eager")(x).sum().backward()
        assert x.grad is not None
        assert x.grad.unique().tolist() == [6]
    else:
        with pytest.raises(Exception) as info:  # noqa: PT011
            compiled(watched, "aot_eager")(x)
        assert _torch.is_of_compiler(info.value)


def test_compiled_code_is_found_on_the_stack() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen: list[tuple[str | None, bool]] = []

    def compiler(graph: Any, _: object) -> Any:
        def run(*args: Tensor) -> Any:
            frame = _torch.compiled_frame()
            name = None if frame is None else frame.f_code.co_name
            seen.append((name, _torch.is_recomputing_in_graph()))
            return graph(*args)

        return make_boxed_func(run)

    def double(x: Tensor) -> Tensor:
        return x.exp()

    function = compiled(double, aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    function(X.clone().requires_grad_()).sum().backward()
    assert seen[0] == ("double", False)
    assert [again for _, again in seen] == [False, True]
    assert _torch.compiled_frame() is None


def test_a_pass_of_our_own_runs_over_the_graphs_of_inductor_and_has_a_version() -> None:
    from torch._inductor import config

    assert hasattr(config, _torch.CHANGES_GRAPHS)
    seen: list[Any] = []
    one = _torch.own_pass(seen.append, "1")
    one("graph")
    assert (seen, one.uuid()) == (["graph"], "1")
