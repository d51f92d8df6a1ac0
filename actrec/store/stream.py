"""Recording into a path: what stands in the recorder for layers whose values go to the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from typing_extensions import override

from actrec._recordings.passes import PassNumbers
from actrec.errors import ActrecError, WriteError

from .call import Call
from .format import Role, Slot
from .layers import StoredLayer
from .load import opened
from .opening import Opening
from .read_only import ReadOnlyLayer
from .reader import StoredRecording
from .runs import PassRuns
from .writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from actrec._recordings.layer import Layer
    from actrec._recordings.passes import Moment
    from actrec._values.containers import Value
    from actrec._values.join import How
    from actrec._values.summary import Summary

    from .call import Look
    from .description import Description
    from .folder import Folder

__all__ = ["LiveLayer", "Stream"]


class Passes(Protocol):
    """What numbers the passes of the block."""

    count: int
    raised: set[int]

    def complete(self) -> int:
        """Return how many passes are complete: nothing is going to be recorded of those before this number."""


class Stream:
    """A path that is being recorded into: opened before the block begins, closed when it has ended."""

    def __init__(
        self, folder: Folder, description: Description, passes: Passes, *, resume: bool = False
    ) -> None:
        self._opening = Opening("record(into={path!r})", folder, description, resume=resume)
        rank, ledger = self._opening.rank, self._opening.ledger
        self._passes = passes
        self._passes.count = rank.committed
        self._passes.raised.update(ledger.heading.raised)
        self.disk = disk = self._opening.disk
        self._before: StoredRecording[Any] = StoredRecording(disk, [rank], only=rank.number)
        self._after: StoredRecording[Any] | None = None
        self._chosen = sum(layer.role == "output" for layer in description.layers)
        self._added = [slot.name for slot in ledger.layers if slot.role == "added"]
        #: The layers that have calls, by the first of them.
        self.order = [*self._before._order]
        self.error: str | None = "the recorder was garbage-collected before the block ended"
        self.closed = False
        self._writer = Writer(self._opening.own, ledger, folder, passes.complete, passes.raised)

    # --- Layers ----------------------------------------------------------------------------------------

    def layer(self, role: Role, index: int, name: str, kind: str) -> LiveLayer:
        """Return the layer that stands for a chosen one."""
        return LiveLayer(self, Slot(role, index, name, kind))

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
        if self.closed and self._after is None:
            self._after = opened(self.disk, rank=self._opening.rank.number)
        recording = self._before if self._after is None else self._after
        return recording.layer(slot.role, slot.name) or StoredLayer(slot.name, slot.type)

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


class LiveLayer(ReadOnlyLayer):
    """A layer whose values go to the disk. They can be read when the block has ended."""

    def __init__(self, stream: Stream, slot: Slot) -> None:
        self.name = slot.name
        self.type = slot.type
        self._stream = stream
        self._slot = slot
        self._before = before = stream.stored(slot)
        self._new_passes = PassRuns()
        self._bytes = before.nbytes
        self._looks = before._summary()
        self._look: Look | None = None  # of the last call

    @override
    def keep(self, value: Value, number: int) -> None:
        call = Call.of(self._slot, number, value, parts=True, before=self._look)
        self._stream.keep(call)
        self._new_passes.add(number)
        self._bytes += call.look.nbytes
        if call.look is not self._look:
            self._look = call.look
            self._looks.add(value)

    @property
    def _stored(self) -> StoredLayer:
        if self._stream.closed:
            return self._stream.stored(self._slot)
        message = (
            f"acts[{self.name!r}]: its values are being written to {self._stream.disk}. "
            "Read them after the with block, or from another process with actrec.load()."
        )
        raise ActrecError(message)

    @property
    @override
    def passes(self) -> PassNumbers:
        if self._stream.closed:
            return self._stored.passes
        return PassNumbers([*self._before.passes, *self._new_passes])

    @override
    def __len__(self) -> int:
        if self._stream.closed:
            return len(self._stored)
        return len(self._before) + len(self._new_passes)

    @override
    def _call(self, index: int) -> Value:
        return self._stored._call(index)

    @override
    def _moments(self) -> list[Moment]:
        return self._stored._moments()

    @override
    def _of(self, calls: list[int]) -> Layer[Any]:
        return self._stored._of(calls)

    @override
    def _join(self, how: How, dim: int, *, release: bool = False) -> Value:
        stored = self._stored
        return stored.cat(dim) if how == "cat" else stored.stack(dim)

    @override
    def _summary(self) -> Summary:
        return self._stored._summary() if self._stream.closed else self._looks

    @property
    @override
    def nbytes(self) -> int:
        return self._stored.nbytes if self._stream.closed else self._bytes

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
