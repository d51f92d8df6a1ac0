"""The part of a layer in a shard: its calls, in groups whose values differ only in their numbers and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from actrec._values.shapes import Summary, dtype_name

from .decoding import Structure
from .format import Slot


@dataclass(slots=True, eq=False)
class Leaf:
    """One tensor of the values of a group: the elements of all calls follow each other in the file."""

    dtype: torch.dtype
    shapes: Tensor  #: (calls, dims)
    begin: int = 0  #: byte in the file
    starts: Tensor = field(init=False)  #: (calls + 1,), the elements before each call

    def __post_init__(self) -> None:
        self.starts = torch.zeros(len(self.shapes) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(self.shapes.prod(1), 0, out=self.starts[1:])

    def shape(self, call: int) -> tuple[int, ...]:
        """Return the shape of the tensor in a call."""
        return tuple(self.shapes[call].tolist())

    def extent(self, first: int, many: int = 1) -> tuple[int, int]:
        """Return the first byte of some calls in the file, and their number of bytes."""
        begin, end = self.starts[first].item(), self.starts[first + many].item()
        size = self.dtype.itemsize
        return self.begin + int(begin) * size, int(end - begin) * size

    def row(self, *, new: bool) -> list[int] | None:
        """Return the shape of a row; ``None`` if shapes differ, or there are no rows. If ``new``, each call is one row."""
        shapes = self.shapes if new else self.shapes[:, 1:]
        alike = (new or self.shapes.shape[1]) and bool((shapes == shapes[0]).all())
        return shapes[0].tolist() if alike else None

    def counts(self, *, new: bool) -> Tensor:
        """Return how many rows each call has, ``(calls,)``."""
        return (
            torch.ones(len(self.shapes), dtype=torch.int64, device="cpu")
            if new
            else self.shapes[:, 0]
        )

    @property
    def nbytes(self) -> int:
        """The bytes of all calls."""
        return self.extent(0, len(self.shapes))[1]


@dataclass(slots=True, eq=False)
class Group:
    """Calls of a layer with the same structure, dtypes and numbers of dimensions."""

    text: str  #: the structure as JSON, equal for equal structures
    structure: Structure
    leaves: list[Leaf]


@dataclass(eq=False)
class Part:
    """The part of one layer in a shard. Other tensors with an entry for each call belong next to ``passes``."""

    slot: Slot
    groups: list[Group]
    passes: Tensor  #: (calls,)
    group: Tensor  #: (calls,), which group each call is in

    def __len__(self) -> int:
        return len(self.passes)

    @cached_property
    def within(self) -> Tensor:
        """The index of each call in its group, ``(calls,)``."""
        order = self.group.argsort(stable=True)
        before = torch.bincount(self.group).cumsum(0) - torch.bincount(self.group)
        within = torch.empty_like(self.group)
        within[order] = torch.arange(len(order), device="cpu") - before[self.group[order]]
        return within

    def place(self, call: int) -> tuple[Group, int]:
        """Return the group of a call, and its index there."""
        return self.groups[int(self.group[call])], int(self.within[call])

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(leaf.nbytes for group in self.groups for leaf in group.leaves)

    @property
    def in_parts(self) -> bool:
        """Whether any tensor is a rank's part of a ``DTensor``."""
        return any(group.structure.parts for group in self.groups)

    def summary(self) -> Summary:
        """Return the summary of the values, without the device."""
        found = Summary()
        for group in self.groups:
            found.dtypes.update(dict.fromkeys(dtype_name(leaf.dtype) for leaf in group.leaves))
            low, high = (
                [end(leaf.shapes, 0).tolist() for leaf in group.leaves]
                for end in (torch.amin, torch.amax)
            )
            found.add_spec(group.structure.spec, low, high)
        return found
