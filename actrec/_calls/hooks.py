"""The hook objects, and how they come onto a model and off it again.

A hook refers weakly to what it reports to, so that dropping a recorder drops what it recorded. In a
copy of the model, or pickled with it, a hook is an inert function. It returns ``None``, always: anything
else would replace the layer's output.
"""

from __future__ import annotations

import sys
import weakref
from abc import abstractmethod
from collections import OrderedDict
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import torch
from torch.compiler import is_dynamo_compiling  # a constant in what the compiler reads
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from actrec._calls.clean_room import inside
from actrec._calls.layer import Session, Track
from actrec._calls.passes import is_own_call
from actrec._calls.stop_early import when_copied
from actrec._selection.names import WRAPPERS, is_called
from actrec._torch import (
    as_constant,
    children_of,
    compiles_itself,
    forward_hooks,
    forward_pre_hooks,
    hook_tables,
    never_compiled,
)
from actrec._values.snapshot import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn


__all__ = [
    "BeginPass",
    "Below",
    "CallHook",
    "EndPass",
    "Hook",
    "Hooks",
    "InputHook",
    "LayerHook",
    "OutputHook",
    "StopHook",
]

T = TypeVar("T", Track, Session)


#: What a hook of actrec is in a copy of the model: nothing, in words that a process without actrec knows too.
_INERT: Callable[..., None] = nullcontext().__exit__


class Hook(Generic[T]):
    """What all hooks have in common."""

    __slots__ = ("_runs", "_target", "module")

    def __init__(self, target: T) -> None:
        #: The module that it is on.
        self.module: Callable[[], nn.Module | None] = lambda: None
        self._target: weakref.ref[T] = weakref.ref(target)
        self._runs = _asked_by_the_compiler(self._target)

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # copy() and pickle ask this.
        return getattr, (nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[Any, Any]) -> Callable[..., None]:
        copied = memo.get(id(self.module()))
        if copied is not None:
            when_copied(memo, partial(_delete_inert, copied))
        return _INERT

    @property
    def __name__(self) -> NoReturn:
        # torch.jit.script asks this first of every hook, and would compile it.
        message = (
            "torch.jit.script() compiles the hooks of a model, and this one is actrec's, of a record() block that is open. "
            "Script the model before the block or after it"
        )
        raise AttributeError(message)

    @abstractmethod
    def register(self, module: nn.Module) -> RemovableHandle:
        """Register this hook on ``module``."""


class LayerHook(Hook[Track]):
    """A hook on a chosen layer. It runs behind those of others, which may replace what it is told."""

    __slots__ = ("_looked",)

    def __init__(self, track: Track) -> None:
        super().__init__(track)
        self._looked = -1  # the id that the next hook of anybody was to get when we last came last

    def table(self, module: nn.Module) -> dict[int, Any]:
        """The hooks of ``module`` that this one is among."""
        return forward_hooks(module)

    def is_settled(self) -> bool:
        """Whether nobody has registered a hook, on any module or tensor, since this one came last."""
        return RemovableHandle.next_id == self._looked

    def settle(self, module: nn.Module) -> bool:
        """Go behind the hooks of others that were registered later; return whether there were any."""
        self._looked = RemovableHandle.next_id
        if not _is_overtaken(self, self.table(module)):
            return False
        _put_last(module)
        return True


def _asked_by_the_compiler(target: Callable[[], Track | Session | None]) -> Callable[[], bool]:
    """Return what the compiler calls while it reads a hook: whether the hook has to run, uncompiled."""

    @as_constant
    def runs() -> bool:
        found = target()
        if found is None or torch.compiler.is_exporting():  # which is no call of the model's own
            return False
        session = found.session if isinstance(found, Track) else found
        session.eager.hold()
        if compiles_itself():  # it could not do with a hook that is not compiled
            if isinstance(found, Track):
                found.compiled += 1
            return False
        return session.recording

    return runs


def _compiled(hook: Hook[Any], *args: Any) -> None:
    """What the compiler reads in the place of a hook."""
    if hook._runs():
        _uncompiled(hook, *args)


@never_compiled(
    "actrec records a layer in it, and torch was not told so before: its compiler was imported inside the block. "
    "Call it once more, or import torch._dynamo before the block"
)
def _uncompiled(hook: Any, *args: Any) -> None:
    torch.compiler.disable(hook.__call__)(*args)  # type: ignore[no-untyped-call]


