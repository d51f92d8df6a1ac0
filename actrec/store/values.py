"""Values as JSON and tensors: a number stands in the place of every tensor.

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
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from actrec._values.constants import Constant, is_array
from actrec._values.containers import Container, Value
from actrec._values.dtensor import is_distributed
from actrec._values.spec import TENSOR, Spec, Step, flatten
from actrec._values.stand_ins import Fields, Opaque, qualified
from actrec.errors import CaptureError

from .dtensor import Spread, local, spread
from .format import (
    MAX_DEPTH,
    MAX_NODES,
    MAX_STRUCTURE,
    Defect,
    integer,
    items,
    mapping,
    need,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Encoded", "Structure", "decode", "encode"]

_SAFE_INT: Final = 1 << 53  # what every reader of JSON reads exactly
_WORD: Final = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
_PACKED: Final = 4  # items of a PackedSequence


# --- Writing -----------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A value as it is written."""

    structure: str  #: JSON
    tensors: list[Tensor]


def encode(value: Value, *, parts: bool = False) -> Encoded:
    """Return ``value`` as JSON and tensors.

    Args:
        value: what a layer returned, or the user has added.
        parts: whether of a ``DTensor`` this rank's local shard is stored, and its placement.

    Raises:
        CaptureError: there is something in it that cannot be stored.
    """
    if type(value) is Tensor:
        return Encoded(_TENSOR, [value])
    tensors, spec = flatten(value, unknown=_refuse)
    if len(spec.steps) > MAX_NODES:
        raise CaptureError(_TOO_LARGE)
    encoder = _Encoder(tensors, parts=parts)
    node = spec.fold(encoder.tensor, encoder.constant, encoder.container).content
    numbers = sorted(set(_numbers(node)))  # an attribute that no stand-in can have is left out
    if len(numbers) < len(encoder.tensors):
        node = _renumbered(node, {number: at for at, number in enumerate(numbers)})
        encoder.tensors = [encoder.tensors[number] for number in numbers]
    structure = json.dumps(node, separators=(",", ":"), allow_nan=False)
    if len(structure) + _ENTRIES * len(encoder.tensors) > MAX_STRUCTURE:
        raise CaptureError(_TOO_LARGE)
    try:
        decode(structure)
    except Defect as defect:
        message = f"it could not be read again: {defect}"
        raise CaptureError(message) from None
    return Encoded(structure, encoder.tensors)


_ENTRIES: Final = 512  # bytes that a tensor takes in the header of a shard, at most
#: The structure of a value that is a tensor and nothing else.
_TENSOR: Final = '{"tensor":0}'
_TOO_DEEP: Final = f"it is nested more than {MAX_DEPTH} deep"
_TOO_LARGE: Final = "it has too many parts. Many numbers are better stored as one tensor"


def _refuse(value: object) -> NoReturn:
    message = (
        f"a value of type {qualified(type(value))} cannot be stored; take out of it what you need"
    )
    raise CaptureError(message)


class _Node(NamedTuple):
    """A node of the structure, and how deep what is in it is nested."""

    content: Any
    depth: int = 0
    has_data: bool = False  # whether there is a tensor or an array in it


