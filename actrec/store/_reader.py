"""``load()``: a stored recording, opened as the same kind of object as one in memory.

Opening reads the headers of the shards. Their data is mapped when it is first asked for, privately: what
is written to a value reaches the memory of this process alone, never the file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Final, NoReturn, overload

import torch
from torch import Tensor

from actrec._display import count, shown
from actrec._forms import Form, form
from actrec._join import joined
from actrec._passes import Count
from actrec._recording import Layer, Recording
from actrec.errors import ActrecError, OptionError, RecordingNotFoundError

from ._disk import Disk
from ._format import END, MANIFEST, Role, corrupt
from ._index import Group, Part, Shard, numbers
from ._manifest import Ending, Manifest, read_ending, read_manifest, read_own
from ._ranks import RankInfo, listed_ranks, summary
from ._whole import WholeLayer, has_parts

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from actrec._nested import Value

__all__ = ["Rank", "StoredLayer", "StoredRecording", "load"]

_RANK: Final = re.compile(r"rank-[0-9]{5}")
_SHARD: Final = re.compile(r"[0-9]{6,}\.safetensors")


def load(path: str | os.PathLike[str], *, rank: int | None = None) -> StoredRecording:
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

    What several ranks of ``torch.distributed`` have recorded is read as one recording: calls are ordered by
    pass, and within a pass by rank; ``acts[name].ranks`` says whose they are. The parts of a ``DTensor`` become one
    call, a plain tensor that is whole, assembled when it is asked for; where a part is missing, the call is left
    out. ``acts.ranks`` says how far each rank has come, and ``acts.rank(2)`` is what rank 2 has recorded, with its
    parts as they are. With ``rank=2``, nothing but the folder of that rank is opened: it can be read though
    another one is damaged.

    Containers come back in their structure: tuples, lists, dicts, named tuples, NumPy arrays and Python's
    numbers and strings as themselves, dataclasses and other classes as :class:`actrec.store.Fields`. No
    class that a file names is ever imported.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        OptionError: there is no such rank.
        CorruptRecordingError: a file is damaged; the message names it and what is wrong with it. Only
            headers are checked: :func:`verify` also checks the data.
    """
    disk = Disk(path)
    try:
        manifest = read_manifest(disk)
    except (FileNotFoundError, NotADirectoryError):
        if any(map(shard_names, rank_folders(disk))):
            raise corrupt(disk.path / MANIFEST, "it is missing") from None
        there = "no actrec.json in that folder" if disk.path.is_dir() else "no such folder"
        message = f"load({str(disk.path)!r}): there is no recording there ({there})."
        raise RecordingNotFoundError(message) from None
    if rank is None:
        ranks = [Rank(folder, manifest) for folder in rank_folders(disk)]
        return StoredRecording(disk, manifest, ranks)
    folders = {rank_number(folder.path.name): folder for folder in rank_folders(disk)}
    numbered = range(max([manifest.ranks - 1, *folders]) + 1)
    rank = _one_of(f"load({str(disk.path)!r}, rank={rank!r})", rank, numbered)
    ranks = [Rank(folders[rank], manifest)] if rank in folders else []
    return StoredRecording(disk, manifest, ranks, only=rank)


def _one_of(call: str, rank: int, there: Sequence[int]) -> int:
    if type(rank) is not int or rank not in there:
        ranks = f"rank {there[0]} alone" if len(there) == 1 else f"ranks {there[0]} to {there[-1]}"
        message = f"{call}: there is no such rank; the recording has {ranks}."
        raise OptionError(message)
    return rank


