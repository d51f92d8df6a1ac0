"""The ``TorchFunctionMode`` that sees the functions that a module's forward calls, and the code that pushes and pops it.

The ``forward`` of each module whose functions are recorded (an :class:`Owner`) is run by a :class:`Watcher`, and that of
each module below it by an :class:`Aside`. They set whose functions are called now, and push and pop the :class:`_Mode` of
the thread, in a ``finally``: hooks would not run after a ``KeyboardInterrupt``. While the forward of a module below the
owner runs, the mode is popped; if a mode of the model's own lies above it, it stays on the stack and records nothing.

Whether a function is recorded is decided at its first call: after that, one that is not costs no more than calling the mode.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from actrec._selection.functions import FunctionQuery, Owner, canonical
from actrec._selection.selection import Choice
from actrec._selection.treatment import Treatment, What
from actrec._torch import (
    CALL_CODE,
    count_function_modes,
    function_mode_at,
    function_modes,
    pop_function_mode,
    push_function_mode,
    transform_depth,
)
from actrec._values.modes import UNCONCERNED
from actrec._values.spec import tensors

from .forwards import Forward, is_ours
from .own_calls import Unrecorded, is_symbolic, is_tracing
from .session import Session
from .track import Track

#: Makes the track of a chosen function, and what makes its layers part of the recording.
Make = Callable[[Choice], tuple[Track, Callable[[], None]]]

_ATTRIBUTE: Final = ("__get__", "__set__", "__delete__")
#: In evaluation they compute everything in one fused function, unless a mode is on: it would change the last bits.
_FUSED: Final = (nn.MultiheadAttention, nn.TransformerEncoder)


def name_of(function: Any) -> str:
    """Return the name of a function of PyTorch, without the decoration of an operator, an attribute or an overload."""
    name: str = getattr(function, "__name__", type(function).__name__)
    if name in _ATTRIBUTE:
        name = function.__self__.__name__
    return canonical(name.partition(".")[0])


def stop_key(owner: Owner) -> str:
    """Return the key of an owner among the layers that have to run before a forward is ended early."""
    return f"{owner.key}:"


@dataclass(eq=False, slots=True)
class Function:
    """The functions with one name that one module calls, and their track, if they are recorded."""

    is_named: bool  # by a query: then it is an error if it cannot be recorded
    is_set: bool  # it returns nothing: its value is the tensor that it has written to
    calls: int = 0  # if it is recorded, all; if not, only the first call of each function
    track: Track | None = None
    publish: Callable[[], None] | None = None  # until a call has returned a tensor


class _Mode(TorchFunctionMode):
    """PyTorch calls this for every function that the forward of an owner calls, in one thread."""

    watcher: Watcher | None = None  # whose functions are called now
    is_on = False  # whether it is on the stack of this thread

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        watcher = self.watcher
        if watcher is not None:
            function = watcher.by_function.get(func)
            is_new = function is None or function.track is not None
            if is_new and not (is_dynamo_compiling() or _is_nobodys()):
                function = function or watcher.function(func)
                track = function.track
                if track is not None and (function.is_named or transform_depth() is None):
                    # All in this one frame: the mode of another block looks at the frames that call the function.
                    kwargs = kwargs or {}
                    function.calls += 1
                    received = None if track.inputs is None else track.takes(func, args, kwargs)
                    result = func(*args, **kwargs)
                    returned = args[0] if function.is_set else result
                    if type(returned) is Tensor or tensors(returned):
                        try:
                            track.gives(watcher.owner.module, returned, received)
                        finally:
                            if function.publish is not None and track.called:
                                watcher.publish(function)
                    return result
                if track is not None:
                    result = func(*args, **(kwargs or {}))
                    track.unrecorded[Unrecorded.TRANSFORMED] += bool(tensors(result))
                    return result
        return func(*args, **kwargs) if kwargs else func(*args)

    # --- The stack of this thread ---------------------------------------------------------------------------

    def is_last(self) -> bool:
        """Whether it is on top of the stack: PyTorch calls it first."""
        many = count_function_modes()
        return many > 0 and function_mode_at(many - 1) is self

    def take_off(self) -> None:
        """Take it off the stack, wherever it is there, if it is."""
        above = []
        while any(mode is self for mode in function_modes()):
            above.append(pop_function_mode())
        for mode in reversed(above[:-1]):  # the model has left them there
            push_function_mode(mode)
        self.is_on = False


UNCONCERNED.add(_Mode)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = _Mode()


# --- Running forwards ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Aside:
    """Runs the forward of a module below an owner, whose functions are not recorded. A block has one, which its watchers share."""

    session: Session
    make: Make
    lock: threading.RLock = field(default_factory=threading.RLock)
    thread: _Thread = field(default_factory=_Thread)

    def run(self, stood_for: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward. Whatever ends it, the mode of this thread is as it was."""
        if is_dynamo_compiling():
            return stood_for.forward(*args, **kwargs)
        forward = stood_for.forward
        if self.session.has_replicas:
            forward = stood_for.forward_of(stood_for.called())
        mode = self.thread.mode
        before = mode.watcher
        if before is None:
            return forward(*args, **kwargs)
        mode.watcher = None
        is_last = mode.is_last()
        if is_last:  # below a mode of the model's own, it stays on the stack
            pop_function_mode()
            mode.is_on = False
        try:
            return forward(*args, **kwargs)
        finally:
            if is_last:
                mode.is_on = True
                push_function_mode(mode)
            mode.watcher = before


