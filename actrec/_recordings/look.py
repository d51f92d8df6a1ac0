"""The shapes, dtypes, memory and calls per pass of a layer. Each call is looked at once.

A later look continues where the last one stopped. That is right if the earlier calls are the same objects and cannot
change: tensors, and tuples of tensors. A dict in a recording may have other items by then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import Any, Final

from torch import Tensor
from typing_extensions import TypeIs, override

from actrec._values.constants import Constant, is_array
from actrec._values.containers import Container
from actrec._values.memory import held, held_by_all
from actrec._values.shapes import Summary
from actrec._values.spec import Step, flatten

#: So many calls are looked at together, if all are tensors, or tuples of tensors.
MANY: Final = 1000

#: What a table shows of a tensor, besides its memory.
_LOOK: Final = attrgetter("shape", "dtype", "device")


class Look:
    """A look at the calls that a layer has so far.

    >>> import torch
    >>> look = Look()
    >>> look.at([torch.zeros(2, 3), torch.zeros(4, 3)])
    >>> look.summary.shape, sum(look.places.values())
    ('(2-4, 3)', 72)
    """

    def __init__(self) -> None:
        self.calls = 0  #: how many were looked at
        self.summary = Summary()
        self.places: dict[object, int] = {}  #: the bytes at each address
        self.most = 0  #: calls in a pass
        self.can_change = False  #: whether a call may change its content, such as a dict
        self._known: set[object] = set()
        self._per_pass: Counter[int] = Counter()
        self._counted = 0

    def at(self, calls: Iterable[Any]) -> None:
        """Look at the calls after those that were looked at."""
        rest = islice(calls, self.calls, None)
        while some := [*islice(rest, MANY)]:
            self.calls += len(some)
            columns = _columns(some)
            if not (columns and self._at_columns(some, columns)):
                for value in some:
                    self._at_value(value)

    def _at_columns(self, some: Sequence[Any], columns: list[Sequence[Tensor]]) -> bool:
        """Look at plain tensors in loops that run in C. Return whether this was possible: they are dense and on the CPU."""
        looks = zip(*(map(_LOOK, column) for column in columns), strict=True)
        try:
            found = dict(zip(looks, some, strict=True))
            if any(device.type != "cpu" for parts in found for _, _, device in parts):
                return False
            for column in columns:
                self.places.update(held_by_all(column))
        except RuntimeError:  # one is sparse or nested
            return False
        for parts, value in found.items():  # few: most calls have the same shapes
            look = type(value), parts
            if look not in self._known:
                self._known.add(look)
                self.summary.add(value)
        return True

    def _at_value(self, value: Any) -> None:
        tensors, spec = flatten(value)
        self.summary.add_flat(tensors, spec)
        self.can_change = self.can_change or not all(map(_is_fixed, spec.steps))
        for array in (step.value for step in spec.steps if _is_array(step)):
            self.summary.dtypes[str(array.dtype)] = None
            self.places[id(self), len(self.places)] = array.nbytes
        for tensor in tensors:
            self.places.update(held(tensor))

    def count(self, passes: Sequence[int]) -> tuple[int, int]:
        """Count the passes of the calls that were looked at: the most calls of any, and how many passes have any."""
        new = [number for number in passes[self._counted : self.calls] if number >= 0]
        self._per_pass.update(new)
        self.most = max(self.most, *map(self._per_pass.__getitem__, {*new}), 0)
        self._counted = self.calls
        return self.most, len(self._per_pass)


class Together:
    """The bytes of several layers together: memory that they share counts once.

    The sum is computed again only if the calls of a layer have changed.
    """

    def __init__(self) -> None:
        self._before: tuple[list[tuple[int, int]], list[Mapping[object, int]], int] = [], [], 0

    @override
    def __reduce__(self) -> tuple[Any, ...]:  # a copy is of other layers
        return Together, ()

    def nbytes(self, places: list[Mapping[object, int]]) -> int:
        """Add up the bytes at the addresses of each layer. A layer that has further calls has further addresses."""
        these = [(id(one), len(one)) for one in places]
        known, _, total = self._before
        if these != known:
            memory: dict[object, int] = {}
            for one in places:
                memory.update(one)
            total = sum(memory.values())
            # Keeps the mappings alive, so that no other object gets their ids.
            self._before = these, places, total
        return total


def _columns(some: Sequence[Any]) -> list[Sequence[Tensor]]:
    """Return the tensors of calls, if all are tensors, or all are tuples of equally many, different tensors; else nothing."""
    types, columns = {*map(type, some)}, [some]
    if types == {tuple} and len({*map(len, some)}) == 1:
        columns = [*zip(*some, strict=True)]
        types = {*map(type, chain(*columns))}
        if any(len({*ids}) < len(ids) for ids in zip(*(map(id, c) for c in columns), strict=True)):
            return []
    return columns if types == {Tensor} else []


def _is_fixed(step: Step) -> bool:
    """Whether the object that a step makes cannot change: a tensor, a constant, a plain tuple."""
    if isinstance(step, Container):
        return step.type is tuple
    return not _is_array(step)


def _is_array(step: Step) -> TypeIs[Constant]:
    return isinstance(step, Constant) and is_array(step.value)
