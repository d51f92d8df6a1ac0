"""Values as text: the structure as JSON, with a number in the place of every tensor.

Nothing that is read is ever imported or called by a name from the file. What has a class that cannot be
had without running somebody's code comes back as a stand-in: a :class:`Fields` for a dataclass, a
``ModelOutput`` or a dict subclass, a named tuple made anew, an ``Opaque`` for a class or an enum member.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections import OrderedDict, UserList, deque, namedtuple
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from actrec._nested import Fields, Opaque, Value, is_array, parts, qualified, tensors
from actrec._snapshot import is_distributed
from actrec.errors import CaptureError

from ._format import (
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_STRUCTURE,
    Defect,
    integer,
    items,
    mapping,
    need,
    text,
)
from ._parts import Spread, local, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Encoded", "Fields", "decode", "encode"]

#: The structure of a value that is a tensor and nothing else.
TENSOR: Final = '{"tensor":0}'

_SAFE_INT: Final = 1 << 53  # what every reader of JSON reads exactly
_WORD = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
_MAX_NODES: Final = MAX_ITEMS // 2
_PACKED: Final = 4  # items of a PackedSequence


class Encoded(NamedTuple):
    """A value taken apart."""

    structure: str
    tensors: list[Tensor]


def encode(value: Value, *, parts: bool = False) -> Encoded:
    """Take a value apart; ``CaptureError`` if there is something in it that cannot be stored.

    With ``parts``, of a ``DTensor`` there is the part of this rank, and how it is spread.
    """
    if type(value) is Tensor:
        return Encoded(TENSOR, [value])
    encoder = _Encoder(parts=parts)
    try:
        structure = json.dumps(
            encoder.node(value, 0), separators=(",", ":"), allow_nan=False, ensure_ascii=True
        )
    except RecursionError:  # pragma: no cover  # MAX_DEPTH is far below what Python allows
        raise CaptureError(_TOO_DEEP) from None
    if len(structure) > MAX_STRUCTURE:
        raise CaptureError(TOO_LARGE)
    return Encoded(structure, encoder.tensors)


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"
TOO_LARGE: Final = "it has too many parts. Many numbers are better stored as one tensor"


class _Encoder:
    def __init__(self, *, parts: bool) -> None:
        self.parts = parts
        self.ranks: set[tuple[int, ...]] = set()  # of the meshes
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}  # by id of the tensor
        self.nodes = 0

    def node(self, value: Value, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CaptureError(_TOO_DEEP)
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise CaptureError(TOO_LARGE)
        if isinstance(value, Tensor):
            if self.parts and is_distributed(value):
                return self.part(value)
            return {"tensor": self.number(value)}
        if is_array(value):
            return self.array(value)
        if isinstance(value, Enum):
            return {"opaque": f"{qualified(type(value))}.{value.name}"}
        known, node = _constant(value)
        return node if known else self.container(value, depth)

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self.numbers[id(tensor)]

    def part(self, tensor: Tensor) -> Any:
        found = spread(tensor)
        self.ranks.add(found.ranks)
        if len(self.ranks) > 1:
            message = (
                "its tensors are spread over different ranks. Let a transform take one of them"
            )
            raise CaptureError(message)
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(local(tensor))
        return {"dtensor": self.numbers[id(tensor)]} | found.node()

    def array(self, value: Any) -> Any:
        numpy = sys.modules["numpy"]
        if isinstance(value, numpy.ma.MaskedArray):  # or else it would come back without its mask
            message = "a masked NumPy array cannot be stored"
            raise CaptureError(message)
        try:
            tensor = torch.from_numpy(numpy.array(value))
        except (TypeError, ValueError) as error:
            message = f"a NumPy array of dtype {value.dtype} cannot be stored"
            raise CaptureError(message) from error
        kind = "array" if isinstance(value, numpy.ndarray) else "scalar"
        number = len(self.tensors)
        self.tensors.append(tensor)
        return {kind: number}

    def container(self, value: Any, depth: int) -> Any:
        def nodes(values: Iterable[Any]) -> list[Any]:
            return [self.node(item, depth + 1) for item in values]

        taken = parts(value)
        if taken is None:
            message = f"a value of type {qualified(type(value))} cannot be stored; take out of it what you need"
            raise CaptureError(message)
        if isinstance(value, (tuple, list, deque, UserList)):
            number = _length(value)
            if next(tensors(taken.children[number:]), None) is None:
                return _sequence(value, nodes(taken.children[:number]))
        else:
            # What has attributes and no items comes back as Fields, of which they are the items.
            number = taken.items if isinstance(value, Mapping) else len(taken.children)
        pairs = _paired(nodes(taken.keys[:number]), nodes(taken.children[:number]))
        if type(value) is dict or type(value).__name__ == "defaultdict":
            return {"dict": pairs}
        if type(value) is OrderedDict:
            return {"ordered_dict": pairs}
        attributes = dict(zip(taken.keys[number:], taken.children[number:], strict=True))
        kind = attributes.pop("_type") if isinstance(value, Fields) else qualified(type(value))
        more = {
            k: v for k, v in attributes.items() if k not in taken.keys[:number] and _may_be_set(k)
        }
        return {"object": kind, "items": pairs, "more": _paired(more, nodes(more.values()))}


def _length(value: Any) -> int:
    """How many items it has, whatever its class says of that."""
    base = next(kind for kind in (tuple, list, deque, UserList) if isinstance(value, kind))
    return base.__len__(value)


def _paired(keys: Iterable[Any], nodes: Iterable[Any]) -> list[list[Any]]:
    return [list(pair) for pair in zip(keys, nodes, strict=True)]


def _may_be_set(name: object) -> bool:
    """Whether a stand-in can have an attribute of that name without losing what a dict can do."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(dict, name)