class _Encoder:
    """Makes nodes of the steps of a spec."""

    def __init__(self, tensors: list[Tensor], *, parts: bool) -> None:
        self.tensors = list(tensors)
        self._parts = parts
        self._ranks: set[tuple[int, ...]] = set()  # of the meshes
        self._spreads: dict[int, Spread] = {}

    def tensor(self, number: int) -> _Node:
        if self._parts and number not in self._spreads and is_distributed(self.tensors[number]):
            self._take_part(number)
        if number in self._spreads:
            return _Node({"dtensor": number, **self._spreads[number].node()}, 0, has_data=True)
        return _Node({"tensor": number}, 0, has_data=True)

    def _take_part(self, number: int) -> None:
        found = self._spreads[number] = spread(self.tensors[number])
        self.tensors[number] = local(self.tensors[number])
        self._ranks.add(found.ranks)
        if len(self._ranks) > 1:
            message = (
                "its tensors are spread over different ranks. Let a transform take one of them"
            )
            raise CaptureError(message)

    def constant(self, constant: Constant) -> _Node:
        value = constant.value
        if is_array(value):
            return _Node(self._array(value), 0, has_data=True)
        known, node = _constant(value)
        if not known:
            message = f"a value of type {qualified(type(value))} cannot be stored; take out of it what you need"
            raise CaptureError(message)
        return _Node(node)

    def _array(self, value: Any) -> Any:
        numpy = sys.modules["numpy"]
        if isinstance(value, numpy.ma.MaskedArray):  # or else it would come back without its mask
            message = "a masked NumPy array cannot be stored"
            raise CaptureError(message)
        try:
            tensor = torch.from_numpy(numpy.array(value))
        except (TypeError, ValueError) as error:
            message = f"a NumPy array of dtype {value.dtype} cannot be stored"
            raise CaptureError(message) from error
        self.tensors.append(tensor)
        kind = "array" if isinstance(value, numpy.ndarray) else "scalar"
        return {kind: len(self.tensors) - 1}

    def container(self, container: Container, children: list[_Node]) -> _Node:
        depth = 1 + max((child.depth for child in children), default=0)
        if depth > MAX_DEPTH:
            raise CaptureError(_TOO_DEEP)
        many = _items(container)
        nodes = [child.content for child in children]
        is_plain = not any(child.has_data for child in children[many:])
        node = _plain_node(container, nodes[:many]) if is_plain else None
        has_data = any(child.has_data for child in children)
        return _Node(node or _object_node(container, many, nodes), depth, has_data)


def _items(container: Container) -> int:
    """How many of the children of a container are items as they are stored; the others are attributes."""
    kind = container.type
    if issubclass(kind, tuple) and not container.items:
        return len(getattr(kind, "_fields", ()))
    if issubclass(kind, (tuple, list, deque, UserList, Mapping)):
        return container.items
    # What has attributes and no items comes back as Fields, of which they are the items.
    return len(container.keys)


def _plain_node(container: Container, nodes: list[Any]) -> dict[str, Any] | None:
    """The node of a sequence or a dict of Python's own; ``None`` for a container of another kind."""
    kind = container.type
    if issubclass(kind, tuple):
        return _tuple_node(container, nodes)
    if issubclass(kind, deque):
        return {"deque": nodes, "maxlen": container.maxlen}
    if issubclass(kind, (list, UserList)):
        return {"list": nodes}
    if kind is dict or kind is OrderedDict or kind.__name__ == "defaultdict":
        pairs = [[_key(key), node] for key, node in zip(container.keys, nodes, strict=False)]
        return {"ordered_dict" if kind is OrderedDict else "dict": pairs}
    return None


def _object_node(container: Container, many: int, nodes: list[Any]) -> dict[str, Any]:
    """The node of a container with attributes, which comes back as Fields."""
    kind, keys = container.type, container.keys
    pairs = [[_key(key), node] for key, node in zip(keys[:many], nodes[:many], strict=True)]
    attributes = dict(zip(keys[many:], nodes[many:], strict=True))
    name = attributes.pop("_type") if kind is Fields else qualified(kind)
    more = [[k, n] for k, n in attributes.items() if k not in keys[:many] and _may_be_set(k)]
    return {"object": pairs, "name": name, "more": more}


def _key(key: object) -> Any:
    """The node of a key of a dict."""
    tensors, spec = flatten(key, unknown=_refuse)
    if tensors:
        message = "a dict with a tensor for a key cannot be stored"
        raise CaptureError(message)
    encoder = _Encoder([], parts=False)
    return spec.fold(encoder.tensor, encoder.constant, encoder.container).content


