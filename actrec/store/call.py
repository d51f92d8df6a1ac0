"""A call that waits to be written to a shard: its tensors, and their structure, dtypes and shapes, which most calls share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor, strided

from actrec._values.containers import Value

from .decoding import TENSOR_ALONE
from .encoding import encode
from .format import Slot

#: About how many bytes a tensor takes in memory besides its data, and in the header of a shard besides its structure.
OVERHEAD: Final = 1024

_Kinds: TypeAlias = "list[tuple[torch.dtype, torch.Size]]"


class Look:
    """The structure, dtypes and shapes of a value. Values that differ only in their numbers share one."""

    __slots__ = ("dtype", "group", "header", "kinds", "nbytes", "shape", "size", "structure")

    def __init__(self, structure: str, kinds: _Kinds) -> None:
        self.structure = structure  #: JSON
        self.kinds = kinds  #: the dtype and the shape of each tensor
        #: Equal for values whose tensors are stored as one tensor in a shard.
        self.group = structure, *((dtype, len(shape)) for dtype, shape in kinds)
        #: The bytes that such a group takes in the header of a shard.
        self.header = len(structure) + OVERHEAD * len(kinds)
        #: The bytes of the tensors.
        self.nbytes = sum(dtype.itemsize * shape.numel() for dtype, shape in kinds)
        #: The bytes that a call counts against the budget.
        self.size = self.nbytes + self.header + OVERHEAD
        #: Set only if the value is a single tensor that is stored as it is.
        self.dtype, self.shape = None, None
        if structure == TENSOR_ALONE and not kinds[0][0].is_complex:
            self.dtype, self.shape = kinds[0]

    def fits(self, value: Value) -> bool:
        """Whether a value is a plain tensor of this dtype and shape, which can be written as it is. A quick check."""
        return (
            type(value) is Tensor
            and value.dtype is self.dtype
            and value.is_cpu
            and value.layout is strided
            and not (value.is_nested or value.requires_grad or value.is_neg())
            and value.shape == self.shape
        )


@dataclass(slots=True, eq=False)
class Call:
    """A value that waits to be written."""

    slot: Slot
    number: int  #: of its pass
    tensors: Sequence[Tensor]
    look: Look

    @classmethod
    def of(
        cls,
        slot: Slot,
        number: int,
        value: Value,
        *,
        parts: bool = False,
        before: Look | None = None,
    ) -> Call:
        """Return a value as it is written, see ``encode``; ``before`` is the look of the previous call, to be shared if equal."""
        if before is not None and before.fits(value):
            return cls(slot, number, (value,), before)
        structure, tensors = encode(value, parts=parts)
        kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if before is None or before.structure != structure or before.kinds != kinds:
            before = Look(structure, kinds)
        return cls(slot, number, tensors, before)
