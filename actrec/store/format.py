"""What writer and reader share: names, dtypes and limits.

The format itself is described in ``docs/reference/format.md``, which is normative.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from actrec._recordings.layer import Role
from actrec.errors import CorruptRecordingError

FORMAT: Final = "actrec"
VERSION: Final = 2
DESCRIPTION: Final = "rank.json"
UNFINISHED: Final = ".tmp"
ANOTHER: Final = "it is another file than when it was opened"

#: Limits that the writer keeps and the reader checks, so that no file can demand absurd amounts of memory.
MAX_HEADER: Final = 1 << 24  # bytes
MAX_JSON: Final = 1 << 24  # bytes of a description
MAX_DEPTH: Final = 64  # of nesting in a value
#: Characters that describe one value; in the header they may become twice as many.
MAX_STRUCTURE: Final = MAX_HEADER // 8
MAX_NODES: Final = 1 << 16  # containers, constants and tensors in one value
MAX_SIZE: Final = 1 << 62  # any size or number
MAX_DIMS: Final = 64  # of a tensor, and of a mesh

#: What a layer's values are: outputs, inputs, gradients, values that the user added, or keys of units.
ROLES: Final[tuple[Role, ...]] = ("output", "input", "gradient", "added", "unit")


class Slot(NamedTuple):
    """A list of calls in a recording: the outputs or inputs of a layer, or the values added by one name."""

    role: Role
    number: int  # of the layer in the recording
    name: str
    type: str

    @property
    def key(self) -> str:
        """The start of its tensors' names in a shard: not the name of the layer, which may contain anything."""
        return f"{self.role}.{self.number:05d}"


class Stored(NamedTuple):
    """How safetensors holds a dtype of PyTorch."""

    code: str
    pair: bool = False  # whether a complex number is stored as two real ones, in one more dimension


_CODES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "U8",
    "complex32": "F16", "complex128": "F64",
}  # fmt: skip
_PAIRS: Final = {"complex32", "complex128"}

#: The dtypes that can be stored, by their name without ``torch.``, as far as this version of PyTorch has them.
DTYPES: Final[dict[str, tuple[torch.dtype, Stored]]] = {
    name: (dtype, Stored(code, name in _PAIRS))
    for name, code in _CODES.items()
    if (dtype := getattr(torch, name, None)) is not None
}
#: How each dtype is held.
STORED: Final = dict(DTYPES.values())


# --- What is wrong with a file -----------------------------------------------------------------------


class Defect(Exception):  # noqa: N818  # not an error yet: code that knows the file makes one of it
    """Something in a file is wrong."""


def corrupt(path: object, defect: object) -> CorruptRecordingError:
    """Return the error for a defect in the file at ``path``."""
    return CorruptRecordingError(f"{path} is damaged: {defect}.")


def need(condition: object, defect: str) -> None:
    """Raise ``Defect`` unless ``condition`` holds."""
    if not condition:
        raise Defect(defect)
