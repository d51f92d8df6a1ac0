"""The units that are open: passes that the user begins and ends.

A unit belongs to the thread or the asyncio task that opened it. Calls elsewhere belong to the unit that is open; if
several are, it is unknown to which, and it is as if none were.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from actrec._recordings.units import Key


@dataclass(eq=False, slots=True)
class Unit:
    """A pass that the user has opened."""

    key: Key
    number: int
    is_open: bool = True
    #: It failed while other threads were still in it: drops what they recorded since, when the last of them has left.
    drop: Callable[[], None] | None = None


#: The units, of all recordings, that this thread or task is inside of.
_around: ContextVar[tuple[Unit, ...]] = ContextVar("actrec units", default=())


class OpenUnits:
    """The units of one recording."""

    def __init__(self) -> None:
        #: By pass, those that may still be dropped: the open ones, and failed ones that other threads are still in.
        self.undecided: dict[int, Unit] = {}
        self.latest = -1  # the pass of the one that was opened last

    def open(self) -> list[Unit]:
        """Return the units that have not ended."""
        return [unit for unit in [*self.undecided.values()] if unit.is_open]

    def own(self) -> int | None:
        """Return the pass of the unit that this thread or task is inside of."""
        units = self.open()
        return next((unit.number for unit in _around.get() if unit in units), None)

    def of_call(self) -> int | None:
        """Return the pass of the unit that a call in this thread belongs to: its own, or the only one."""
        own, units = self.own(), self.open()
        return units[0].number if own is None and len(units) == 1 else own

    def begin(self, key: Key, number: int) -> Unit:
        """Open the unit of pass ``number``, in this thread or task."""
        unit = Unit(key, number)
        self.undecided[number] = unit
        self.latest = number
        _around.set((*_around.get(), unit))
        return unit

    def end(self, unit: Unit, drop: Callable[[], None] | None) -> None:
        """Close it. With ``drop`` it is undecided until that was called."""
        unit.is_open, unit.drop = False, drop
        if drop is None:
            self.undecided.pop(unit.number, None)
        _around.set(tuple(one for one in _around.get() if one is not unit))
