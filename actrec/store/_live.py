"""Recording into a path: what stands in the recorder for layers whose values go to the disk."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn, overload

from actrec._recording import Layer
from actrec.errors import (
    ActrecError,
    CaptureError,
    OptionError,
    RecordingExistsError,
    WriteError,
)

from ._format import END, MANIFEST, MAX_VALUE, OWN, UNFINISHED, Defect, Role, Slot, corrupt
from ._manifest import Manifest, read_manifest
from ._outline import PassRuns, form_of
from ._place import place
from ._rank import here
from ._reader import (
    Rank,
    StoredLayer,
    StoredRecording,
    opened,
    rank_folder,
    rank_folders,
    shard_name,
    shard_names,
)
from ._shard import Call, Heading, described, storable
from ._shard import write as write_shard
from ._tree import TOO_LARGE, Encoded, encode
from ._writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from actrec._forms import Form
    from actrec._nested import Value
    from actrec._passes import Passes

    from ._folder import Folder
    from ._place import Lock, Place

__all__ = ["LiveLayer", "Stream", "appearance", "claim", "encoded"]


def encoded(value: Value, *, parts: bool = False) -> Encoded:
    """Take a value apart into what is written; ``CaptureError`` if it cannot be stored.

    With ``parts``, a rank stores its part of a ``DTensor``, and relies on the others to do so too.
    """
    structure, tensors = encode(value, parts=parts)
    if described(structure, tensors) > MAX_VALUE:
        raise CaptureError(TOO_LARGE)
    return Encoded(structure, [storable(tensor) for tensor in tensors])


def appearance(found: Encoded) -> Form:
    """How a value looks to who reads it; ``CaptureError`` if no reader would take what is written of it."""
    try:
        return form_of(found.structure, found.tensors)
    except Defect as defect:
        message = f"it could not be read again: {defect}"
        raise CaptureError(message) from None


class Stream:
    """A path that is being recorded into: opened before the block begins, closed when it has ended."""

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        passes: Passes,
        *,
        resume: bool = False,
    ) -> None:
        rank, ranks, run = here(folder.rank, folder.world_size, folder.run)
        self._disk = place(folder)
        call = f"record(into={str(self._disk)!r})"
        if run is None and not resume:
            raise OptionError(_unnamed(call, rank, ranks))
        self._rank = rank
        self._passes = passes
        self._counts: dict[tuple[Role, str], StoredLayer] = {}
        self._added: dict[str, int] = {}
        self._chosen = len(manifest.layers)
        self.order: list[str] = []  # the layers that have calls, by the first of them
        self._stored: StoredRecording | None = None
        self.error: str | None = "the block was dropped without being left"
        self.closed = False
        own = self._disk / rank_folder(rank)
        names = {name: key for name, key in manifest.names.items() if name != key}
        manifest = replace(manifest, names=names, ranks=ranks, run=run or manifest.run)
        self._lock = claim(call, self._disk, own, manifest, resume=resume)
        try:
            self._writer = self._open(call, own, folder, manifest, resume=resume)
        except BaseException:
            self._lock.release()
            raise
        _opened.add(self)

    def _open(
        self, call: str, own: Place, folder: Folder, manifest: Manifest, *, resume: bool
    ) -> Writer:
        there = publish(call, self._disk, own, manifest, resume=resume)
        found = Rank(own, there)
        described = found.manifest
        if found.has_begun:
            described.check_same(self._disk, manifest)
            self._remember(StoredRecording(self._disk, there, [found], only=found.number))
            began = max(manifest.began, described.began + 1)  # clocks may be put back
            described = replace(described, ranks=manifest.ranks, began=began)
        else:
            began = manifest.began if resume else there.began
            described = replace(manifest, recording=there.recording, run=there.run, began=began)
        if described != found.manifest:
            own.commit(OWN, lambda file: file.write(described.own_content()))
        shards = _discard_leftovers(call, own, found) if resume else found.count
        self._passes.count = found.committed
        self._passes.raised.update(found.outline.raised)
        return Writer(
            own,
            there.recording,
            folder,
            rank=found.number,
            shards=shards,
            committed=found.committed,
            raised=self._passes.raised,
        )

    def _remember(self, before: StoredRecording) -> None:
        """Know what was recorded before this run."""
        self.order = before.execution_order
        chosen = before.chosen
        for name, layer in before.items():
            if name not in chosen:
                self._added[name] = self._chosen + len(self._added)
            self._counts["output" if name in chosen else "added", name] = layer  # type: ignore[assignment]
        for name, layer in before._input_layers.items():
            self._counts["input", name] = layer  # type: ignore[assignment]

    # --- Layers ----------------------------------------------------------------------------------------

    def layer(self, role: Role, index: int, name: str, kind: str) -> LiveLayer:
        """The layer that stands for a chosen one."""
        before = self._counts.get((role, name), StoredLayer(name, kind))
        return LiveLayer(self, Slot(role, index, name, kind), before)

    def added(self, name: str) -> LiveLayer:
        """The layer that stands for values that are added by a name."""
        index = self._added.setdefault(name, self._chosen + len(self._added))
        return self.layer("added", index, name, "added")

    def added_before(self) -> dict[str, LiveLayer]:
        """The layers of names that were added in earlier runs."""
        return {name: self.added(name) for name in self._added}

    def keep(self, slot: Slot, value: Encoded, number: int) -> None:
        """Write a value, sooner or later."""
        call = Call(slot, number, value.structure, value.tensors, 0)
        self._writer.keep(call, self._passes.complete)

    def stored(self, slot: Slot) -> StoredLayer:
        """What is on the disk of a layer, after the end."""
        if not self.closed:
            message = (
                f"acts[{slot.name!r}]: its values are being written to {self._disk}. "
                "Read them after the with block, or from another process with actrec.load()."
            )
            raise ActrecError(message)
        if self._stored is None:
            self._stored = opened(self._disk, rank=self._rank)
        layers = self._stored._input_layers if slot.role == "input" else self._stored._layers
        layer = layers.get(slot.name)
        return layer if isinstance(layer, StoredLayer) else StoredLayer(slot.name, slot.type)

    # --- Ending ----------------------------------------------------------------------------------------

    def left_by(self, error: BaseException | None) -> None:
        """Say how the block was left."""
        self.error = None if error is None else type(error).__name__

    def close(self) -> None:
        """Commit what is complete. May be called again."""
        self.closed = True
        _opened.discard(self)
        try:
            passes = self._passes.count if self.error is None else self._passes.complete()
            self._writer.close(passes, self.error)
            self._passes.count = self._writer.committed
        finally:
            self._lock.release()

    def failure(self) -> WriteError | None:
        """The error of the writer that no call has raised."""
        return self._writer.unseen()


# --- Beginning ---------------------------------------------------------------------------------------


def claim(call: str, disk: Place, own: Place, new: Manifest, *, resume: bool = False) -> Lock:
    """Make the folder of this rank, or with ``resume`` take the one that is there; nobody else gets it."""
    if disk.is_file():
        raise _taken(call, "that is a file")
    names = disk.names()
    is_recording = MANIFEST in names or any(rank_folders(disk))
    if names and not is_recording:
        raise _taken(call, f"that folder has other things in it ({names[0][:60]!r})")
    if is_recording and not resume:
        if new.ranks == 1 or own.name in names:
            raise _taken(call, "there is a recording already", _GO_ON)
        if MANIFEST in names:
            _check_run(call, read_manifest(disk), new)
    try:
        own.make()
    except FileExistsError:
        if not resume:
            raise _taken(call, "another run has just begun there") from None
    try:
        return own.lock()
    except BlockingIOError:
        raise _taken(call, _NOW) from None


def publish(call: str, disk: Place, own: Place, new: Manifest, *, resume: bool = False) -> Manifest:
    """Describe the recording, if no other rank has done so; return what describes it."""
    try:
        return _published(call, disk, own, new, resume=resume)
    except BaseException:
        own.unmake()
        raise


def _published(call: str, disk: Place, own: Place, new: Manifest, *, resume: bool) -> Manifest:
    if MANIFEST not in disk.names():
        for rank in rank_folders(disk) if resume else [own]:
            # Another rank may have written both since.
            if shard_names(rank) and MANIFEST not in disk.names():
                raise corrupt(disk.shown(MANIFEST), "it is missing")
        with suppress(FileExistsError):
            disk.commit(MANIFEST, lambda file: file.write(new.content()), exclusive=True, by=own)
            return new
    there = read_manifest(disk)
    if not resume:
        _check_run(call, there, new)
    return there


def _check_run(call: str, there: Manifest, new: Manifest) -> None:
    """The ranks of one run share a path, and nobody else."""
    if there.run != new.run:
        ranks = f"a run of {there.ranks} ranks" if there.ranks > 1 else "a single process"
        raise _taken(
            call, f"{ranks} records there, or has recorded, and this is another run", _GO_ON
        )


def _unnamed(call: str, rank: int, ranks: int) -> str:
    return (
        f"{call}: this process is rank {rank} of {ranks}, and nothing says of which run, as its launcher has given it no name. "
        "Ranks of different runs could end up in one recording. Give all ranks of this run a name that no other run has: "
        "record(..., into=Folder(path, run='2026-11-28-a')), or torchrun --rdzv-id=NAME."
    )


_GO_ON = "Go on with it: record(..., resume=True); or delete it, or choose another path."


def _taken(call: str, why: str, what_to_do: str = "Choose another path.") -> RecordingExistsError:
    return RecordingExistsError(f"{call}: {why}. {what_to_do}")


def _discard_leftovers(call: str, own: Place, found: Rank) -> int:
    """Take away what was not finished, empty the shards of passes that never were, and forget how the run before ended.

    Return how many shards there are then.
    """
    count = found.count
    leftovers = [shard.heading for shard in found.leftovers()]
    unfinished = [name for name in own.names() if name.endswith(UNFINISHED)]
    if leftovers or unfinished:
        # They may be those of a run that is alive, though no lock says so. It can go no further than this shard, whose name
        # only one can have.
        heading = Heading(found.manifest.recording, found.number, count, found.committed)
        try:
            own.begin(shard_name(count), partial(write_shard, heading=heading, calls=[])).finish()
        except FileExistsError:
            raise _taken(call, _NOW) from None
        count += 1
    own.remove(END)
    for heading in leftovers:
        write = partial(write_shard, heading=heading._replace(part=False), calls=[])
        own.commit(shard_name(heading.shard), write)
    for name in unfinished:
        own.remove(name)
    return count


_NOW = "another run is recording there now"


_LOOKS: Final = 256  # that are known not to need another look


class LiveLayer(Layer):
    """A layer whose values go to the disk. They can be read when the block has ended."""

    def __init__(self, stream: Stream, slot: Slot, before: StoredLayer) -> None:
        self.name = slot.name
        self.type = slot.type
        self._stream = stream
        self._slot = slot
        self._before = before
        self._passes = PassRuns()
        self._bytes = 0
        self._looks: dict[object, Form] = {}
        self._new: dict[Form, None] = {}

    def keep(self, value: Value, number: int) -> None:
        found = encoded(value, parts=True)
        look = found.structure, *((t.dtype, tuple(t.shape)) for t in found.tensors)
        size = sum(tensor.nbytes for tensor in found.tensors)
        if look not in self._looks:
            if len(self._looks) >= _LOOKS:  # a number in a value makes another structure
                self._looks.clear()
            self._looks[look] = appearance(found)
        self._stream.keep(self._slot, found, number)
        self._new[self._looks[look]] = None
        self._passes.add(number)
        self._bytes += size

    @property
    def passes(self) -> Sequence[int]:
        if self._stream.closed:
            return self._stored.passes
        return [*self._before.passes, *self._passes]

    def __len__(self) -> int:
        if self._stream.closed:
            return len(self._stored)
        return len(self._before) + len(self._passes)

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value:
        return self._stored[index]

    def __iter__(self) -> Iterator[Value]:
        return iter(self._stored)

    def nth(self, number: int) -> Layer:
        """Return one call of each pass. See :meth:`Layer.nth`."""
        return self._stored.nth(number)

    def cat(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along an existing dimension. See :meth:`Layer.cat`."""
        return self._stored.cat(dim, release=release)

    def stack(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along a new dimension. See :meth:`Layer.stack`."""
        return self._stored.stack(dim, release=release)

    def _forms(self) -> Iterable[Form]:
        return self._stored._forms()

    def _different_forms(self) -> Iterable[Form]:
        if self._stream.closed:
            return self._stored._different_forms()
        return dict.fromkeys([*self._before._different_forms(), *self._new])

    def _seen(self) -> tuple[list[Form], int]:
        return list(self._different_forms()), self.nbytes

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes if self._stream.closed else self._before.nbytes + self._bytes

    def _places(self) -> Iterator[tuple[object, int]]:
        if self._stream.closed:
            return self._stored._places()
        return iter([*self._before._places(), (id(self), self._bytes)])

    def clear(self) -> NoReturn:
        message = (
            f"acts[{self.name!r}].clear(): what was written to a path stays there. To keep only a part of a "
            "run, record that part: acts.pause() records nothing."
        )
        raise ActrecError(message)

    @property
    def _stored(self) -> StoredLayer:
        return self._stream.stored(self._slot)

    def __reduce__(self) -> tuple[Callable[..., StoredLayer], tuple[StoredLayer]]:
        # What is copied or pickled is what was stored, not the storing of it.
        return _itself, (self._stored,)


def _itself(layer: StoredLayer) -> StoredLayer:
    return layer


# --- Forked processes --------------------------------------------------------------------------------

_opened: weakref.WeakSet[Stream] = weakref.WeakSet()


def _forget_locks() -> None:
    """A forked process must not hold on to its parent's locks."""
    for stream in _opened:
        stream._lock.release()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows
    os.register_at_fork(after_in_child=_forget_locks)
