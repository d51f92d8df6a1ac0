"""Recording into a path: what stands in the recorder for layers whose values go to the disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from typing_extensions import override

from actrec._recordings.passes import ListView
from actrec._values.summary import Summary
from actrec.errors import ActrecError, WriteError

from .call import Call
from .format import FUNCTION, Role, Slot
from .layers import StoredLayer
from .load import opened
from .opening import Opening
from .read_only import ReadOnlyLayer
from .reader import StoredRecording
from .runs import PassRuns
from .steps import steps
from .units import key_call
from .writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from actrec._recordings.layer import Layer
    from actrec._recordings.passes import Moment
    from actrec._recordings.units import Key, Units
    from actrec._values.containers import Value
    from actrec._values.join import How

    from .call import Look
    from .description import Description
    from .folder import Folder

__all__ = ["LiveLayer", "Stream"]


class Passes(Protocol):
    """What numbers the passes of the block."""

    count: int
    raised: set[int]
    undecided: set[int]  #: those that may still be dropped

    def complete(self) -> int:
        """Return how many passes are complete: nothing is going to be recorded of those before this number."""


class Stream:
    """A path that is being recorded into: opened before the block begins, closed when it has ended."""

    def __init__(
        self, folder: Folder, description: Description, passes: Passes, *, resume: bool = False
    ) -> None:
        self._opening = Opening("record(into={path!r})", folder, description, resume=resume)
        rank, ledger = self._opening.rank, self._opening.ledger
        self._resumed = resume
        self.rank: int | None = rank.number
        self._passes = passes
        self.undecided = passes.undecided
        self._passes.count = rank.committed
        self._passes.raised.update(ledger.heading.raised)
        self.disk = disk = self._opening.disk
        self._before: StoredRecording[Any] = StoredRecording(disk, [rank], only=rank.number)
        self._after: StoredRecording[Any] | None = None
        self._chosen = sum(layer.role == "output" for layer in description.layers)
        self._added = [slot.name for slot in ledger.layers if slot.role == "added"]
        #: The numbers of functions, which have come to be layers when they were first called.
        self._functions = {
            slot.name: slot.number for slot in ledger.layers if slot.type == FUNCTION
        }
        self._most = len(description.layers)  # more than any number of a chosen one
        #: The layers that have calls, by the first of them.
        self.order = [*self._before._order]
        self.error: str | None = "the recorder was garbage-collected before the block ended"
        self.closed = False
        self._writer = Writer(self._opening.own, ledger, folder, passes.complete, passes.raised)

    # --- Layers ----------------------------------------------------------------------------------------

    def layer(self, role: Role, index: int, name: str, kind: str) -> LiveLayer:
        """Return the layer that stands for a chosen one."""
        return LiveLayer(self, Slot(role, index, name, kind))

    def function(self, role: Role, name: str) -> LiveLayer:
        """Return the layer that stands for a function."""
        following = max(self._functions.values(), default=self._most - 1) + 1
        return self.layer(role, self._functions.setdefault(name, following), name, FUNCTION)

    def added(self, name: str) -> LiveLayer:
        """Return the layer that stands for values that are added by a name."""
        if name not in self._added:
            self._added.append(name)
        return self.layer("added", self._chosen + self._added.index(name), name, "added")

    def added_before(self) -> dict[str, LiveLayer]:
        """Return the layers of names that were added in earlier runs."""
        return {name: self.added(name) for name in self._added}

    def keep(self, call: Call) -> None:
        """Write a call, sooner or later."""
        self._writer.keep(call)

    def stored(self, slot: Slot) -> StoredLayer:
        """Return what is on the disk of a layer: before the block and in it, what was there when it began."""
        return self._recording().layer(slot.role, slot.name) or StoredLayer(slot.name, slot.type)

    def _recording(self) -> StoredRecording[Any]:
        """What is on the disk: when the block began, or now that it has ended."""
        if self.closed and self._after is None:
            self._after = opened(self.disk, rank=self._opening.rank.number)
        return self._before if self._after is None else self._after

    # --- Units -----------------------------------------------------------------------------------------

    def units(self) -> Units:
        """Return the units that this rank has recorded before."""
        return self._before._units.copy()

    def done_before(self) -> Iterable[Key]:
        """Return the keys of the units that all ranks have committed, in earlier runs."""
        return opened(self.disk).done if self._resumed else ()

    def doubt(self) -> str | None:
        """Return what suggests that passes are not what the user works off, in a run that goes on by their number."""
        if not self._resumed or len(self._recording()._units):
            return None
        return steps(str(self.disk), self._recording())

    def keep_unit(self, number: int, key: Key) -> None:
        """The unit of pass ``number`` has ended, and is kept."""
        self.keep(key_call(number, key))

    def drop_unit(self, number: int) -> None:
        """The unit of pass ``number`` has failed."""
        self._writer.drop(number)

    # --- Ending ----------------------------------------------------------------------------------------

    def left_by(self, error: BaseException | None) -> None:
        """Say how the block was left."""
        self.error = None if error is None else type(error).__name__

    def close(self) -> None:
        """Commit what is complete. May be called again."""
        self.closed = True
        try:
            passes = self._passes.count if self.error is None else self._passes.complete()
            self._writer.close(passes, self.error)
            self._passes.count = self._writer.committed
        finally:
            self._opening.lock.release()

    def failure(self) -> WriteError | None:
        """Return the error of the writer that no call has raised."""
        return self._writer.unseen()


@dataclass(slots=True)
class _Open:
    """What a layer has of a unit that has not ended."""

    calls: int = 0
    nbytes: int = 0
    looks: Summary = field(default_factory=Summary)


class LiveLayer(ReadOnlyLayer):
    """A layer whose values go to the disk. They can be read when the block has ended; those of earlier runs at any time."""

    def __init__(self, stream: Stream, slot: Slot) -> None:
        self.name = slot.name
        self.type = slot.type
        self._stream = stream
        self._slot = slot
        self._before = before = stream.stored(slot)
        self._new_passes = PassRuns()
        self._known = len(before)
        self._bytes = before.nbytes
        self._looks = before._summary()
        self._look: Look | None = None  # of the last call
        self._open: dict[int, _Open] = {}

    @override
    def keep(self, value: Value, number: int) -> None:
        call = Call.of(self._slot, number, value, parts=True, before=self._look)
        self._stream.keep(call)
        is_known = call.look is self._look
        self._look = call.look
        if number in self._stream.undecided:
            unit = self._open.setdefault(number, _Open())
            is_known = is_known and unit.calls > 0
            unit.calls += 1
            unit.nbytes += call.look.nbytes
            looks = unit.looks
        else:
            self._new_passes.add(number)
            self._bytes += call.look.nbytes
            looks = self._looks
        if not is_known:
            looks.add(value)

    @override
    def settle(self, number: int) -> None:
        unit = self._open.pop(number, None)
        if unit is not None:
            for _ in range(unit.calls):
                self._new_passes.add(number)
            self._bytes += unit.nbytes
            self._looks.update(unit.looks)

    @override
    def drop(self, number: int) -> None:
        self._open.pop(number, None)
        self._look = None  # it may have been that of its last call

    @property
    def _stored(self) -> StoredLayer:
        """What is on the disk, if that is all there is."""
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
    def _moments(self) -> list[Moment]:
        if self._stream.closed:
            return self._stored._moments()
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
            "run, record that part: acts.pause() records nothing."
        )
        raise ActrecError(message)

    @override
    def __reduce__(self) -> tuple[Callable[..., StoredLayer], tuple[StoredLayer]]:
        # What is copied or pickled is what was stored, not the storing of it.
        return _itself, (self._stored,)


def _itself(layer: StoredLayer) -> StoredLayer:
    return layer
