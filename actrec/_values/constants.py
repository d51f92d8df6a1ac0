"""Values that are neither tensors nor containers, and are kept as they are: numbers, strings, types, NumPy arrays, placeholders."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from .stand_ins import Opaque

#: Immutable, or as good as.
CONSTANTS: Final = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type(...), type, Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    Opaque,
)  # fmt: skip


_NUMBERS: Final = {
    bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128,
}  # fmt: skip
_INT64: Final = range(-(1 << 63), 1 << 63)


@dataclass(slots=True, eq=False)
class Constant:
    """A constant in a value. It equals those of the same type and content, so that NaN equals NaN."""

    value: Any

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or self._content() == other._content()

    __hash__ = None  # type: ignore[assignment]

    @property
    def kind(self) -> str:
        """The type of the constant, for messages and tables."""
        value = self.value
        return value.type.rpartition(".")[2] if isinstance(value, Opaque) else type(value).__name__

    def _content(self) -> object:
        value = self.value
        return (value.shape, value.dtype, value.tobytes()) if is_array(value) else repr(value)


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a NumPy array or scalar without Python objects."""
    numpy = sys.modules.get("numpy")  # if there is an array, NumPy was imported
    is_numpy = numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))
    return is_numpy and not value.dtype.hasobject


def as_tensor(value: Any) -> Tensor | None:
    """Return a number, or a NumPy array of numbers, as a tensor of its precision; ``None`` for all else."""
    if is_array(value):
        try:
            return torch.from_numpy(sys.modules["numpy"].array(value))
        except TypeError:  # of texts or dates
            return None
    dtype = next((of for kind, of in _NUMBERS.items() if isinstance(value, kind)), None)
    if dtype is None or isinstance(value, Enum) or (dtype is torch.int64 and value not in _INT64):
        return None
    return torch.tensor(value, dtype=dtype, device="cpu")
