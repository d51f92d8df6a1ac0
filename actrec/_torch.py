"""Every private name of PyTorch, and of torchmetrics, that actrec uses, what it is for, and what happens in a version that lacks it.

No other module of actrec uses one, and ``tests/test_private_names.py`` notices when one of them changes what it does.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from types import FrameType
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from typing_extensions import override

F = TypeVar("F", bound="Callable[..., Any]")


def if_imported(module: str, name: str) -> Any:
    """The attribute ``name`` of ``module``; ``None`` if that has not been imported, or lacks the name."""
    return getattr(sys.modules.get(module), name, None)


# --- The memory of tensors -------------------------------------------------------------------------


def sharing() -> Callable[[Tensor], Tensor] | None:
    """The function that makes a tensor share the memory of another one, copy-on-write; ``None`` if it does not work.

    Without it every value is cloned.
    """
    share = getattr(Tensor, "_lazy_clone", None)
    try:
        original = torch.zeros(2, device="cpu")
        shared = share(original)  # type: ignore[misc]  # None raises, as below
        original.add_(1)
    except (TypeError, RuntimeError):
        return None
    return share if shared.tolist() == [0, 0] and original.tolist() == [1, 1] else None


lazy_clone: Final = sharing()

#: The address of a storage, without ending its sharing as ``data_ptr()`` does. Without it no memory counts as shared.
data_address: Callable[[Tensor], int] | None = getattr(torch._C, "_data_address", None)

#: How often a tensor was written in place. It is in the documentation of autograd, and has no other name.
version: Final[Callable[[Tensor], int]] = attrgetter("_version")


def rewinding(tensor: Tensor) -> Callable[[], object]:
    """A function that resets ``version`` of ``tensor`` to its value now. Without the name it does nothing, and a backward may fail."""
    kind: Any = getattr(torch.autograd, "_unsafe_preserve_version_counter", nullcontext)
    return partial(kind(tensor).__exit__, None, None, None)


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor whose memory a view shares, or ``None``. It is in the documentation of views, and has no other name."""
    return tensor._base


def sparse_parts(tensor: Tensor) -> list[Tensor]:
    """The indices and values of a COO tensor, which the public methods refuse to return before it is coalesced."""
    return [tensor._indices(), tensor._values()]


def shard_order(tensor: Tensor) -> list[list[int]]:
    """For each sharded dimension of a ``DTensor``, the dimensions of the mesh in the order in which they shard it.

    Only some versions have it; in the others, an order that is not that of the mesh has a placement of its own.
    """
    order = getattr(getattr(tensor, "_spec", None), "shard_order", None) or ()
    return [list(getattr(entry, "mesh_dims", ())) for entry in order]


# --- Modes -------------------------------------------------------------------------------------------


