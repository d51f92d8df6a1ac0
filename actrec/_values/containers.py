"""Values are trees: tensors inside tuples, dicts, dataclasses and what libraries derive from them.

:func:`parts` alone knows how a container is taken apart and put together; everything else here walks over what
it says, without recursion, so that no depth is too much. :func:`rebuild` makes a new tree of the same types with
every tensor replaced, so that nothing of the model's own containers is kept: a list that the caller appends to
later, a cache that grows with every token. What is not known is not touched (iterating a generator would
consume it): an :class:`Opaque` stands in its place.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from types import MemberDescriptorType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "Fields",
    "Opaque",
    "Parts",
    "Value",
    "is_array",
    "leaves",
    "nodes",
    "opaque",
    "parts",
    "qualified",
    "rebuild",
    "same",
    "tensors",
]

#: What a layer returned: a tensor, or any nesting of tuples, lists, dicts and dataclasses of them.
Value: TypeAlias = Any

# --- What stands for an object ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Opaque:
    """Stands where a layer returned an object that actrec does not take apart, such as a cache.

    >>> Opaque("transformers.cache_utils.DynamicCache")
    Opaque('transformers.cache_utils.DynamicCache')

    The object itself is not kept: it may be large, and the model goes on changing it. To record
    something of it, take that out with a ``transform``.
    """

    type: str

    def __repr__(self) -> str:
        return f"Opaque({self.type!r})"


# Immutable, or as good as: kept as they are.
_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type(...), type, Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    Opaque,
)  # fmt: skip


class Fields(dict[Any, Value]):
    """Stands for a container whose class cannot be had: what is in it, by key or by name.

    >>> out = Fields("transformers.modeling_outputs.BaseModelOutput", {"hidden": 1})
    >>> out["hidden"], out.hidden
    (1, 1)
    >>> out
    BaseModelOutput({'hidden': 1})

    In a recording that was loaded it stands for a dataclass, a ``ModelOutput`` or another kind of dict: the
    class itself would have to be imported, and a file does not get to say what is imported. In memory it stands
    for a ``Mapping`` of a kind of its own, which nobody but its class knows how to make.
    """

    def __init__(self, kind: str, fields: Any = (), more: Iterable[tuple[str, Value]] = ()) -> None:
        super().__init__(fields)
        self.__dict__["_type"] = kind
        self.__dict__.update(more)

    def __getattr__(self, name: str) -> Value:
        try:
            return self[name]
        except KeyError:
            kind = self.__dict__.get("_type", "Fields")
            message = f"this {kind} has no {name!r}; it has {', '.join(map(repr, self))}"
            raise AttributeError(message) from None

    def __repr__(self) -> str:
        return f"{self._type.rpartition('.')[2]}({dict.__repr__(self)})"


def opaque(value: object) -> Opaque:
    """The placeholder for ``value``."""
    return value if isinstance(value, Opaque) else Opaque(qualified(type(value)))


def qualified(kind: type) -> str:
    """The name of a class, with its module unless it is a builtin."""
    builtin = kind.__module__ == "builtins"
    return kind.__qualname__ if builtin else f"{kind.__module__}.{kind.__qualname__}"


# --- Taking apart ----------------------------------------------------------------------------------


class Parts(NamedTuple):
    """A container taken apart."""

    children: list[Value]
    keys: Sequence[Any]  # of the children
    items: int  # so many of them are keys of items, the others are names of attributes
    make: Callable[[list[Value]], Value]  # a container like it, of other children

    def steps(self) -> Iterator[tuple[str, Value]]:
        """The children, each with what one writes behind the container to reach it."""
        items, attributes = self.children[: self.items], self.children[self.items :]
        for key, child in zip(self.keys, items, strict=False):
            yield f"[{key!r}]", child
        met = set(map(id, items))  # a ModelOutput has each of its values twice
        for name, child in zip(self.keys[self.items :], attributes, strict=True):
            if id(child) not in met:
                yield f".{name}", child


def parts(value: Value) -> Parts | None:
    """Take ``value`` apart; ``None`` if it is no container, or one of a kind that is not known.

    Known are tuples, lists, deques and dicts with what derives from them, ``UserDict`` and ``UserList``,
    dataclasses, attrs classes and namespaces, the nodes that are registered with PyTorch's pytree, and whatever
    else is a ``Mapping``. Methods of a class's own are called of the last two alone.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return Parts(list(value), range(len(value)), len(value), kind)
    if kind is dict:
        keys = list(value)
        return Parts([value[key] for key in keys], keys, len(keys), partial(_plain_dict, keys))
    if isinstance(value, tuple):
        return _tuple(value)
    if isinstance(value, dict):
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        keys = list(base.keys(value))
        items = [base.__getitem__(value, key) for key in keys]
        return _with_attributes(value, keys, items, partial(_dict, value, base, keys))
    if isinstance(value, (list, deque)):
        base = list if isinstance(value, list) else deque
        items = list(base.__iter__(value))
        return _with_attributes(value, range(len(items)), items, partial(_list, value, base))
    return _object(value)


