"""Functions that the forward of a module calls itself: seen by a mode of PyTorch's that is on only while it runs.

The ``forward`` of each module whose functions are asked for (an :class:`Owner`), and of the modules below it, is run by
a :class:`Watcher`. It says whose functions are called now, and pushes and pops the :class:`_Mode` of the thread, in a
``finally``: hooks would not run behind a ``KeyboardInterrupt``. Below an owner the mode is popped while another
module's forward runs; where that is inside a mode of the model's own, it stays on, and records nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from actrec._selection.functions import canonical
from actrec._selection.names import is_called
from actrec._selection.selection import Choice
from actrec._text import listed, nearest
from actrec._torch import (
    CALL_CODE,
    children_of,
    count_function_modes,
    function_mode_at,
    pop_function_mode,
    push_function_mode,
)
from actrec._values.spec import tensors

from .forwards import Forward
from .layer import Unrecorded
from .own_calls import OWN_MODES, is_tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from actrec._selection.functions import FunctionQuery, Owner, What
    from actrec._selection.queries import Transform
    from actrec._values.containers import Value

    from .layer import Track
    from .session import Session

    #: Makes the track of a chosen function, and what makes its layers part of the recording.
    Make = Callable[[Choice], tuple[Track, Callable[[], None]]]

__all__ = ["Functions", "Missing", "name_of", "stop_key"]

_ATTRIBUTE: Final = ("__get__", "__set__", "__delete__")
#: In evaluation they compute all in one fused function, but for a mode that is on: it would change the last bits.
_FUSED: Final = (nn.MultiheadAttention, nn.TransformerEncoder)
_DISPATCH: Final = ("__torch_function__", "handle_torch_function")
#: The folder that the files of actrec are in.
_PACKAGE: Final = f"{Path(__file__).parents[1]}{os.sep}"


def name_of(function: Any) -> str:
    """Return the name of a function of PyTorch's: that of an operator, an attribute or an overload is the plain one."""
    name: str = getattr(function, "__name__", type(function).__name__)
    if name in _ATTRIBUTE:
        name = function.__self__.__name__
    return canonical(name.partition(".")[0])


class _Function:
    """The functions of one name that one module calls: what is recorded of them, if anything is."""

    __slots__ = ("calls", "is_set", "publish", "track")

    def __init__(self, name: str) -> None:
        self.calls = 0
        #: It returns nothing: its value is what it has written to.
        self.is_set = name == "setitem"
        self.track: Track | None = None
        self.publish: Callable[[], None] | None = None  # until a call has returned a tensor


