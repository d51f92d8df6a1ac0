"""``load()``: a stored recording, opened as the same kind of object as one in memory.

Opening reads the description of each rank and the header of its last shard. What is small is read when it is asked for;
what is large is mapped, privately: what is written to a value reaches the memory of this process alone, never the file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from actrec._recordings.layer import V
from actrec._recordings.passes import Count, PassNumbers
from actrec._recordings.recording import Recording
from actrec._text import count, shown
from actrec._values.summary import Summary
from actrec.errors import CorruptRecordingError, OptionError, RecordingNotFoundError

from .check import shard_problems
from .description import read_description
from .format import DESCRIPTION, Role, corrupt
from .index import Found, Index, shard_names
from .place import place
from .ranks import RankInfo, listed_ranks, summary
from .read_only import ReadOnlyLayer
from .whole import WholeLayer, made_whole

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from actrec._recordings.layer import Layer
    from actrec._recordings.passes import Moment
    from actrec._values.containers import Value

    from .ledger import SoFar
    from .place import Place
    from .shard import Group, Part, Shard

__all__ = [
    "Rank",
    "StoredLayer",
    "StoredRecording",
    "load",
    "opened",
    "rank_folder",
    "rank_folders",
]

_RANK: Final = re.compile(r"rank-[0-9]{5}")
#: The folder of a rank, or a file in it.
_INSIDE: Final = re.compile(
    r"(?P<whole>.+)[/\\\\]rank-(?P<rank>[0-9]{5})([/\\\\][^/\\\\]+)?", re.DOTALL
)


def load(
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    check: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    cache_bytes: int = 1 << 30,
) -> StoredRecording[V]:
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

    Opening reads one header of each rank and no data, so it takes milliseconds however large the recording is. A
    call is read from the disk when it is asked for; one of more than a megabyte is a view of the mapped file. Writing
    to it never changes the file, but may be seen where this recording gives out the same bytes again; take a
    ``clone()`` to write to. ``cat()`` and ``stack()`` return new tensors.

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

    A URL such as ``"s3://bucket/run"`` is opened through ``fsspec``. What is asked for is downloaded, in blocks of
    4 MiB, of which the last ones stay in memory. For a path on disk ``cache_bytes`` means nothing.

    Args:
        path: the folder, or the URL.
        rank: the rank whose folder alone is opened.
        check: whether to read and check all data first, which takes as long as reading it.
        storage_options: what ``fsspec`` passes to the file system of a URL: credentials, an endpoint.
        cache_bytes: about how many bytes of what was downloaded are kept.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        OptionError: there is no such rank.
        CorruptRecordingError: a file is damaged; the message names it and what is wrong with it. Only
            headers are checked, unless ``check=True``.
        ReadError: an object store could not be reached, or refused.
    """
    recording = opened(place(path, storage_options, cache_bytes), rank=rank)
    problem = next(recording.problems(), None) if check else None
    if problem is not None:
        raise CorruptRecordingError(problem)
    return recording


def opened(disk: Place, *, rank: int | None = None) -> StoredRecording[Any]:
    """Open what is at a place; of a ``rank`` that is there, nothing else is looked at."""
    folders = {rank_number(folder.name): folder for folder in rank_folders(disk)}
    if type(rank) is int and rank in folders and is_described(folders[rank]):
        return StoredRecording(disk, [Rank(folders[rank])], only=rank)
    described = [folder for folder in folders.values() if is_described(folder)]
    if not described:
        message = f"load({str(disk)!r}): {_what_is_there(disk)}."
        raise RecordingNotFoundError(message)
    if rank is None:
        return StoredRecording(disk, [Rank(folder, of=len(described)) for folder in described])
    first = Rank(described[0])
    numbered = range(max(first.index.heading.ranks - 1, *folders) + 1)
    _check_rank(f"load({str(disk)!r}, rank={rank!r})", rank, numbered)
    return StoredRecording(disk, [], only=rank, model=first.description.model)


def _what_is_there(disk: Place) -> str:
    """What is at a place where there is no recording, and what to write instead."""
    is_file = disk.is_file()
    if not (is_file or disk.exists()):
        return "there is no recording there (no such folder)"
    inside = _INSIDE.fullmatch(str(disk))
    if inside is not None and (is_file or is_described(disk)):
        whole, number = inside["whole"], int(inside["rank"])
        what = "a file of a recording" if is_file else f"the folder of rank {number} of a recording"
        return f"that is {what}. Write load({whole!r}), or load({whole!r}, rank={number}) for what that rank has written"
    if is_file:
        return "that is a file, and a recording is a folder. What record(..., into=path) has written is opened with load(path)"
    return "there is no recording there (no rank.json in any folder in it)"