class OutputHook(LayerHook):
    """Tells what a call returned."""

    @override
    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_dynamo_compiling():
            _compiled(self, module, args, output)
            return
        track = self._target()
        if track is not None:
            if RemovableHandle.next_id != self._looked and self.settle(module):
                track.overtake()
            track.end(module, args, None, output)


#: If the block is left during a call, torch calls the hooks that it took off once more, without the kwargs.
_GONE: Any = object()


class CallHook(LayerHook):
    """Tells what a call returned to a track that also wants what it received."""

    @override
    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = _GONE
    ) -> None:
        if is_dynamo_compiling():
            _compiled(self, module, args, kwargs, output)
            return
        track = self._target()
        if track is not None and output is not _GONE:
            if RemovableHandle.next_id != self._looked and self.settle(module):
                track.overtake()
            track.end(module, args, kwargs, output)


class InputHook(LayerHook):
    """Tells what a call receives."""

    @override
    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self, with_kwargs=True)

    @override
    def table(self, module: nn.Module) -> dict[int, Any]:
        return forward_pre_hooks(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = _GONE) -> None:
        if is_dynamo_compiling():
            _compiled(self, module, args, kwargs)
            return
        track = self._target()
        if track is not None and kwargs is not _GONE:
            is_late = RemovableHandle.next_id != self._looked and self.settle(module)
            track.begin(module, args, kwargs, is_late=is_late)


class BeginPass(Hook[Session]):
    """Tells that a call of the root, or of a module on the way to a chosen layer, begins."""

    __slots__ = ("_below", "_is_root")

    def __init__(self, session: Session, below: Below, *, is_root: bool) -> None:
        super().__init__(session)
        self._below = below
        self._is_root = is_root

    @override
    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self, prepend=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_dynamo_compiling():
            _compiled(self, module, args)
            return
        session = self._target()
        if (
            session is not None
            and session.recording
            and is_own_call()
            and not (inside and session.is_aside())
        ):
            if self._is_root:
                session.eager.hold()
            if self._is_root and session.offload is not None and session.passes.running:
                session.offload.finish()  # a pass that was interrupted may be about to be closed
            session.passes.begin(module, is_root=self._is_root)
            self._below.look(session)
            if session.stop is not None and self._is_root:
                session.stop.enters(module)


