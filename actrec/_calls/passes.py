"""Which pass is running: every call belongs to one outermost forward of the recorded model.

Hooks on the root and on the modules between it and the chosen layers report when a forward begins and
ends. They keep a stack for each thread; the first module on it opened the pass. So a pass is normally a
call of the root, and where the root is not called (``model.encode(x)``, the encoder that ``generate()``
runs before the first step) it is the outermost call on the way to a chosen layer.

A forward may share its work among threads: a call of a module inside it, in another thread than the main one, belongs to the
pass that is running; if several are, it is unknown to which, and the call is a pass of its own.

The user may open a pass as well, a *unit*: all calls until it ends belong to that pass, and forwards begin no passes.

A forward that raises an ``Exception`` removes its stack entries too, because ``always_call`` hooks run for it. Only
after a ``KeyboardInterrupt`` entries are left over; the next call of the root finds and drops them.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn

from actrec._recordings.pass_numbers import Count
from actrec._recordings.units import Key
from actrec._torch import CALL_CODE, compiled_frame, frames, is_replica

from .open_units import OpenUnits, Unit
from .suspended import KINDS, Suspended


class _Thread:
    """The modules that one thread is calling, and the pass that their calls belong to."""

    __slots__ = ("calling", "graph", "handled", "is_root", "number", "opened_in", "opener")

    def __init__(self) -> None:
        self.calling: list[int] = []  # their ids
        self.number: int | None = None  # of the pass, while the thread calls something
        self.opener: Callable[[], nn.Module | None] = lambda: None  # whose call began the pass
        self.is_root = False  # whether the opener is the root
        self.handled = 0  # the id of the exception that was being handled when the pass began
        self.graph = False  # whether compiled code reports a call right now
        self.opened_in: FrameType | None = None  # of the compiled code that began the pass

    def leads_to(self, module: nn.Module) -> bool:
        """Whether ``module`` is inside the module whose call began the pass."""
        opener = self.opener()
        if opener is None or opener is module:
            return False
        return self.is_root or any(inside is module for inside in opener.modules())


class _Local(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


class Passes(Count):
    """Numbers the passes from 0, and finds the pass that a call belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self._local = _Local()
        self._open: dict[_Thread, None] = {}  # the threads that are in a pass, the latest last
        self._suspended = Suspended()
        self.units = OpenUnits()
        self.undecided = self.units.undecided
        self._lock = threading.RLock()

    # --- Beginning and ending ------------------------------------------------------------------------------

    def begin(self, module: nn.Module, *, is_root: bool) -> None:
        """A call of ``module`` begins, and with it a pass, unless this thread is in one."""
        thread = self._local.thread
        if thread.calling and is_root and not self._goes_on(thread):
            self._close(thread, raised=True)
        if not thread.calling:
            thread.handled = id(sys.exception())
            thread.opener, thread.is_root = weakref.ref(module), is_root
            with self._lock:  # or complete() could see a pass that is counted and not open yet
                thread.number = self._number(module)
                self._open[thread] = None
        thread.calling.append(id(module))

    def skip(self, module: nn.Module) -> None:
        """A call of ``module`` begins that is not recorded. Inside a pass, its end is not that of a call that is."""
        calling = self._local.thread.calling
        if calling:
            calling.append(-id(module))

    @contextmanager
    def in_graph(self) -> Iterator[None]:
        """Compiled code makes the calls that begin in this block: they are not on Python's stack."""
        thread = self._local.thread
        thread.graph, before = True, thread.number
        try:
            yield
        finally:
            thread.graph = False
            if before is None:  # it may have begun a pass
                thread.opened_in = compiled_frame()

    def _goes_on(self, thread: _Thread) -> bool:
        """Whether the call that begins is made inside those on this thread's stack: else they were interrupted."""
        if thread.graph:
            return _is_inside(thread.calling) or any(one is thread.opened_in for one in frames())
        return CALL_CODE is None or _is_inside(thread.calling, besides=1)  # its own call

    def end(self, module: nn.Module, output: object, error: BaseException | None) -> None:
        """The call of ``module`` has ended, and with it those inside whose end was not reported.

        ``error`` is the exception that is being handled; if it was already handled when the pass began, the pass did not raise it.
        """
        thread = self._local.thread
        calling, called = thread.calling, id(module)
        if calling and calling[-1] == -called:
            calling.pop()
            return
        if type(output) in KINDS and thread.number is not None:
            with self._lock:
                self._suspended.add(output, thread.number)
        if called in calling:
            while calling.pop() != called:
                pass
            if not calling:
                self._close(thread, raised=error is not None and id(error) != thread.handled)

    def _close(self, thread: _Thread, *, raised: bool) -> None:
        thread.calling.clear()
        number = thread.number
        assert number is not None  # noqa: S101  # it was calling something
        unit = None
        with self._lock:
            self._open.pop(thread, None)
            if (raised or self.undecided) and not self._count_inside(number):
                if raised:
                    self.raised.add(number)
                unit = self.undecided.get(number)
        thread.number = thread.opened_in = None
        if unit is not None and unit.drop is not None:
            unit.drop()
            self.undecided.pop(number, None)

    def _count_inside(self, number: int) -> int:
        """Count the threads that are in a forward of pass ``number``."""
        return sum(one.number == number for one in self._open)

    def abandon(self) -> None:
        """The open passes are interrupted: count them as raised. Takes no lock, for a forked process."""
        self.raised.update(one.number for one in [*self._open] if one.number is not None)
        self.raised.update(unit.number for unit in self.units.open())

    def restart(self) -> None:
        """Count from 0 again."""
        self.count = 0
        self.raised.clear()
        self.units.latest = -1

    # --- Units ---------------------------------------------------------------------------------------------

    def open_unit(self, key: Key) -> Unit | None:
        """Begin a pass that ends with :meth:`close_unit`; ``None`` if this thread is in another pass."""
        thread = self._local.thread
        if self.units.own() is not None:
            return None
        if thread.calling:
            if _is_inside(thread.calling):
                return None
            self._close(thread, raised=True)  # it was interrupted
        with self._lock:
            unit = self.units.begin(key, self.count)
            self.count += 1
        return unit

    def leave_unit(self, unit: Unit) -> int:
        """The ``with`` block of the unit has ended. Return how many other threads are in a forward that belongs to it."""
        thread = self._local.thread
        if thread.number == unit.number:
            self._close(thread, raised=True)  # a forward that was interrupted
        with self._lock:
            return self._count_inside(unit.number)

    def close_unit(self, unit: Unit, drop: Callable[[], None] | None = None) -> None:
        """End the unit. If it has failed, ``drop`` is called again when the last thread has left it."""
        with self._lock:
            if drop is not None:
                self.raised.add(unit.number)
            self.units.end(unit, drop if self._count_inside(unit.number) else None)
            self._suspended.forget(unit.number)  # what they call begins passes of their own

    def latest(self) -> int | None:
        """Return the pass of a value that the user adds now; ``None`` if it is unknown, or the pass was a unit that ended."""
        with self._lock:
            if self.units.open():
                return self.units.of_call()
            return None if self.units.latest == self.count - 1 else self.count - 1

    # --- What is running -----------------------------------------------------------------------------------

    def current_or_last(self) -> int:
        """Return the pass that this thread is inside of, or the last one that has begun."""
        number = self._local.thread.number
        return max(0, self.count - 1) if number is None else number

    @property
    def running(self) -> bool:
        """Whether this thread is inside a pass."""
        return bool(self._local.thread.calling)

    def opened_by(self, module: nn.Module) -> bool:
        """Whether the pass of this thread ends with the call of ``module`` that is ending."""
        calling = self._local.thread.calling
        return calling[:1] == [id(module)] and calling[-1] != -id(module)

    def count_complete(self) -> int:
        """Return how many passes are complete: nothing is going to be recorded of those before this number.

        The latest pass never is, because a value that is added after a forward belongs to it; a unit is when it has ended.
        """
        with self._lock:
            unfinished = [one.number for one in self._open if one.number is not None]
            unfinished += [unit.number for unit in self.units.open()]
            unfinished += self._suspended.unfinished()
            ended = self.count - (self.units.latest != self.count - 1)
            return max(0, min([*unfinished, ended]))

    def number_of(self, module: nn.Module) -> int:
        """Return the pass that the running call of ``module`` belongs to: that of its thread, or a new one."""
        number = self._local.thread.number
        if number is None:
            with self._lock:
                number = self._number(module)
        return number

    def _number(self, module: nn.Module) -> int:
        elsewhere = self._open or self.undecided or self._suspended.passes
        number = self._elsewhere(module) if elsewhere else None
        if number is None:
            number = self.count
            self.count += 1
        return number

    def _elsewhere(self, module: nn.Module) -> int | None:
        """Return the pass that a call of ``module`` belongs to, if it was opened in another place than this thread's stack."""
        for number in (self._suspended.running(), self.units.own()):
            if number is not None:
                return number
        # The replicas of DataParallel are not modules of the model, and run in threads of their own.
        if self._open and is_replica(module):
            return [*self._open][-1].number
        is_main = threading.current_thread() is threading.main_thread()
        around = set() if is_main else self._around(module)
        if len(around) == 1:
            return around.pop()
        return self.units.of_call()

    def _around(self, module: nn.Module) -> set[int | None]:
        """Return the passes of other threads whose forward may have started the thread of this call of ``module``."""
        # Not of those that this thread is inside of itself: they began before the block, or in a pause.
        return {
            one.number
            for one in self._open
            if one.leads_to(module) and not _is_inside([id(one.opener())])
        }


def _is_inside(modules: list[int], besides: int = 0) -> bool:
    """Whether this thread is inside a call of one of ``modules`` (ids), the innermost calls ``besides`` left out."""
    called = [id(one.f_locals["self"]) for one in frames() if one.f_code is CALL_CODE]
    return any(one in modules for one in called[besides:])
