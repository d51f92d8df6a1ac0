"""The replacement of a module's ``forward`` while a block is open that ends it early or records its functions."""

from __future__ import annotations

import copy
import os
import threading
import types
import weakref
from collections.abc import Callable
from functools import partial, update_wrapper
from itertools import dropwhile, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Protocol

from torch import nn
from typing_extensions import override

from actrec._torch import CALL_CODE, frames

#: The folder that the files of actrec are in.
_PACKAGE: Final = f"{Path(__file__).parents[1]}{os.sep}"


def is_ours(frame: types.FrameType) -> bool:
    """Whether the code of a frame is actrec's, examples in its docstrings excepted."""
    return frame.f_code.co_filename.startswith(_PACKAGE)


#: A module has one ``forward``, and blocks of several threads may be about to change it.
placing = threading.RLock()


class Runner(Protocol):
    """Runs a forward."""

    def run(self, stood_for: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the forward returns."""


class Forward:
    """Replaces the ``forward`` of a module, and lets ``runner`` run the original one.

    It refers weakly to the runner: once that is gone, it just calls the original forward.
    """

    forward: Callable[..., Any]
    own: Any  # what was set on the module itself, normally nothing

    def __init__(self, module: nn.Module, runner: Runner) -> None:
        self.module = module
        self._runner: Callable[[], Runner | None] = weakref.ref(runner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runner = self._runner()
        if runner is None:
            return self.forward(*args, **kwargs)
        return runner.run(self, args, kwargs)

    def called(self) -> nn.Module:
        """Return the module whose forward is about to run: this one, or a replica of it that ``DataParallel`` has made."""
        # A module with hooks calls its forward from a function inside the usual one: two frames.
        for caller in islice(dropwhile(is_ours, frames()), 2):
            if caller.f_code is CALL_CODE:
                found: nn.Module = caller.f_locals["self"]
                if self._is_part_of(vars(found).get("forward")):
                    return found
        return self.module

    def _is_part_of(self, forward: object) -> bool:
        """Whether ``forward`` is this, or replaces it: a replica has the attributes of the module it was made from."""
        while isinstance(forward, Forward):
            if forward is self:
                return True
            forward = forward.own
        return False

    def forward_of(self, module: nn.Module) -> Callable[..., Any]:
        """Return the original forward of the module, or of a replica of it."""
        replicated = module is not self.module and self.own is None
        return types.MethodType(type(self.module).forward, module) if replicated else self.forward

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # In a pickle of the model, the original forward, loadable without actrec.
        if self.own is None:
            return getattr, (self.module, "forward")
        return itemgetter(0), ((self.own,),)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        """In a copy of the model there is no replacement. Until the copy is complete, it has its class's forward here."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        copied = copy.deepcopy(self.module, memo)  # in the memo: its copying has begun
        forward = types.MethodType(type(copied).forward, copied)
        when_copied(memo, partial(vars(copied).pop, "forward", None))
        return forward

    def place(self) -> None:
        """Put it on the module."""
        with placing:
            self.forward = self.module.forward
            self.own = vars(self.module).get("forward")
            update_wrapper(self, self.forward, updated=())
            vars(self.module)["forward"] = self
            State.hold(self.module)

    def remove(self) -> None:
        """Remove this forward again, unless other code has replaced it meanwhile."""
        self._runner = _nothing
        with placing:
            take_off(self.module, self, self.own)
            State.release(self.module)


# --- What blocks put in the place of a forward ---------------------------------------------------------------

#: What was set on their modules themselves, before the functions of :mod:`.in_graph.mark` were.
own_of_marks: Final[weakref.WeakKeyDictionary[Any, Any]] = weakref.WeakKeyDictionary()


def _is_mark(forward: Any) -> bool:
    function = getattr(forward, "__func__", None)
    return function is not None and function in own_of_marks


def _below(forward: Any) -> Any:
    """Return what ``forward`` has replaced on its module; ``None`` also if it is not of a block."""
    if isinstance(forward, Forward):
        return forward.own
    return own_of_marks[forward.__func__] if _is_mark(forward) else None


def take_off(module: nn.Module, forward: Any, own: Any) -> None:
    """Take ``forward``, which had replaced ``own``, off a module. What blocks have placed above it, has replaced ``own`` from now on."""
    attributes = vars(module)
    above: Any = attributes.get("forward")
    if above is forward:
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own
        return
    while above is not None and _below(above) is not forward:
        above = _below(above)
    if isinstance(above, Forward):
        above.own = own
    elif above is not None:
        own_of_marks[above.__func__] = own


def own_forward(forward: Any) -> Any:
    """Return ``forward``, or what it has replaced, if it is of a block."""
    while isinstance(forward, Forward) or _is_mark(forward):
        forward = _below(forward)
    return forward


class State:
    """A method of a module that makes its state, for a copy or a pickle: without what blocks have put there."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._blocks = 0  # that need it

    @staticmethod
    def hold(module: nn.Module, name: str = "__getstate__") -> None:
        """Let the method of a module be a state as long as the block needs it."""
        state = vars(module).setdefault(name, State(module, name))
        if isinstance(state, State):
            state._blocks += 1

    @staticmethod
    def release(module: nn.Module, name: str = "__getstate__") -> None:
        """A block needs it no longer."""
        state = vars(module).get(name)
        if isinstance(state, State):
            state._blocks -= 1
            if not state._blocks:
                del vars(module)[name]

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # Where a class pickles the attributes itself: what the module has without this.
        return getattr, (self._module, self._name)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        copied = copy.deepcopy(self._module, memo)  # in the memo: its copying has begun
        when_copied(memo, partial(vars(copied).pop, self._name, None))
        return self

    def __call__(self) -> Any:
        found = getattr(type(self._module), self._name)(self._module)
        is_module = isinstance(found, type(self._module))  # a replica
        state = vars(found) if is_module else found
        if not isinstance(state, dict):  # the class has a state of its own kind
            return found
        kept = {name: value for name, value in state.items() if not isinstance(value, State)}
        own = own_forward(kept.pop("forward", None))
        if own is not None:
            kept["forward"] = own
        if not is_module:
            return kept
        vars(found).clear()
        vars(found).update(kept)
        return found


def _nothing() -> None:
    """Return ``None``, as a weak reference to a dropped object does."""


class _WhenCopied(list[Any]):
    """Functions to be called when the memo of a ``deepcopy`` is dropped, that is, when the copy is complete."""

    def __del__(self) -> None:
        for undo in self:
            undo()


def when_copied(memo: dict[Any, Any], undo: Callable[[], object]) -> None:
    """Call ``undo`` when the copy that is being made with ``memo`` is complete."""
    memo.setdefault(_WhenCopied, _WhenCopied()).append(undo)