class Watcher:
    """Runs the forward of an owner, and says that its functions are called; or of a module below one: then nobody's are."""

    def __init__(self, room: Functions, owner: Owner | None = None) -> None:
        self._room = room
        self._owner = owner
        self.queries: list[FunctionQuery] = []
        self.unrecorded: Counter[Unrecorded] = Counter()
        self.ran = 0
        self.fused = 0  # how often it was left alone, so that it runs as it would
        self.by_name: dict[str, _Function] = {}
        self.by_function: dict[Any, _Function] = {}

    @property
    def owner(self) -> Owner:
        """The module whose functions are asked for."""
        assert self._owner is not None  # noqa: S101  # what is called below it is not looked at
        return self._owner

    # --- Running it -----------------------------------------------------------------------------------------

    def run(self, stood_for: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward. Whatever ends it, the mode of this thread is as it was."""
        if is_dynamo_compiling():
            return stood_for.forward(*args, **kwargs)
        room = self._room
        forward = stood_for.forward
        if room.session.has_replicas:
            forward = stood_for.forward_of(_called_module())
        mode = room.thread.mode
        before = mode.watcher
        if self._owner is None or not self._is_heard(inside=before is not None):
            return forward(*args, **kwargs) if before is None else mode.aside(forward, args, kwargs)
        is_first = not mode.is_on
        try:
            try:
                mode.listen_to(self, is_first=is_first)
                result = forward(*args, **kwargs)
            finally:
                mode.listen_again(before, was_first=is_first)
        finally:
            mode.listen_again(before, was_first=is_first)  # in case that was interrupted
        if room.session.stop is not None:
            room.session.stop.ran(stop_key(self._owner))
        return result

    def _is_heard(self, *, inside: bool) -> bool:
        """Whether what is called in it is looked at. If it runs ``inside`` another owner, that has been asked already."""
        session = self._room.session
        self.ran += 1
        if not session.listens():
            self.unrecorded[Unrecorded.PAUSED] += session.pauses > 0
            return False
        module = self.owner.module
        if isinstance(module, _FUSED) and not module.training:
            self.fused += 1
            return False
        traced = not inside and is_tracing()
        self.unrecorded[Unrecorded.TRACED] += traced
        return not traced

    # --- What is called -------------------------------------------------------------------------------------

    def function(self, function: Any) -> _Function:
        """Return what is recorded of a function that is called for the first time."""
        found = self.by_function[function] = self.named(name_of(function))
        found.calls += 1
        return found

    def gives(self, function: _Function, track: Track, returned: Value, received: Value) -> None:
        """A function that is recorded has returned a value."""
        try:
            track.gives(self.owner.module, returned, received)
        finally:
            if function.publish is not None and track.called:
                self.publish(function)

    def named(self, name: str) -> _Function:
        """Return what is recorded of functions of a name."""
        with self._room.lock:
            found = self.by_name.get(name)
            if found is None:
                found = _Function(name)
                transforms = self._transforms(name)
                if transforms:
                    owner = self.owner
                    choice = Choice(
                        f"{owner.key}:{name}", owner.module, (), transforms, is_function=True
                    )
                    found.track, found.publish = self._room.make(choice)
                self.by_name[name] = found
        return found

    def _transforms(self, name: str) -> dict[What, Transform | None]:
        """What is to be recorded of functions of a name: a query that spells it out goes before others."""
        asking = [query for query in self.queries if query.asks_for(name)]
        asking.sort(key=lambda query: not query.is_spelled_out)
        transforms: dict[What, Transform | None] = {}
        for query in asking:
            transforms.setdefault(query.what, query.transform)
        return transforms

    def publish(self, function: _Function) -> None:
        """Make what is recorded of a function part of the recording."""
        with self._room.lock:
            if function.publish is not None:
                function.publish()
                function.publish = None


class _Mode(TorchFunctionMode):
    """Hears of every function that the forward of an owner calls, in one thread."""

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
            if (function is None or function.track is not None) and not _is_called_by_us():
                function = function or watcher.function(func)
                if function.track is not None:
                    # All in this one frame: a mode of another block looks at who calls the function.
                    kwargs = kwargs or {}
                    track = function.track
                    function.calls += 1
                    received = None if track.inputs is None else track.takes(func, args, kwargs)
                    result = func(*args, **kwargs)
                    returned = args[0] if function.is_set else result
                    if type(returned) is Tensor or tensors(returned):
                        watcher.gives(function, track, returned, received)
                    return result
        return func(*args, **kwargs) if kwargs else func(*args)

    # --- The stack of this thread ---------------------------------------------------------------------------

    def aside(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward of a module below an owner, whose functions are nobody's."""
        before, self.watcher = self.watcher, None
        many = count_function_modes()
        # Below a mode of the model's own, it stays where it is.
        is_last = many > 0 and function_mode_at(many - 1) is self
        if is_last:
            pop_function_mode()
            self.is_on = False
        try:
            return forward(*args, **kwargs)
        finally:
            if is_last:
                push_function_mode(self)
                self.is_on = True
            self.watcher = before

    def listen_to(self, watcher: Watcher, *, is_first: bool) -> None:
        """The functions of an owner are called from now on."""
        self.watcher = watcher
        if is_first:
            push_function_mode(self)
            self.is_on = True

    def listen_again(self, watcher: Watcher | None, *, was_first: bool) -> None:
        """Go back to what was before."""
        self.watcher = watcher
        if was_first:
            above = []
            while any(function_mode_at(at) is self for at in range(count_function_modes())):
                above.append(pop_function_mode())
            for mode in reversed(above[:-1]):  # which the model has left there
                push_function_mode(mode)
            self.is_on = False


OWN_MODES.add(_Mode)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = _Mode()


def _is_ours(frame: FrameType) -> bool:
    """Whether the code of a frame is actrec's. Examples in its docstrings are a user's."""
    return frame.f_code.co_filename.startswith(_PACKAGE)


def _is_called_by_us() -> bool:
    """Whether actrec calls the function that is running, to keep a value of a layer, or lets a transform call it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if _is_ours(frame) and frame.f_code.co_filename != __file__:
            return True
        frame = frame.f_back if frame.f_code.co_name in _DISPATCH else None
    return False


def stop_key(owner: Owner) -> str:
    """Return what stands for an owner among the layers that a forward ends behind."""
    return f"{owner.key}:"


class Missing(NamedTuple):
    """The queries for which nothing was recorded, each with the likely cause, and whether an owner was called at all."""

    causes: dict[str, str]
    is_called: bool


# --- The block ---------------------------------------------------------------------------------------------


class Functions:
    """The functions that a block records, and the modules that call them."""

    def __init__(self, queries: tuple[FunctionQuery, ...], session: Session, make: Make) -> None:
        self.session = session
        self.make = make
        self.lock = threading.RLock()
        self.thread = _Thread()
        self._queries = queries
        self._watchers: dict[int, Watcher] = {}
        for query in queries:
            for owner in query.owners:
                watcher = self._watchers.setdefault(id(owner.module), Watcher(self, owner))
                watcher.queries.append(query)
        self._others = [Watcher(self)]  # that of the modules below them

    @property
    def owners(self) -> list[Owner]:
        """The modules whose functions are asked for."""
        return [watcher.owner for watcher in self._watchers.values()]

    def begin(self) -> None:
        """Make layers of the functions that are spelled out: they are there before they are called."""
        for watcher in self._watchers.values():
            for query in watcher.queries:
                if query.is_spelled_out:
                    watcher.publish(watcher.named(query.function))

    def forwards(self) -> Iterator[Forward]:
        """Make what stands in for the forwards of the owners, and of all modules below them."""
        for watcher in self._watchers.values():
            yield Forward(watcher.owner.module, watcher)
        below = {
            id(module): module
            for watcher in self._watchers.values()
            for module in watcher.owner.module.modules()
        }
        for module in below.values():
            is_script = isinstance(module, torch.jit.ScriptModule)
            if id(module) not in self._watchers and is_called(module) and not is_script:
                yield Forward(module, *self._others)

    def end(self) -> None:
        """The block has ended: keep nothing that was recorded."""
        self._watchers.clear()
        self._others.clear()

    def replicated(self, model: nn.Module) -> Iterator[nn.Module]:
        """The modules that ``DataParallel`` may make replicas of."""
        yield model
        yield from (m.module for m in model.modules() if isinstance(m, nn.DataParallel))

    # --- Never silent ---------------------------------------------------------------------------------------

    def missing(self) -> Missing:
        """Return the queries for which nothing was recorded."""
        causes = {query.query: self._cause(query) for query in self._queries}
        return Missing(
            {query: cause for query, cause in causes.items() if cause is not None},
            any(watcher.ran for watcher in self._watchers.values()),
        )

    def _cause(self, query: FunctionQuery) -> str | None:
        watchers = [self._watchers[id(owner.module)] for owner in query.owners]
        asked = [
            (name, function)
            for watcher in watchers
            for name, function in watcher.by_name.items()
            if query.asks_for(name)
        ]
        tracks = [function.track for _, function in asked if function.track is not None]
        if any(track.called or track.kept or track.error for track in tracks):
            return None
        one = len(watchers) == 1
        who = repr(watchers[0].owner.key) if one else f"the {len(watchers)} modules that it names"
        if not any(watcher.ran for watcher in watchers):
            return f"{who} {'was' if one else 'were'} never called, so no function was called there"
        if all(watcher.fused == watcher.ran for watcher in watchers):
            return f"{who} {'is' if one else 'are'} fused in evaluation, which looking inside would turn off. Record the module"
        elsewhere: Counter[Unrecorded] = Counter()
        for counted in [*(w.unrecorded for w in watchers), *(t.unrecorded for t in tracks)]:
            elsewhere.update(counted)
        for where, cause in _ELSEWHERE.items():
            if elsewhere[where]:
                return f"{who} {'was' if one else 'were'} called {cause}"
        silent = sorted({name for name, function in asked if function.calls})
        if silent:
            return f"{listed(silent)} was called there, and returned no tensor"
        return f"{who} did not call it. {self._instead(query, watchers)}"

    def _instead(self, query: FunctionQuery, watchers: list[Watcher]) -> str:
        """What was called there, and what may have been meant."""
        called = sorted(
            {n for w in watchers for n, function in w.by_name.items() if function.calls}
        )
        hint = nearest(query.function, called) if called else ""
        there = f"Called there: {listed(called) if called else 'nothing'}."
        said = there if hint.startswith("There") else f"{there} {hint}".rstrip()
        if any(children_of(watcher.owner.module) for watcher in watchers):
            inside = f"{watchers[0].owner.key}.**".lstrip(".")
            said += f" What modules inside call has their names, such as {f'{inside}:{query.function}'!r}."
        return f"{said} {_UNSEEN}"


_ELSEWHERE: Final = {
    Unrecorded.PAUSED: "inside acts.pause()",
    Unrecorded.BACKWARD: "inside backward(), where calls are not recorded",
    Unrecorded.RECOMPUTED: "inside backward(), where activation checkpointing recomputes what was recorded before",
    Unrecorded.TRACED: "by something that reads the model (torch.jit.trace, make_fx, torch.export)",
}
_UNSEEN: Final = (
    "Not seen is what PyTorch's own functions call (multi_head_attention_forward, say), torch.autograd.Function.apply, and "
    "what runs in C++ or TorchScript"
)


def _called_module() -> nn.Module | None:
    """The module whose forward is about to run: it may be a replica of the one that is known."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    # Where there are hooks, a function inside it calls the forward.
    callers = [] if frame is None else [frame, frame.f_back]
    return next((f.f_locals["self"] for f in callers if f and f.f_code is CALL_CODE), None)
