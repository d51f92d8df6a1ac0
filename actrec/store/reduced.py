"""Reduced layers on disk: each commit writes the state of the reduction, and the last state of each rank counts.

A state is stored like a call of the layer, in the last pass that is in it: a dict of ``reduction``, the name of its class,
``states``, a list of dicts of tensors, and ``passes``, the passes of the calls in runs ``(first, how many, calls in each)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from actrec._recordings.layer import FUNCTION, Layer
from actrec._recordings.pass_numbers import ListView, PassRuns, RankPass, in_runs
from actrec._recordings.reduced import Reduced, merged
from actrec._values.shapes import Summary
from actrec._values.spec import tensors
from actrec.errors import ActrecError, CorruptRecordingError, OptionError
from actrec.reduce import KINDS, Reduction

from .call import Call
from .format import MAX_SIZE, Defect, Slot, corrupt, need
from .late import Backwards
from .layers import Source, StoredLayer
from .live import Writing
from .read_only import Unchanged

_FORM: Final = ["reduction", "states", "passes"]
_MOST: Final = 1 << 32  # calls
_NOTHING: Final = "nothing"


class States:
    """Writes the states of a reduction while it is recorded."""

    def __init__(self, stream: Writing, slot: Slot, backwards: Backwards) -> None:
        self.rank = stream.rank
        self.count_complete = backwards.count_complete
        self.keep_later = stream.keep_later
        self._stream = stream
        self._slot = slot
        self._late = backwards.late

    @property
    def closed(self) -> bool:
        """Whether the recording has ended."""
        return self._stream.closed

    def take_from(self, state: Callable[[int], tuple[int, dict[str, Any]] | None]) -> None:
        """Call ``state(n)`` whenever the passes before ``n`` are committed.

        It returns the last of these passes, and the state after it; ``None`` if there is nothing new.
        """

        def take(complete: int) -> Iterator[Call]:
            found = state(complete)
            if found is not None:
                yield Call.of(self._slot, *found)

        self._late.append(take)

    def stored(self) -> StoredReduction:
        """Return the reduction that is on the disk; until the block ends, the one that was there when it began."""
        return StoredReduction(self._stream.stored(self._slot))


def saved_state(layer: Reduced, number: Callable[[RankPass], int]) -> tuple[int, dict[str, Any]]:
    """Return the last pass of a reduction and its state, as they are written, with passes renumbered by ``number``."""
    passes = sorted(map(number, layer._rank_passes()))
    states = layer._states()
    sink = layer.sink
    if isinstance(sink, Reduction):
        sink = deepcopy(sink)
        sink.renumber(lambda rank, own: number(layer._rank_pass(rank, own)))
        states = [sink.metric_state]
    return max(passes, default=0), layer._value(states, PassRuns(passes))


class StoredReduction(Unchanged, Reduced):
    """A reduced layer on disk, with the merged reduction of all ranks. It is read on access."""

    def __init__(self, recorded: StoredLayer) -> None:
        self.name = recorded.name
        self.type = recorded.type
        self.recorded = recorded

    @cached_property
    def _found(self) -> list[tuple[int, _State]]:
        """The last state of each rank."""
        sources = [source for source in self.recorded._sources if source.so_far.calls]
        return [(source.rank.number, _last(source)) for source in sources]

    @property
    @override
    def _kind(self) -> str:
        return self._found[0][1].kind if self._found else _NOTHING

    @cached_property
    @override
    def sink(self) -> Any:
        """The reduction of all ranks; ``None`` if it is not from :mod:`actrec.reduce`: only the name of its class is known."""
        if self._kind not in KINDS:
            return None
        of_ranks = []
        for rank, found in self._found:
            one = KINDS[self._kind].of(found.states[0])
            merged(one, *found.states[1:]).of_rank(rank)
            of_ranks.append(one.metric_state)
        return merged(KINDS[self._kind].of(of_ranks[0]), *of_ranks[1:])

    @override
    def compute(self) -> Any:
        call = f"acts[{self.name!r}].compute()"
        if self._kind == _NOTHING:
            message = f"{call}: nothing was recorded of this layer, so there is no result."
            raise ActrecError(message)
        if self.sink is None:
            message = (
                f"{call}: it was reduced by {self._kind}, and actrec never imports a class that a file names. "
                f"Merge the stored states into a new one: acts[{self.name!r}].merge_into({self._kind}(...)).compute()."
            )
            raise ActrecError(message)
        return super().compute()

    @override
    def _states(self) -> list[Mapping[str, Any]]:
        return [state for _, found in self._found for state in found.states]

    @cached_property
    def _ordered(self) -> list[RankPass]:
        """The rank and pass of each call, sorted by pass."""
        rank_passes = [
            (rank, number) for rank, found in self._found for number in in_runs(found.runs)
        ]
        return sorted(rank_passes, key=lambda one: one[1])

    @property
    @override
    def passes(self) -> ListView[int]:
        return ListView([number for _, number in self._ordered])

    @property
    def ranks(self) -> list[int]:
        """For each call, the rank that has recorded it."""
        return [rank or 0 for rank, _ in self._ordered]

    @override
    def __len__(self) -> int:
        return len(self._ordered)

    @override
    def _rank_pass(self, rank: int, number: int) -> RankPass:
        return rank, number

    @override
    def _seen(self) -> tuple[Summary, Mapping[object, int]]:
        nbytes = sum(tensor.nbytes for tensor in tensors(self._states()))
        return Summary({self._kind: None} if len(self) else {}), {id(self): nbytes}

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the states."""
        try:
            self.sink  # noqa: B018  # is made of them
            self._ordered  # noqa: B018
        except CorruptRecordingError as error:
            yield str(error)


