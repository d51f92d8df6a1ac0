"""Recording into a path: what stands in the recorder for layers whose values go to the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Protocol, overload

from typing_extensions import override

from actrec._recordings.passes import PassNumbers
from actrec.errors import ActrecError, WriteError

from .format import Role, Slot
from .layers import StoredLayer
from .layout import Call
from .load import opened
from .opening import Opening
from .read_only import LayerOnDisk
from .reader import StoredRecording
from .runs import PassRuns
from .writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from actrec._recordings.layer import Layer
    from actrec._recordings.passes import Moment
    from actrec._values.containers import Value
    from actrec._values.summary import Summary

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
        self._before: StoredRecording[Any] = StoredRecording(
            self._opening.disk, [rank], only=rank.number
        )
        self._chosen = len(description.layers)
        self._added = [slot.name for slot in ledger.layers if slot.role == "added"]
        self.order = (
            self._before.execution_order
        )  # the layers that have calls, by the first of them
        self._stored: StoredRecording[Any] | None = None
        self.error: str | None = "the recorder was garbage-collected before the block ended"
        self.closed = False
        self._passes.raised.update(ledger.heading.raised)
        self._writer = Writer(
            self._opening.own, ledger, folder, passes.complete, self._passes.raised
        )

    # --- Layers ----------------------------------------------------------------------------------------

    def layer(self, role: Role, index: int, name: str, kind: str) -> LiveLayer:
        """Return the layer that stands for a chosen one."""
        slot = Slot(role, index, name, kind)
        return LiveLayer(self, slot, self._found(self._before, slot))

    def added(self, name: str) -> LiveLayer:
        """Return the layer that stands for values that are added by a name."""
        if name not in self._added:
            self._added.append(name)
        return self.layer("added", self._chosen + self._added.index(name), name, "added")

    def added_before(self) -> dict[str, LiveLayer]:
        """Return the layers of names that were added in earlier runs."""
        return {name: self.added(name) for name in self._added}

    def keep(self, slot: Slot, value: Value, number: int) -> Call:
        """Write a value of a pass, sooner or later; return it as it is written."""
        call = Call.of(slot, number, value, parts=True)
        self._writer.keep(call)
        return call

    def stored(self, slot: Slot) -> StoredLayer:
        """Return what is on the disk of a layer, after the end."""
        if not self.closed:
            message = (
                f"acts[{slot.name!r}]: its values are being written to {self._opening.disk}. "
                "Read them after the with block, or from another process with actrec.load()."
            )
            raise ActrecError(message)
        if self._stored is None:
            self._stored = opened(self._opening.disk, rank=self._opening.rank.number)
        return self._found(self._stored, slot)

    def _found(self, recording: StoredRecording[Any], slot: Slot) -> StoredLayer:
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


class LiveLayer(LayerOnDisk):
    """A layer whose values go to the disk. They can be read when the block has ended."""

    def __init__(self, stream: Stream, slot: Slot, before: StoredLayer) -> None:
        self.name = slot.name
        self.type = slot.type
        self._stream = stream
        self._slot = slot
        self._before = before
        self._new_passes = PassRuns()
        self._bytes = before.nbytes
        self._looks = before._summary()

    @override
    def keep(self, value: Value, number: int) -> None:
        call = self._stream.keep(self._slot, value, number)
        self._new_passes.add(number)
        self._bytes += sum(tensor.nbytes for tensor in call.tensors)
        self._looks.add(value)

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

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    @override
    def __getitem__(self, index: int | slice) -> Value:
        return self._stored[index]

    @override
    def __iter__(self) -> Iterator[Value]:
        return iter(self._stored)

    @override
    def _moments(self) -> list[Moment]:
        return self._stored._moments()

    @override
    def _of(self, calls: list[int]) -> Layer[Any]:
        return self._stored._of(calls)

    @override
    def cat(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along an existing dimension. See :meth:`Layer.cat`."""
        return self._stored.cat(dim, release=release)

    @override
    def stack(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along a new dimension. See :meth:`Layer.stack`."""
        return self._stored.stack(dim, release=release)

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

    @property
    def _stored(self) -> StoredLayer:
        return self._stream.stored(self._slot)

    @override
    def __reduce__(self) -> tuple[Callable[..., StoredLayer], tuple[StoredLayer]]:
        # What is copied or pickled is what was stored, not the storing of it.
        return _itself, (self._stored,)


def _itself(layer: StoredLayer) -> StoredLayer:
    return layer