def _tuple(value: tuple[Value, ...]) -> Parts:
    kind, items = type(value), list(tuple.__iter__(value))
    if kind.__module__ == "torch.return_types":  # tuples in C, made of one sequence
        return Parts(items, range(len(items)), len(items), kind)
    found = _with_attributes(value, range(len(items)), items, partial(tuple.__new__, kind))
    names = getattr(kind, "_fields", ())
    if len(names) != len(items):
        return found
    return found._replace(keys=[*names, *found.keys[len(items) :]], items=0)


def _plain_dict(keys: list[Any], items: list[Value]) -> dict[Any, Value]:
    return dict(zip(keys, items, strict=True))


def _dict(value: Any, base: Any, keys: list[Any], items: list[Value]) -> Value:
    new = base.__new__(type(value))
    if isinstance(value, defaultdict):
        new.default_factory = value.default_factory
    for key, item in zip(keys, items, strict=True):
        base.__setitem__(new, key, item)
    if getattr(value, "__dict__", None) is value:
        new.__dict__ = new
    return new


def _list(value: Any, base: Any, items: list[Value]) -> Value:
    new = base.__new__(type(value))
    if isinstance(value, deque):
        deque.__init__(new, maxlen=value.maxlen)
    base.extend(new, items)
    return new


def _object(value: Any) -> Parts | None:
    kind = type(value)
    if kind in _NODES and not _is_stored(value):
        return _node(value)
    if isinstance(value, (UserDict, UserList)) and type(vars(value).get("data")) in {dict, list}:
        data = cast("Parts", parts(value.data))
        return _with_attributes(value, data.keys, data.children, partial(_wrapped, kind, data.make))
    if isinstance(value, SimpleNamespace) or _is_record(kind):
        return _with_attributes(value, (), [], partial(_bare, kind))
    return _mapping(value) if isinstance(value, Mapping) else None


def _wrapped(kind: type, make: Callable[[list[Value]], Value], items: list[Value]) -> Value:
    """A ``UserDict`` or a ``UserList``: what it holds is in its ``data``."""
    new: Any = _bare(kind)
    new.__dict__["data"] = make(items)
    return new


_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that was made in Python


def _bare(kind: type, _: object = None) -> Any:
    """An object of the class with nothing in it: as the class in C, which it derives from, makes it."""
    base: Any = next(base for base in kind.__mro__ if not base.__flags__ & _HEAP)
    return base.__new__(kind)


# --- Attributes ------------------------------------------------------------------------------------

# For each class: the names that it declares, those of its slots among them, and those of its slots.
_names: WeakKeyDictionary[type, tuple[list[str], list[str]]] = WeakKeyDictionary()


def _is_record(kind: type) -> bool:
    """Whether it is a class that declares what its objects hold: a dataclass, or one of attrs."""
    return dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__")


def _declared(kind: Any) -> tuple[list[str], list[str]]:
    if kind not in _names:
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        slots = [
            name
            for base in reversed(kind.__mro__)
            if "__slots__" in vars(base)
            for name, slot in vars(base).items()
            if isinstance(slot, MemberDescriptorType)
        ]
        names = [field.name for field in (*fields, *getattr(kind, "__attrs_attrs__", ()))]
        _names[kind] = list(dict.fromkeys([*names, *slots])), slots
    return _names[kind]


def _is_stored(value: Any) -> bool:
    """Whether an object holds all that its class declares, and its class does."""
    return _is_record(type(value)) and _attributes(value).keys() >= set(_declared(type(value))[0])


