"""Recording into a path: what stands in the recorder for layers whose values go to the disk."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, overload

from typing_extensions import override

from actrec._recordings.layer import Layer
from actrec._recordings.passes import PassNumbers
from actrec.errors import ActrecError, OptionError, RecordingExistsError, WriteError

from . import shard
from .description import read_description
from .format import DESCRIPTION, Role, Slot
from .index import shard_name
from .ledger import Ledger
from .place import place
from .rank import ANY_RUN, here
from .reader import (
    Rank,
    StoredLayer,
    StoredRecording,
    is_described,
    opened,
    rank_folder,
    rank_folders,
)
from .runs import PassRuns
from .shard import Call, storable
from .values import encode
from .writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from actrec._values.containers import Value
    from actrec._values.summary import Summary

    from .description import Description
    from .folder import Folder
    from .safetensors import Writable

__all__ = ["LiveLayer", "Opening", "Stream"]


class Opening:
    """The folder of a rank, taken by this process for as long as it records there.

    Args:
        call: who asks, for messages.
        folder: the path and its settings.
        new: what is going to be recorded.
        resume: whether what is there may be gone on with.
        alone: whether this process is the only one, whatever launched it.

    Raises:
        RecordingExistsError: there is something at the path that this run has no part in; it was not touched.
        ResumeError: what is there was recorded with other layers or options.
    """

    def __init__(
        self,
        call: str,
        folder: Folder,
        new: Description,
        *,
        resume: bool = False,
        alone: bool = False,
    ) -> None:
        self.disk = place(folder)
        self._call = call.format(path=str(self.disk))
        position = here(0, 1) if alone else here(folder.rank, folder.world_size, folder.run)
        self._position = position
        self.own = self.disk / rank_folder(position.rank)
        if not resume:
            self._check_named()
        self._check_path()
        if not resume:
            self._check_new(position.run)
        self.own.make()
        try:
            self.lock = self.own.lock()
        except BlockingIOError:
            raise self._taken(_NOW) from None
        try:
            self.rank, self.ledger = self._begun(new, resume=resume)
            self.own.sweep()
        except BaseException:
            self.lock.release()
            raise

    # --- What is there ---------------------------------------------------------------------------------

    def _check_named(self) -> None:
        rank, ranks, run = self._position
        if run is None:
            message = (
                f"{self._call}: this process is rank {rank} of {ranks}, and nothing says of which run, as its launcher has given "
                "it no name. Ranks of different runs could end up in one recording. Give all ranks of this run a name that no "
                "other run has: record(..., into=Folder(path, run='2026-11-28-a')), or torchrun --rdzv-id=NAME."
            )
            raise OptionError(message)

    def _check_path(self) -> None:
        """Check that what is there is a recording, or nothing."""
        if self.disk.is_file():
            why = "that is a file"
            raise self._taken(why)
        names = self.disk.names()
        if names and not rank_folders(self.disk):
            why = f"that folder has other things in it ({names[0][:60]!r})"
            raise self._taken(why)

    def _check_new(self, run: str | None) -> None:
        """Check that this rank has not recorded yet, and that all others which have are of the same run."""
        if is_described(self.own):
            why = "there is a recording already"
            raise self._taken(why, _GO_ON)
        self._check_others(run)

    def _check_others(self, run: str | None) -> None:
        for other in self._others():
            if other.recording != run:
                many = "a single process" if other.ranks == 1 else f"a run of {other.ranks} ranks"
                why = f"{many} records there, or has recorded, and this is another run"
                raise self._taken(why, _GO_ON)

    def _others(self) -> Iterator[Description]:
        """What other ranks record there."""
        for folder in rank_folders(self.disk):
            if folder.name != self.own.name and is_described(folder):
                yield read_description(folder)

    # --- Beginning -------------------------------------------------------------------------------------

    def _begun(self, new: Description, *, resume: bool) -> tuple[Rank, Ledger]:
        """Describe what is recorded, if that was not done before; return what there is."""
        if resume and is_described(self.own):
            rank = Rank(self.own)
            rank.description.check_same(self.disk, new)
            return rank, self._resumed(rank)
        run = self._position.run or ANY_RUN
        other = next(self._others(), None) if resume else None
        recording = run if other is None else other.recording
        self._describe(replace(new, recording=recording, ranks=self._position.ranks))
        rank = Rank(self.own)
        return rank, Ledger(rank.index.heading)

    def _describe(self, new: Description) -> None:
        self._commit(DESCRIPTION, lambda file: file.write(new.content()), _BEGUN)
        try:  # of two runs that began at the same moment, the later one sees the other
            self._check_others(new.recording)
        except BaseException:
            self.own.remove(DESCRIPTION)
            raise

    def _resumed(self, rank: Rank) -> Ledger:
        """Go on after the last shard, with one that nobody else can write and that leaves out what was not completed.

        From there on, a run that is still alive, though no lock says so, cannot write.
        """
        ledger = Ledger(rank.index.heading, rank.index.layers).resumed(
            self._position.ranks, time.time_ns()
        )
        heading = ledger.next((), ledger.heading.committed)
        write = partial(shard.write, heading=heading, layers=ledger.layers, laid=())
        self._commit(shard_name(heading.shard), write, _NOW)
        return ledger

    def _commit(self, name: str, write: Callable[[Writable], object], taken: str) -> None:
        try:
            self.own.commit(name, write)
        except FileExistsError:
            raise self._taken(taken) from None
        except OSError as error:
            message = f"{self._call}: {self.own.shown(name)} could not be written: {error}."
            raise WriteError(message) from error

    def _taken(self, why: str, what_to_do: str = "Choose another path.") -> RecordingExistsError:
        return RecordingExistsError(f"{self._call}: {why}. {what_to_do}")


_BEGUN = "another run has just begun there"
_NOW = "another run is recording there now"
_GO_ON = "Go on with it: record(..., resume=True); or delete it, or choose another path."


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
        _open.add(self)

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
        structure, tensors = encode(value, parts=True)
        call = Call(slot, number, structure, [storable(tensor) for tensor in tensors])
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
        _open.discard(self)
        try:
            passes = self._passes.count if self.error is None else self._passes.complete()
            self._writer.close(passes, self.error)
            self._passes.count = self._writer.committed
        finally:
            self.release()

    def release(self) -> None:
        """Let others have the folder."""
        self._opening.lock.release()

    def failure(self) -> WriteError | None:
        """Return the error of the writer that no call has raised."""
        return self._writer.unseen()


class LiveLayer(Layer[Any]):
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
    def nth(self, number: int) -> Layer[Any]:
        """Return one call of each pass. See :meth:`Layer.nth`."""
        return self._stored.nth(number)

    @override
    def cat(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along an existing dimension. See :meth:`Layer.cat`."""
        return self._stored.cat(dim, release=release)

    @override
    def stack(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along a new dimension. See :meth:`Layer.stack`."""
        return self._stored.stack(dim, release=release)

    def _summary(self) -> Summary:
        return self._stored._summary() if self._stream.closed else self._looks

    @property
    @override
    def nbytes(self) -> int:
        return self._stored.nbytes if self._stream.closed else self._bytes

    @override
    def _seen(self) -> tuple[Summary, dict[object, int]]:
        return self._summary(), dict(self._places())

    @override
    def _places(self) -> Iterator[tuple[object, int]]:
        return iter([(id(self), self.nbytes)])

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


# --- Forked processes --------------------------------------------------------------------------------

_open: weakref.WeakSet[Stream] = weakref.WeakSet()


def _release_all() -> None:
    """Let go, in a forked process, of its parent's locks."""
    for stream in _open:
        stream.release()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows
    os.register_at_fork(after_in_child=_release_all)
