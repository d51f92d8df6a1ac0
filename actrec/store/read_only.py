"""Layers that were stored: most are read call by call, and none can be written to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NoReturn

from typing_extensions import override

from actrec._recordings.instead import no_call, no_index
from actrec._recordings.layer import Layer
from actrec._recordings.pass_numbers import ListView
from actrec._values.containers import Value
from actrec._values.join import How
from actrec._values.shapes import Summary
from actrec._values.spec import flatten
from actrec.errors import ActrecError


class Unchanged(Layer[Any]):
    """A layer that was stored, and can only be read."""

    @override
    def _keep(self, value: Value, number: int) -> None:
        self._refuse_to("keep")

    @override
    def _drop(self, number: int) -> None:
        self._refuse_to("drop")

    @override
    def clear(self) -> NoReturn:
        self._refuse_to("clear")

    def _refuse_to(self, method: str) -> NoReturn:
        message = (
            f"acts[{self.name!r}].{method}(): this is a stored recording, which can only be read."
        )
        raise ActrecError(message)


class ReadOnlyLayer(Unchanged):
    """A layer whose calls are read on access."""

    @abstractmethod
    def _call(self, index: int) -> Value:
        """Read call number ``index``, which must exist."""

    @override
    def __getitem__(self, index: int | slice) -> Value:
        if isinstance(index, slice):
            return [self._call(at) for at in range(len(self))[index]]
        try:
            at = range(len(self))[index]
        except IndexError:
            raise IndexError(no_call(self, index)) from None
        except TypeError:
            raise TypeError(no_index(self, index)) from None
        return self._call(at)

    @override
    def __iter__(self) -> Iterator[Value]:
        return map(self._call, range(len(self)))

    @override
    def _join(self, how: How, dim: int, *, release: bool = False) -> Value:
        return super()._join(how, dim)  # nothing is held that could be released

    @override
    def _of(self, calls: list[int]) -> Layer[Any]:
        return ChosenLayer(self, calls)


class ChosenLayer(ReadOnlyLayer):
    """Some calls of a layer on disk."""

    def __init__(self, base: Layer[Any], calls: list[int]) -> None:
        self.name = base.name
        self.type = base.type
        self.base = base
        self.calls = calls
        self._units, self._transform = base._units, base._transform

    @property
    @override
    def passes(self) -> ListView[int]:
        return ListView(self._numbers)

    @cached_property
    def _numbers(self) -> list[int]:
        passes = self.base.passes
        return [passes[index] for index in self.calls]

    @property
    def ranks(self) -> list[int]:
        """For each call, the rank that has recorded it."""
        ranks = self.base.ranks  # type: ignore[attr-defined]  # layers on disk know them
        return [ranks[index] for index in self.calls]

    @override
    def __len__(self) -> int:
        return len(self.calls)

    @override
    def _call(self, index: int) -> Value:
        return self.base[self.calls[index]]

    @override
    def _seen(self) -> tuple[Summary, dict[object, int]]:
        summary, nbytes = Summary(), 0
        for value in self:
            found, spec = flatten(value)
            summary.add_flat(found, spec)
            nbytes += sum(tensor.nbytes for tensor in found)
        return summary, {id(self): nbytes}
