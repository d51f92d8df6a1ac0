"""A stored recording: what several ranks have written, as one recording whose calls are read on access.

Opening reads the description of each rank and the header of its last shard. Small values are read into memory; large ones
are mapped privately: writing to a value changes only the memory of this process, never the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic

from typing_extensions import override

from actrec._progress import showing
from actrec._recordings.layer import Layer, Role, V
from actrec._recordings.pass_numbers import Count, RankPass
from actrec._recordings.recording import Recording
from actrec._recordings.run import Run
from actrec._selection.treatment import WHATS
from actrec._text import count, shown
from actrec.errors import OptionError

from .check import shard_problems
from .description import LayerInfo
from .format import ROLES, corrupt
from .joined_ranks import WholeLayer
from .layers import Source, StoredLayer
from .place import Place
from .rank import Rank, RankInfo, nothing_of, summary
from .reduced import StoredReduction, made_reduced
from .units import UNIT, StoredUnits
from .warned import warnings_of


class StoredRecording(Recording[V], Generic[V]):
    """A recording on disk, as :func:`actrec.load` opens it.

    Args:
        disk: the place of the recording.
        ranks: the ranks that were opened.
        only: the rank, if only this one is opened: its tensors are then as it has written them.
        model: the type of the model, if no rank has a description.
    """

    def __init__(
        self, disk: Place, ranks: Sequence[Rank], *, only: int | None = None, model: str = ""
    ) -> None:
        _check_same_recording(disk, ranks)
        self.place = disk
        self._ranks = ranks
        self._only = only
        described = [rank.description for rank in ranks]
        sources = _sources(ranks)
        by_functions = any(query.reduction for one in described for query in one.functions)
        #: The layers as the ranks have recorded them.
        self.recorded: dict[tuple[Role, str], StoredLayer] = {}
        layers: dict[Role, dict[str, Layer[Any]]] = {role: {} for role in ROLES}
        for (role, name), info in _known(ranks, sources).items():
            stored = StoredLayer(name, info.type, sources.get((role, name), ()))
            self.recorded[role, name] = stored
            layer = made_reduced(stored, info.reduction, by_functions=by_functions)
            if layer is stored and stored.in_parts and only is None:
                layer = WholeLayer(stored)
            layer._transform = info.transform
            layers[role][name] = layer
        run = _StoredRun(
            ", ".join(dict.fromkeys(one.model for one in described)) or model,
            {name: key for one in reversed(described) for name, key in one.names.items()},
            list(dict.fromkeys(name for _, name in sources)),
            Count(max((rank.committed for rank in ranks), default=0)),
            StoredUnits(sources.get((UNIT.role, UNIT.name), [])),
            str(disk),
            ranks=ranks,
        )
        beside = {what: layers[what] for what in WHATS[1:] if layers[what]}
        super().__init__(run, layers["output"] | layers["added"], beside)

    @cached_property
    def ranks(self) -> tuple[RankInfo, ...]:
        """How far each rank of the run has come, as a :class:`RankInfo`, including ranks that wrote nothing.

        A single process is rank 0. If a run was resumed with fewer ranks, those that it had before are listed too.
        """
        there = {rank.number: rank.info for rank in self._ranks}
        numbers = sorted({*self._expected, *there})
        return tuple(there.get(number) or nothing_of(number) for number in numbers)

    @property
    def _expected(self) -> range:
        """The ranks of the latest run that were opened: only these have to be closed."""
        if self._only is not None:
            return range(self._only, self._only + 1)
        headings = (rank.heading for rank in self._ranks)
        return range(max(((one.began, one.ranks) for one in headings), default=(0, 1))[1])

    @property
    def _latest(self) -> list[RankInfo]:
        """The ranks that have to be closed."""
        return [info for info in self.ranks if info.number in self._expected]

    def rank(self, number: int) -> StoredRecording[V]:
        """Return the recording of one rank. Nothing is read or copied.

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

        Args:
            number: the number of the rank.

        Returns:
            A recording, without calls if the rank wrote nothing. For a ``DTensor`` it has that rank's local part, as a plain
            tensor.

        Raises:
            OptionError: the run had no such rank.
        """
        check_rank(f"acts.rank({number!r})", number, [info.number for info in self.ranks])
        found = [rank for rank in self._ranks if rank.number == number]
        return StoredRecording(self.place, found, only=number, model=self._run.model)

    @property
    def complete(self) -> bool:
        """Whether every rank was closed properly, so that nothing is missing at the end.

        If a recording was resumed with fewer ranks than before, only these ranks have to be closed. It is also false if
        several ranks have recorded units with the same key.
        """
        whole = not (self._left_out or self._repeated)
        return all(rank.complete for rank in self._latest) and whole

    def everything(self) -> Iterator[Layer[Any]]:
        """Yield all layers, those of inputs and gradients too."""
        for part in self._parts.values():
            yield from part._layers.values()

    @property
    def wholes(self) -> list[WholeLayer]:
        """The layers whose calls are made of parts."""
        return [layer for layer in self.everything() if isinstance(layer, WholeLayer)]

    def problems(self, *, progress: bool = False) -> Iterator[str]:
        """Yield what is wrong with the shards (all data is read), with tensors in parts, and with reductions."""
        yield from shard_problems([rank.folder for rank in self._ranks], "check", progress=progress)
        yield from self._misfits(progress=progress)

    def _misfits(self, *, progress: bool) -> Iterator[str]:
        """Yield what is wrong with values that are made of several calls: tensors in parts, and reductions."""
        calls = sum(map(len, self.wholes))
        with showing("verify parts", calls, progress=progress) as each:
            for layer in self.everything():
                if isinstance(layer, WholeLayer):
                    yield from layer.problems(each)
                elif isinstance(layer, StoredReduction):
                    yield from layer.problems()

    @property
    def _left_out(self) -> int:
        """How many calls are left out, because parts of their tensors are missing."""
        return sum(layer.left_out for layer in self.wholes)

    @property
    def _repeated(self) -> int:
        """How many units were recorded by more than one rank, unless each has recorded a part."""
        apart = len(self._ranks) > 1 and not self.wholes
        return len(self._run.units) - len(self.done) if apart else 0

    @override
    def _title(self) -> str:
        reasons = list(summary(self._latest)) if len(self.ranks) > 1 else []
        if self._left_out:
            reasons.append(f"{count(self._left_out, 'call')} left out, with missing parts")
        if self._repeated:
            reasons.append(f"{count(self._repeated, 'unit')} recorded by more than one rank")
        why = f" (incomplete{': ' * bool(reasons)}{'; '.join(reasons)})"
        return f"stored {shown(self._run.model)}" + ("" if self.complete else why)


@dataclass(eq=False)
class _StoredRun(Run):
    """A run, as some ranks have written it."""

    ranks: Sequence[Rank] = field(kw_only=True)

    @override
    def raised(self) -> set[RankPass]:
        return {(one.number, number) for one in self.ranks for number in one.heading.raised}

    @override
    def warnings(self) -> Sequence[str]:
        found = (text for rank in self.ranks for text in warnings_of(rank.folder))
        return [*dict.fromkeys(found)]  # ranks of one run give the same warnings


def check_rank(call: str, rank: int, there: Sequence[int]) -> None:
    """Raise ``OptionError`` if there is no such rank."""
    if type(rank) is not int or rank not in there:
        ranks = f"only rank {there[0]}" if len(there) == 1 else f"ranks {there[0]} to {there[-1]}"
        message = f"{call}: there is no such rank; the recording has {ranks}."
        raise OptionError(message)


def _check_same_recording(disk: Place, ranks: Sequence[Rank]) -> None:
    """Raise ``CorruptRecordingError`` for ranks of different recordings."""
    for other in ranks:
        first = ranks[0]
        if other.description.recording != first.description.recording:
            message = (
                f"ranks {first.number} and {other.number} in it belong to different recordings. load(path, rank=...) "
                "opens one of them"
            )
            raise corrupt(disk, message)


def _sources(ranks: Sequence[Rank]) -> dict[tuple[Role, str], list[Source]]:
    """Return each layer as the ranks have recorded it, in the order in which the first calls of the layers ended."""
    sources: dict[tuple[Role, str], list[Source]] = {}
    for rank in ranks:
        for slot, so_far in rank.layers.items():
            found = Source(rank, slot.role, slot.name, slot.type, so_far)
            sources.setdefault((slot.role, slot.name), []).append(found)
    return sources


def _known(
    ranks: Sequence[Rank], sources: Mapping[tuple[Role, str], list[Source]]
) -> dict[tuple[Role, str], LayerInfo]:
    """Return the layers that the ranks describe, and then those that they do not: functions, and values that were added."""
    known: dict[tuple[Role, str], LayerInfo] = {}
    for rank in ranks:
        for info in rank.description.layers:
            known.setdefault((info.role, info.name), info)
    for key, found in sources.items():
        known.setdefault(key, LayerInfo(found[0].name, found[0].type))
    return known
