"""Recording into a path: what stands in the recorder for layers whose values go to the disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from actrec._rank import Position
from actrec._recordings.layer import Layer, Role
from actrec._recordings.units import Key, Units
from actrec.errors import WriteError

from .description import Description
from .folder import Folder
from .format import Slot
from .late import Backwards, LateLayer
from .layers import StoredLayer
from .live import LiveLayer
from .load import opened
from .opening import Opening
from .reader import StoredRecording
from .reduced import States
from .steps import steps
from .units import key_call
from .warned import keep_warnings
from .writer import Writer


class Passes(Protocol):
    """What numbers the passes of the block."""

    count: int
    raised: set[int]
    undecided: set[int]  #: those that may still be dropped

    def count_complete(self) -> int:
        """Return how many passes are complete: nothing is going to be recorded of those before this number."""


class Stream:
    """A path that is being recorded into: opened before the block begins, closed when it has ended."""

    def __init__(
        self,
        folder: Folder,
        description: Description,
        passes: Passes,
        *,
        resume: bool = False,
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
        self.where = str(disk)
        self._before: StoredRecording[Any] = StoredRecording(disk, [rank], only=rank.number)
        self._after: StoredRecording[Any] | None = None
        #: The number of each layer among those of its role, which is the same in all runs.
        self._numbers: defaultdict[Role, dict[str, int]] = defaultdict(dict)
        for layer in description.layers:
            self._numbers[layer.role][layer.name] = len(self._numbers[layer.role])
        for slot in ledger.layers:
            self._numbers[slot.role][slot.name] = slot.number
        #: The layers that have calls, by the first of them.
        self.order: Sequence[str] = [*self._before._run.order]
        self.error: str | None = "the recorder was garbage-collected before the block ended"
        self.closed = False
        self._backwards = Backwards(passes.count_complete)
        self._writer = Writer(
            self._opening.own,
            ledger,
            folder,
            self._backwards.count_complete,
            passes.raised,
            late=self._backwards.take,
        )
        #: Write a call, sooner or later; there will be calls of a pass that come when it is complete.
        self.keep, self.expect = self._writer.keep, self._writer.expect

    # --- Layers ----------------------------------------------------------------------------------------

    def layer(self, role: Role, name: str, kind: str) -> Layer[Any]:
        """Return the layer that stands for values of this role."""
        slot = self._slot(role, name, kind)
        if role == "gradient":
            return LateLayer(self, slot, self._backwards)
        return LiveLayer(self, slot)

    def states(self, role: Role, name: str, kind: str) -> States:
        """Return where the states of a reduction of these values are written to."""
        return States(self, self._slot(role, name, kind), self._backwards)

    def _slot(self, role: Role, name: str, kind: str) -> Slot:
        numbers = self._numbers[role]
        number = numbers.setdefault(name, max(numbers.values(), default=-1) + 1)
        return Slot(role, number, name, kind)

    def position(self) -> Position:
        """Return the position of this process among the ranks."""
        return self._opening.position

    def added_before(self) -> dict[str, Layer[Any]]:
        """Return the layers of names that were added in earlier runs."""
        return {name: self.layer("added", name, "added") for name in [*self._numbers["added"]]}

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
        return self._before._run.units.copy()

    def done_before(self) -> Iterable[Key]:
        """Return the keys of the units that all ranks have committed, in earlier runs."""
        return opened(self.disk).done if self._resumed else ()

    def doubt(self) -> str | None:
        """Return what suggests that passes are not what the user works off, in a run that goes on by their number."""
        if not self._resumed or len(self._recording()._run.units):
            return None
        return steps(str(self.disk), self._recording())

    def keep_unit(self, number: int, key: Key) -> None:
        """The unit of pass ``number`` has ended, and is kept."""
        self.keep(key_call(number, key))

    def drop_unit(self, number: int) -> None:
        """The unit of pass ``number`` has failed."""
        self._writer.drop(number)

    # --- Ending ----------------------------------------------------------------------------------------

    def warned(self, messages: Sequence[str]) -> None:
        """Keep what the end of the block warns of beside the shards."""
        keep_warnings(self._opening.own, self._opening.ledger.heading.began, messages)

    def close(self) -> None:
        """Commit what is complete. May be called again."""
        self.closed = True
        try:
            passes = self._passes.count if self.error is None else self._passes.count_complete()
            self._writer.close(passes, self.error)
            self._passes.count = self._writer.committed
        finally:
            self._opening.lock.release()

    def failure(self) -> WriteError | None:
        """Return the error of the writer that no call has raised."""
        return self._writer.take_error()