def _attributes(value: Any) -> dict[str, Value]:
    """What a container holds besides its items, by name; what was never set is not there."""
    names, slots = _declared(type(value))
    held = getattr(value, "__dict__", {})
    if held is value:  # there are dicts that are their own __dict__
        held = {}
    if slots:
        held = held | {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {name: held[name] for name in dict.fromkeys([*names, *held]) if name in held}


def _with_attributes(
    value: Any, keys: Sequence[Any], items: list[Value], new: Callable[[list[Value]], Value]
) -> Parts:
    """A container of these items and of what it holds besides; ``new(items)`` is one of the items alone."""
    found = _attributes(value)
    if isinstance(value, (UserDict, UserList)):
        del found["data"]
    if not found:
        return Parts(items, keys, len(items), new)

    def make(children: list[Value]) -> Value:
        made = new(children[: len(items)])
        for name, child in zip(found, children[len(items) :], strict=True):
            # Past a frozen dataclass, and past a __setattr__ that also writes an item.
            object.__setattr__(made, name, child)
        return made

    return Parts([*items, *found.values()], [*keys, *found], len(items), make)


# --- Classes that say themselves what is in them ---------------------------------------------------

# Private PyTorch: the classes that were registered with its pytree, by whoever wrote them.
_NODES: Mapping[type, Any] = getattr(_pytree, "SUPPORTED_NODES", {})


def _node(value: Any) -> Parts | None:
    """A node of PyTorch's pytree: functions of its own take it apart and put it together."""
    node = _NODES[type(value)]
    with suppress(Exception):  # theirs to raise, and not for the model to hear
        children, context = node.flatten_fn(value)
        children = list(children)
        keys, items = _node_keys(node, value, children)

        def make(new: list[Value]) -> Value:
            # In the place of a tensor, anything else may be refused, or silently taken for something else.
            if all(map(_alike, children, new)):
                with suppress(Exception):
                    made = node.unflatten_fn(new, rebuild(context, Tensor.clone, _itself))
                    if type(made) is type(value):
                        return made
            return _stand_in(type(value), keys, new)

        return Parts(children, keys, items, make)
    return None


def _node_keys(node: Any, value: Any, children: list[Value]) -> tuple[Sequence[Any], int]:
    """The keys of the children of a node, and how many of them are keys of items."""
    number = len(children)
    entries: list[Any] = []
    with suppress(Exception):  # it may have none, or not the function that tells them
        entries = [entry for entry, _ in node.flatten_with_keys_fn(value)[0]]
    names = [entry.name for entry in entries if hasattr(entry, "name")]
    if not entries:
        held = {id(item): name for name, item in getattr(value, "__dict__", {}).items()}
        names = [held[id(child)] for child in children if id(child) in held]
    if len(set(names)) == number:
        return names, 0
    keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in entries]
    return keys if len(set(map(repr, keys))) == number else range(number), number


def _alike(one: Value, other: Value) -> bool:
    return type(one) is type(other) or (isinstance(one, Tensor) and isinstance(other, Tensor))


def _itself(value: Value) -> Value:
    return value


def _mapping(value: Mapping[Any, Value]) -> Parts | None:
    """A mapping of another kind, which nobody but its class knows how to make."""
    with suppress(Exception):
        keys = list(value)
        children = [value[key] for key in keys]
        return Parts(children, keys, len(keys), partial(_stand_in, type(value), keys))
    return None


def _stand_in(kind: type, keys: Sequence[Any], children: list[Value]) -> Fields:
    return Fields(qualified(kind), zip(keys, children, strict=True))


# --- Walking ---------------------------------------------------------------------------------------

_UNFINISHED = object()


