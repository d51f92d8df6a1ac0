"""The hook: PyTorch calls it at each call of a module, and it reports the call to its target.

A hook refers weakly to its target, so that dropping a recorder drops what it recorded. In a
copy of the model, or pickled with it, a hook is an inert function. It always returns ``None``: anything
else would replace the layer's output. ``placing.py`` registers and removes all hooks of a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from enum import Enum, auto
from functools import partial
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling  # a constant in what the compiler reads
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from actrec._torch import as_constant, hook_tables, never_compiled

from .forwards import when_copied


class Target(Protocol):
    """The object that a hook reports to."""

    def met_by_compiler(self) -> bool:
        """The compiler reads a hook: note it, and return whether the hook has to run, uncompiled."""


T = TypeVar("T", bound=Target)


class Event(Enum):
    """What a hook reports, in the order in which PyTorch runs the hooks of a call."""

    ENTER = auto()  #: the start of a call that may begin a pass
    RECEIVE = auto()  #: the arguments of a layer's call
    RETURN = auto()  #: the output of a layer's call
    LEAVE = auto()  #: the end of a call that may end a pass, also by an exception
    STOP = auto()  #: that all other hooks on a layer's call have run


#: Takes the place of a hook in a copy of the model: does nothing, and can be unpickled without actrec.
_INERT: Callable[..., None] = nullcontext().__exit__


def _no_module() -> None:
    """Return ``None``, the module of a hook that is not registered yet."""


class Hook(Generic[T]):
    """Reports each call of a module to ``target``, if that still exists, by calling ``hear``.

    ``hear(target, hook, module, args, kwargs, output)``; before the call, ``output`` is ``None``.
    """

    __slots__ = ("_handle", "_hear", "_target", "checked_at", "event", "module")

    def __init__(self, event: Event, target: T, hear: Callable[..., object]) -> None:
        self.event = event
        #: The module that it is on.
        self.module: Callable[[], nn.Module | None] = _no_module
        #: ``RemovableHandle.next_id`` when it was last checked that no hook of others comes after this one; while it
        #: is the same, no hook was registered since.
        self.checked_at = -1
        self._target: weakref.ref[T] = weakref.ref(target)
        self._hear = hear
        self._handle: RemovableHandle | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, output: Any = None
    ) -> None:
        # If the block is left during a call, torch calls the hooks that it took off once more, without the kwargs.
        if is_dynamo_compiling():
            if self._runs():
                _uncompiled(self, module, args, kwargs, output)
            return
        target = self._target()
        if target is not None:
            self._hear(target, self, module, args, kwargs, output)

    @as_constant
    def _runs(self) -> bool:
        """Answer the compiler, which asks while it reads the hook, and compiles the answer in as a constant."""
        target = self._target()
        return target is not None and target.met_by_compiler()

    def register(self, module: nn.Module) -> RemovableHandle:
        """Register this hook on ``module``."""
        self.module = weakref.ref(module)
        first, last = self.event is Event.ENTER, self.event is Event.LEAVE
        if first or self.event is Event.RECEIVE:
            handle = module.register_forward_pre_hook(self, prepend=first, with_kwargs=True)
        else:
            handle = module.register_forward_hook(self, with_kwargs=True, always_call=last)
        self._handle = handle
        return handle

    def remove(self, module: nn.Module) -> None:
        """Remove this hook from ``module``, also where other code has replaced the table that its handle refers to."""
        try:
            if self._handle is not None:  # else registering it was interrupted
                self._handle.remove()
        finally:
            delete(module, self)

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # For copy() and pickle.
        return getattr, (nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[Any, Any]) -> Callable[..., None]:
        copied = memo.get(id(self.module()))
        if copied is not None:
            when_copied(memo, partial(delete, copied, _INERT))
        return _INERT

    @property
    def __name__(self) -> NoReturn:
        # torch.jit.script reads the name of every hook before it compiles it.
        message = (
            "torch.jit.script() compiles the hooks of a model, and this one belongs to a record() block that is open. "
            "Script the model before the block or after it"
        )
        raise AttributeError(message)


def delete(module: nn.Module, hook: object) -> None:
    """Delete ``hook`` wherever the module has it; a handle does not reach a table that other code has replaced."""
    # Of copies, made in one step: other threads place and remove hooks too.
    tables = [[*table.items()] for table in hook_tables(module) if table]
    for key in [key for table in tables for key, found in table if found is hook]:
        # PyTorch keeps in further tables how a hook is called.
        for one in vars(module).values():
            if isinstance(one, dict):
                one.pop(key, None)


# --- What the compiler reads in the place of a hook ------------------------------------------------------


@never_compiled(
    "actrec records a layer in it, and the compiler was imported only inside the block. Call it once more, or import "
    "torch._dynamo before the block"
)
def _uncompiled(hook: Any, *args: Any) -> None:
    torch.compiler.disable(hook.__call__)(*args)  # type: ignore[no-untyped-call]