def _sequence(value: Any, nodes: list[Any]) -> dict[str, Any]:
    kind = type(value)
    if isinstance(value, deque):
        return {"deque": nodes, "maxlen": value.maxlen}
    if not isinstance(value, tuple):
        return {"list": nodes}
    if kind is PackedSequence:
        return {"packed_sequence": True, "items": nodes}
    if kind.__module__ == "torch.return_types":
        return {"return_type": kind.__name__, "items": nodes}
    fields = getattr(kind, "_fields", None)
    if isinstance(fields, tuple) and len(fields) == len(nodes):
        return {"named_tuple": kind.__name__, "fields": list(fields), "items": nodes}
    return {"tuple": True, "items": nodes}


def _constant(value: Any) -> tuple[bool, Any]:  # noqa: C901, PLR0911, PLR0912  # a table, in effect
    """Whether ``value`` is a constant, and what stands for it."""
    match value:
        case None | bool():
            return True, value
        case str():
            return True, str(value)
        case int():
            small = -_SAFE_INT < value < _SAFE_INT
            return True, int(value) if small else {"int": hex(value)}
        case float():
            return True, float(value) if math.isfinite(value) else {"float": repr(float(value))}
        case complex():
            return True, {"complex": [_constant(value.real)[1], _constant(value.imag)[1]]}
        case bytes():
            return True, {"bytes": base64.b64encode(value).decode("ascii")}
        case torch.Size():
            return True, {"size": list(value)}
        case range():
            return True, {"range": [_constant(x)[1] for x in (value.start, value.stop, value.step)]}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return True, {type(value).__name__: str(value).removeprefix("torch.")}
        case torch.device():
            return True, {"device": str(value)}
        case Opaque():
            return True, {"opaque": value.type}
        case type():
            return True, {"opaque": qualified(value)}
        case slice():
            parts = [_constant(x) for x in (value.start, value.stop, value.step)]
            return all(known for known, _ in parts), {"slice": [node for _, node in parts]}
    return value is ..., {"ellipsis": True}


# --- Reading -----------------------------------------------------------------------------------------


