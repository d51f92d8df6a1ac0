"""The layer of a recorder whose values are written to a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from typing_extensions import override

from actrec._recordings.layer import Layer
from actrec._recordings.pass_numbers import ListView, RankPass
from actrec._recordings.pass_runs import PassRuns
from actrec._values.containers import Value
from actrec._values.join import How
from actrec._values.shapes import Summary
from actrec._values.spec import itself
from actrec.errors import ActrecError

from .call import Call, Look
from .format import Slot
from .layers import StoredLayer
from .place import Place
from .read_only import ReadOnlyLayer


class Writing(Protocol):
    """The path that the values of a layer are written to."""

    disk: Place
    rank: int | None
    closed: bool
    undecided: set[int]  #: the passes that may still be dropped

    def keep(self, call: Call) -> None:
        """Write a call, sooner or later."""

    def expect(self, number: int) -> None:
        """Keep a place for pass ``number``, which will get more calls when it is complete."""

    def stored(self, slot: Slot) -> StoredLayer:
        """Return the part of a layer that is on the disk."""


@dataclass(slots=True)
class Open:
    """The counts of a layer's calls in a unit that has not ended."""

    calls: int = 0
    nbytes: int = 0
    looks: Summary = field(default_factory=Summary)


class LiveLayer(ReadOnlyLayer):
    """A layer whose values are written to the disk. They can be read after the block; those of earlier runs at any time."""

    def __init__(self, stream: Writing, slot: Slot) -> None:
        self.name = slot.name
        self.type = slot.type
        self._stream = stream
        self._write = stream.keep
        self._undecided = stream.undecided
        self._slot = slot
        self._before = before = stream.stored(slot)
        self._new_passes = PassRuns()
        self._known = len(before)
        self._bytes = before.nbytes
        self._looks = before._summary()
        self._look: Look | None = None  # of the last call
        self._open: dict[int, Open] = {}

    @override
    def _keep(self, value: Value, number: int) -> None:
        call = Call.of(self._slot, number, value, parts=True, before=self._look)
        self._write(call)
        look = call.look
        is_known = look is self._look
        self._look = look
        if number in self._undecided:
            unit = self._open.setdefault(number, Open())
            is_known = is_known and unit.calls > 0
            unit.calls += 1
            unit.nbytes += look.nbytes
            looks = unit.looks
        else:
            self._new_passes.add(number)
            self._bytes += look.nbytes
            looks = self._looks
        if not is_known:
            looks.add(value)

    @override
    def _settle(self, number: int) -> None:
        unit = self._open.pop(number, None)
        if unit is not None:
            for _ in range(unit.calls):
                self._new_passes.add(number)
            self._bytes += unit.nbytes
            self._looks.update(unit.looks)

    @override
    def _drop(self, number: int) -> None:
        self._open.pop(number, None)
        self._look = None  # it may have been the look of a dropped call

    @property
    def _stored(self) -> StoredLayer:
        """The layer on the disk, if it has all calls."""
        if self._stream.closed:
            return self._stream.stored(self._slot)
        if self._known and len(self) == self._known:
            return self._before
        raise ActrecError(self._being_written())

    def _being_written(self) -> str:
        earlier = (
            f" Calls of earlier runs can be read now: acts[{self.name!r}][:{self._known}]."
            if self._known
            else ""
        )
        return (
            f"acts[{self.name!r}]: its values are being written to {self._stream.disk}. "
            f"Read them after the with block, or from another process with actrec.load().{earlier}"
        )

    @property
    @override
    def passes(self) -> ListView[int]:
        if self._stream.closed:
            return self._stored.passes
        open_units = [number for number, unit in self._open.items() for _ in range(unit.calls)]
        return ListView([*self._before.passes, *self._new_passes, *open_units])

    @override
    def __len__(self) -> int:
        if self._stream.closed:
            return len(self._stored)
        return self._known + len(self._new_passes) + sum(o.calls for o in [*self._open.values()])

    @override
    def _call(self, index: int) -> Value:
        if not self._stream.closed and index < self._known:
            return self._before._call(index)
        return self._stored._call(index)

    @override
    def _rank_passes(self) -> list[RankPass]:
        if self._stream.closed:
            return self._stored._rank_passes()
        return [(self._stream.rank, number) for number in self.passes]

    @override
    def _of(self, calls: list[int]) -> Layer[Any]:
        return self._stored._of(calls)

    @override
    def _join(self, how: How, dim: int, *, release: bool = False) -> Value:
        stored = self._stored
        return stored.cat(dim) if how == "cat" else stored.stack(dim)

    @override
    def _summary(self) -> Summary:
        if self._stream.closed:
            return self._stored._summary()
        found = Summary()
        for looks in (self._looks, *(unit.looks for unit in [*self._open.values()])):
            found.update(looks)
        return found

    @property
    @override
    def nbytes(self) -> int:
        if self._stream.closed:
            return self._stored.nbytes
        return self._bytes + sum(unit.nbytes for unit in [*self._open.values()])

    @override
    def clear(self) -> NoReturn:
        message = (
            f"acts[{self.name!r}].clear(): what was written to a path stays there. To keep only a part of a "
            "run, record only that part: nothing is recorded inside acts.pause()."
        )
        raise ActrecError(message)

    @override
    def __reduce__(self) -> tuple[Callable[..., StoredLayer], tuple[StoredLayer]]:
        # A copy or a pickle is the layer on the disk.
        return itself, (self._stored,)