def _check_rank(call: str, rank: int, there: Sequence[int]) -> None:
    if type(rank) is not int or rank not in there:
        ranks = f"rank {there[0]} alone" if len(there) == 1 else f"ranks {there[0]} to {there[-1]}"
        message = f"{call}: there is no such rank; the recording has {ranks}."
        raise OptionError(message)


# --- Ranks -------------------------------------------------------------------------------------------


def rank_folder(rank: int) -> str:
    """Return the name of the folder of a rank."""
    return f"rank-{rank:05d}"


def rank_folders(disk: Place) -> list[Place]:
    """Return the folders of all ranks, in order."""
    return [disk / name for name in disk.names() if _RANK.fullmatch(name)]


def rank_number(folder: str) -> int:
    """Return the rank that a folder is of."""
    return int(folder.partition("-")[2])


def is_described(folder: Place) -> bool:
    """Whether a rank has begun to record there; a folder with shards and no description is damaged."""
    if _has_description(folder):
        return True
    if not shard_names(folder):
        return False
    if not _has_description(folder):  # now: it may have begun after the first look
        raise corrupt(folder.shown(DESCRIPTION), "it is missing")
    return True


def _has_description(folder: Place) -> bool:
    try:
        return folder.size(DESCRIPTION) >= 0
    except FileNotFoundError:
        return False


class Rank:
    """What one rank has written: the folder ``rank-00000``, say, of ``of`` folders that are opened together."""

    def __init__(self, disk: Place, *, of: int = 1) -> None:
        self.number = rank_number(disk.name)
        self.description = read_description(disk)
        self.index = Index(disk, self.description.heading(self.number), of=of)

    @property
    def committed(self) -> int:
        """How many passes there are."""
        return self.index.heading.committed

    @property
    def info(self) -> RankInfo:
        """How far the rank has come."""
        ended = self.index.heading.ended
        if ended is None:
            error: str | None = "killed or still recording"
        else:  # the name of an exception, or a sentence
            error = f"left by {ended}" if ended.isidentifier() else ended or None
        return RankInfo(self.number, self.committed, error is None, error)


class Source(NamedTuple):
    """A layer as one rank has recorded it."""

    rank: Rank
    role: Role
    name: str
    type: str
    so_far: SoFar

    def parts(self) -> Iterator[tuple[Shard, Part]]:
        """What its shards hold of the layer."""
        return self.rank.index.parts(self.role, self.name)

    def find(self, call: int) -> Found:
        """Find a call."""
        return self.rank.index.find(self.role, self.name, call)


# --- Layers ------------------------------------------------------------------------------------------


