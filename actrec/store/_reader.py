"""``load()``: a stored recording, opened as the same kind of object as one in memory.

Opening reads the headers of the shards. Their data is mapped when it is first asked for, privately: what
is written to a value reaches the memory of this process alone, never the file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Final, NoReturn, overload

import torch
from torch import Tensor

from actrec._display import shown
from actrec._forms import Form, form
from actrec._join import joined
from actrec._passes import Count
from actrec._recording import Layer, Recording
from actrec.errors import ActrecError, RecordingNotFoundError

from ._cache import CACHE_BYTES, Cache
from ._format import END, MANIFEST, Role, corrupt
from ._index import Group, Part, Shard, numbers
from ._manifest import Ending, Manifest, read_ending, read_manifest
from ._place import place

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from actrec._nested import Value

    from ._place import Place

__all__ = ["Rank", "StoredLayer", "StoredRecording", "load", "opened"]

RANK: Final = re.compile(r"rank-[0-9]{5}")
_SHARD: Final = re.compile(r"[0-9]{6,}\.safetensors")


def load(
    path: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> StoredRecording:
    """Open a stored recording.

    >>> import tempfile, torch, actrec
    >>> from torch import nn
    >>> folder = tempfile.mkdtemp() + "/run"
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with actrec.record(model, "0", into=folder) as acts:
    ...     for batch in torch.randn(2, 5, 4):
    ...         output = model(batch)
    >>> acts = actrec.load(folder)
    >>> acts
    stored Sequential: 1 layer, 2 passes, 120 B
    layer  type    calls  shape   dtype    memory
    0      Linear      2  (5, 3)  float32   120 B
    >>> acts["0"][1].shape, acts["0"].cat().shape
    (torch.Size([5, 3]), torch.Size([10, 3]))

    Opening reads a header for each shard and no data, so it is fast however large the recording is. A
    call is read from the disk when its values are used: it is a view of the mapped file. Writing to it
    never changes the file, but is seen wherever this recording gives out the same bytes again; take a
    ``clone()`` to write to. ``cat()`` and ``stack()`` return new tensors.

    A recording that was not closed properly (the process was killed, the block left by an exception, the
    disk full) has all the passes that were committed, and says so: ``acts.complete`` is false.

    Containers come back in their structure: tuples, lists, dicts, named tuples, NumPy arrays and Python's
    numbers and strings as themselves, dataclasses and other classes as :class:`actrec.store.Fields`. No
    class that a file names is ever imported.

    A URL such as ``"s3://bucket/run"`` is opened through ``fsspec``. What is asked for is downloaded, in blocks,
    into a cache: the last ``cache_bytes`` of it, in files without names in the folder ``cache`` (the system's
    temporary one), which are gone with this process. For a path on disk these options mean nothing.

    Args:
        path: the folder, or the URL.
        storage_options: what ``fsspec`` passes to the file system of a URL: credentials, an endpoint.
        cache: the folder of the cache.
        cache_bytes: how large the cache may grow, beyond what values in use keep.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        CorruptRecordingError: a file is damaged; the message names it and what is wrong with it. Only
            headers are checked: :func:`verify` also checks the data.
        ReadError: an object store could not be reached, or refused.
    """
    return opened(place(path, storage_options, Cache(cache, cache_bytes)))


def opened(disk: Place) -> StoredRecording:
    """Open what is at a place."""
    try:
        manifest = read_manifest(disk)
    except (FileNotFoundError, NotADirectoryError):
        ranks = filter(RANK.fullmatch, disk.names())
        if any(shard_names(disk / rank) for rank in ranks):
            raise corrupt(disk.shown(MANIFEST), "it is missing") from None
        there = "no actrec.json in that folder" if disk.exists() else "no such folder"
        message = f"load({str(disk)!r}): there is no recording there ({there})."
        raise RecordingNotFoundError(message) from None
    folders = filter(RANK.fullmatch, disk.names())
    return StoredRecording(disk, manifest, [Rank(disk / name, manifest) for name in folders])


class Rank:
    """What one writer has written: the folder ``rank-00000``, say."""

    def __init__(self, disk: Place, manifest: Manifest) -> None:
        self.number = rank_number(disk.name)
        self.shards: list[Shard] = []
        self.committed = 0
        self.ending: Ending | None = read_ending(disk, manifest.recording)
        for number, name in enumerate(shard_names(disk)):
            if name != shard_name(number):
                raise corrupt(disk.shown(shard_name(number)), "it is missing")
            self._add(Shard(disk, name), manifest, number)
        if self.ending is not None:
            if len(self.shards) < self.ending.shards:
                raise corrupt(disk.shown(shard_name(len(self.shards))), "it is missing")
            if (len(self.shards), self.committed) != (self.ending.shards, self.ending.passes):
                raise corrupt(
                    disk.shown(END), "it speaks of fewer shards or other passes than there are"
                )

    def _add(self, shard: Shard, manifest: Manifest, number: int) -> None:
        check_identity(shard, manifest.recording, self.number, number)
        if shard.heading.committed < self.committed:
            raise corrupt(shard.path, "it commits fewer passes than the shard before it")
        self.committed = shard.heading.committed
        self.shards.append(shard)

    def leftovers(self) -> Iterator[Shard]:
        """The shards with calls of a pass that was never completed."""
        for shard in self.shards:
            passes = (run for part in shard.parts for run in part.passes)
            if shard.heading.part and any(first >= self.committed for first, _, _ in passes):
                yield shard

    def committed_shards(self) -> list[Shard]:
        """The shards with calls that count."""
        left = set(self.leftovers())
        return [shard for shard in self.shards if shard not in left]

    @property
    def complete(self) -> bool:
        """Whether the writer was closed properly."""
        return self.ending is not None and self.ending.error is None


def rank_number(folder: str) -> int:
    """The rank that a folder is of."""
    return int(folder.partition("-")[2])


def check_identity(shard: Shard, recording: str, rank: int, number: int) -> None:
    """Check that a shard is what its place says, and no other file that was put there."""
    heading = shard.heading
    for what, found, expected in (
        ("recording", heading.recording, recording),
        ("rank", heading.rank, rank),
        ("shard", heading.shard, number),
    ):
        if found != expected:
            defect = f"it says that it belongs to {what} {str(found)[:60]}, not {expected}"
            raise corrupt(shard.path, defect)


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:06d}.safetensors"


def shard_names(disk: Place) -> list[str]:
    """The files of all shards, in order."""
    return sorted(filter(_SHARD.fullmatch, disk.names()), key=lambda name: (len(name), name))


class StoredLayer(Layer):
    """A layer on disk: indexed and iterated over like a list, each call read when it is asked for."""

    def __init__(self, name: str, kind: str, parts: Iterable[Part] = ()) -> None:
        self.name = name
        self.type = kind
        parts = list(parts)
        self._groups: list[Group] = [group for part in parts for group in part.groups]
        self._stretches = [stretch for part in parts for stretch in part.calls]
        self._runs = [run for part in parts for run in part.passes]
        self._starts = list(accumulate((stretch.many for stretch in self._stretches), initial=0))
        # Calls are listed by pass. They are stored so, unless several ranks or threads have written them.
        bounds = ((first, first + step * (many - 1)) for first, step, many in self._runs if many)
        ordered = all(a[1] <= b[0] for a, b in pairwise(bounds))
        self._order: list[int] | None = None
        if not ordered:
            passes = list(numbers(self._runs))
            self._order = sorted(range(len(passes)), key=passes.__getitem__)

    @property
    def passes(self) -> list[int]:
        return sorted(numbers(self._runs))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value:
        if isinstance(index, slice):
            return [self._call(at) for at in range(len(self))[index]]
        try:
            return self._call(range(len(self))[index])
        except IndexError:
            message = f"acts[{self.name!r}][{index}]: there are {len(self)} calls"
            raise IndexError(message) from None

    def __iter__(self) -> Iterator[Value]:
        return map(self._call, range(len(self)))

    def _call(self, index: int) -> Value:
        group, call = self._place(index)
        return group.value(call)

    def _place(self, index: int) -> tuple[Group, int]:
        """Where a call is: in which group, and the how-manieth there."""
        if self._order is not None:
            index = self._order[index]
        at = bisect_right(self._starts, index) - 1
        group, first, _ = self._stretches[at]
        return group, first + index - self._starts[at]

    def _forms(self) -> Iterable[Form]:
        forms: dict[object, Form] = {}
        for index in range(len(self)):
            group, call = self._place(index)
            look = id(group), *(leaf.shape(call) for leaf in group.leaves)
            if look not in forms:
                forms[look] = form(group.example(call))
            yield forms[look]

    def _places(self) -> Iterator[tuple[object, int]]:
        for group in self._groups:
            for leaf in group.leaves:
                for begin, nbytes in leaf.pieces():
                    yield (group.shard.path, begin), nbytes

    def cat(self, dim: int = 0, *, release: bool = False) -> Value:  # noqa: ARG002
        """Join all calls along an existing dimension. See :meth:`Layer.cat`; nothing is released."""
        columns = self._columns() if dim == 0 else None
        if columns is None or any(leaf.scalar for leaf in self._groups[0].leaves):
            return joined(self, "cat", dim)
        return self._groups[0].filled([torch.cat(column) for column in columns])

    def stack(self, dim: int = 0, *, release: bool = False) -> Value:  # noqa: ARG002
        """Join all calls along a new dimension. See :meth:`Layer.stack`; nothing is released."""
        columns = self._columns() if dim == 0 else None
        if columns is None:
            return joined(self, "stack", dim)
        shapes = [leaf.shape(0) for leaf in self._groups[0].leaves]
        if any(
            len({rows for g in self._groups for rows in g.leaves[k].rows}) > 1
            for k in range(len(shapes))
        ):
            return joined(self, "stack", dim)  # which says what does not fit
        pairs = zip(columns, shapes, strict=True)
        return self._groups[0].filled([torch.cat(c).view(len(self), *shape) for c, shape in pairs])

    def _columns(self) -> list[list[Tensor]] | None:
        """For each tensor of a value, what each group has of it, whole; ``None`` if calls have to be joined one by one."""
        if self._order is not None or not self._groups or not self._groups[0].leaves:
            return None
        likes = {
            (
                group.structure,
                *((leaf.dtype, leaf.tail, leaf.expanded, leaf.scalar) for leaf in group.leaves),
            )
            for group in self._groups
        }
        leaves = self._groups[0].leaves
        if len(likes) > 1 or any(leaf.expanded for leaf in leaves):
            return None
        return [[_whole(group, k) for group in self._groups] for k in range(len(leaves))]

    def keep(self, value: Value, number: int) -> NoReturn:  # noqa: ARG002
        self._read_only("keep")

    def clear(self) -> NoReturn:
        self._read_only("clear")

    def _read_only(self, method: str) -> NoReturn:
        message = (
            f"acts[{self.name!r}].{method}(): this is a stored recording, which can only be read."
        )
        raise ActrecError(message)


def _whole(group: Group, number: int) -> Tensor:
    leaf = group.leaves[number]
    return leaf.whole(group.shard.storage, leaf.before[-1], *leaf.tail)


class StoredRecording(Recording):
    """A recording on disk, as :func:`actrec.load` opens it."""

    def __init__(self, disk: Place, manifest: Manifest, ranks: Sequence[Rank]) -> None:
        self._place = disk
        self._ranks = ranks
        self.chosen = frozenset(layer.name for layer in manifest.layers)
        parts = self._parts(ranks)
        info = {layer.name: layer.type for layer in manifest.layers}
        layers = _layers("output", info, parts) | _layers("added", {}, parts)
        self._input_layers = _layers("input", info, parts) if manifest.inputs else {}
        grads = _layers("gradient", info, parts) if manifest.grads else {}
        order = [name for role, name in parts if role in {"output", "added"}]
        committed = Count(max((rank.committed for rank in ranks), default=0))
        super().__init__(
            manifest.model,
            layers,
            manifest.names,
            order,
            committed,
            inputs=self._input_layers,
            grads=grads,
        )

    @staticmethod
    def _parts(ranks: Sequence[Rank]) -> dict[tuple[Role, str], list[Part]]:
        parts: dict[tuple[Role, str], list[Part]] = {}
        for shard in chain.from_iterable(rank.committed_shards() for rank in ranks):
            for part in shard.parts:
                parts.setdefault((part.slot.role, part.slot.name), []).append(part)
        return parts

    @property
    def complete(self) -> bool:
        """Whether the recording was closed properly, so that nothing is missing at its end."""
        return bool(self._ranks) and all(rank.complete for rank in self._ranks)

    def _title(self) -> str:
        return f"stored {shown(self._model)}" + ("" if self.complete else " (incomplete)")


def _layers(
    role: Role, info: Mapping[str, str], parts: Mapping[tuple[Role, str], list[Part]]
) -> dict[str, Layer]:
    kinds = {name: found[0].slot.type for (kind, name), found in parts.items() if kind == role}
    return {
        name: StoredLayer(name, kind, parts.get((role, name), ()))
        for name, kind in {**info, **kinds}.items()
    }