class _State(NamedTuple):
    """A stored state."""

    kind: str
    states: list[dict[str, Any]]
    runs: list[tuple[int, int, int]]


def _last(source: Source) -> _State:
    """Return the last state of a rank."""
    found = source.find(source.so_far.calls - 1)
    try:
        return _checked(found.value(), source.rank.committed)
    except Defect as defect:
        raise corrupt(found.shard.path, defect) from None


def _checked(value: Any, committed: int) -> _State:
    need(is_state(value), "a value should be the state of a reduction, and is not")
    kind, states, runs = (value[key] for key in _FORM)
    need(
        runs.dtype is torch.int64
        and runs.shape[1:] == (3,)
        and bool(((runs >= 0) & (runs <= MAX_SIZE // 4)).all()),
        "the passes of a reduction are not runs",
    )
    many = runs[:, 1:].double().prod(1).sum()  # may be too large for 64 bits
    need(many <= _MOST, "a reduction has impossibly many calls")
    last = int(runs[:, :2].sum(1).max()) if len(runs) else 0
    need(last <= committed, "a reduction has passes that are not committed")
    if kind in KINDS:
        need(len(states) > 0, "a reduction has no state")
        for state in states:
            try:
                KINDS[kind].of(state)
            except (OptionError, TypeError, ValueError) as error:
                message = f"the state of a reduction is not one of {kind}: {error}"
                raise Defect(message) from None
    return _State(kind, states, [(first, many, each) for first, many, each in runs.tolist()])


def is_state(value: Any) -> bool:
    """Return whether a value is the state of a reduction."""
    return (
        isinstance(value, dict)
        and [*value] == _FORM
        and isinstance(value["reduction"], str)
        and isinstance(value["states"], list)
        and all(isinstance(state, dict) for state in value["states"])
        and isinstance(value["passes"], Tensor)
    )


def made_reduced(layer: StoredLayer, name: str | None, *, by_functions: bool) -> Layer[Any]:
    """Return the layer, or a :class:`StoredReduction` of it if it was reduced: if its description has the ``name`` of a reduction.

    If functions are reduced, the description does not list them one by one: what is stored says which are.
    """
    is_reduced = name is not None
    if by_functions and layer.type == FUNCTION and len(layer):
        is_reduced = is_state(layer[-1])
    return StoredReduction(layer) if is_reduced else layer
