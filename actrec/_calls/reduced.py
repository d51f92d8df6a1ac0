"""A layer whose calls are reduced as they come: by a metric of torchmetrics, or a reduction of :mod:`actrec.reduce`.

A pass that may still be dropped (a unit that may fail, or, when recording to a path, a pass that is not complete) is reduced
separately: as a part, which is merged with the rest once the pass is final.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from typing_extensions import override

from actrec._recordings.pass_numbers import ListView, PassRuns, RankPass
from actrec._recordings.reduced import Reduced, followed, merged
from actrec._values.containers import Value
from actrec._values.spec import tensors
from actrec.errors import ActrecError, CaptureError
from actrec.reduce import Reduction

from .clean_room import devices_of, in_a_clean_room


class States(Protocol):
    """The path that the states of a reduction are written to."""

    rank: int | None

    @property
    def closed(self) -> bool:
        """Whether the recording has ended."""

    def take_from(self, state: Callable[[int], tuple[int, dict[str, Any]] | None]) -> None:
        """Ask ``state`` for the state whenever passes are committed."""

    def count_complete(self) -> int:
        """Return how many passes are complete."""

    def keep_later(self) -> None:
        """There is a call whose state will be written when its pass is complete."""

    def stored(self) -> Reduced:
        """Return the reduction that is on the disk; until the block ends, the one that was there when it began."""


class _Part(NamedTuple):
    """The reduction of one pass, and how many calls are in it."""

    sink: Any
    calls: int


class ReducedLayer(Reduced):
    """A layer whose calls are reduced while they are recorded."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        kind: str,
        undecided: Collection[int] = (),
        states: States | None = None,
    ) -> None:
        """``undecided`` are the passes that may still be dropped; it changes. Without ``states``, all stays in memory."""
        self.name = name
        self.type = kind
        self._make = make
        self._undecided = undecided
        self._disk = states
        self._rank = None if states is None else states.rank
        self._lock = threading.RLock()  # the writer must not be called while it is held
        self._empty()
        if states is not None:
            before = states.stored()
            self._runs = PassRuns(before.passes)
            before.merge_into(self._sink)
            states.take_from(self.state)

    def _empty(self) -> None:
        self._sink: Any = self._make()
        self._merges = self._disk is not None or isinstance(self._sink, Reduction)
        self.mask: str | None = self._sink.mask if isinstance(self._sink, Reduction) else None
        self._runs = PassRuns()  # of the calls that are reduced into `_sink`
        self._latest: int | None = None  # the last pass in `_sink` since its state was written
        self._parts: dict[int, _Part] = {}  # by pass
        self._waiting: dict[int, list[Value]] = {}  # by pass, calls that are not reduced yet
        self._masks: dict[int, list[Tensor]] = {}

    # --- What comes ----------------------------------------------------------------------------------------

    @override
    def _keep(self, value: Value, number: int) -> None:
        if self._disk is not None:
            self._disk.keep_later()
        settled = self._settled() if self._parts else None
        with self._lock:
            if settled is not None:
                self._merge(settled)
            self._waiting.setdefault(number, []).append(value)
            if self.mask is None and number not in self._undecided:
                self._take_in(number)

    def add(self, name: str, value: Value, number: int) -> None:
        """The user has added a value to pass ``number``: perhaps the mask."""
        if name != self.mask:
            return
        with self._lock:
            if number in self._undecided or number in self._waiting:
                self._masks.setdefault(number, []).append(value)
            if number not in self._undecided and number in self._waiting:
                self._take_in(number)

    @override
    def _settle(self, number: int) -> None:
        with self._lock:
            if number in self._waiting:
                self._take_in(number, joined=True)
            self._masks.pop(number, None)  # of a unit in which the layer was not called

    @override
    def _drop(self, number: int) -> None:
        with self._lock:
            for of_passes in (self._waiting, self._masks, self._parts):
                of_passes.pop(number, None)

    def unmasked(self, raised: Collection[int]) -> ActrecError | None:
        """Return an error if calls still wait for a mask, other than those of passes that raised."""
        waiting = [number for number in self._waiting if number not in raised]
        return CaptureError(self._without_mask(waiting)) if waiting else None

    def _without_mask(self, numbers: Sequence[int]) -> str:
        return (
            f"acts[{self.name!r}]: no value {self.mask!r} was added in pass {', '.join(map(str, numbers[:8]))}, and its calls are reduced "
            f"with that mask. Write acts.add({self.mask!r}, batch['attention_mask']) after the forward."
        )

    def _take_in(self, number: int, *, joined: bool = False) -> None:
        calls, masks = self._waiting.pop(number), self._masks.pop(number, [])
        if self.mask is not None and not masks:
            raise ActrecError(self._without_mask([number]))
        is_part = self._merges and (joined or len(calls) > 1 or self._disk is not None)
        sink = self._make() if is_part else self._sink  # all of a pass, or none of it
        update = partial(_reduce, sink, masks, number, joined)
        in_a_clean_room(update, calls, devices_of(calls), grad=False)
        if is_part:
            before = self._parts.get(number)
            if before is not None:
                sink = followed(before.sink, sink)
            self._parts[number] = _Part(sink, len(calls) + (0 if before is None else before.calls))
        else:
            self._count(number, len(calls))

    # --- What is merged ------------------------------------------------------------------------------------

    def _settled(self) -> Callable[[int], bool]:
        """Return a predicate: whether a pass is final."""
        if self._disk is None:
            return lambda number: number not in self._undecided
        complete = self._disk.count_complete()  # acquires a lock, and so is called outside ours
        return lambda number: number < complete

    def _merge(self, settled: Callable[[int], bool]) -> None:
        for number in sorted(filter(settled, self._parts)):
            part = self._parts.pop(number)
            self._sink = followed(self._sink, part.sink)
            self._count(number, part.calls)

    def _count(self, number: int, calls: int) -> None:
        for _ in range(calls):
            self._runs.add(number)
        self._latest = number if self._latest is None else max(self._latest, number)

    def state(self, complete: int) -> tuple[int, dict[str, Any]] | None:
        """Return the last of the passes before ``complete``, and the state after it; ``None`` if there is nothing new."""
        with self._lock:
            self._merge(lambda number: number < complete)
            latest, self._latest = self._latest, None
            if latest is None:
                return None
            return latest, self._value([self._sink.metric_state], self._runs)

    # --- As a layer ----------------------------------------------------------------------------------------

    @property
    @override
    def sink(self) -> Any:
        """The reduction; if it goes to a path, a copy of it."""
        settled = self._settled()
        with self._lock:
            self._merge(settled)
            if self._disk is None:
                return self._sink
            parts = [self._parts[number].sink for number in self._decided()]
            states = [one.metric_state for one in (self._sink, *parts)]
        sink = merged(
            self._make(), *(self._disk.stored()._states() if self._disk.closed else states)
        )
        if isinstance(sink, Reduction):
            sink.of_rank(self._rank or 0)
        return sink

    def _decided(self) -> list[int]:
        """Return the passes in separate parts that will not be dropped: a reader sees them."""
        return sorted(number for number in self._parts if number not in self._undecided)

    @override
    def _states(self) -> list[Mapping[str, Any]]:
        return [self.sink.metric_state]

    @property
    @override
    def passes(self) -> ListView[int]:
        if self._disk is not None and self._disk.closed:
            return ListView([*self._disk.stored().passes])
        with self._lock:
            parts = [[number] * self._parts[number].calls for number in self._decided()]
            return ListView([*self._runs, *chain.from_iterable(parts)])

    @override
    def __len__(self) -> int:
        if self._disk is not None and self._disk.closed:
            return len(self._disk.stored())
        with self._lock:
            return len(self._runs) + sum(self._parts[number].calls for number in self._decided())

    @override
    def _rank_pass(self, rank: int, number: int) -> RankPass:
        return self._rank, number

    @property
    @override
    def _kind(self) -> str:
        return type(self._sink).__name__

    @override
    def _rank_passes(self) -> list[RankPass]:
        return [self._rank_pass(0, number) for number in self.passes]

    @override
    def clear(self) -> None:
        if self._disk is not None:
            message = (
                f"acts[{self.name!r}].clear(): what was written to a path stays there. To reduce only a part of a run, record only "
                "that part: inside acts.pause() nothing is recorded."
            )
            raise ActrecError(message)
        with self._lock:
            self._empty()

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle is in memory, with the calls so far.
        sink, runs = self.sink, PassRuns(self.passes)
        kept = {k: v for k, v in vars(self).items() if k not in {"_lock", "_parts"}}
        return kept | {"_undecided": (), "_disk": None, "_sink": sink, "_runs": runs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _parts={})


