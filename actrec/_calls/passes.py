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
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from actrec._recordings.passes import Count
from actrec._torch import CALL_CODE, is_replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from torch import nn

__all__ = ["Passes"]


class _Thread:
    """What one thread is in: the modules it is calling, and the pass that their calls belong to."""

    __slots__ = ("calling", "handled", "is_root", "number", "opener")

    def __init__(self) -> None:
        self.calling: list[int] = []  # their ids
        self.number: int | None = None  # of the pass, while it calls something
        self.opener: Callable[[], nn.Module | None] = lambda: None  # whose call began the pass
        self.is_root = False  # whether that is the root
        self.handled = 0  # the id of the exception that was being handled when the pass began

    def leads_to(self, module: nn.Module) -> bool:
        """Whether ``module`` is inside the one whose call began the pass."""
        opener = self.opener()
        if opener is None or opener is module:
            return False
        return self.is_root or any(inside is module for inside in opener.modules())


class _Local(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


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


def _modules_called(frame: FrameType | None) -> list[int]:
    """The modules (ids) that this thread is calling. What others are doing cannot be looked at while they do it."""
    return [id(one.f_locals["self"]) for one in _frames(frame) if one.f_code is CALL_CODE]


class Passes(Count):
    """Numbers the passes, from 0, and tells which one a call belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self._local = _Local()
        self._open: list[_Thread] = []  # the threads that are in a pass, the latest last
        self._suspended: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    @override
    def __reduce__(self) -> tuple[type[Count], tuple[int, set[int]]]:
        return Count, (self.count, self.raised)  # a copy counts no more

    # --- Beginning and ending ------------------------------------------------------------------------------

    def begin(self, module: nn.Module, *, is_root: bool) -> None:
        """A call of ``module`` begins, and with it a pass, unless this thread is in one."""
        thread = self._local.thread
        if thread.calling and is_root and not _is_inside_itself([*thread.calling, id(module)]):
            self._close(thread, raised=True)
        if not thread.calling:
            thread.handled = id(sys.exc_info()[1])
            thread.opener, thread.is_root = weakref.ref(module), is_root
            with self._lock:  # so that no pass is counted and not open, as complete() would see it
                thread.number = self._number(module)
                self._open.append(thread)
        thread.calling.append(id(module))

    def end(self, module: nn.Module, output: object, error: BaseException | None) -> None:
        """The call of ``module`` has ended, and with it those inside that did not say so.

        If the ``output`` has not run yet, its calls will belong to this pass. ``error`` is the exception that is being
        handled. If it was when the pass began, the pass did not raise it.
        """
        thread = self._local.thread
        if type(output) in _SUSPENDED and thread.number is not None:
            with self._lock:
                self._suspended[output] = thread.number
        if id(module) in thread.calling:
            while thread.calling.pop() != id(module):
                pass
            if not thread.calling:
                self._close(thread, raised=error is not None and id(error) != thread.handled)

    def _close(self, thread: _Thread, *, raised: bool) -> None:
        thread.calling.clear()
        with self._lock:
            self._open = [one for one in self._open if one is not thread]
            if raised and thread.number not in [one.number for one in self._open]:
                self.raised.add(thread.number)  # type: ignore[arg-type]  # it was calling something
        thread.number = None

    def abandon(self) -> None:
        """Nothing more is recorded of the passes that are open. Takes no lock, for a forked process."""
        numbers = [one.number for one in list(self._open)]
        self.raised.update(number for number in numbers if number is not None)

    def restart(self) -> None:
        """Count from 0 again."""
        self.count = 0
        self.raised.clear()

    # --- What is running -----------------------------------------------------------------------------------

    @property
    def current(self) -> int | None:
        """The pass that this thread is inside of."""
        return self._local.thread.number

    @property
    def running(self) -> bool:
        """Whether this thread is inside a pass."""
        return bool(self._local.thread.calling)

    def opened_by(self, module: nn.Module) -> bool:
        """Whether the pass of this thread ends with the call of ``module``."""
        return self._local.thread.calling[:1] == [id(module)]

    def complete(self) -> int:
        """Return how many passes are complete: nothing is going to be recorded of those before this number.

        The latest one never is, for what is added after a forward belongs to it.
        """
        with self._lock:
            unfinished = [n for one, n in self._suspended.items() if _frame(one) is not None]
            unfinished += [one.number for one in self._open if one.number is not None]
            return max(0, min([*unfinished, self.count - 1]))

    def number_of(self, module: nn.Module) -> int:
        """Return the pass that the running call of ``module`` belongs to: that of its thread, or a new one."""
        number = self._local.thread.number
        if number is None:
            with self._lock:
                number = self._number(module)
        return number

    def _number(self, module: nn.Module) -> int:
        number = self._elsewhere(module) if self._open or self._suspended else None
        if number is None:
            number = self.count
            self.count += 1
        return number

    def _elsewhere(self, module: nn.Module) -> int | None:
        """Return the pass that a call of ``module`` belongs to, if it is running elsewhere than around the call."""
        here = sys._getframe(1)
        if self._suspended:
            ids = {id(frame) for frame in _frames(here)}
            for suspended, number in self._suspended.items():
                if id(_frame(suspended)) in ids:
                    return number
        # The replicas of DataParallel are no modules of the model's, and have threads of their own.
        if self._open and is_replica(module):
            return self._open[-1].number
        if threading.current_thread() is threading.main_thread():
            return None
        around = [one for one in self._open if one.leads_to(module)]
        if around:
            own = _modules_called(here)  # that began before the block, or in a pause
            around = [one for one in around if id(one.opener()) not in own]
        numbers = {one.number for one in around}
        return numbers.pop() if len(numbers) == 1 else None


def _is_inside_itself(modules: list[int]) -> bool:
    """Whether this thread is inside a call of one of ``modules`` (ids), besides the one that asks."""
    calls = sum(one in modules for one in _modules_called(sys._getframe(1)))
    return calls > 1 or CALL_CODE is None