class StoredLayer(ReadOnlyLayer):
    """A layer on disk: indexed and iterated over like a list, each call read when it is asked for."""

    def __init__(self, name: str, kind: str, sources: Iterable[Source] = ()) -> None:
        self.name = name
        self.type = kind
        self._sources = list(sources)
        calls = (source.so_far.calls for source in self._sources)
        self._starts = list(accumulate(calls, initial=0))

    @cached_property
    def _order(self) -> Tensor | None:
        """The calls by pass, ``None`` where they are stored so; several ranks or threads store them otherwise."""
        found = [source.so_far for source in self._sources if source.so_far.calls]
        if all(one.ordered for one in found) and all(a.last <= b.first for a, b in pairwise(found)):
            return None
        return self._stored_passes.argsort(stable=True)

    @cached_property
    def _stored_passes(self) -> Tensor:
        parts = [part.passes for source in self._sources for _, part in source.parts()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")

    @property
    @override
    def passes(self) -> PassNumbers:
        return PassNumbers(self._numbers)

    @cached_property
    def _numbers(self) -> list[int]:
        return self._stored_passes.sort().values.tolist()

    @property
    def ranks(self) -> list[int]:
        """For each call, the rank that has recorded it; of a tensor in parts, the first of those ranks.

        All zeros, unless a run of several processes was recorded.
        """
        owners = [
            source.rank.number for source in self._sources for _ in range(source.so_far.calls)
        ]
        return owners if self._order is None else [owners[at] for at in self._order.tolist()]

    @property
    def in_parts(self) -> bool:
        """Whether any tensor is a rank's part of a ``DTensor``."""
        return any(source.so_far.in_parts for source in self._sources)

    @override
    def __len__(self) -> int:
        return self._starts[-1]

    @override
    def _call(self, index: int) -> Value:
        found = self.find(index)
        return found.shard.value(found.group, found.call)

    def find(self, index: int) -> Found:
        """Find a call."""
        if self._order is not None:
            index = int(self._order[index])
        at = bisect_right(self._starts, index) - 1
        return self._sources[at].find(index - self._starts[at])

    @override
    def _per_pass(self) -> tuple[int, int]:
        found = [source.so_far for source in self._sources]
        return max((one.most for one in found), default=0), sum(one.passes for one in found)

    @override
    def _summary(self) -> Summary:
        found = Summary()
        for source in self._sources:
            found.update(source.so_far.looks)
        return found

    @property
    @override
    def nbytes(self) -> int:
        return sum(source.so_far.nbytes for source in self._sources)

    @override
    def cat(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along an existing dimension. See :meth:`Layer.cat`; nothing is released."""
        joined = self._joined(new=False) if dim == 0 else None
        return super().cat(dim) if joined is None else joined

    @override
    def stack(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along a new dimension. See :meth:`Layer.stack`; nothing is released."""
        joined = self._joined(new=True) if dim == 0 else None
        return super().stack(dim) if joined is None else joined

    def _joined(self, *, new: bool) -> Value | None:
        """Join the calls shard by shard, each read into its place; ``None`` where that is not possible."""
        if self._order is not None or not len(self):
            return None
        plan = _JoinPlan(new=new)
        if not all(plan.fits(part) for part in self._parts()):
            return None
        results = plan.results()
        for shard, part in self._read():
            plan.read(shard, part, results)
        return plan.value(results)

    def _read(self) -> Iterator[tuple[Shard, Part]]:
        return chain.from_iterable(source.parts() for source in self._sources)

    def _parts(self) -> Iterator[Part]:
        return (part for _, part in self._read())


class _JoinPlan:
    """How calls that lie behind each other in the shards become one value."""

    def __init__(self, *, new: bool) -> None:
        self._new = new  # dimension
        self._first: Group | None = None
        self._rows: list[int] = []
        self._at: list[int] = []

    def fits(self, part: Part) -> bool:
        """Take in a part, and return whether its calls can be joined with those before by copying bytes."""
        group, *others = part.groups
        if self._first is None:
            self._first = group
            self._rows = [0] * len(group.leaves)
            self._at = [0] * len(group.leaves)
        if others or group.text != self._first.text or not group.structure.joins:
            return False
        for number, (leaf, first) in enumerate(zip(group.leaves, self._first.leaves, strict=True)):
            sizes, like = (one.shapes if self._new else one.shapes[:, 1:] for one in (leaf, first))
            dims = leaf.shapes.shape[1]
            same = leaf.dtype == first.dtype and sizes.shape[1] == like.shape[1]
            if not same or not bool((sizes == like[0]).all()) or not (dims or self._new):
                return False
            self._rows[number] += len(leaf.shapes) if self._new else int(leaf.shapes[:, 0].sum())
        return bool(group.leaves)

    def results(self) -> list[Tensor]:
        """Memory for the joined tensors."""
        assert self._first is not None  # noqa: S101  # there are calls
        shapes = [leaf.shape(0) if self._new else leaf.shape(0)[1:] for leaf in self._first.leaves]
        return [
            torch.empty((rows, *shape), dtype=leaf.dtype, device="cpu")
            for rows, shape, leaf in zip(self._rows, shapes, self._first.leaves, strict=True)
        ]

    def read(self, shard: Shard, part: Part, results: list[Tensor]) -> None:
        """Read what a shard has."""
        (group,) = part.groups
        for number, (leaf, result) in enumerate(zip(group.leaves, results, strict=True)):
            rows = len(leaf.shapes) if self._new else int(leaf.shapes[:, 0].sum())
            at = self._at[number]
            self._at[number] = at + rows
            shard.read_into(leaf.extent(0, len(leaf.shapes))[0], result[at : at + rows])

    def value(self, results: list[Tensor]) -> Value:
        """The joined value."""
        assert self._first is not None  # noqa: S101  # likewise
        return self._first.structure.spec.fill(results)


# --- Recordings --------------------------------------------------------------------------------------


class StoredRecording(Recording[V], Generic[V]):
    """A recording on disk, as :func:`actrec.load` opens it.

    Args:
        disk: where it is.
        ranks: the ranks that were opened.
        only: the rank that it is of alone, whose tensors are as it has written them.
        model: the type of the model, where no rank says it.
    """

    def __init__(
        self, disk: Place, ranks: Sequence[Rank], *, only: int | None = None, model: str = ""
    ) -> None:
        _check_same_recording(disk, ranks)
        self.place = disk
        self._ranks = ranks
        self._only = only
        described = [rank.description for rank in ranks]
        info = {layer.name: layer.type for one in reversed(described) for layer in one.layers}
        names = dict.fromkeys(layer.name for one in described for layer in one.layers)
        info = {name: info[name] for name in names}
        sources = _sources(ranks)
        whole = only is None
        layers = _layers("output", info, sources, whole=whole)
        layers |= _layers("added", {}, sources, whole=whole)
        inputs = any(one.inputs for one in described)
        grads = any(one.grads for one in described)
        super().__init__(
            ", ".join(dict.fromkeys(one.model for one in described)) or model,
            layers,
            {name: key for one in reversed(described) for name, key in one.names.items()},
            [name for role, name in sources if role in {"output", "added"}],
            Count(max((rank.committed for rank in ranks), default=0)),
            inputs=_layers("input", info, sources, whole=whole) if inputs else {},
            grads=_layers("gradient", info, sources, whole=whole) if grads else {},
        )

    @property
    @override
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
        numbers = {info.number for info in there}
        return tuple(listed_ranks(there, sorted({*range(self._expected), *numbers})))

    @property
    def _expected(self) -> int:
        """How many ranks the run has that began last: those are to be closed, and no others."""
        headings = (rank.index.heading for rank in self._ranks)
        return max(((one.began, one.ranks) for one in headings), default=(0, 1))[1]

    @property
    def _latest(self) -> list[RankInfo]:
        """How far the ranks have come that are to be closed."""
        return [i for i in self.ranks if self._only is not None or i.number < self._expected]

    def rank(self, number: int) -> StoredRecording[V]:
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
        _check_rank(f"acts.rank({number!r})", number, [info.number for info in self.ranks])
        found = [rank for rank in self._ranks if rank.number == number]
        return StoredRecording(self.place, found, only=number, model=self._model)

    @property
    def complete(self) -> bool:
        """Whether every rank was closed properly, so that nothing is missing at the end.

        Of a recording that was gone on with by fewer ranks than before, these are the ranks that count.
        """
        return all(rank.complete for rank in self._latest) and not self._left_out

    @property
    @override
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.everything())

    def layer(self, role: Role, name: str) -> StoredLayer | None:
        """Return a layer by its role, if there is one, as the ranks have recorded it."""
        layers = {"input": self._inputs, "gradient": self._grads}.get(role, self)
        found = None if layers is None else layers._layers.get(name)
        return found.recorded if isinstance(found, WholeLayer) else found  # type: ignore[return-value]

    @override
    def _raised(self) -> set[Moment]:
        return {(one.number, number) for one in self._ranks for number in one.index.heading.raised}

    def everything(self) -> Iterator[Layer[Any]]:
        """Yield all layers, those of inputs and gradients too."""
        for recording in (self, self._inputs, self._grads):
            yield from () if recording is None else recording._layers.values()

    @property
    def wholes(self) -> list[WholeLayer]:
        """The layers whose calls are made of parts."""
        return [layer for layer in self.everything() if isinstance(layer, WholeLayer)]

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the shards, all of whose data is read, and with tensors in parts."""
        for rank in self._ranks:
            yield from shard_problems(rank.index.disk, rank.description.heading(rank.number))
        for layer in self.wholes:
            yield from layer.problems()

    @property
    def _left_out(self) -> int:
        """How many calls are left out, because parts of their tensors are missing."""
        return sum(layer.left_out for layer in self.wholes)

    @override
    def _title(self) -> str:
        reasons = list(summary(self._latest)) if len(self.ranks) > 1 else []
        if self._left_out:
            reasons.append(f"{count(self._left_out, 'call')} left out for want of parts")
        why = f" (incomplete{': ' * bool(reasons)}{'; '.join(reasons)})"
        return f"stored {shown(self._model)}" + ("" if self.complete else why)


def _check_same_recording(disk: Place, ranks: Sequence[Rank]) -> None:
    """Refuse ranks that different runs have begun."""
    for first, other in pairwise(ranks):
        if other.description.recording != first.description.recording:
            message = (
                f"ranks {first.number} and {other.number} in it belong to different recordings. load(path, rank=...) "
                "opens one of them"
            )
            raise corrupt(disk, message)


def _sources(ranks: Sequence[Rank]) -> dict[tuple[Role, str], list[Source]]:
    """What each rank has of each layer, in the order in which the first calls of the layers ended."""
    sources: dict[tuple[Role, str], list[Source]] = {}
    for rank in ranks:
        for slot, so_far in rank.index.layers.items():
            found = Source(rank, slot.role, slot.name, slot.type, so_far)
            sources.setdefault((slot.role, slot.name), []).append(found)
    return sources


def _layers(
    role: Role,
    info: Mapping[str, str],
    sources: Mapping[tuple[Role, str], list[Source]],
    *,
    whole: bool,
) -> dict[str, Layer[Any]]:
    kinds = {name: found[0].type for (kind, name), found in sources.items() if kind == role}
    layers = {
        name: StoredLayer(name, kind, sources.get((role, name), ()))
        for name, kind in {**info, **kinds}.items()
    }
    return {name: made_whole(layer) if whole else layer for name, layer in layers.items()}
