"""Makes values of JSON and tensors. ``encoding.py`` is the reverse.

Reading never imports or calls anything by a name from the file. A value whose class could only be obtained by
running other people's code is read as a stand-in: a :class:`Fields` for a dataclass, a ``ModelOutput`` or a dict
subclass, a newly made named tuple, an ``Opaque`` for a class or an enum member.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from actrec._values.containers import Container, Value
from actrec._values.spec import Spec, Step, flatten
from actrec._values.stand_ins import Fields

from . import constants
from .dtensor import Spread
from .format import MAX_DEPTH, Defect, need
from .forms import Maybe, checked

#: The structure of a value that is a single tensor.
TENSOR_ALONE: Final = '{"tensor":0}'
TOO_DEEP: Final = f"a value is nested more than {MAX_DEPTH} deep"
_PACKED: Final = 4  # items of a PackedSequence
_MOST_FIELDS: Final = 1000  # of a named tuple


@dataclass(frozen=True)
class Structure:
    """A parsed structure: how a value is made of its tensors."""

    spec: Spec
    parts: tuple[tuple[int, Spread], ...] = ()  #: the tensors that are a rank's part of a DTensor
    #: The tensors that are NumPy scalars, without dimensions.
    scalars: frozenset[int] = frozenset()
    #: Whether the tensors of several values can be joined: not if they are arrays, or packed.
    joins: bool = True


@lru_cache(maxsize=1024)
def decode(structure: str) -> Structure:
    """Parse the JSON of a structure; ``Defect`` if it does not describe a value."""
    reader = _Reader()
    try:
        value = reader.value(json.loads(structure))
    except RecursionError:
        raise Defect(TOO_DEEP) from None
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        message = f"a value cannot be made of its description ({error})"
        raise Defect(message) from error
    found, spec = flatten(value)
    by_id = {id(mark): number for number, mark in reader.marks.items()}
    numbers = [by_id[id(mark)] for mark in found]
    need(set(numbers) == set(range(len(by_id))), "a value does not use all of its tensors")
    steps = tuple(_step(step, numbers) for step in spec.steps)
    parts, scalars = tuple(reader.parts.items()), frozenset(reader.scalars)
    return Structure(Spec(steps, len(numbers)), parts, scalars, reader.joins)


def _step(step: Step, numbers: list[int]) -> Step:
    """Return the step that makes the value itself, for one that makes the value of marks."""
    if isinstance(step, int):
        return numbers[step]
    if isinstance(step, Container) and step.type in _MADE_OF_ONE:
        kind, make = _MADE_OF_ONE[step.type]
        return _OfOneTensor(kind, (0,), 1, make)
    return step


class _Reader:
    """Makes a value of the nodes of a structure, with marks in place of tensors. It has a method for each kind of node."""

    def __init__(self) -> None:
        self.marks: dict[int, Tensor] = {}
        self.parts: dict[int, Spread] = {}
        self.scalars: set[int] = set()
        self.joins = True

    def value(self, node: Any, depth: int = 0) -> Value:
        """Return what a node describes."""
        need(depth <= MAX_DEPTH, TOO_DEEP)
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        kinds = _NODES.intersection(checked(node, dict, "a part of a value"))
        need(len(kinds) == 1, f"a part of a value is of no known kind ({', '.join(node)[:60]})")
        (kind,) = kinds
        if kind in constants.KINDS:
            return constants.KINDS[kind].read(node[kind])
        return getattr(self, f"_{kind}")(node[kind], node, depth + 1)

    def _values(self, nodes: Any, depth: int) -> list[Value]:
        return [self.value(node, depth) for node in checked(nodes, list, "the parts of a value")]

    # --- Tensors ---------------------------------------------------------------------------------------

    def _tensor(self, number: Any, *_: Any) -> Tensor:
        number = checked(number, int, "the number of a tensor")
        return self.marks.setdefault(number, torch.empty(0, device="cpu"))

    def _dtensor(self, number: Any, node: Any, _: int) -> Tensor:
        self.parts[number] = Spread.parsed(node)
        return self._tensor(number)

    def _array(self, number: Any, *_: Any) -> Value:
        self.joins = False
        return _Array([self._tensor(number)])

    def _scalar(self, number: Any, *_: Any) -> Value:
        self.joins = False
        self.scalars.add(number)
        return _Scalar([self._tensor(number)])

    # --- Containers ------------------------------------------------------------------------------------

    def _tuple(self, nodes: Any, _: Any, depth: int) -> Value:
        return tuple(self._values(nodes, depth))

    def _list(self, nodes: Any, _: Any, depth: int) -> Value:
        return self._values(nodes, depth)

    def _deque(self, nodes: Any, node: Any, depth: int) -> Value:
        return deque(self._values(nodes, depth), checked(node["maxlen"], Maybe(int), "a maxlen"))

    def _named_tuple(self, nodes: Any, node: Any, depth: int) -> Value:
        checked(node, {"named_tuple": list, "name": str, "fields": [str]}, "a named tuple")
        fit = len(nodes) == len(node["fields"]) <= _MOST_FIELDS
        need(fit, "a named tuple does not have as many values as fields, or has too many")
        return _named(node["name"], tuple(node["fields"]), self._values(nodes, depth))

    def _packed_sequence(self, nodes: Any, _: Any, depth: int) -> Value:
        need(len(nodes) == _PACKED, "a PackedSequence does not have four parts")
        self.joins = False
        return tuple.__new__(PackedSequence, self._values(nodes, depth))

    def _return_type(self, nodes: Any, node: Any, depth: int) -> Value:
        known = {kind.__name__: kind for kind in torch.return_types.all_return_types}
        need(node["name"] in known, "an unknown return type of PyTorch")
        kind: Any = known[node["name"]]
        need(len(nodes) == kind.n_sequence_fields, "a return type has the wrong number of parts")
        return kind(self._values(nodes, depth))

    def _dict(self, pairs: Any, _: Any, depth: int) -> Value:
        return self._pairs(pairs, depth)

    def _ordered_dict(self, pairs: Any, _: Any, depth: int) -> Value:
        return OrderedDict(self._pairs(pairs, depth))

    def _object(self, pairs: Any, node: Any, depth: int) -> Value:
        more = self._pairs(node["more"], depth)
        possible = all(may_be_set(name) and name != "_type" for name in more)
        need(possible, "an attribute of a value has an impossible name")
        name = checked(node["name"], str, "the type of a value")
        return Fields(name, self._pairs(pairs, depth), more.items())

    def _pairs(self, pairs: Any, depth: int) -> dict[Any, Value]:
        found = {}
        for key, node in checked(pairs, [(None, None)], "the items of a value"):
            reader = _Reader()
            name = reader.value(key, depth)
            need(not reader.marks, "a tensor is the key of an item")
            # With two classes of the same name, for example, one entry would be lost.
            need(name not in found, "two keys are equal once they are read")
            found[name] = self.value(node, depth)
        return found


_NODES: Final = frozenset(
    {
        "tensor", "dtensor", "array", "scalar", "tuple", "list", "deque", "named_tuple", "packed_sequence", "return_type",
        "dict", "ordered_dict", "object", *constants.KINDS,
    }
)  # fmt: skip


# --- Classes that stand for others ---------------------------------------------------------------------


class _Array(list[Tensor]):
    """In place of a NumPy array that is made of a tensor."""


class _Scalar(list[Tensor]):
    """In place of a NumPy scalar that is made of a tensor."""


class _OfOneTensor(Container):
    """A step that makes something else of a tensor, which is then not a tensor of the value."""

    @property
    @override
    def paths(self) -> list[str]:
        return []


#: For each of these classes, a class with the name of the object, and a function that makes the object.
_MADE_OF_ONE: Final[dict[type, tuple[type, Callable[[list[Tensor]], Any]]]] = {
    _Array: (type("ndarray", (), {}), lambda tensors: tensors[0].numpy()),
    _Scalar: (type("scalar", (), {}), lambda tensors: tensors[0].numpy()[()]),
}


def may_be_set(name: object) -> bool:
    """Whether a stand-in can have an attribute with that name, without hiding an attribute of dict."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(dict, name)


@lru_cache(maxsize=256)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """Make a named tuple class; invalid names are replaced."""
    name = name if constants.WORD.fullmatch(name) else "namedtuple"
    kind = namedtuple(name, fields, rename=True)  # type: ignore[misc]  # noqa: PYI024
    kind.__reduce__ = _reduced  # type: ignore[assignment,method-assign]
    return kind


def _named(name: str, fields: tuple[str, ...], values: Iterable[Value]) -> Any:
    return tuple.__new__(_named_tuple(name, fields), values)


def _reduced(value: Any) -> tuple[Any, ...]:
    """Copy and pickle such a named tuple: its class is made again, because it cannot be imported."""
    return _named, (type(value).__name__, value._fields, tuple(value))
