"""Which pass is running: every call belongs to one outermost forward of the recorded model.

Hooks on the root and on the modules between it and the chosen layers say when a forward begins and
ends. They keep a stack for each thread; the first module on it opened the pass. So a pass is normally a
call of the root, and where the root is not called (``model.encode(x)``, the encoder that ``generate()``
runs before the first step) it is the outermost call on the way to a chosen layer.

A forward may share its work among threads: a call below it, in another thread than the main one, belongs to the pass
that is running; where several are, nothing tells to which, and it is a pass of its own. And a forward may be a generator or a
coroutine: then its pass goes on whenever that does.

A forward that raises closes its stack entries too: ``always_call`` hooks run for an ``Exception``. Only
after a ``KeyboardInterrupt`` entries stay behind; the next call of the root finds out and drops them.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from actrec._recordings.passes import Count
from actrec._torch import (
    CALL_CODE,
    backward_number,
    count_dispatch_modes,
    count_function_modes,
    is_jit_comparing,
    is_jit_tracing,
    is_read,
    is_replica,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import FrameType

    from torch import nn

__all__ = [
    "Count",
    "Passes",
    "checking",
    "is_own_call",
    "is_tracing",
]


# --- Calls that are none of the model's own ---------------------------------------------------------

#: The threads that torch.jit.trace may be checking its trace in.
checking: set[int] = set()


def is_own_call() -> bool:
    """Whether the call that is running is one of the model's own.

    Activation checkpointing calls modules again while ``backward()`` runs, to recompute what it did not
    keep, and :func:`is_tracing` says what else calls them.
    """
    return backward_number() == -1 and not is_tracing()


def is_tracing() -> bool:
    """Whether this thread is running the model only to write down what it does.

    ``torch.jit.trace`` does, and calls the model again to compare it with the trace. So do ``make_fx``, AOT
    autograd and ``torch.export``, with tensors that have no values. What other threads compile or export
    meanwhile is not asked: ``torch.compiler.is_compiling()`` would tell that too.
    """
    if is_jit_tracing():
        checking.add(threading.get_ident())
        return True
    if (count_dispatch_modes() or count_function_modes()) and is_read():
        return True
    return bool(checking) and _is_checked()


def _is_checked() -> bool:
    """Whether torch.jit.trace is comparing its trace with the model, behind a trace in this thread."""
    if threading.get_ident() not in checking:
        return False
    if is_jit_comparing():
        return True
    checking.discard(threading.get_ident())
    return False


def _is_running(modules: Collection[int]) -> bool:
    """Whether this thread is inside a call of one of ``modules`` (ids), besides the one that asks."""
    frame: FrameType | None = sys._getframe(1)
    calls = 0
    while frame is not None:
        if frame.f_code is CALL_CODE and id(frame.f_locals["self"]) in modules:
            calls += 1
        frame = frame.f_back
    return calls > 1 or CALL_CODE is None


# --- Which pass a call belongs to that no call around it in its thread tells ------------------------


@dataclass(frozen=True, slots=True)
class _Open:
    """A pass that is running, or a part of it in a thread of its own."""

    number: int
    thread: int
    module: weakref.ref[nn.Module]  # whose call began it
    is_root: bool

    def leads_to(self, module: nn.Module) -> bool:
        """Whether ``module`` is inside the one whose call it is."""
        opener = self.module()
        if opener is None or opener is module:
            return False
        return self.is_root or any(inside is module for inside in opener.modules())


#: What a forward may return that has not run yet, and where it then runs.
_SUSPENDED = {
    GeneratorType: "gi_frame",
    CoroutineType: "cr_frame",
    AsyncGeneratorType: "ag_frame",
}


def _frame(suspended: Any) -> FrameType | None:
    """Where it runs, or has stopped; ``None`` when it has ended."""
    return getattr(suspended, _SUSPENDED[type(suspended)])  # type: ignore[no-any-return]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _calls(frame: FrameType | None) -> set[int]:
    """The modules (ids) that this thread is calling. What others are doing cannot be looked at while they do it."""
    return {id(one.f_locals["self"]) for one in _frames(frame) if one.f_code is CALL_CODE}


class _Thread(threading.local):
    """What one thread is in: the ids of the modules it is calling, and the pass they belong to."""

    def __init__(self) -> None:
        self.calling: list[int] = []
        self.current: int | None = None  # while it calls something
        self.handled = 0  # the id of the exception that was being handled when the pass began


class Passes(Count):
    """Numbers the passes, from 0, and tells which one a call belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = _Thread()
        self._open: list[_Open] = []  # in all threads, the latest last
        self._suspended: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    @override
    def __reduce__(self) -> tuple[type[Count], tuple[int, set[int]]]:
        return Count, (self.count, self.raised)  # a copy counts no more

    def begin(self, module: nn.Module, *, is_root: bool) -> None:
        """A call of ``module`` begins."""
        thread = self.thread
        if thread.calling and is_root and not _is_running([*thread.calling, id(module)]):
            self._close(thread, raised=True)
        if not thread.calling:
            thread.handled = id(sys.exc_info()[1])
            with self._lock:  # so that no pass is counted and not open, as complete() would see it
                thread.current = self.number(module)
                here = threading.get_ident()
                self._open.append(_Open(thread.current, here, weakref.ref(module), is_root))
        thread.calling.append(id(module))

    def end(self, module: nn.Module, error: BaseException | None = None) -> None:
        """The call of ``module`` has ended, and with it those inside that did not say so.

        ``error`` is the exception that is being handled. If it was when the pass began, the pass did not raise it.
        """
        thread = self.thread
        if id(module) in thread.calling:
            while thread.calling.pop() != id(module):
                pass
            if not thread.calling:
                self._close(thread, raised=error is not None and id(error) != thread.handled)

    def abandon(self) -> None:
        """Nothing more is recorded of the passes that are open."""
        self.raised.update(
            [one.number for one in list(self._open)]
        )  # without the lock, for a forked process

    def suspend(self, output: object) -> None:
        """A call has returned ``output``. If that has not run yet, its calls will belong to this pass."""
        if type(output) in _SUSPENDED and self.thread.current is not None:
            with self._lock:
                self._suspended[output] = self.thread.current

    def opened_by(self, module: nn.Module) -> bool:
        """Whether the pass of this thread ends with the call of ``module``."""
        return self.thread.calling[:1] == [id(module)]

    @property
    def running(self) -> bool:
        """Whether this thread is inside a pass."""
        return bool(self.thread.calling)

    def complete(self) -> int:
        """Return how many passes are complete: nothing is going to be recorded of those before this number.

        The latest one never is, for what is added after a forward belongs to it.
        """
        with self._lock:
            going_on = [n for one, n in self._suspended.items() if _frame(one) is not None]
            return max(0, min([*(one.number for one in self._open), *going_on, self.count - 1]))

    def restart(self) -> None:
        """Count from 0 again."""
        self.count = 0
        self.raised.clear()

    def number(self, module: nn.Module) -> int:
        """Return the number of a pass that begins with a call of ``module``."""
        with self._lock:
            if self._open or self._suspended:
                number = self._running(module)
                if number is not None:
                    return number
            self.count += 1
            return self.count - 1

    def _running(self, module: nn.Module) -> int | None:
        """Return the pass that a call of ``module`` belongs to, if it is running elsewhere than around the call."""
        here = sys._getframe(1)
        if self._suspended:
            frames = {id(frame) for frame in _frames(here)}
            for suspended, number in self._suspended.items():
                if id(_frame(suspended)) in frames:
                    return number
        # The replicas of DataParallel are no modules of the model's, and have threads of their own.
        if self._open and is_replica(module):
            return self._open[-1].number
        if threading.current_thread() is threading.main_thread():
            return None
        around = [one for one in self._open if one.leads_to(module)]
        if around:
            own = _calls(here)  # that began before the block, or in a pause
            around = [one for one in around if id(one.module()) not in own]
        numbers = {one.number for one in around}
        return numbers.pop() if len(numbers) == 1 else None

    def _close(self, thread: _Thread, *, raised: bool) -> None:
        thread.calling.clear()
        here = threading.get_ident()
        with self._lock:
            self._open = [one for one in self._open if one.thread != here]
            if raised and thread.current not in {one.number for one in self._open}:
                self.raised.add(thread.current)  # type: ignore[arg-type]  # it was calling something
        thread.current = None
