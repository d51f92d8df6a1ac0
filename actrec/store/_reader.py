"""``load()``: a stored recording, opened as the same kind of object as one in memory.

Opening reads the headers of the shards. Their data is read or mapped when it is asked for, privately: what
is written to a value reaches the memory of this process alone, never the file.
"""

from __future__ import annotations

import os
import re
import threading
from array import array
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from actrec._display import count, shown
from actrec._forms import Form, form
from actrec._passes import Count
from actrec._recording import Layer, PassNumbers, Recording
from actrec.errors import CorruptRecordingError, OptionError, RecordingNotFoundError

from ._cache import CACHE_BYTES, Cache
from ._checksums import shard_problems
from ._container import Container
from ._disk import ANOTHER
from ._format import END, MANIFEST, Defect, Role, corrupt
from ._index import Group, Opened, Part, Shard, numbers, open_shard
from ._manifest import Ending, Manifest, read_ending, read_manifest, read_own
from ._outline import Held, Look, Outline, form_of, look, per_pass
from ._place import place
from ._ranks import RankInfo, listed_ranks, summary
from ._read_only import ReadOnlyLayer
from ._whole import WholeLayer, has_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from actrec._nested import Value
    from actrec._recording import Moment

    from ._index import Run
    from ._place import Place

__all__ = ["Rank", "StoredLayer", "StoredRecording", "load", "opened"]

_RANK: Final = re.compile(r"rank-[0-9]{5}")
_SHARD: Final = re.compile(r"[0-9]{6,}\.safetensors")