_DATA: Final = ("tensor", "dtensor", "array", "scalar")


def _numbers(node: Any) -> Iterator[int]:
    """The numbers of the tensors in a node."""
    if isinstance(node, dict):
        yield from (node[kind] for kind in _DATA if kind in node)
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        if isinstance(child, (dict, list)):
            yield from _numbers(child)


def _renumbered(node: Any, numbers: Mapping[int, int]) -> Any:
    """The node with other numbers for its tensors."""
    if isinstance(node, list):
        return [_renumbered(child, numbers) for child in node]
    if isinstance(node, dict):
        return {
            key: numbers[child] if key in _DATA else _renumbered(child, numbers)
            for key, child in node.items()
        }
    return node


def _may_be_set(name: object) -> bool:
    """Whether a stand-in can have an attribute of that name without losing what a dict can do."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(dict, name)


def _tuple_node(container: Container, nodes: list[Any]) -> dict[str, Any]:
    kind = container.type
    if kind is PackedSequence:
        return {"packed_sequence": nodes}
    if kind.__module__ == "torch.return_types":
        return {"return_type": nodes, "name": kind.__name__}
    if not container.items and nodes:
        return {
            "named_tuple": nodes,
            "name": kind.__name__,
            "fields": list(container.keys[: len(nodes)]),
        }
    return {"tuple": nodes}


def _constant(value: Any) -> tuple[bool, Any]:  # noqa: C901, PLR0911, PLR0912  # a table, in effect
    """Whether ``value`` is a constant, and the node that stands for it."""
    match value:
        case Enum():
            return True, {"opaque": f"{qualified(type(value))}.{value.name}"}
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


@dataclass(frozen=True)
class Structure:
    """What a structure says: how values are made of their tensors."""

    spec: Spec
    parts: tuple[tuple[int, Spread], ...] = ()  #: the tensors that are a rank's part of a DTensor
    scalars: frozenset[int] = (
        frozenset()
    )  #: the tensors that are a NumPy scalar, without dimensions
    joins: bool = True  #: whether the tensors of several values can be joined: not if they are arrays, or packed


@lru_cache(maxsize=1024)
def decode(structure: str) -> Structure:
    """Return what the JSON of a structure says; ``Defect`` if it describes no value."""
    if structure == _TENSOR:
        return Structure(TENSOR)
    try:
        decoder = _Decoder()
        decoder.add(json.loads(structure), 0)
    except RecursionError:
        raise Defect(_DEEP) from None
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        message = f"a value cannot be made of its description ({error})"
        raise Defect(message) from error
    count = 1 + max(decoder.numbers, default=-1)
    need(decoder.numbers == set(range(count)), "a value does not use all of its tensors")
    spec = Spec(tuple(decoder.steps), count)
    return Structure(spec, tuple(decoder.parts.items()), frozenset(decoder.scalars), decoder.joins)


_DEEP: Final = f"a value is nested more than {MAX_DEPTH} deep"


class _Array(Container):
    """A step that makes a NumPy array of a tensor, which is then no tensor of the value."""

    @property
    @override
    def paths(self) -> list[str]:
        return []


def _scalar(children: list[Tensor]) -> Any:
    return children[0].numpy()[()]


def _array(children: list[Tensor]) -> Any:
    return children[0].numpy()


def _deque(maxlen: int | None, children: list[Value]) -> Value:
    return deque(children, maxlen)


def _keyed(kind: type, keys: tuple[Any, ...], children: list[Value]) -> Value:
    return kind(zip(keys, children, strict=True))


def _fields(
    name: str, keys: tuple[Any, ...], more: tuple[str, ...], children: list[Value]
) -> Fields:
    many = len(keys)
    own, attributes = zip(keys, children[:many], strict=True), children[many:]
    return Fields(name, own, zip(more, attributes, strict=True))


class _Decoder:
    """Makes steps of the nodes of a structure. A method for each kind of node."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.numbers: set[int] = set()
        self.parts: dict[int, Spread] = {}
        self.scalars: set[int] = set()
        self.joins = True

    def add(self, node: Any, depth: int) -> None:
        """Add the steps that make what a node describes."""
        need(depth <= MAX_DEPTH, _DEEP)
        if node is None or isinstance(node, (bool, int, float, str)):
            self.steps.append(Constant(node))
            return
        node = mapping(node, "a part of a value")
        kinds = _NODES.intersection(node)
        need(len(kinds) == 1, f"a part of a value is of no known kind ({', '.join(node)[:60]})")
        (kind,) = kinds
        if kind in _CONSTANTS:
            self.steps.append(Constant(_CONSTANTS[kind](node[kind])))
        else:
            getattr(self, f"_{kind}")(node[kind], node, depth + 1)

    def _close(
        self,
        kind: type,
        nodes: Any,
        depth: int,
        make: Callable[[list[Value]], Value],
        keys: Sequence[Any] | None = None,
        *,
        attributes: Sequence[str] = (),
    ) -> None:
        """Add the steps of the children, and that of a container with them."""
        nodes = items(nodes, "the parts of a value")
        for node in nodes:
            self.add(node, depth)
        keys = range(len(nodes) - len(attributes)) if keys is None else keys
        self.steps.append(Container(kind, [*keys, *attributes], len(keys), make))

    def _number(self, number: Any) -> int:
        found = integer(number, "the number of a tensor", MAX_NODES)
        self.numbers.add(found)
        return found

    def _tensor(self, number: Any, *_: Any) -> None:
        self.steps.append(self._number(number))

    def _dtensor(self, number: Any, node: Any, _: int) -> None:
        self._tensor(number)
        self.parts[number] = Spread.parsed(node)

    def _array(self, number: Any, *_: Any) -> None:
        self._made_array(number, _array)

    def _scalar(self, number: Any, *_: Any) -> None:
        self._made_array(number, _scalar)
        self.scalars.add(number)

    def _made_array(self, number: Any, make: Callable[[list[Value]], Value]) -> None:
        self._tensor(number)
        self.joins = False
        self.steps.append(_Array(object, (0,), 1, make))

    def _tuple(self, nodes: Any, _: Any, depth: int) -> None:
        self._close(tuple, nodes, depth, tuple)

    def _list(self, nodes: Any, _: Any, depth: int) -> None:
        self._close(list, nodes, depth, list)

    def _deque(self, nodes: Any, node: Any, depth: int) -> None:
        most = node["maxlen"]
        maxlen = None if most is None else integer(most, "a maxlen")
        self._close(deque, nodes, depth, partial(_deque, maxlen))

    def _named_tuple(self, nodes: Any, node: Any, depth: int) -> None:
        fields = tuple(
            text(field, "the field of a named tuple") for field in items(node["fields"], "fields")
        )
        fit = len(fields) == len(items(nodes, "the items of a named tuple")) <= 1000  # noqa: PLR2004
        need(fit, "a named tuple has not as many values as fields")
        kind = _named_tuple(text(node["name"], "the name of a named tuple"), fields)
        self._close(kind, nodes, depth, partial(tuple.__new__, kind), (), attributes=kind._fields)

    def _packed_sequence(self, nodes: Any, _: Any, depth: int) -> None:
        need(len(nodes) == _PACKED, "a PackedSequence has other than four parts")
        self.joins = False
        make = partial(tuple.__new__, PackedSequence)
        self._close(PackedSequence, nodes, depth, make, (), attributes=PackedSequence._fields)

    def _return_type(self, nodes: Any, node: Any, depth: int) -> None:
        known = {kind.__name__: kind for kind in torch.return_types.all_return_types}
        need(node["name"] in known, "an unknown return type of PyTorch")
        kind: Any = known[node["name"]]
        need(len(nodes) == kind.n_sequence_fields, "a return type has other parts")
        self._close(kind, nodes, depth, kind)

    def _dict(self, pairs: Any, _: Any, depth: int, kind: type = dict) -> None:
        keys, nodes = self._pairs(pairs, depth)
        self._close(kind, nodes, depth, partial(_keyed, kind, keys), keys)

    def _ordered_dict(self, pairs: Any, node: Any, depth: int) -> None:
        self._dict(pairs, node, depth, OrderedDict)

    def _object(self, pairs: Any, node: Any, depth: int) -> None:
        keys, nodes = self._pairs(pairs, depth)
        more, attributes = self._pairs(node["more"], depth)
        for name in more:
            fit = _may_be_set(name) and name != "_type"
            need(fit, "an attribute of a value has an impossible name")
        make = partial(_fields, text(node["name"], "the type of a value"), keys, more)
        self._close(Fields, [*nodes, *attributes], depth, make, keys, attributes=more)

    def _pairs(self, pairs: Any, depth: int) -> tuple[tuple[Any, ...], list[Any]]:
        """The keys, and the nodes of what they lead to."""
        keys, nodes = [], []
        for pair in items(pairs, "the items of a value"):
            key, node = items(pair, "an item of a value")
            decoder = _Decoder()
            decoder.add(key, depth)
            need(not decoder.numbers, "a tensor is the key of an item")
            keys.append(Spec(tuple(decoder.steps), 0).fill(()))
            nodes.append(node)
        # Two classes of one name, say, of which one entry would be lost.
        need(len(set(keys)) == len(keys), "two keys are equal once they are read")
        return tuple(keys), nodes