class EndPass(Hook[Session]):
    """Tells that such a call ended, also by an exception."""

    @override
    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(self, always_call=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_dynamo_compiling():
            _compiled(self, module, args, output)
            return
        session = self._target()
        if session is not None and is_own_call() and not (inside and session.is_aside()):
            error = sys.exc_info()[1]
            try:
                if session.offload is not None and session.passes.opened_by(module):
                    session.offload.finish()  # before the pass counts as complete
                    if error is None:  # PyTorch would drop a second one
                        session.offload.deliver()
                session.passes.suspend(output)
            except Exception as failure:
                error = failure
                raise
            finally:
                session.passes.end(module, error)
            if error is not None:
                explain(error)
                if error is session.error:
                    session.surfaced = not session.passes.running


class StopHook(Hook[Session]):
    """Ends a forward behind the last chosen layer, once all other hooks have heard of its call."""

    @override
    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(self)

    def __call__(self, *args: object) -> None:
        if is_dynamo_compiling():
            _compiled(self, *args)
            return
        session = self._target()
        if session is not None and session.stop is not None:
            session.stop.when_done()


class Below:
    """What a call leads to, without another call on the way that is looked after: it may change while a block runs."""

    def __init__(self, module: nn.Module, hooks: Mapping[nn.Module, Iterable[LayerHook]]) -> None:
        owners = [*_containers(module)]
        self._children = [(owner, dict(children_of(owner))) for owner in owners]
        inside = {
            child for _, known in self._children for child in known.values() if child is not None
        }
        self._hooks = [(child, hook) for child in inside for hook in hooks.get(child, ())]
        # The call itself has begun: PyTorch has already looked up which hooks hear of that.
        own = [hook for hook in hooks.get(module, ()) if not isinstance(hook, InputHook)]
        self._hooks += [(module, hook) for hook in own]

    def look(self, session: Session) -> None:
        """Put the hooks of the layers last, and remember which layers another module has replaced."""
        for module, hook in self._hooks:
            if not hook.is_settled():
                hook.settle(module)
        for owner, known in self._children:
            if children_of(owner) != known:
                for segment, child in known.items():
                    other = children_of(owner).get(segment)
                    if child is not None and other is not None and not _holds(other, child):
                        session.replace(child)
                known.clear()
                known.update(children_of(owner))


class Hooks:
    """The hooks of one block: on the model all together or not at all."""

    def __init__(self) -> None:
        self._placed: list[tuple[nn.Module, Hook[Any], RemovableHandle]] = []

    def place(self, plan: Iterable[tuple[nn.Module, Hook[Any]]]) -> None:
        """Register every hook; if one cannot be, take those before it off again."""
        plan = list(plan)
        _reserve_ids(module for module, _ in plan)
        try:
            for module, hook in plan:
                hook.module = weakref.ref(module)
                self._placed.append((module, hook, hook.register(module)))
                if len(forward_hooks(module)) > 1:
                    _put_stops_last(module)
        except BaseException:
            self.remove()
            for module, hook in plan:  # one that was interrupted is there, and no handle for it
                _delete(module, hook)
            raise

    def remove(self) -> None:
        """Take every hook off, whatever happened to the model meanwhile. May be called again."""
        try:
            self._take_off()
        except BaseException:
            self._take_off()  # the rest, after an interrupt
            raise

    def _take_off(self) -> None:
        failures: list[BaseException] = []
        while self._placed:
            module, hook, handle = self._placed[-1]
            for off in (handle.remove, partial(_delete, module, hook)):
                try:
                    off()
                except BaseException as error:  # noqa: BLE001  # raised below, once all are off
                    failures.append(error)
            self._placed.pop()
        if failures:
            raise failures[0]


def _delete(module: nn.Module, hook: Hook[Any]) -> None:
    """Delete ``hook`` where its handle cannot reach it: somebody replaced the module's table of hooks."""
    for table in hook_tables(module):
        # Of a copy, made in one step: other threads place and remove hooks too.
        for key in [key for key, found in [*table.items()] if found is hook]:
            del table[key]


def _delete_inert(module: nn.Module) -> None:
    """Delete what stands for our hooks in a copy of a module."""
    for table in hook_tables(module):
        for key in [key for key, found in [*table.items()] if found is _INERT]:
            for one in vars(
                module
            ).values():  # PyTorch keeps in further tables how a hook is called
                if isinstance(one, OrderedDict):
                    one.pop(key, None)


def _put_last(module: nn.Module) -> None:
    """Put the hooks of all open blocks behind those of others.

    Other threads may be calling the module. After a call, no order that they see on the way has a hook of ours behind
    one that ends a pass or a forward: so it is those of others that are moved.
    """
    for key, hook in [*forward_pre_hooks(module).items()]:
        if isinstance(hook, InputHook):
            _move(forward_pre_hooks(module), key, last=True)
    hooks = [*forward_hooks(module).items()]
    for key, hook in reversed(hooks):
        if not isinstance(hook, Hook):
            _move(forward_hooks(module), key, last=False)


def _put_stops_last(module: nn.Module) -> None:
    """Where a block around this one stops early, what was hooked now still hears of the last call."""
    for key, hook in [*forward_hooks(module).items()]:
        if isinstance(hook, StopHook):
            _move(forward_hooks(module), key, last=True)


def _move(table: Any, key: int, *, last: bool) -> None:
    with suppress(KeyError):  # another thread has taken it off
        table.move_to_end(key, last=last)


def _is_overtaken(hook: Hook[Any], table: dict[int, Any]) -> bool:
    """Whether a hook that is none of ours comes behind this one."""
    hooks = [*table.values()]
    place = next((place for place, found in enumerate(hooks) if found is hook), len(hooks))
    return not all(isinstance(other, Hook) for other in hooks[place:])


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """The module, and the containers inside it that are never called: what its calls look up modules in."""
    yield module
    for child in children_of(module).values():
        if child is not None and child is not module and not is_called(child):
            yield from _containers(child)


def _holds(other: nn.Module | None, module: nn.Module) -> bool:
    """Whether ``other`` is ``module``, or wraps it."""
    while other is not module and other is not None:
        wrapped = [child for segment, child in children_of(other).items() if segment in WRAPPERS]
        other = wrapped[0] if len(wrapped) == len(children_of(other)) and wrapped else None
    return other is module


def _reserve_ids(modules: Iterable[nn.Module]) -> None:
    """Keep new ids clear of those in use.

    A model that was pickled with hooks brings their ids into a process that counts from 0, and a handle
    that gets the same id would replace another library's hook.
    """
    used = [key for module in modules for table in hook_tables(module) for key in [*table]]
    lowest = max(used, default=-1) + 1
    # No call in between, as in max(): it would set back what another thread has counted on meanwhile.
    if lowest > RemovableHandle.next_id:  # noqa: PLR1730
        RemovableHandle.next_id = lowest