class Rank:
    """What one writer has written: the folder ``rank-00000``, say."""

    def __init__(self, disk: Disk, manifest: Manifest) -> None:
        self.number = rank_number(disk.path.name)
        self.manifest = read_own(disk, manifest) or manifest
        self.shards: list[Shard] = []
        self.committed = 0
        self.ending: Ending | None = read_ending(disk, manifest.recording)
        for number, name in enumerate(shard_names(disk)):
            if name != shard_name(number):
                raise corrupt(disk.path / shard_name(number), "it is missing")
            self._add(Shard(disk, name), manifest, number)
        if self.ending is not None:
            if len(self.shards) < self.ending.shards:
                raise corrupt(disk.path / shard_name(len(self.shards)), "it is missing")
            if (len(self.shards), self.committed) != (self.ending.shards, self.ending.passes):
                raise corrupt(
                    disk.path / END, "it speaks of fewer shards or other passes than there are"
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
    def has_begun(self) -> bool:
        """Whether anything was written, if only that there was nothing."""
        return bool(self.shards) or self.ending is not None

    @property
    def info(self) -> RankInfo:
        """How far the writer has come."""
        if self.ending is None:
            error: str | None = "killed or still recording"
        else:
            error = self.ending.error and f"left by {self.ending.error}"
        return RankInfo(self.number, self.committed, error is None, error)


def rank_folder(rank: int) -> str:
    """The folder of a rank."""
    return f"rank-{rank:05d}"


def rank_folders(disk: Disk) -> list[Disk]:
    """The folders of all ranks, in order."""
    return [disk / name for name in disk.names() if _RANK.fullmatch(name)]


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


def shard_names(disk: Disk) -> list[str]:
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

    @property
    def ranks(self) -> list[int]:
        """For each call, the rank that has recorded it; of a tensor in parts, the first of those ranks.

        All zeros, unless a run of several processes was recorded.
        """
        owners = [
            stretch.group.shard.heading.rank
            for stretch in self._stretches
            for _ in range(stretch.many)
        ]
        return owners if self._order is None else [owners[index] for index in self._order]

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

    #: ``only`` says that the recording is that of one rank alone, in whose own words its tensors are.
    def __init__(
        self, disk: Disk, manifest: Manifest, ranks: Sequence[Rank], *, only: int | None = None
    ) -> None:
        self._path = disk.path
        self._disk = disk
        self._manifest = manifest
        self._ranks = ranks
        self._only = only
        described = [rank.manifest for rank in ranks] or [manifest]
        info = {layer.name: layer.type for one in reversed(described) for layer in one.layers}
        names = dict.fromkeys(layer.name for one in described for layer in one.layers)
        info = {name: info[name] for name in names}
        self.chosen = frozenset(info)
        parts = self._parts(ranks)
        whole = only is None
        layers = _layers("output", info, parts, whole=whole)
        layers |= _layers("added", {}, parts, whole=whole)
        inputs = any(one.inputs for one in described)
        self._input_layers = _layers("input", info, parts, whole=whole) if inputs else {}
        grads = any(one.grads for one in described)
        grad_layers = _layers("gradient", info, parts, whole=whole) if grads else {}
        order = [name for role, name in parts if role in {"output", "added"}]
        committed = Count(max((rank.committed for rank in ranks), default=0))
        super().__init__(
            ", ".join(dict.fromkeys(one.model for one in described)),
            layers,
            {name: key for one in reversed(described) for name, key in one.names.items()},
            order,
            committed,
            inputs=self._input_layers,
            grads=grad_layers,
        )

    @staticmethod
    def _parts(ranks: Sequence[Rank]) -> dict[tuple[Role, str], list[Part]]:
        parts: dict[tuple[Role, str], list[Part]] = {}
        for shard in chain.from_iterable(rank.committed_shards() for rank in ranks):
            for part in shard.parts:
                parts.setdefault((part.slot.role, part.slot.name), []).append(part)
        return parts

    @property
    def num_passes(self) -> int:
        """The number of committed passes; where several ranks have recorded, that of the rank that has most.

        Each rank counts its own passes. ``acts.ranks`` says how many each one has.
        """
        return super().num_passes

    @cached_property
    def ranks(self) -> tuple[RankInfo, ...]:
        """How far each rank of the run has come, as a :class:`RankInfo`, also of those that wrote nothing.

        A single process is rank 0.
        """
        there = [rank.info for rank in self._ranks]
        if self._only is not None:
            return tuple(listed_ranks(there, [self._only]))
        run = max([self._manifest.ranks, *(rank.manifest.ranks for rank in self._ranks)])
        return tuple(listed_ranks(there, range(max([run, *(i.number + 1 for i in there)]))))

    def rank(self, number: int) -> StoredRecording:
        """Return what one rank has recorded, as a recording of its own; nothing is read or copied.

        >>> import tempfile, torch, actrec
        >>> path = tempfile.mkdtemp() + "/run"
        >>> model = torch.nn.Linear(4, 3)
        >>> for rank in range(2):  # torchrun would start two processes, and say which is which
        ...     folder = actrec.store.Folder(path, rank=rank, world_size=2)
        ...     with actrec.record(model, "", into=folder):
        ...         output = model(torch.randn(5 + rank, 4))
        >>> acts = actrec.load(path)
        >>> len(acts[""]), acts[""].ranks, acts.rank(1)[""][0].shape
        (2, [0, 1], torch.Size([6, 3]))

        Of a ``DTensor`` it has that rank's local part, as a plain tensor. Raises ``OptionError`` if the run had no
        such rank; of one that wrote nothing, there are no calls.
        """
        _one_of(f"acts.rank({number!r})", number, [info.number for info in self.ranks])
        found = [rank for rank in self._ranks if rank.number == number]
        return StoredRecording(self._disk, self._manifest, found, only=number)

    @property
    def complete(self) -> bool:
        """Whether every rank was closed properly, so that nothing is missing at the end."""
        return all(rank.complete for rank in self.ranks) and not self._left_out

    @property
    def _wholes(self) -> list[WholeLayer]:
        """The layers whose calls are made of parts."""
        layers = [*self._layers.values(), *self._input_layers.values()]
        return [layer for layer in layers if isinstance(layer, WholeLayer)]

    @property
    def _left_out(self) -> int:
        """How many calls are left out, because parts of their tensors are missing."""
        return sum(layer.left_out for layer in self._wholes)

    def _title(self) -> str:
        reasons = list(summary(self.ranks)) if len(self.ranks) > 1 else []
        if self._left_out:
            reasons.append(f"{count(self._left_out, 'call')} left out for want of parts")
        why = f" (incomplete{': ' * bool(reasons)}{'; '.join(reasons)})"
        return f"stored {shown(self._model)}" + ("" if self.complete else why)


def _layers(
    role: Role,
    info: Mapping[str, str],
    parts: Mapping[tuple[Role, str], list[Part]],
    *,
    whole: bool,
) -> dict[str, Layer]:
    kinds = {name: found[0].slot.type for (kind, name), found in parts.items() if kind == role}
    layers = {
        name: StoredLayer(name, kind, parts.get((role, name), ()))
        for name, kind in {**info, **kinds}.items()
    }
    return {name: _made_whole(layer) if whole else layer for name, layer in layers.items()}


def _made_whole(layer: StoredLayer) -> Layer:
    return WholeLayer(layer) if any(has_parts(g.structure) for g in layer._groups) else layer
