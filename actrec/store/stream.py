"""Recording into a path: the destination that makes layers whose values are written to the disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
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
    """Numbers the passes of the block."""

    count: int
    raised: set[int]

    @property
    def undecided(self) -> Collection[int]:
        """Those that may still be dropped; it changes."""

    def count_complete(self) -> int:
        """Return how many passes are complete: those before this number will get no more calls."""


class Stream:
    """A path that is being recorded into: opened before the block begins, closed when it has ended."""

    def __init__(
        self,
        folder: Folder,
        description: Description,
        passes: Passes,
        order: dict[str, None],
        *,
        resume: bool = False,
    ) -> None:
        """``order`` gets the layers, in the order in which their first calls ended: those of earlier runs here."""
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
        order.update(dict.fromkeys(self._before._run.order))
        self.error: str | None = "the recorder was garbage-collected before the block ended"
        self.closed = False
        self._backwards = Backwards(passes.count_complete)
        self._writer = Writer(
            self._opening.own,
            ledger,
            folder,
            self._backwards.count_complete,
            passes.raised,
            order=order,
            late=self._backwards.take,
        )
        self.keep, self.keep_later = self._writer.keep, self._writer.keep_later

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
        """Return the layers of values that the user added in earlier runs, by name."""
        return {name: self.layer("added", name, "added") for name in [*self._numbers["added"]]}

    def stored(self, slot: Slot) -> StoredLayer:
        """Return a layer on the disk; until the block ends, as it was when it began."""
        return self._recording().recorded.get((slot.role, slot.name)) or StoredLayer(
            slot.name, slot.type
        )

    def _recording(self) -> StoredRecording[Any]:
        """Return the recording on the disk; until the block ends, as it was when it began."""
        if self.closed and self._after is None:
            self._after = opened(self.disk, rank=self._opening.rank.number)
        return self._before if self._after is None else self._after

    # --- Units -----------------------------------------------------------------------------------------

    def units(self) -> Units:
        """Return the units that this rank has recorded before."""
        return self._before._run.units.copy()

    def done_before(self) -> Iterable[Key]:
        """Return the keys of the units that any rank has committed in earlier runs."""
        return opened(self.disk).done if self._resumed else ()

    def doubt(self) -> str | None:
        """Return why it may be wrong to resume by the number of passes, if there are no units and it seems so."""
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
        """Write the warnings at the end of the block to a file next to the shards."""
        keep_warnings(self._opening.own, self._opening.ledger.heading.began, messages)

    def close(self) -> None:
        """Commit the complete passes. May be called again."""
        self.closed = True
        try:
            passes = self._passes.count if self.error is None else self._passes.count_complete()
            self._writer.close(passes, self.error)
            self._passes.count = self._writer.committed
        finally:
            self._opening.lock.close()

    def failure(self) -> WriteError | None:
        """Return the error of the writer, if no call has raised it."""
        return self._writer.take_error()