def load(
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    check: bool = False,
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
    call is read from the disk when it is asked for; one that is large is a view of the mapped file, of
    which the system reads what is used. Writing to it never changes the file, but may be seen where this
    recording gives out the same bytes again; take a ``clone()`` to write to. ``cat()`` and ``stack()``
    return new tensors.

    A file that somebody has cut short or replaced is found when a call is read. But while you hold a large
    call, its file must not be cut short, nor be removed by another machine on a network file system: the
    system ends a process that uses memory whose file is gone (``SIGBUS``). A ``clone()`` is safe.

    A recording that was not closed properly (the process was killed, the block left by an exception, the
    disk full) has all the passes that were committed, and says so: ``acts.complete`` is false.

    What several ranks of ``torch.distributed`` have recorded is read as one recording: calls are ordered by
    pass, and within a pass by rank; ``acts[name].ranks`` says whose they are. The parts of a ``DTensor`` become one
    call, a plain tensor that is whole, assembled when it is asked for; where a part is missing, the call is left
    out. ``acts.ranks`` says how far each rank has come, and ``acts.rank(2)`` is what rank 2 has recorded, with its
    parts as they are. With ``rank=2``, nothing but the folder of that rank is opened: it can be read though
    another one is damaged.

    Data is not checked when it is read: a file whose bytes were changed, by a bad disk say, gives other numbers without a
    word. ``check=True`` reads everything once, compares the checksums, and raises for the first that does not fit;
    :func:`verify` lists all of them.

    Containers come back in their structure: tuples, lists, dicts, named tuples, NumPy arrays and Python's
    numbers and strings as themselves, dataclasses and other classes as :class:`actrec.store.Fields`. No
    class that a file names is ever imported.

    A URL such as ``"s3://bucket/run"`` is opened through ``fsspec``. What is asked for is downloaded, in blocks,
    into a cache: the last ``cache_bytes`` of it, in files without names in the folder ``cache`` (the system's
    temporary one), which are gone with this process. For a path on disk these options mean nothing.

    Args:
        path: the folder, or the URL.
        rank: the rank whose folder alone is opened.
        check: whether to read and check all data first, which takes as long as reading it.
        storage_options: what ``fsspec`` passes to the file system of a URL: credentials, an endpoint.
        cache: the folder of the cache.
        cache_bytes: how large the cache may grow, beyond what values in use keep.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        OptionError: there is no such rank.
        CorruptRecordingError: a file is damaged; the message names it and what is wrong with it. Only
            headers are checked, unless ``check=True``.
        ReadError: an object store could not be reached, or refused.
    """
    recording = opened(place(path, storage_options, Cache(cache, cache_bytes)), rank=rank)
    problem = next(recording._problems(), None) if check else None
    if problem is not None:
        raise CorruptRecordingError(problem)
    return recording


def opened(disk: Place, *, rank: int | None = None) -> StoredRecording:
    """Open what is at a place."""
    try:
        manifest = _described(disk)
    except (FileNotFoundError, NotADirectoryError):
        there = "no actrec.json in that folder" if disk.exists() else "no such folder"
        message = f"load({str(disk)!r}): there is no recording there ({there})."
        raise RecordingNotFoundError(message) from None
    if rank is None:
        writers = rank_folders(disk)
        ranks = [Rank(folder, manifest, of=len(writers)) for folder in writers]
        return StoredRecording(disk, manifest, ranks)
    folders = {rank_number(folder.name): folder for folder in rank_folders(disk)}
    numbered = range(max([manifest.ranks - 1, *folders]) + 1)
    rank = _one_of(f"load({str(disk)!r}, rank={rank!r})", rank, numbered)
    ranks = [Rank(folders[rank], manifest)] if rank in folders else []
    return StoredRecording(disk, manifest, ranks, only=rank)


def _described(disk: Place) -> Manifest:
    try:
        return read_manifest(disk)
    except (FileNotFoundError, NotADirectoryError):
        if not any(map(shard_names, rank_folders(disk))):
            raise
    try:  # it is written before the first shard, maybe just now
        return read_manifest(disk)
    except FileNotFoundError:
        raise corrupt(disk.shown(MANIFEST), "it is missing") from None


def _one_of(call: str, rank: int, there: Sequence[int]) -> int:
    if type(rank) is not int or rank not in there:
        ranks = f"rank {there[0]} alone" if len(there) == 1 else f"ranks {there[0]} to {there[-1]}"
        message = f"{call}: there is no such rank; the recording has {ranks}."
        raise OptionError(message)
    return rank


#: So many bytes the shards of a recording may take that are kept open, which is what their headers say; one of each
#: rank is.
_OPEN_BYTES: Final = 1 << 28


_CHECKED: Final = Container({}, {}, 0)  # the parts know what is needed of it


class Rank:
    """What one writer, ``of`` so many that are opened together, has written: the folder ``rank-00000``, say."""

    def __init__(self, disk: Place, manifest: Manifest, *, of: int = 1) -> None:
        self.path = str(disk)
        self.number = rank_number(disk.name)
        names = disk.names()  # and the shards after it: where there is an end, they are all there
        self.manifest = read_own(disk, names, manifest) or manifest
        self.outline = Outline()
        self.ending: Ending | None = read_ending(disk, names, manifest.recording)
        self._disk = disk
        self._opened: dict[int, Opened] = {}  # the one used last is the last
        self._most_open = _OPEN_BYTES // of  # bytes
        self._open_bytes = 0
        self._begin()
        passes = 0  # committed by as many shards as the end speaks of
        for number, name in enumerate(shard_names(disk)):
            if name != shard_name(number):
                raise corrupt(disk.shown(shard_name(number)), "it is missing")
            self._add(self.opened(number))
            if self.ending is None or number < self.ending.shards:
                passes = self.committed
        self._check_ending(passes)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._opening = threading.Lock()

    def _check_ending(self, passes: int) -> None:
        ending = self.ending
        if ending is None:
            return
        if self.count >= ending.shards and passes == ending.passes:
            if self.count > ending.shards:
                self.ending = (
                    None  # that of a run which ended after another had gone on with what it wrote
                )
            return
        recording = self.manifest.recording
        if read_ending(self._disk, self._disk.names(), recording) != ending:
            self.ending = None  # a run was resumed while the shards were read
            return
        if self.count < ending.shards:
            raise corrupt(self._disk.shown(shard_name(self.count)), "it is missing")
        raise corrupt(self._disk.shown(END), "it speaks of other passes than there are")

    def _add(self, opened: Opened) -> None:
        if opened.shard.heading.committed < self.committed:
            raise corrupt(opened.shard.path, "it commits fewer passes than the shard before it")
        self.outline.add(opened)

    @property
    def count(self) -> int:
        """How many shards there are."""
        return self.outline.count

    @property
    def committed(self) -> int:
        """How many passes there are."""
        return self.outline.committed

    def opened(self, number: int) -> Opened:
        """Shard ``number``, which is opened if it is not."""
        if self._pid != os.getpid():
            self._begin()  # in a forked process the lock may be held by a thread that does not exist
        with self._opening:
            opened = self._opened.pop(number, None)
            if opened is None:
                opened = open_shard(self._disk, shard_name(number))
                check_identity(opened.shard, self.manifest.recording, self.number, number)
                opened = opened._replace(container=_CHECKED)
                self._open_bytes += opened.memory
            self._opened[number] = opened
            while self._open_bytes > self._most_open and len(self._opened) > 1:
                self._open_bytes -= self._opened.pop(next(iter(self._opened))).memory
        return opened

    def part(self, held: Held, at: int) -> Part:
        """What the how-manieth shard that holds any of a layer holds of it."""
        opened = self.opened(held.shards[at])
        part = opened.part(held.slot.role, held.slot.name)
        if part is None or part.starts[-1] != held.starts[at + 1] - held.starts[at]:
            raise corrupt(opened.shard.path, ANOTHER)
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_open_bytes": 0, "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def leftovers(self) -> Iterator[Shard]:
        """The shards with calls of a pass that was never completed."""
        return (self.opened(number).shard for number in self.outline.leftovers)

    @property
    def has_begun(self) -> bool:
        """Whether anything was written, if only that there was nothing."""
        return self.count > 0 or self.ending is not None

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


def rank_folders(disk: Place) -> list[Place]:
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


def shard_names(disk: Place) -> list[str]:
    """The files of all shards, in order."""
    return sorted(filter(_SHARD.fullmatch, disk.names()), key=lambda name: (len(name), name))


class Source(NamedTuple):
    """A rank that has recorded calls of a layer."""

    rank: Rank
    held: Held

    def parts(self) -> Iterator[Part]:
        """What its shards hold of the layer."""
        return (self.rank.part(self.held, at) for at in range(len(self.held.shards)))

    def place(self, call: int) -> tuple[Group, int]:
        """Where a call is: in which group, and the how-manieth there."""
        at = bisect_right(self.held.starts, call) - 1
        part = self.rank.part(self.held, at)
        return part.place(call - self.held.starts[at])


class _Numbers:
    """The pass of each call: as it is stored, or in another order."""

    def __init__(self, runs: Iterable[Run], order: array[int] | None) -> None:
        self._triples = array("Q", chain.from_iterable(runs))
        self._starts = array("Q", accumulate(self._triples[2::3], initial=0))
        self._order = order

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> int:
        at = index if self._order is None else self._order[index]
        run = bisect_right(self._starts, at) - 1
        first, step = self._triples[3 * run : 3 * run + 2]
        return first + step * (at - self._starts[run])

    def __iter__(self) -> Iterator[int]:
        if self._order is not None:
            return map(self.__getitem__, range(len(self)))
        flat = iter(self._triples)
        return numbers(zip(flat, flat, flat, strict=True))


class StoredLayer(ReadOnlyLayer):
    """A layer on disk: indexed and iterated over like a list, each call read when it is asked for."""

    def __init__(self, name: str, kind: str, sources: Iterable[Source] = ()) -> None:
        self.name = name
        self.type = kind
        self._sources = list(sources)
        calls = (source.held.starts[-1] for source in self._sources)
        self._starts = list(accumulate(calls, initial=0))

    @cached_property
    def _order(self) -> array[int] | None:
        """The calls by pass, ``None`` where they are stored so; several ranks or threads store them otherwise."""
        held = [source.held for source in self._sources]
        if all(one.ordered for one in held) and all(a.last <= b.first for a, b in pairwise(held)):
            return None
        order = torch.tensor(list(self._stored_passes()), device="cpu").argsort(stable=True)
        return array("q", order.tolist())

    def _stored_passes(self) -> Iterator[int]:
        return chain.from_iterable(source.held.passes for source in self._sources)

    @property
    def passes(self) -> PassNumbers:
        return PassNumbers(self._numbers)

    @cached_property
    def _numbers(self) -> _Numbers:
        return _Numbers((run for source in self._sources for run in source.held.runs), self._order)

    def _per_pass(self) -> tuple[int, int]:
        found = [per_pass(source.held.runs) for source in self._sources]
        return max((most for most, _ in found), default=0), sum(passes for _, passes in found)

    @property
    def ranks(self) -> list[int]:
        """For each call, the rank that has recorded it; of a tensor in parts, the first of those ranks.

        All zeros, unless a run of several processes was recorded.
        """
        owners = [
            source.rank.number for source in self._sources for _ in range(source.held.starts[-1])
        ]
        return owners if self._order is None else [owners[index] for index in self._order]

    def __len__(self) -> int:
        return self._starts[-1]

    def _call(self, index: int) -> Value:
        group, call = self._place(index)
        return group.value(call)

    def _place(self, index: int) -> tuple[Group, int]:
        """Where a call is: in which group, and the how-manieth there."""
        if self._order is not None:
            index = self._order[index]
        at = bisect_right(self._starts, index) - 1
        return self._sources[at].place(index - self._starts[at])

    def parts(self) -> Iterator[Part]:
        """What the shards hold of this layer, in the order in which it is stored."""
        return (part for source in self._sources for part in source.parts())

    def _groups(self) -> list[Group]:
        return [group for part in self.parts() for group in part.groups]

    def _forms(self) -> Iterable[Form]:
        forms: dict[Look, Form] = {}
        for index in range(len(self)):
            group, call = self._place(index)
            like = look(group, call)
            if like not in forms:
                forms[like] = form(group.example(call))
            yield forms[like]

    def _different_forms(self) -> Iterable[Form]:
        looks = dict.fromkeys(like for source in self._sources for like in source.held.looks)
        return dict.fromkeys(map(self._form, looks))

    def _form(self, like: Look) -> Form:
        structure, leaves = like
        try:
            return form_of(structure, leaves)
        except Defect as defect:
            raise corrupt(self._sources[0].rank.path, defect) from None

    @property
    def nbytes(self) -> int:
        return sum(source.held.nbytes for source in self._sources)

    def _places(self) -> Iterator[tuple[object, int]]:
        for group in self._groups():
            for leaf in group.leaves:
                for begin, nbytes in leaf.pieces():
                    yield (group.shard.path, begin), nbytes

    def cat(self, dim: int = 0, *, release: bool = False) -> Value:  # noqa: ARG002
        """Join all calls along an existing dimension. See :meth:`Layer.cat`; nothing is released."""
        groups = self._alike() if dim == 0 else []
        if not groups or any(leaf.scalar for leaf in groups[0].leaves):
            return super().cat(dim)
        return groups[0].filled(_columns(groups))

    def stack(self, dim: int = 0, *, release: bool = False) -> Value:  # noqa: ARG002
        """Join all calls along a new dimension. See :meth:`Layer.stack`; nothing is released."""
        groups = self._alike() if dim == 0 else []
        if not groups or any(len(set(_rows(groups, k))) > 1 for k in range(len(groups[0].leaves))):
            return super().stack(dim)  # which says what does not fit
        shapes = [leaf.shape(0) for leaf in groups[0].leaves]
        pairs = zip(_columns(groups), shapes, strict=True)
        return groups[0].filled([column.view(len(self), *shape) for column, shape in pairs])

    def _alike(self) -> list[Group]:
        """The groups, if their calls can be joined group by group; otherwise nothing."""
        groups = [] if self._order is not None else self._groups()
        likes = {
            (
                group.structure,
                *((leaf.dtype, leaf.tail, leaf.expanded, leaf.scalar) for leaf in group.leaves),
            )
            for group in groups
        }
        fit = len(likes) == 1 and groups[0].leaves and not any(_expanded(groups))
        return groups if fit and not any(k in groups[0].structure for k in _NOT_JOINED) else []


#: What has tensors that are not joined: NumPy arrays are constants, and packed sequences are not joined at all.
_NOT_JOINED: Final = ('"array":', '"scalar":', '"packed_sequence":')  # in text, quotes are escaped


def _columns(groups: list[Group]) -> list[Tensor]:
    """For each tensor of a value, what all groups have of it."""
    leaves = groups[0].leaves
    rows = [sum(group.leaves[k].before[-1] for group in groups) for k in range(len(leaves))]
    found = [
        torch.empty((many, *leaf.tail), dtype=leaf.dtype, device="cpu")
        for many, leaf in zip(rows, leaves, strict=True)
    ]
    done = [0] * len(leaves)
    for group in groups:  # one after the other, so that no more than one is mapped
        for k, leaf in enumerate(group.leaves):
            many = leaf.before[-1]
            part = leaf.whole(group.shard.storage, many, *leaf.tail)
            found[k][done[k] : done[k] + many] = part
            done[k] += many
    return found


def _rows(groups: list[Group], number: int) -> Iterator[int]:
    return (rows for group in groups for rows in group.leaves[number].rows)


def _expanded(groups: list[Group]) -> Iterator[bool]:
    return (bool(leaf.expanded) for leaf in groups[0].leaves)


class StoredRecording(Recording):
    """A recording on disk, as :func:`actrec.load` opens it."""

    #: ``only`` says that the recording is that of one rank alone, in whose own words its tensors are.
    def __init__(
        self, disk: Place, manifest: Manifest, ranks: Sequence[Rank], *, only: int | None = None
    ) -> None:
        self._place = disk
        self._manifest = manifest
        self._ranks = ranks
        self._only = only
        described = [rank.manifest for rank in ranks] or [manifest]
        info = {layer.name: layer.type for one in reversed(described) for layer in one.layers}
        names = dict.fromkeys(layer.name for one in described for layer in one.layers)
        info = {name: info[name] for name in names}
        self.chosen = frozenset(info)
        sources = self._sources(ranks)
        whole = only is None
        layers = _layers("output", info, sources, whole=whole)
        layers |= _layers("added", {}, sources, whole=whole)
        inputs = any(one.inputs for one in described)
        self._input_layers = _layers("input", info, sources, whole=whole) if inputs else {}
        grads = any(one.grads for one in described)
        grad_layers = _layers("gradient", info, sources, whole=whole) if grads else {}
        order = [name for role, name in sources if role in {"output", "added"}]
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
    def _sources(ranks: Sequence[Rank]) -> dict[tuple[Role, str], list[Source]]:
        sources: dict[tuple[Role, str], list[Source]] = {}
        for rank in ranks:
            for key, held in rank.outline.held.items():
                sources.setdefault(key, []).append(Source(rank, held))
        return sources

    @property
    def nbytes(self) -> int:
        if self._wholes:
            return super().nbytes
        return sum(rank.outline.nbytes for rank in self._ranks)

    def _raised(self) -> set[Moment]:
        return {(rank.number, number) for rank in self._ranks for number in rank.outline.raised}

    @property
    def num_passes(self) -> int:
        """The number of committed passes; where several ranks have recorded, that of the rank that has most.

        Each rank counts its own passes. ``acts.ranks`` says how many each one has.
        """
        return super().num_passes

    @cached_property
    def ranks(self) -> tuple[RankInfo, ...]:
        """How far each rank of the run has come, as a :class:`RankInfo`, also of those that wrote nothing.

        A single process is rank 0. Where a run was gone on with by fewer ranks, those that it had before are listed, too.
        """
        there = [rank.info for rank in self._ranks]
        if self._only is not None:
            return tuple(listed_ranks(there, [self._only]))
        most = max([self._last.ranks, *(info.number + 1 for info in there)])
        return tuple(listed_ranks(there, range(most)))

    @property
    def _last(self) -> Manifest:
        """What the run says that began last."""
        said = (self._manifest, *(rank.manifest for rank in self._ranks))
        return max(said, key=lambda one: (one.began, one.ranks))

    @property
    def _its_ranks(self) -> list[RankInfo]:
        """How far the ranks of that run have come: those are to be closed, and no others."""
        if self._only is not None:
            return list(self.ranks)
        last = self._last
        numbers = {rank.number for rank in self._ranks if rank.manifest.began >= last.began}
        numbers.update(range(last.ranks))
        return [info for info in self.ranks if info.number in numbers]

    def rank(self, number: int) -> StoredRecording:
        """Return what one rank has recorded, as a recording of its own; nothing is read or copied.

        >>> import tempfile, torch, actrec
        >>> path = tempfile.mkdtemp() + "/run"
        >>> model = torch.nn.Linear(4, 3)
        >>> for rank in range(2):  # torchrun would start two processes, and say which is which
        ...     folder = actrec.store.Folder(path, rank=rank, world_size=2, run="a")
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
        return StoredRecording(self._place, self._manifest, found, only=number)

    @property
    def complete(self) -> bool:
        """Whether every rank was closed properly, so that nothing is missing at the end.

        Of a recording that was gone on with by fewer ranks than before, these are the ranks that count.
        """
        return all(rank.complete for rank in self._its_ranks) and not self._left_out

    @property
    def _wholes(self) -> list[WholeLayer]:
        """The layers whose calls are made of parts."""
        layers = [*self._layers.values(), *self._input_layers.values()]
        return [layer for layer in layers if isinstance(layer, WholeLayer)]

    def _problems(self) -> Iterator[str]:
        """What is wrong with the data, all of which is read."""
        for layer in self._wholes:
            yield from layer.problems()
        for rank in self._ranks:
            for number in range(rank.count):
                yield from shard_problems(rank._disk, open_shard(rank._disk, shard_name(number)))

    @property
    def _left_out(self) -> int:
        """How many calls are left out, because parts of their tensors are missing."""
        return sum(layer.left_out for layer in self._wholes)

    def _title(self) -> str:
        reasons = list(summary(self._its_ranks)) if len(self.ranks) > 1 else []
        if self._left_out:
            reasons.append(f"{count(self._left_out, 'call')} left out for want of parts")
        why = f" (incomplete{': ' * bool(reasons)}{'; '.join(reasons)})"
        return f"stored {shown(self._model)}" + ("" if self.complete else why)


def _layers(
    role: Role,
    info: Mapping[str, str],
    sources: Mapping[tuple[Role, str], list[Source]],
    *,
    whole: bool,
) -> dict[str, Layer]:
    kinds = {
        name: found[0].held.slot.type for (kind, name), found in sources.items() if kind == role
    }
    layers = {
        name: StoredLayer(name, kind, sources.get((role, name), ()))
        for name, kind in {**info, **kinds}.items()
    }
    return {name: _made_whole(layer) if whole else layer for name, layer in layers.items()}


def _made_whole(layer: StoredLayer) -> Layer:
    looks = (like for source in layer._sources for like in source.held.looks)
    return WholeLayer(layer) if any(has_parts(structure) for structure, _ in looks) else layer