def _reduce(
    sink: Any,
    masks: list[Tensor],
    number: int,
    joined: bool,  # noqa: FBT001
    calls: list[Value],
) -> None:
    """Update ``sink`` with calls of a pass; those of a unit are joined along the positions."""
    if not isinstance(sink, Reduction):
        for value in calls:
            found = tensors(value)
            sink.update(found[0] if len(found) == 1 else value)
        return
    lengths = [sink.positions(value) if joined else 0 for value in calls]
    start = 0
    for at, (value, length) in enumerate(zip(calls, lengths, strict=True)):
        mask = _mask_of(at, masks, start, lengths) if masks else None
        sink.update(value, mask, number=number, start=start)
        start += length


def _mask_of(at: int, masks: list[Tensor], start: int, lengths: list[int]) -> Tensor:
    """Return the mask of call number ``at``: its own, or its part of the one for all calls of a unit, along the positions."""
    if len(masks) == len(lengths):
        return masks[at]
    mask, total = masks[0], sum(lengths)
    if len(masks) > 1:
        message = f"there are {len(masks)} masks and {len(lengths)} calls in the unit; add one for each call, or one for all"
        raise CaptureError(message)
    if mask.ndim < 2 or not total:  # noqa: PLR2004  # one entry for each sample
        return mask
    if mask.shape[1] < total:
        message = f"a mask of shape {tuple(mask.shape)} is too short for the {total} positions of {len(lengths)} calls"
        raise CaptureError(message)
    begin = mask.shape[1] - total + start
    return mask[:, begin : begin + lengths[at]]
