"""A layer whose calls go into the user's container."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import torch
from typing_extensions import override

from actrec._recordings.in_memory import chosen
from actrec._recordings.layer import Layer
from actrec._recordings.pass_numbers import ListView
from actrec._values.containers import Value
from actrec._values.spec import tensors
from actrec.errors import ActrecError

from .clean_room import devices_of, in_a_clean_room

#: The passes of about so many calls that a bounded container has dropped may still be remembered.
_SLACK = 64


class SinkLayer(Layer[Any]):
    """A layer whose calls go into a container, made by the factory that the user gave as ``into``.

    Other attributes are the container's: ``acts["conv1"].mean`` is ``acts["conv1"].sink.mean``.
    """

    def __init__(
        self, name: str, sink: Any, make: Callable[[], Any], kind: str, held: Collection[int] = ()
    ) -> None:
        """``held`` are the passes whose calls the container does not get yet; it changes."""
        self.name = name
        self.type = kind
        self.sink = sink
        self._held = held
        #: By pass, the calls that the container gets when the unit has ended.
        self._held_back: dict[int, list[Value]] = {}
        self._make = None if hasattr(self.sink, "clear") else make
        #: The passes of the latest calls, of those that made the container longer or changed its last item.
        self._passes: deque[int] = deque()
        #: By id: an item of the container, and its pass.
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    @property
    @override
    def passes(self) -> ListView[int]:
        # A bounded container has dropped the oldest calls; -1: the user has appended an item.
        latest = [*self._passes][-len(self) :] if len(self) else []
        latest += [-1] * (len(self) - len(latest))
        if not self._known:
            return ListView(latest)
        # It may have dropped other items, or sorted them: the pass of an item that is recognized goes before the count.
        found = map(self._pass_of, self._readable())
        pairs = zip_longest(latest, islice(found, len(latest)))
        return ListView([number if known is None else known for number, known in pairs])

    @override
    def _keep(self, value: Value, number: int) -> None:
        if number in self._held:
            self._held_back.setdefault(number, []).append(value)
        else:
            self._append(value, number)

    @override
    def _settle(self, number: int) -> None:
        for value in self._held_back.pop(number, ()):
            self._append(value, number)

    @override
    def _drop(self, number: int) -> None:
        self._held_back.pop(number, None)

    def _append(self, value: Value, number: int) -> None:
        before, last = len(self), self._last()
        in_a_clean_room(self.sink.append, value, devices_of(value), grad=torch.is_grad_enabled())
        newest = self._last()
        grown = len(self) - before if hasattr(self.sink, "__len__") else 1
        if grown > 0:
            self._passes.extend([number] * grown)
        elif newest is None or newest is not last:
            self._passes.append(number)
        while len(self._passes) > 2 * len(self) + _SLACK:
            self._passes.popleft()
        for item in (value, newest):  # newest: the value, or what the container has made of it
            if item is not last and self._pass_of(item) is None:
                self._remember(item, number)

    def _last(self) -> Value:
        return self.sink[-1] if isinstance(self.sink, (list, deque)) and self.sink else None

    def _remember(self, item: Value, number: int) -> None:
        thing = next(iter(tensors(item)), item)
        with suppress(TypeError):  # a number, say, cannot be recognized
            gone = partial(_forget, self._known, id(thing))
            self._known[id(thing)] = weakref.ref(thing, gone), number

    def _pass_of(self, item: Value) -> int | None:
        """The pass of something in the container, if it can be recognized."""
        for thing in (item, *tensors(item)):
            reference, number = self._known.get(id(thing), (None, -1))
            if reference is not None and reference() is thing:
                return number
        return None

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy has other objects, and gets no calls of the units that are open.
        copied = {"_passes": deque(self.passes), "_known": {}, "_held": (), "_held_back": {}}
        return vars(self) | copied

    @override
    def clear(self) -> None:
        if self._make is None:
            self.sink.clear()
        else:
            self.sink = self._make()
        self._passes.clear()
        self._known.clear()
        self._held_back.clear()

    @override
    def __getitem__(self, index: int | slice) -> Value:
        return list(self)[index] if isinstance(index, slice) else self._items()[index]

    def __setitem__(self, index: int, value: Value) -> None:
        self.sink[index] = value

    @override
    def __len__(self) -> int:
        return len(self.sink) if hasattr(self.sink, "__len__") else len(self._passes)

    @override
    def __iter__(self) -> Iterator[Value]:
        return iter(self._items())

    @override
    def _of(self, calls: list[int]) -> Layer[Any]:
        return chosen(self, calls)

    @property
    @override
    def _is_kept(self) -> bool:
        return hasattr(self.sink, "__iter__")

    def _items(self) -> Any:
        if not self._is_kept:
            message = (
                f"acts[{self.name!r}]: its calls went into a {type(self.sink).__name__}, from which they cannot be "
                f"read. It is at acts[{self.name!r}].sink."
            )
            raise ActrecError(message)
        return self.sink

    def __getattr__(self, name: str) -> Any:
        if name == "sink":  # not set yet while the layer is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.sink, name)


def _forget(known: dict[int, Any], key: int, _: object) -> None:
    """Forget the item ``key``, which was garbage-collected."""
    known.pop(key, None)