def rebuild(
    value: Value,
    tensor: Callable[[Tensor], Value],
    unknown: Callable[[object], Value] = opaque,
    *,
    stand_ins: bool = True,
) -> Value:
    """Return a tree like ``value``, made anew, with ``tensor(t)`` in the place of every tensor ``t``.

    Types are kept: named tuples (``PackedSequence`` and ``torch.return_types`` among them), dict, list
    and tuple subclasses, dataclasses, the ``ModelOutput`` of transformers, and nodes of PyTorch's pytree
    (``TensorDict``). A tensor that stands in several places is replaced once and stays one tensor. NumPy arrays
    are copied. ``unknown(x)`` says what stands for an object of any other kind. For a container that only its
    own class could make, there are :class:`Fields`, or, without ``stand_ins``, ``unknown(x)``.
    """
    if type(value) is Tensor:
        return tensor(value)
    made: dict[int, Value] = {}  # by id: what stands for a tensor or a container
    kept = []  # a container may make its children when asked: their ids must stay theirs
    above: list[Any] = []  # the containers around the one that is being worked on
    container: Any = None
    make: Callable[[list[Value]], Value] = _itself
    children, new = iter((value,)), []
    while True:
        for child in children:
            if type(child) is not Tensor and isinstance(child, _CONSTANTS):
                new.append(child)
            elif id(child) in made:
                found = made[id(child)]
                # A container that contains itself is not finished when it is met again.
                new.append(opaque(child) if found is _UNFINISHED else found)
            elif isinstance(child, Tensor):
                made[id(child)] = found = tensor(child)
                new.append(found)
            elif (taken := parts(child)) is not None:
                made[id(child)] = _UNFINISHED
                kept.append(taken.children)
                above.append((container, make, children, new))
                container, make, children, new = child, taken.make, iter(taken.children), []
                break
            else:
                made[id(child)] = found = copy.copy(child) if is_array(child) else unknown(child)
                new.append(found)
        else:
            if not above:
                return new[0]
            found = make(new)
            if not stand_ins and type(found) is not type(container):
                found = unknown(container)
            made[id(container)] = found
            container, make, children, new = above.pop()
            new.append(found)


def is_array(value: Any) -> bool:
    """Whether ``value`` is a NumPy array, or a scalar of NumPy's, that holds nothing but numbers."""
    numpy = sys.modules.get("numpy")  # whoever has an array has imported it
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return False
    return not value.dtype.hasobject


def tensors(value: Value) -> Iterator[Tensor]:
    """The tensors of a recorded value, each once, in the order in which :func:`rebuild` meets them.

    >>> [t.shape for t in tensors((torch.zeros(2), {"h": torch.zeros(3), "cache": Opaque("Cache")}))]
    [torch.Size([2]), torch.Size([3])]
    """
    met: dict[int, object] = {}  # by id; what is met is kept, so that the ids stay theirs
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if id(part) in met:
            continue
        if isinstance(part, Tensor):
            met[id(part)] = part
            yield part
        elif not isinstance(part, _CONSTANTS) and (taken := parts(part)) is not None:
            met[id(part)] = part
            waiting += taken.children[::-1]


def same(one: Value, other: Value) -> bool:
    """Whether two values have one structure, and equal tensors and constants in it.

    >>> same((torch.ones(2), "a"), (torch.ones(2), "a")), same([torch.ones(2)], (torch.ones(2),))
    (True, False)
    """
    waiting = [(one, other)]
    while waiting:
        a, b = waiting.pop()
        if a is b:
            continue
        x, y = (None if isinstance(v, (Tensor, *_CONSTANTS)) else parts(v) for v in (a, b))
        if x is None or y is None:
            if not _same_leaf(a, b):
                return False
        elif type(a) is not type(b) or [*x.keys] != [*y.keys]:
            return False
        else:
            waiting += zip(x.children, y.children, strict=True)
    return True


def _same_leaf(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    with suppress(RuntimeError):  # tensors of kinds that cannot be compared
        if isinstance(a, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if is_array(a):
            return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
        return bool(a == b)
    return False


def leaves(value: Value) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a recorded value in the order of :func:`tensors`, each with the way to it.

    >>> [path for path, _ in leaves((torch.zeros(2), {"h": torch.zeros(3)}))]
    ['[0]', "[1]['h']"]

    The way is what one writes behind the value: ``acts["lstm"][0][1]['h']``. A tensor that stands in
    several places is found in each of them.
    """
    return ((path, part) for path, part, _ in nodes(value) if isinstance(part, Tensor))


def nodes(value: Value) -> Iterator[tuple[str, Value, bool]]:
    """Everything in a value, itself included: the way to it, and whether it is a container with something in it.

    A container comes before what is in it. Where one contains itself, it is not entered again.
    """
    above: set[int] = set()
    waiting: list[tuple[str | None, Value]] = [("", value)]
    while waiting:
        path, part = waiting.pop()
        if path is None:  # all that was in it has been
            above.remove(id(part))
            continue
        is_leaf = isinstance(part, (Tensor, *_CONSTANTS)) or id(part) in above
        taken = None if is_leaf else parts(part)
        inside = [] if taken is None else [(path + step, child) for step, child in taken.steps()]
        yield path, part, bool(inside)
        if inside:
            above.add(id(part))
            waiting += [(None, part), *inside[::-1]]