class Watcher:
    """Runs the forward of an owner, and records the functions that it calls."""

    def __init__(self, aside: Aside, owner: Owner, queries: Iterable[FunctionQuery]) -> None:
        self.owner = owner
        # A query that spells a function out takes precedence.
        self.queries = sorted(queries, key=lambda query: not query.is_spelled_out)
        self._aside = aside
        self.unrecorded: Counter[Unrecorded] = Counter()
        self.ran = 0
        self.fused = 0  # how often it ran without the mode, to stay fused
        self.by_name: dict[str, Function] = {}
        self.by_function: dict[Any, Function] = {}

    # --- Running it -----------------------------------------------------------------------------------------

    def run(self, stood_for: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward. Whatever ends it, the mode of this thread is as it was."""
        if is_dynamo_compiling():
            return stood_for.forward(*args, **kwargs)
        session = self._aside.session
        mode = self._aside.thread.mode
        before = mode.watcher
        if not self._is_heard((*args, *kwargs.values()), inside=before is not None):
            return self._aside.run(stood_for, args, kwargs)
        module, forward = self.owner.module, stood_for.forward
        if session.has_replicas:
            module = stood_for.called()
            forward = stood_for.forward_of(module)
        is_first = not mode.is_on
        begins, result = False, None
        try:
            try:
                # If the owner is called by itself, its call is a pass.
                begins = not session.passes.running and session.enter(module, is_root=False)
                mode.watcher = self
                if is_first:
                    mode.is_on = True  # before the push: if that is interrupted, take_off() runs
                    push_function_mode(mode)
                result = forward(*args, **kwargs)
            finally:
                mode.watcher = before
                if is_first and mode.is_last():
                    pop_function_mode()
                    mode.is_on = False
        finally:
            mode.watcher = before
            if is_first and mode.is_on:  # interrupted, or the model has left modes of its own above
                mode.take_off()
            if begins:
                session.leave(None, module, None, None, result)
        if session.stop is not None:
            session.stop.ran(stop_key(self.owner))
        return result

    def _is_heard(self, given: tuple[Any, ...], *, inside: bool) -> bool:
        """Whether this call of the forward is recorded. ``inside`` another owner, tracing was checked already."""
        session = self._aside.session
        self.ran += 1
        if not session.listens():
            self.unrecorded[Unrecorded.PAUSED] += session.pauses > 0
            return False
        module = self.owner.module
        if isinstance(module, _FUSED) and not module.training:
            self.fused += 1
            return False
        if not inside and (is_tracing() or is_symbolic(given)):
            self.unrecorded[Unrecorded.TRACED] += 1
            return False
        return True

    # --- What is called -------------------------------------------------------------------------------------

    def function(self, function: Any) -> Function:
        """Return the :class:`Function` of a function that is called for the first time."""
        found = self.by_function[function] = self.named(name_of(function))
        found.calls += 1
        return found

    def named(self, name: str) -> Function:
        """Return the :class:`Function` of a name."""
        with self._aside.lock:
            found = self.by_name.get(name)
            if found is None:
                queries = [query for query in self.queries if query.asks_for(name)]
                is_named = any(query.function == name for query in queries)
                found = Function(is_named, is_set=name == "setitem")
                treatments: dict[What, Treatment] = {}
                for query in queries:
                    treatments.setdefault(query.what, query.treatment)
                if treatments:
                    key, module = f"{self.owner.key}:{name}", self.owner.module
                    choice = Choice(key, module, (), treatments, is_function=True)
                    found.track, found.publish = self._aside.make(choice)
                self.by_name[name] = found
        return found

    def publish(self, function: Function) -> None:
        """Make the layers of a function part of the recording."""
        with self._aside.lock:
            if function.publish is not None:
                function.publish()
                function.publish = None


# --- Who calls -------------------------------------------------------------------------------------------


#: The code that runs the forward in which a function is called.
_RUNS: Final = {Watcher.run.__code__, Aside.run.__code__}


def _is_nobodys() -> bool:
    """Whether the running function was not called by a forward.

    Then actrec called it, to keep a value of a layer, or a transform did, or a hook of a submodule, such as that
    of ``spectral_norm``.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code not in _RUNS:
        if is_ours(frame) and frame.f_code.co_filename != __file__:
            return True
        if frame.f_code is CALL_CODE:
            module: nn.Module = frame.f_locals["self"]
            if isinstance(vars(module).get("forward"), Forward):
                return True
        frame = frame.f_back
    return False
