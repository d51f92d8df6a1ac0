"""Values without tensors and containers, as JSON: how each kind is written, and how it is read.

Reading never imports or calls anything by a name from the file: a class or an enum member is read as an ``Opaque``.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, NamedTuple

import torch

from actrec._values.stand_ins import Opaque, qualified
from actrec.errors import CaptureError

from .format import Defect, need
from .forms import checked

_SAFE_INT: Final = 1 << 53  # what every reader of JSON reads exactly
#: A name that can be the name of anything in Python.
WORD: Final = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)


def node_of(value: Any) -> Any:
    """Return a constant as JSON; ``CaptureError`` if it cannot be stored."""
    plain = _plain(value)
    if plain is not None or value is None:
        return plain
    for name, kind in KINDS.items():
        if isinstance(value, kind.type):
            return {name: kind.write(value)}
    raise refused(value)


def from_node(node: Any) -> Any:
    """Return the constant of a node."""
    if not isinstance(node, dict):
        return node
    ((name, inner),) = node.items()
    return KINDS[name].read(inner)


def refused(value: object) -> CaptureError:
    """Return the error that says that a value cannot be stored."""
    kind = qualified(type(value))
    return CaptureError(f"a value of type {kind} cannot be stored; take out of it what you need")


def _plain(value: Any) -> Any:
    """Return a value that JSON can express itself; ``None`` for anything else."""
    if isinstance(value, Enum):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < _SAFE_INT:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return str(value) if isinstance(value, str) else None


class Kind(NamedTuple):
    """A kind of constant that JSON cannot express itself."""

    type: Any
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _opaque_of(value: Any) -> str:
    if isinstance(value, Opaque):
        return value.type
    return qualified(value) if isinstance(value, type) else f"{qualified(type(value))}.{value.name}"


def _opaque(name: Any) -> Opaque:
    name = checked(name, str, "the type of an object")
    need(name.rpartition(".")[2], "the type of an object has no name")
    return Opaque(name)


def _float(word: Any) -> float:
    need(word in {"nan", "inf", "-inf"}, "an unknown floating-point number")
    return float(word)


def _parts(nodes: Any, many: int) -> list[Any]:
    """Return the constants that another one consists of."""
    need(len(nodes) == many, "a constant has other parts")
    return [from_node(node) for node in checked(nodes, list, "the parts of a constant")]


def _ends(value: Any) -> list[Any]:
    return [node_of(end) for end in (value.start, value.stop, value.step)]


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _of_torch(kind: Any) -> Kind:
    """Return the kind of a PyTorch constant, which is written as its name."""

    def read(name: Any) -> Any:
        is_name = WORD.fullmatch(checked(name, str, "a constant"))
        found = vars(torch).get(name)  # getattr() would import what torch imports lazily
        need(is_name and isinstance(found, kind), "an unknown constant of PyTorch")
        return found

    return Kind(kind, _name, read)


def _device(name: Any) -> torch.device:
    try:
        return torch.device(checked(name, str, "a device"))
    except RuntimeError:
        message = "an unknown device"
        raise Defect(message) from None


#: By their names in the file. The first that fits is used: an ``IntEnum`` is also an ``int``.
KINDS: Final[dict[str, Kind]] = {
    "opaque": Kind((Enum, Opaque, type), _opaque_of, _opaque),
    "int": Kind(int, hex, lambda digits: int(checked(digits, str, "an integer"), 16)),
    "float": Kind(float, lambda value: repr(float(value)), _float),
    "complex": Kind(
        complex,
        lambda value: [node_of(value.real), node_of(value.imag)],
        lambda nodes: complex(*_parts(nodes, 2)),
    ),
    "bytes": Kind(
        bytes,
        lambda value: base64.b64encode(value).decode("ascii"),
        lambda code: base64.b64decode(checked(code, str, "bytes"), validate=True),
    ),
    "size": Kind(torch.Size, list, lambda sizes: torch.Size(checked(sizes, [int], "a size"))),
    "range": Kind(range, _ends, lambda nodes: range(*_parts(nodes, 3))),
    "slice": Kind(slice, _ends, lambda nodes: slice(*_parts(nodes, 3))),
    "ellipsis": Kind(type(...), lambda _: True, lambda _: ...),
    "dtype": _of_torch(torch.dtype),
    "layout": _of_torch(torch.layout),
    "memory_format": _of_torch(torch.memory_format),
    "device": Kind(torch.device, str, _device),
}