class PublicInferenceMode(ExitStack):
    """Turns inference mode on or off as long as this object exists; the public class has to be entered."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.enter_context(torch.inference_mode(mode))

    def __del__(self) -> None:
        self.close()


#: PyTorch's class for this, which takes a fraction of the time.
InferenceMode: Final[Any] = getattr(torch._C, "_InferenceMode", PublicInferenceMode)

# The stack of dispatch modes of this thread. Without it, it counts as empty.
count_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_dispatch_mode_at: Any = getattr(torch._C, "_get_dispatch_stack_at", None)
pop_dispatch_mode: Any = getattr(torch._C, "_pop_torch_dispatch_stack", None)
push_dispatch_mode: Any = getattr(torch._C, "_push_on_torch_dispatch_stack", None)

# The stack of function modes of this thread. Without it, functions inside modules cannot be recorded.
count_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
function_mode_at: Any = getattr(torch._C, "_get_function_stack_at", None)
pop_function_mode: Any = getattr(torch._C, "_pop_torch_function_stack", None)
push_function_mode: Any = getattr(torch._C, "_push_on_torch_function_stack", None)


def dispatch_modes() -> list[Any]:
    """The dispatch modes of this thread, from the outermost inwards."""
    return [_dispatch_mode_at(at) for at in range(count_dispatch_modes())]


def function_modes() -> list[Any]:
    """The function modes of this thread, from the outermost inwards."""
    return [function_mode_at(at) for at in range(count_function_modes())]


def is_of_pytorch(mode: object) -> bool:
    """Whether a mode is that of a default device, or one in which tensors represent others. Without their names, none is."""
    device = if_imported("torch.utils._device", "DeviceContext")
    is_device = device is not None and isinstance(mode, device)
    return is_device or getattr(mode, "_mode_key", None) is not None


_functorch = getattr(torch._C, "_functorch", None)

#: Whether a tensor represents many, or a step of a derivative, in a transform of ``torch.func``. Without it: never.
is_wrapped: Callable[[Tensor], bool] = getattr(
    _functorch, "is_functorch_wrapped_tensor", lambda _: False
)

#: How deep this thread is in transforms of ``torch.func``; ``None`` outside. Without it, functions in one raise ``CaptureError``.
transform_depth: Callable[[], int | None] = getattr(_functorch, "maybe_current_level", lambda: None)

#: Whether a tensor is a batch of gradients at once (``is_grads_batched=True``). Without it, no.
is_batch: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", lambda _: False)


# --- Modules -------------------------------------------------------------------------------------------

# The tables of a module, which documentation and other libraries use by these names.
children_of: Final[Callable[[nn.Module], dict[str, nn.Module | None]]] = attrgetter("_modules")
forward_hooks: Final[Callable[[nn.Module], dict[int, Any]]] = attrgetter("_forward_hooks")
forward_pre_hooks: Final[Callable[[nn.Module], dict[int, Any]]] = attrgetter("_forward_pre_hooks")


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The tables of the hooks that run after and before the forward of ``module``."""
    return forward_hooks(module), forward_pre_hooks(module)


def renumber(module: nn.Module, old: int, new: int) -> int:
    """Give a hook of ``module`` another number, in its table and in the tables of how hooks are called. Return the number."""
    for name, table in vars(module).items():
        if name.startswith("_forward") and "hooks" in name and old in table:
            is_first = next(iter(table)) == old
            table[new] = table.pop(old)
            if is_first:
                table.move_to_end(new, last=False)
    return new


#: How ``DataParallel`` makes a replica of a module: the name of a method. A version without it does not ask for one.
REPLICATE: Final = "_replicate_for_data_parallel"

#: The code that calls a module, by which its calls are found on Python's stack. Without it, none are.
CALL_CODE: Final = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)

#: The base of the dropout modules. Without it, a layer that was not called has one likely cause less.
DROPOUTS: Final[tuple[type, ...]] = tuple(
    filter(None, [getattr(nn.modules.dropout, "_DropoutNd", None)])
)

#: The classes that were registered with PyTorch's pytree. Without it, such objects are opaque.
PYTREE_NODES: Final[Mapping[type, Any]] = getattr(_pytree, "SUPPORTED_NODES", {})


def is_replica(module: nn.Module) -> bool:
    """Whether ``DataParallel`` made ``module``, to run in a thread of its own. Without the mark, its calls are passes."""
    return getattr(module, "_is_replica", False)


def is_export_guard(module: nn.Module) -> bool:
    """Whether ``module`` checks the inputs of an exported model. Without the name, queries select it too."""
    return type(module).__module__ == "torch.export._unlift"


# --- Functions -----------------------------------------------------------------------------------------


def schemas_of(function: Any) -> list[Any]:
    """The schemas of the operators of a function. Without them, arguments get the names of its documented parameters."""
    overload = getattr(function, "_schema", None)  # of one overload of torch.ops
    if overload is not None:
        return [overload]
    name, packet = getattr(function, "__name__", "__"), None
    if isinstance(function, torch._ops.OpOverloadPacket):
        packet = function
    elif not name.startswith("__"):  # those are of lists and dicts, too
        packet = getattr(torch.ops.aten, name, None)
    names: list[str] = [] if packet is None else packet.overloads()  # type: ignore[no-untyped-call]
    return [getattr(packet, name)._schema for name in names]


