"""What the calls of a layer look like: shapes, dtypes, memory, and how many there are in a pass, each call looked at once.

A look that goes on where it stopped is right as long as the calls before are the same, and cannot change by themselves: that
is what lists of tensors, and of tuples of tensors, are. A dict in a recording may have got other items since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from actrec._values.constants import Constant, is_array
from actrec._values.containers import Container
from actrec._values.memory import held, held_strided
from actrec._values.spec import Step, flatten
from actrec._values.summary import Summary

__all__ = ["Look", "Together"]


class Look:
    """A look at the calls of a layer, as many as there were.

    >>> import torch
    >>> look = Look()
    >>> look.at([torch.zeros(2, 3), torch.zeros(4, 3)])
    >>> look.summary.shape, sum(look.places.values())
    ('(2-4, 3)', 72)
    """

    def __init__(self) -> None:
        self.calls = 0  #: so many were looked at
        self.summary = Summary()
        self.places: dict[object, int] = {}  #: the bytes at each address
        self.most = 0  #: calls in a pass
        self.can_change = False  #: whether a call may come to look otherwise, though it is the same
        self._known: set[object] = set()
        self._per_pass: dict[int, int] = {}
        self._counted = 0

    def at(self, calls: Iterable[Any]) -> None:
        """Look at the calls behind those that were looked at."""
        for value in islice(calls, self.calls, None):
            self.calls += 1
            if type(value) is Tensor and value.layout is torch.strided and not value.is_nested:
                look = value.shape, value.dtype, value.device  # there are few different ones
                if look in self._known:
                    where, nbytes = held_strided(value)
                    self.places[where] = nbytes
                    continue
                self._known.add(look)
            tensors, spec = flatten(value)
            self.summary.add_flat(tensors, spec)
            self.can_change = self.can_change or not all(map(_is_fixed, spec.steps))
            for tensor in tensors:
                self.places.update(held(tensor))

    def count(self, passes: Sequence[int]) -> tuple[int, int]:
        """Count the passes of the calls that were looked at: the most calls of any, and how many passes have any."""
        for number in passes[self._counted : self.calls]:
            if number >= 0:
                many = self._per_pass[number] = self._per_pass.get(number, 0) + 1
                self.most = max(self.most, many)
        self._counted = self.calls
        return self.most, len(self._per_pass)


class Together:
    """The bytes of several layers together: memory that they share counts once.

    They are added up anew only where a layer has other calls than before.
    """

    def __init__(self) -> None:
        self._before: tuple[list[tuple[int, int]], list[Mapping[object, int]], int] = [], [], 0

    def nbytes(self, places: list[Mapping[object, int]]) -> int:
        """Add up the bytes at the addresses of each layer. A layer that has further calls has further addresses."""
        these = [(id(one), len(one)) for one in places]
        known, _, total = self._before
        if these != known:
            memory: dict[object, int] = {}
            for one in places:
                memory.update(one)
            total = sum(memory.values())
            self._before = (
                these,
                places,
                total,
            )  # which keeps them, so that no other one has their id
        return total


def _is_fixed(step: Step) -> bool:
    """Whether what a step makes is what it was, however long ago: a tensor, a constant, a plain tuple."""
    if isinstance(step, Container):
        return step.type is tuple
    return not (isinstance(step, Constant) and is_array(step.value))