def _parts(nodes: Any, many: int) -> list[Any]:
    """The constants that another one consists of."""
    need(len(nodes) == many, "a constant has other parts")
    decoder = _Decoder()
    for node in items(nodes, "the parts of a constant"):
        decoder.add(node, MAX_DEPTH)
    return [step.value for step in decoder.steps if isinstance(step, Constant)]


def _float(word: Any) -> float:
    need(word in {"nan", "inf", "-inf"}, "an unknown floating-point number")
    return float(word)


def _of_torch(kind: type) -> Callable[[Any], Any]:
    def constant(name: Any) -> Any:
        need(_WORD.fullmatch(text(name, "a constant")), "an unknown constant of PyTorch")
        found = vars(torch).get(name)  # getattr() would import what torch imports late
        need(isinstance(found, kind), "an unknown constant of PyTorch")
        return found

    return constant


def _device(name: Any) -> torch.device:
    try:
        return torch.device(text(name, "a device"))
    except RuntimeError:
        message = "an unknown device"
        raise Defect(message) from None


def _opaque(name: Any) -> Opaque:
    name = text(name, "the type of an object")
    need(name.rpartition(".")[2], "the type of an object has no name")
    return Opaque(name)


_CONSTANTS: Final[dict[str, Callable[[Any], Any]]] = {
    "int": lambda digits: int(text(digits, "an integer"), 16),
    "float": _float,
    "complex": lambda nodes: complex(*_parts(nodes, 2)),
    "bytes": lambda code: base64.b64decode(text(code, "bytes"), validate=True),
    "size": lambda sizes: torch.Size([integer(s, "a size") for s in items(sizes, "a shape")]),
    "range": lambda nodes: range(*_parts(nodes, 3)),
    "slice": lambda nodes: slice(*_parts(nodes, 3)),
    "ellipsis": lambda _: ...,
    "dtype": _of_torch(torch.dtype),
    "layout": _of_torch(torch.layout),
    "memory_format": _of_torch(torch.memory_format),
    "device": _device,
    "opaque": _opaque,
}
_NODES: Final = frozenset(
    {
        "tensor", "dtensor", "array", "scalar", "tuple", "list", "deque", "named_tuple", "packed_sequence", "return_type",
        "dict", "ordered_dict", "object", *_CONSTANTS,
    }
)  # fmt: skip


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