def decode(
    structure: str,
    tensor: Callable[[int], Tensor],
    whole: Callable[[int, Spread], Tensor] | None = None,
) -> Value:
    """Put a value together again; ``Defect`` if the text describes none.

    ``tensor(k)`` is its tensor ``k``, and ``whole(k, spread)`` the same of a tensor that is in parts, one of
    which tensor ``k`` is. Without it, the part stands for the whole.
    """
    if structure == TENSOR:
        return tensor(0)
    try:
        return _Decoder(tensor, whole).value(json.loads(structure), 0)
    except RecursionError:
        raise Defect(_DEEP) from None
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        message = f"a value cannot be made of its description ({error})"
        raise Defect(message) from error


_DEEP = f"a value is nested more than {MAX_DEPTH} deep"


class _Decoder:
    def __init__(
        self,
        tensor: Callable[[int], Tensor],
        whole: Callable[[int, Spread], Tensor] | None,
    ) -> None:
        self.tensor = tensor
        self.whole = whole
        self.made: dict[int, Tensor] = {}

    def value(self, node: Any, depth: int) -> Value:
        need(depth <= MAX_DEPTH, _DEEP)
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        node = mapping(node, "a part of a value")
        kinds = _KINDS.intersection(node)
        need(len(kinds) == 1, f"a part of a value is of no known kind ({', '.join(node)[:60]})")
        (kind,) = kinds
        return getattr(self, f"_{kind}")(node[kind], node, depth + 1)

    def values(self, nodes: Any, depth: int) -> list[Value]:
        return [self.value(node, depth) for node in items(nodes, "the parts of a value")]

    def pairs(self, nodes: Any, depth: int) -> list[tuple[Value, Value]]:
        pairs = []
        for pair in items(nodes, "the items of a value"):
            key, value = items(pair, "an item of a value")
            pairs.append((self.value(key, depth), self.value(value, depth)))
        # Two classes of one name, say, of which one entry would be lost.
        need(len(dict(pairs)) == len(pairs), "two keys are equal once they are read")
        return pairs

    def _tensor(self, number: Any, *_: Any) -> Tensor:
        number = integer(number, "the number of a tensor")
        if number not in self.made:
            self.made[number] = self.tensor(number)
        return self.made[number]

    def _dtensor(self, number: Any, node: Any, _: int) -> Tensor:
        found = Spread.parsed(node)
        number = integer(number, "the number of a tensor")
        if number not in self.made and self.whole is not None:
            self.made[number] = self.whole(number, found)
        return self._tensor(number)

    def _array(self, number: Any, *_: Any) -> Any:
        return self._tensor(number).numpy()

    def _scalar(self, number: Any, *_: Any) -> Any:
        array = self._array(number)
        need(array.ndim == 0, "a NumPy scalar has dimensions")
        return array[()]

    def _tuple(self, _: Any, node: Any, depth: int) -> Any:
        return tuple(self.values(node["items"], depth))

    def _named_tuple(self, name: Any, node: Any, depth: int) -> Any:
        values = self.values(node["items"], depth)
        fields = tuple(
            text(field, "the field of a named tuple") for field in items(node["fields"], "fields")
        )
        need(len(fields) == len(values) <= 1000, "a named tuple has not as many values as fields")  # noqa: PLR2004
        return _named(text(name, "the name of a named tuple"), fields, values)

    def _packed_sequence(self, _: Any, node: Any, depth: int) -> Any:
        values = self.values(node["items"], depth)
        need(len(values) == _PACKED, "a PackedSequence has other than four parts")
        return tuple.__new__(PackedSequence, values)

    def _return_type(self, name: Any, node: Any, depth: int) -> Any:
        known = {kind.__name__: kind for kind in torch.return_types.all_return_types}
        need(name in known, "an unknown return type of PyTorch")
        return known[name](self.values(node["items"], depth))

    def _list(self, nodes: Any, _: Any, depth: int) -> Any:
        return self.values(nodes, depth)

    def _deque(self, nodes: Any, node: Any, depth: int) -> Any:
        most = node["maxlen"]
        return deque(
            self.values(nodes, depth), None if most is None else integer(most, "a deque's maxlen")
        )

    def _dict(self, nodes: Any, _: Any, depth: int) -> Any:
        return dict(self.pairs(nodes, depth))

    def _ordered_dict(self, nodes: Any, _: Any, depth: int) -> Any:
        return OrderedDict(self.pairs(nodes, depth))

    def _object(self, name: Any, node: Any, depth: int) -> Any:
        more = []
        for pair in items(node["more"], "the attributes of a value"):
            key, value = items(pair, "an attribute of a value")
            need(
                _may_be_set(key) and key != "_type",
                "an attribute of a value has an impossible name",
            )
            more.append((key, self.value(value, depth)))
        return Fields(text(name, "the type of a value"), self.pairs(node["items"], depth), more)

    def _int(self, digits: Any, *_: Any) -> int:
        return int(text(digits, "an integer"), 16)

    def _float(self, word: Any, *_: Any) -> float:
        need(word in {"nan", "inf", "-inf"}, "an unknown floating-point number")
        return float(word)

    def _complex(self, parts: Any, *_: Any) -> complex:
        real, imaginary = self.values(parts, MAX_DEPTH)
        return complex(real, imaginary)

    def _bytes(self, code: Any, *_: Any) -> bytes:
        return base64.b64decode(text(code, "bytes"), validate=True)

    def _size(self, sizes: Any, *_: Any) -> torch.Size:
        return torch.Size([integer(size, "a size") for size in items(sizes, "a shape")])

    def _range(self, parts: Any, *_: Any) -> range:
        return range(*self.values(parts, MAX_DEPTH))

    def _slice(self, parts: Any, *_: Any) -> slice:
        start, stop, step = self.values(parts, MAX_DEPTH)
        return slice(start, stop, step)

    def _ellipsis(self, *_: Any) -> Any:
        return ...

    def _dtype(self, name: Any, *_: Any) -> Any:
        return _of_torch(name, torch.dtype)

    def _layout(self, name: Any, *_: Any) -> Any:
        return _of_torch(name, torch.layout)

    def _memory_format(self, name: Any, *_: Any) -> Any:
        return _of_torch(name, torch.memory_format)

    def _device(self, name: Any, *_: Any) -> torch.device:
        try:
            return torch.device(text(name, "a device"))
        except RuntimeError:
            message = "an unknown device"
            raise Defect(message) from None

    def _opaque(self, name: Any, *_: Any) -> Opaque:
        name = text(name, "the type of an object")
        need(name.rpartition(".")[2], "the type of an object has no name")
        return Opaque(name)


_KINDS = frozenset(
    name[1:] for name in vars(_Decoder) if name.startswith("_") and not name.startswith("__")
)


def _of_torch(name: Any, kind: type) -> Any:
    need(_WORD.fullmatch(text(name, "a constant")), "an unknown constant of PyTorch")
    constant = vars(torch).get(name)  # getattr() would import what torch imports late
    need(isinstance(constant, kind), "an unknown constant of PyTorch")
    return constant


@lru_cache(maxsize=256)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple class; names that Python cannot have become others."""
    name = name if _WORD.fullmatch(name) else "namedtuple"
    kind = namedtuple(name, fields, rename=True)  # type: ignore[misc]  # noqa: PYI024
    kind.__reduce__ = _reduced  # type: ignore[assignment,method-assign]
    return kind


def _named(name: str, fields: tuple[str, ...], values: Iterable[Value]) -> Any:
    return tuple.__new__(_named_tuple(name, fields), values)


def _reduced(value: Any) -> tuple[Any, ...]:
    """How such a named tuple is copied and pickled: its class is made anew, for nobody can import it."""
    return _named, (type(value).__name__, value._fields, tuple(value))
