"""The hook in compiled code: the compiler puts a call of actrec's operator in its place, which calls the hook at run time.

Code that is not compiled calls the hook as usual.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling  # a constant in what the compiler reads
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from actrec._calls.gradients import AGAIN
from actrec._calls.hooks import Event, Hook, T
from actrec._recordings.in_memory import ListLayer
from actrec._torch import (
    as_constant,
    base_of,
    hook_tables,
    is_exporting,
    is_in_body,
    is_in_checkpoint,
    renumber,
    transform_depth,
)
from actrec.errors import CaptureError

from .operator import TOKEN, key_to, tell, tell_gradient, tell_watched
from .outline import ALONE, NOTHING, encode

#: The modules that the compiler has seen in the body of an operator such as ``torch.cond``.
_in_bodies: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()


class HookInGraph(Hook[T]):
    """A hook that compiled code calls, by the operator."""

    __slots__ = ("__weakref__", "key", "late", "watches")

    def __init__(self, event: Event, target: T, hear: Callable[..., object]) -> None:
        super().__init__(event, target, hear)
        self.watches = event is Event.RETURN and getattr(target, "grads", None) is not None
        has_value = event is Event.RETURN or event is Event.RECEIVE
        #: Whether it may be told when the compiled code has gone on.
        self.late = not has_value or _keeps_all(target)

    @property
    def kind(self) -> tuple[Event, bool, bool]:
        """What determines the code that is compiled in its place."""
        return self.event, self.watches, self.late

    @override
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, output: Any = None
    ) -> None:
        if is_dynamo_compiling():
            if self._runs():
                _tell(self, args, kwargs, output)
            return
        target = self._target()
        if target is not None:
            self._hear(target, self, module, args, kwargs, output)

    @override
    @as_constant
    def _runs(self) -> bool:
        if is_exporting():
            return False
        if transform_depth() is not None:
            raise CaptureError(_TRANSFORM)
        if is_in_body():
            self.is_in_body()
            return False
        if self.watches and torch.is_grad_enabled() and is_in_checkpoint() and self.is_recorded():
            raise CaptureError(_CHECKPOINT)
        return True

    def hear(self, value: Any) -> None:
        """Compiled code has called the module; ``value`` is the output, or the arguments."""
        target, module = self._target(), self.module()
        if target is None or module is None:
            return
        # Compiled code runs the hooks of others in the order in which the compiler found them.
        self.checked_at = RemovableHandle.next_id
        if self.event is Event.ENTER:
            with target.passes.in_graph():  # type: ignore[attr-defined]  # of a session
                self._hear(target, self, module, (), None, None)
        elif self.event is Event.RECEIVE:
            self._hear(target, self, module, *value, None)
        else:
            self._hear(target, self, module, (), None, value)

    def is_recorded(self) -> bool:
        """Whether its calls are recorded now."""
        target = self._target()
        return target is not None and target.session.recording  # type: ignore[attr-defined]  # of a track

    def is_in_body(self) -> None:
        """Count a call in the body of an operator such as ``torch.cond``: compiled code does not report it."""
        target, module = self._target(), self.module()
        if target is not None and module is not None and self.event is Event.RETURN:
            target.compiled += 1  # type: ignore[attr-defined]  # of a track
            _in_bodies.add(module)

    @override
    def register(self, module: nn.Module) -> RemovableHandle:
        """Register this hook on ``module`` under the same number each time: code was compiled for that number."""
        handle = super().register(module)
        if module in _in_bodies:
            self.is_in_body()
        used = {number for table in hook_tables(module) for number in [*table]}
        # No other hook has a number below zero.
        numbers = (-self.event.value - depth * len(Event) for depth in itertools.count())
        handle.id = renumber(module, handle.id, next(n for n in numbers if n not in used))
        self.key = key_to(self, module, handle.id)
        return handle


def _keeps_all(track: Any) -> bool:
    """Whether all values of a layer are kept as they are, in lists: then it takes no more memory to tell it later."""
    kept = [(track.outputs, track.capture)]
    kept += [] if track.inputs is None else [(track.inputs.calls, track.inputs.capture)]
    return all(type(layer) is ListLayer and how.is_twin for layer, how in kept)


# --- What the compiler reads -----------------------------------------------------------------------------


_CHECKPOINT = f"record(compiled=True, grads=...): a layer is called inside a checkpoint() that is compiled. There {AGAIN}"
_TRANSFORM = (
    "record(compiled=True): a layer is called inside torch.func (vmap, grad, jvp) in a function that is compiled, where a tensor "
    "represents many and cannot be kept. Record a call of the model outside of it"
)


def _tell(hook: HookInGraph[Any], args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
    """Call the operator."""
    if hook.watches and torch.is_grad_enabled():
        _tell_watched(hook, output)
        return
    is_return, is_receive = hook.event is Event.RETURN, hook.event is Event.RECEIVE
    if is_return and type(output) is Tensor:  # most often, and the compiler reads this faster
        tell([output], [], ALONE, [hook.key], hook.late, TOKEN)
    elif is_return or is_receive:
        tensors: list[Tensor] = []
        numbers: list[int] = []
        outline = encode(output if is_return else (args, kwargs), tensors, numbers)
        tell(tensors, numbers, outline, [hook.key], hook.late, TOKEN)
    else:
        tell([], [], NOTHING, [hook.key], hook.late, TOKEN)


def _tell_watched(hook: HookInGraph[Any], output: Any) -> None:
    """Call the operator, and place a hook on each tensor that a gradient may reach."""
    tensors: list[Tensor] = []
    numbers: list[int] = []
    outline = encode(output, tensors, numbers)
    watched = [at for at, tensor in enumerate(tensors) if tensor.requires_grad]
    if not watched:
        tell(tensors, numbers, outline, [hook.key], hook.late, TOKEN)
        return
    leaves = [at for at in watched if tensors[at].is_leaf]
    bases = [base_of(tensor) for tensor in tensors]
    # If there are several views of one tensor, such as its chunks, PyTorch refuses writes to them.
    views = [at for at in watched if _count(bases, bases[at]) == 1]
    ticket = tell_watched(tensors, numbers, outline, len(leaves) > 0, views, hook.key, TOKEN)
    for at in watched:
        if at not in leaves:
            _watch(tensors[at], ticket, at)


def _count(bases: list[Tensor | None], one: Tensor | None) -> int:
    """Count the views of ``one``."""
    return 0 if one is None else len([base for base in bases if base is one])


def _watch(tensor: Tensor, ticket: Tensor, at: int) -> None:
    def arrives(grad: Tensor) -> Any:
        return tell_gradient(grad, ticket, at)

    tensor.register_hook(arrives)  # type: ignore[no-untyped-call]
