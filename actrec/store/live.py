"""The layer of a recorder whose values are written to a path."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn, Protocol

from typing_extensions import override

from actrec._recordings.layer import Layer
from actrec._recordings.pass_numbers import ListView, PassRuns, RankPass
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
    undecided: Collection[int]  #: the passes that may still be dropped

    def keep(self, call: Call) -> None:
        """Write a call, sooner or later."""

    def keep_later(self) -> None:
        """There is a call that will be written when its pass is complete."""

    def stored(self, slot: Slot) -> StoredLayer:
        """Return the part of a layer that is on the disk."""


@dataclass(slots=True)
class Counts:
    """The passes, bytes and shapes of some calls of a layer."""

    passes: PassRuns = field(default_factory=PassRuns)
    nbytes: int = 0
    looks: Summary = field(default_factory=Summary)
    _look: Look | None = None  # the last that is in `looks`

    def add(self, look: Look, value: Value) -> None:
        """Count a value, besides its pass."""
        self.nbytes += look.nbytes
        if look is not self._look:
            self.looks.add(value)
            self._look = look

    def update(self, other: Counts) -> None:
        """Count other calls too."""
        for number in other.passes:
            self.passes.add(number)
        self.nbytes += other.nbytes
        self.looks.update(other.looks)


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
        self._known = len(before)
        self._look: Look | None = None  # of the last call
        self._settled = Counts(nbytes=before.nbytes, looks=before._seen()[0])
        self._open: dict[int, Counts] = {}  # by pass, of units that have not ended

    @override
    def _keep(self, value: Value, number: int) -> None:
        call = Call.of(self._slot, number, value, parts=True, before=self._look)
        self._write(call)
        self._look = call.look
        counts = self._counts(number) if self._undecided else self._settled
        counts.passes.add(number)
        counts.add(call.look, value)

    def _counts(self, number: int) -> Counts:
        """Return the counts that a call of pass ``number`` belongs to."""
        return (
            self._open.setdefault(number, Counts()) if number in self._undecided else self._settled
        )

    @override
    def _settle(self, number: int) -> None:
        unit = self._open.pop(number, None)
        if unit is not None:
            self._settled.update(unit)

    @override
    def _drop(self, number: int) -> None:
        self._open.pop(number, None)

    def _all_counts(self) -> list[Counts]:
        return [self._settled, *self._open.values()]

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
        new = chain.from_iterable(counts.passes for counts in self._all_counts())
        return ListView([*self._before.passes, *new])

    @override
    def __len__(self) -> int:
        if self._stream.closed:
            return len(self._stored)
        return self._known + sum(len(counts.passes) for counts in self._all_counts())

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
    def _seen(self) -> tuple[Summary, Mapping[object, int]]:
        if self._stream.closed:
            return self._stored._seen()
        found, nbytes = Summary(), 0
        for counts in self._all_counts():
            found.update(counts.looks)
            nbytes += counts.nbytes
        return found, {id(self): nbytes}

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
