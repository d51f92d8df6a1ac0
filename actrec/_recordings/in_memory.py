"""A layer in memory: a ``list``. However the list is changed, each call keeps its pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Generic, Self, SupportsIndex

from typing_extensions import override

from actrec._values.shapes import Summary

from .instead import no_call, no_index, no_sum
from .layer import Layer, V
from .look import Look
from .pass_numbers import ListView


def chosen(layer: Layer[V], calls: list[int]) -> ListLayer[V]:
    """Return a layer in memory with some calls of another layer."""
    passes = layer.passes
    found = ListLayer(layer.name, [layer[index] for index in calls], layer.type)
    found._passes = [passes[index] for index in calls]
    found._units, found._transform = layer._units, layer._transform
    return found


class ListLayer(list[V], Layer[V], Generic[V]):
    """A layer in memory: a real ``list``."""

    def __init__(self, name: str, values: Iterable[V] = (), kind: str = "Tensor") -> None:
        super().__init__(values)
        self.name = name
        self.type = kind
        self._passes = list(range(len(self)))
        self._edits = 0  # how often the list was changed, other than by appending
        self._look: tuple[Look, int] | None = None  # the last look, and `_edits` at that time

    __eq__ = Layer.__eq__
    __ne__ = Layer.__ne__
    __hash__: ClassVar[None] = None
    __repr__ = Layer.__repr__

    @override
    def _of(self, calls: list[int]) -> Layer[V]:
        return chosen(self, calls)

    @property
    @override
    def passes(self) -> ListView[int]:
        self._align()
        return ListView(self._passes)

    @override
    def _keep(self, value: V, number: int) -> None:
        passes = self._passes  # once: attribute access on a layer is slow
        if len(passes) != len(self):
            self._align()
        passes.append(number)
        list.append(self, value)

    @override
    def _seen(self) -> tuple[Summary, Mapping[object, int]]:
        look = self._looked()
        summary = Summary()
        summary.update(look.summary)
        return summary, look.places

    @override
    def _per_pass(self) -> tuple[int, int]:
        return self._looked().count(self.passes)

    @override
    def _look_again(self) -> None:
        self._edits += 1

    def _looked(self) -> Look:
        """Look at the calls that were appended since, or at all calls if the list was changed in another way."""
        edits, before = self._edits, self._look
        self._look = None  # or another thread would continue this look meanwhile
        look = Look() if before is None or before[1] != edits else before[0]
        if look.calls > len(self):
            look = Look()
        look.at(self)
        if not look.can_change:
            self._look = look, edits
        return look

    @override
    def _drop(self, number: int) -> None:
        passes = self.passes
        for index in [index for index, own in enumerate(passes) if own == number][::-1]:
            del self[index]

    def _align(self) -> None:
        """Make ``_passes`` as long as the list, after an interrupt in keep() or an append() by the user (pass -1)."""
        del self._passes[len(self) :]
        self._passes += [-1] * (len(self) - len(self._passes))

    @override
    def __getitem__(self, index: Any, /) -> Any:
        try:
            return super().__getitem__(index)
        except TypeError:
            raise TypeError(no_index(self, index)) from None
        except IndexError:
            raise IndexError(no_call(self, index)) from None

    @override
    def __add__(self, other: Any, /) -> list[Any]:
        try:
            return super().__add__(other)
        except TypeError:
            raise TypeError(no_sum(self)) from None

    # --- Users may change the list: each call keeps its pass ------------------------------------------------

    def _edit(self, method: str, *given: Any, passes: tuple[Any, ...]) -> Any:
        """Call a method of the list with ``given``, and the same method of the passes with ``passes``."""
        self._align()
        found = getattr(super(), method)(*given)
        getattr(self._passes, method)(*passes)
        self._edits += 1
        return found

    @override
    def pop(self, index: SupportsIndex = -1) -> V:
        value: V = self._edit("pop", index, passes=(index,))
        return value

    @override
    def __delitem__(self, index: SupportsIndex | slice) -> None:
        self._edit("__delitem__", index, passes=(index,))

    @override
    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            value = list(value)
            self._edit("__setitem__", index, value, passes=(index, [-1] * len(value)))
        else:
            super().__setitem__(index, value)
            self._edits += 1

    @override
    def insert(self, index: SupportsIndex, value: V) -> None:
        self._edit("insert", index, value, passes=(index, -1))

    @override
    def __imul__(self, times: SupportsIndex) -> Self:
        self._align()
        super().__imul__(times)
        self._edits += 1
        return self

    @override
    def remove(self, value: V) -> None:
        del self[self.index(value)]

    @override
    def reverse(self) -> None:
        self._edit("reverse", passes=())

    @override
    def sort(self, *, key: Callable[[Any], Any] | None = None, reverse: bool = False) -> None:
        keys: list[Any] = [*self] if key is None else [*map(key, self)]
        order = sorted(range(len(keys)), key=keys.__getitem__, reverse=reverse)
        calls, passes = ([of[index] for index in order] for of in ([*self], self.passes))
        self._edit("__setitem__", slice(None), calls, passes=(slice(None), passes))

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own passes, and units that do not change with the recording.
        units = None if self._units is None else self._units.copy()
        return {**vars(self), "_passes": [*self.passes], "_units": units, "_look": None}

    @override
    def clear(self) -> None:
        super().clear()
        self._passes = []  # a new list: a view of the old one keeps its items
        self._edits += 1
