"""A call on its way to a shard: its tensors, and what they look like, which most calls of a layer have in common."""

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

#: What a tensor takes in Python's memory besides its data, and in the header of a shard besides its structure, roughly.
OVERHEAD: Final = 1024

_Kinds: TypeAlias = "list[tuple[torch.dtype, torch.Size]]"


class Look:
    """What values have in common that differ in their numbers alone."""

    __slots__ = ("dtype", "group", "header", "kinds", "nbytes", "shape", "size", "structure")

    def __init__(self, structure: str, kinds: _Kinds) -> None:
        self.structure = structure  #: JSON
        self.kinds = kinds  #: the dtype and the shape of each tensor
        #: Equal for values whose tensors are one in a shard.
        self.group = structure, *((dtype, len(shape)) for dtype, shape in kinds)
        #: The bytes that such a group takes in the header of a shard.
        self.header = len(structure) + OVERHEAD * len(kinds)
        #: The bytes of the tensors.
        self.nbytes = sum(dtype.itemsize * shape.numel() for dtype, shape in kinds)
        #: The bytes that a call counts against the budget.
        self.size = self.nbytes + self.header + OVERHEAD
        #: Of a tensor alone whose memory is what it is; of nothing else.
        self.dtype, self.shape = None, None
        if structure == TENSOR_ALONE and not kinds[0][0].is_complex:
            self.dtype, self.shape = kinds[0]

    def fits(self, value: Value) -> bool:
        """Whether a value looks like this, and can be written as it is: that is asked of the usual ones, for it takes little."""
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
        """Return a value as it is written, see ``encode``; ``before`` is the look of the call before, which may be shared."""
        if before is not None and before.fits(value):
            return cls(slot, number, (value,), before)
        structure, tensors = encode(value, parts=parts)
        kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if before is None or before.structure != structure or before.kinds != kinds:
            before = Look(structure, kinds)
        return cls(slot, number, tensors, before)