# --- The graph of autograd -------------------------------------------------------------------------

_creation: Any = getattr(torch._C._autograd, "_get_creation_meta", None)
_DEFAULT = getattr(getattr(torch._C._autograd, "CreationMeta", None), "DEFAULT", None)

#: The number of the next node that this thread makes.
next_number: Any = getattr(torch.autograd, "_get_sequence_nr", None)


def number_of(node: Any) -> int:
    """The number of a node: each thread counts those that it makes. Those of leaves are the highest."""
    number: int = node._sequence_nr()
    return number


def listen(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Register a hook on a tensor that is not a leaf. It cannot be removed, and this takes less time than ``register_hook()``.

    That also uses up one of the numbers by which actrec sees that a hook was registered on a module; this does not,
    unless the version lacks the names.
    """
    try:
        hooks: Any = tensor._backward_hooks
        if hooks is None:
            register = tensor.grad_fn._register_hook_dict  # type: ignore[union-attr]
            hooks = tensor._backward_hooks = OrderedDict()
            register(tensor)
        hooks[hook] = hook
    except AttributeError:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def is_writable_view(tensor: Tensor) -> bool:
    """Whether PyTorch allows writes to a view: not to one of several outputs of an operation. Without the name, yes."""
    return _creation is None or _creation(tensor) == _DEFAULT


def owners(base: Any) -> tuple[int, int]:
    """How many references there are to ``base`` from Python, and from anywhere."""
    return sys.getrefcount(base) - _references(_PROBE) + _USUAL, base._use_count()


def _references(thing: object) -> int:
    return sys.getrefcount(thing)


#: After a limit of the compiler was reached with ``fullgraph=True``, a call of a function holds one more reference to its
#: arguments. So the references that a call holds are counted with an object that nothing else refers to.
_PROBE: Final = object()
_USUAL: Final = _references(_PROBE)


def owners_of_one_view() -> tuple[int, int]:
    """Return :func:`owners` of a base that is referred to by one view, and by a variable of the caller.

    Where this version lacks one of the names, return ``(0, 0)``: no base has so few, so each counts as used elsewhere.
    """
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            view = torch.ones(2, device="cpu", requires_grad=True).exp().view(1, 2)
            base = base_of(view)
            known = _creation(view) == _DEFAULT and next_number() == number_of(view.grad_fn) + 1
            return owners(base) if known else (0, 0)
    except (AttributeError, TypeError):
        return 0, 0


# --- What this thread is doing -----------------------------------------------------------------------


def frames() -> Iterator[FrameType]:
    """The frames of this thread, from that of the caller outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _frames_in(module: str) -> Iterator[FrameType]:
    """Those of them that run the code of a module; none if that has not been imported."""
    file = if_imported(module, "__file__")
    return (frame for frame in frames() if frame.f_code.co_filename == file)


def checkpoint_frames() -> Iterator[tuple[str, FrameType]]:
    """The frames of activation checkpointing in this thread, from the inside out, each with the name of its function.

    ``"forward"`` runs a region of reentrant checkpointing for the first time, ``"backward"`` again; the
    variable ``ctx`` in them is the region's. ``"unpack_hook"`` runs a non-reentrant region again.
    """
    for frame in _frames_in("torch.utils.checkpoint"):
        name = frame.f_code.co_name
        if name in {"forward", "backward", "unpack_hook"}:
            yield name, frame


def is_recomputing() -> bool:
    """Whether activation checkpointing is running calls of this thread again."""
    return any(name != "forward" for name, _ in checkpoint_frames())


def recomputing_number() -> int:
    """A substitute for the number of the running backward: -1 unless a checkpoint is being recomputed."""
    return 0 if is_recomputing() else -1


#: The number of the backward that this thread is running, or -1.
backward_number: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", recomputing_number)


def at_end_of_backward(function: Callable[[], object]) -> None:
    """Call ``function`` when the running backward has ended; at once, where PyTorch does not say when that is."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    queue = getattr(engine, "queue_callback", None)
    if queue is None:
        function()
    else:
        queue(function)


#: Whether ``torch.jit.trace`` is running in this thread; the public name asks the same, a little slower.
is_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]


def is_jit_comparing() -> bool:
    """Whether ``torch.jit.trace`` is comparing its trace with the model in this thread, which it does after the trace."""
    return any(frame.f_code.co_name == "_check_trace" for frame in _frames_in("torch.jit._trace"))


#: The modes in which PyTorch reads a model, each with its module, which is imported by then.
_READING = (
    ("torch.fx.experimental.proxy_tensor", "ProxyTorchDispatchMode"),
    ("torch.fx.experimental.proxy_tensor", "PreDispatchTorchFunctionMode"),
    ("torch._subclasses.functional_tensor", "FunctionalTensorMode"),
)


def is_read() -> bool:
    """Whether ``make_fx``, AOT autograd or ``torch.export`` is reading what runs in this thread."""
    context = if_imported("torch._guards", "TracingContext")
    if context is not None and context.try_get() is not None:
        return True
    kinds = tuple(
        kind for module, name in _READING if (kind := if_imported(module, name)) is not None
    )
    return any(isinstance(mode, kinds) for mode in dispatch_modes() + function_modes())


# --- The compiler --------------------------------------------------------------------------------------


def compiles_itself() -> bool:
    """Whether an operator of PyTorch that compiles itself is doing so in this thread. Without it, never."""
    asked = if_imported("torch._higher_order_ops.utils", "_in_hop_compile")
    return asked is not None and asked()


def is_exporting() -> bool:
    """Whether the compiler is exporting a model. Without the name, which torch 2.6 lacks, that is not known."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def is_compiler_loaded() -> bool:
    """Whether all of the compiler has been imported. This does not wait for another thread that is importing it."""
    return "torch._dynamo" in sys.modules and if_imported("torch._dynamo", "set_stance") is not None


def stance() -> Any:
    """The stance of the compiler, which is loaded: it reads this before it runs anything that is compiled."""
    return if_imported("torch._dynamo.eval_frame", "_stance")


def stance_setter() -> Callable[[Any], Any] | None:
    """The function that sets the stance. The public one accepts only fixed stances, and its end undoes what the user has set since."""
    setter: Callable[[Any], Any] | None = if_imported("torch._dynamo.eval_frame", "_set_stance")
    return setter


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile(model)`` returns. Without the name, always false."""
    kind = if_imported("torch._dynamo.eval_frame", "OptimizedModule")
    return kind is not None and isinstance(module, kind)


def not_compiled_alone(*functions: Any) -> None:
    """Keep the compiler from compiling ``functions``, and what they call, by themselves; as a part of other code it may."""
    from torch._C._dynamo import eval_frame  # noqa: PLC0415
    from torch._dynamo import types  # noqa: PLC0415  # which takes a second, where it has not been imported

    action: Any = types.FrameAction  # type: ignore[attr-defined]
    strategy: Any = types.FrameExecStrategy  # type: ignore[attr-defined]
    for function in functions:
        eval_frame.set_code_exec_strategy(function.__code__, strategy(action.SKIP, action.SKIP))


def is_of_compiler(error: BaseException) -> bool:
    """Whether ``error`` was raised by the compiler. Without the names, it was not."""
    kinds = [if_imported("torch._dynamo.exc", name) for name in _OF_COMPILER]
    return isinstance(error, tuple(kind for kind in kinds if kind is not None))


_OF_COMPILER: Final = ("TorchDynamoException", "FailOnRecompileLimitHit")


def compiles_tensor_hooks() -> bool:
    """Whether ``Tensor.register_hook()`` can be compiled. If not, gradients are not recorded in compiled code."""
    return find_spec("torch._higher_order_ops.register_hook") is not None


def compiled_frame() -> FrameType | None:
    """The frame whose compiled code has called the code that runs. Without the names, ``None``."""
    other = if_imported("torch._compile", "__file__")
    callers = (frame.f_back for frame in _frames_in("torch._dynamo.eval_frame"))
    return next((one for one in callers if one and one.f_code.co_filename != other), None)


def is_recomputing_in_graph() -> bool:
    """Whether the compiled code that has called the code that runs is that of a backward. Without the name, always false."""
    found = _frames_in("torch._functorch._aot_autograd.runtime_wrappers")
    return any("backward" in frame.f_code.co_name for frame in found)


def _bodies() -> Iterator[tuple[str, str]]:
    """How the compiler reads the bodies of operators such as ``torch.cond``, and which ones. Without the names, nothing."""
    for frame in _frames_in("torch._dynamo.variables.higher_order_ops"):
        name = frame.f_code.co_name
        if name.startswith("speculate_subgraph"):
            yield name, str(frame.f_locals.get("description"))


def is_in_body() -> bool:
    """Whether the compiler is reading the body of an operator, such as ``torch.cond``, that compiles it separately."""
    return any(how == "speculate_subgraph" and "checkpoint" not in what for how, what in _bodies())


def is_in_checkpoint() -> bool:
    """Whether the compiler is reading code that activation checkpointing will run again."""
    return any("checkpoint" in what for _, what in _bodies())


def count_graphs() -> int:
    """How many graphs were compiled in this process."""
    counters = if_imported("torch._dynamo.utils", "counters")
    return int(counters["stats"]["unique_graphs"])


#: The limits of how often a piece of code is compiled: settings of ``torch._dynamo.config``.
LIMITS: Final = ("recompile_limit", "accumulated_recompile_limit")


def compiler_config() -> Any:
    """The settings of the compiler, which is loaded."""
    return if_imported("torch._dynamo", "config")


#: The setting of Inductor for a pass of the user's over its graphs.
CHANGES_GRAPHS: Final = "post_grad_custom_post_pass"


def own_pass(function: Callable[[Any], None], version: str) -> Any:
    """Return a pass that runs ``function``; ``version`` is part of the keys of Inductor's caches."""
    from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: PLC0415

    class Pass(CustomGraphPass):
        @override
        def __call__(self, graph: Any) -> None:
            function(graph)

        @override
        def uuid(self) -> str:
            return version

    return Pass()


def writes(operator: Any) -> bool:
    """Whether an operator in a graph writes to one of its arguments."""
    return isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable


#: Where a node of a graph has what it is called with in eager mode, whose strides Inductor gives to what it is called with.
EAGER_VALUES: Final = "eager_input_vals"


def inductor_config() -> Any:
    """The settings of Inductor; ``None`` where it was not imported with the compiler."""
    return if_imported("torch._inductor", "config")


def as_constant(function: F) -> F:
    """Mark a function that the compiler calls while it reads a model, as ``torch._dynamo.assume_constant_result`` does."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_compiled(reason: str) -> Callable[[F], F]:
    """Mark a function as ``torch.compiler.disable()`` does, which would import the compiler."""

    def mark(function: F) -> F:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark


#: The private operators with which ``torch.distributions`` draws random numbers.
PRIVATE_DRAWS: Final = frozenset({"_standard_gamma", "_sample_dirichlet"})


# --- Metrics of torchmetrics ---------------------------------------------------------------------------


def reductions_of(metric: Any) -> dict[str, str | None]:
    """The name of the function that merges each state of a metric. Without it, its ``merge_state()`` is trusted."""
    found = getattr(metric, "_reductions", {})
    return {name: getattr(how, "__name__", None) for name, how in found.items()}


def count_an_update(metric: Any) -> None:
    """Count an update of a metric that was merged from others, which else warns that it is empty. Without the name, it does not."""
    if getattr(metric, "_update_count", None) == 0:
        metric._update_count = 1
