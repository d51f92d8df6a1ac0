"""A layer whose calls are reduced as they come: by a metric of torchmetrics, or a reduction of :mod:`actrec.reduce`."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, overload

from typing_extensions import override

from actrec._recordings.layer import Layer
from actrec._recordings.passes import ListView
from actrec._values.memory import held
from actrec._values.spec import tensors
from actrec._values.summary import Summary
from actrec.errors import ActrecError, CaptureError
from actrec.reduce import Reduction

from .clean_room import devices_of, in_a_clean_room

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import Tensor

    from actrec._values.containers import Value

__all__ = ["ReducedLayer", "is_reduction"]


def is_reduction(made: object) -> bool:
    """Whether values go to ``made`` by ``update()``, and a result comes from ``compute()``, as in torchmetrics."""
    return not hasattr(made, "append") and all(
        callable(getattr(made, method, None)) for method in ("update", "compute")
    )


class ReducedLayer(Layer[Any]):
    """A layer whose calls are reduced by ``sink``.

    Whatever else that can do, the layer can do: ``acts["conv1"].compute()`` is the metric's.
    """

    def __init__(
        self,
        name: str,
        sink: Any,
        make: Callable[[], Any],
        kind: str,
        undecided: Collection[int] = (),
    ) -> None:
        """``undecided`` are the passes that may still be taken back; it changes."""
        self.name = name
        self.type = kind
        self.sink = sink
        self.mask: str | None = sink.mask if isinstance(sink, Reduction) else None
        self._make = make
        self._undecided = undecided
        self._passes: list[int] = []
        self._waiting: dict[int, list[Value]] = {}  # by pass, calls that are not taken in yet
        self._masks: dict[int, list[Tensor]] = {}
        self._before: Reduction | None = None  # without the latest unit
        self._lock = threading.RLock()

    # --- What comes ----------------------------------------------------------------------------------------

    @override
    def keep(self, value: Value, number: int) -> None:
        with self._lock:
            self._waiting.setdefault(number, []).append(value)
            if self.mask is None and number not in self._undecided:
                self._take_in(number)

    def add(self, name: str, value: Value, number: int) -> None:
        """The user has added a value in pass ``number``: perhaps the mask."""
        if name != self.mask:
            return
        with self._lock:
            self._masks.setdefault(number, []).append(value)
            if number not in self._undecided and number in self._waiting:
                self._take_in(number)

    @override
    def settle(self, number: int) -> None:
        with self._lock:
            if number in self._waiting:
                self._take_in(number, joined=True)

    @override
    def drop(self, number: int) -> None:
        with self._lock:
            self._waiting.pop(number, None)
            self._masks.pop(number, None)
            if self._before is not None and self._passes[-1:] == [number]:
                # Another layer could not be settled. Nothing can be taken back from a metric.
                self.sink, self._before = self._before, None
                self._passes = [one for one in self._passes if one != number]

    def unmasked(self, raised: Collection[int]) -> ActrecError | None:
        """Return what is wrong if calls wait for a mask, other than those of passes that raised."""
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
        update = self._reduce if isinstance(self.sink, Reduction) else self._update
        in_a_clean_room(
            partial(update, masks, number, joined), calls, devices_of(calls), grad=False
        )
        self._passes += [number] * len(calls)

    def _update(self, _: object, __: object, ___: object, calls: list[Value]) -> None:
        for value in calls:
            found = tensors(value)
            self.sink.update(found[0] if len(found) == 1 else value)

    def _reduce(self, masks: list[Tensor], number: int, joined: bool, calls: list[Value]) -> None:  # noqa: FBT001
        part = self.sink.new() if joined or len(calls) > 1 else self.sink  # all of them, or none
        lengths = [part.positions(value) if joined else 0 for value in calls]
        start = 0
        for at, (value, length) in enumerate(zip(calls, lengths, strict=True)):
            mask = _mask_of(at, masks, start, lengths) if masks else None
            part.update(value, mask, number=number, start=start)
            start += length
        if part is not self.sink:
            before, after = self.sink, self.sink.new()
            after.merge(before)
            after.merge(part)
            self.sink, self._before = after, before

    # --- As a layer ----------------------------------------------------------------------------------------

    @property
    @override
    def passes(self) -> ListView[int]:
        return ListView(self._passes)

    @override
    def __len__(self) -> int:
        return len(self._passes)

    @override
    def clear(self) -> None:
        with self._lock:
            self.sink = self._make()
            self._passes = []
            self._before = None
            self._waiting.clear()
            self._masks.clear()

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    @override
    def __getitem__(self, index: int | slice) -> Value:
        self._refuse()

    @override
    def __iter__(self) -> Iterator[Value]:
        self._refuse()

    @override
    def _of(self, calls: list[int]) -> Layer[Any]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        message = (
            f"acts[{self.name!r}]: its calls were not kept, they were reduced by {type(self.sink).__name__}. The result is "
            f"acts[{self.name!r}].compute()."
        )
        raise ActrecError(message)

    @override
    def _seen(self) -> tuple[Summary, Mapping[object, int]]:
        places: dict[object, int] = {}
        for tensor in tensors(vars(self.sink)):
            places.update(held(tensor))
        kinds = {type(self.sink).__name__: None} if len(self) else {}
        return Summary(kinds), places

    @property
    @override
    def is_kept(self) -> bool:
        return False

    @override
    def _readable(self) -> Iterator[Value]:
        self._refuse()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_lock"} | {"_undecided": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __getattr__(self, name: str) -> Any:
        if name == "sink" or name.startswith("__"):  # while it is copied there is none yet
            raise AttributeError(name)
        return getattr(self.sink, name)


def _mask_of(at: int, masks: list[Tensor], start: int, lengths: list[int]) -> Tensor:
    """The mask of call number ``at``: its own, or its part of one for all calls of a unit, joined along the positions."""
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
