"""One container: how it is taken apart into what is in it, and how one like it is made again.

:func:`parts` knows tuples, lists and dicts with what libraries derive from them, dataclasses, and the nodes of PyTorch's
pytree. What is not known is not touched (iterating a generator would consume it): an :class:`Opaque` stands in its place.
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
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "CONSTANTS",
    "Fields",
    "Opaque",
    "Parts",
    "Value",
    "is_array",
    "opaque",
    "parts",
    "qualified",
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

    @override
    def __repr__(self) -> str:
        return f"Opaque({self.type!r})"


# Immutable, or as good as: kept as they are.
CONSTANTS: Final = (
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

    @override
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
    keys: Sequence[Any]  #: of the children
    items: int  #: so many of them are keys of items, the others are names of attributes
    make: Callable[
        [list[Value]], Value
    ]  #: a container like it, of other children; refers to none of these
    is_own: bool = True  #: whether what is made is of the same class, and not a stand-in
    maxlen: int | None = None  #: of a deque


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
        factory = value.default_factory if isinstance(value, defaultdict) else None
        is_own = getattr(value, "__dict__", None) is value
        return _with_attributes(value, keys, items, partial(_dict, kind, keys, factory, is_own))
    if isinstance(value, (list, deque)):
        base = list if isinstance(value, list) else deque
        items = list(base.__iter__(value))
        maxlen = value.maxlen if isinstance(value, deque) else None
        new = partial(_list, kind, maxlen)
        return _with_attributes(value, range(len(items)), items, new)._replace(maxlen=maxlen)
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


def _dict(kind: Any, keys: list[Any], factory: Any, is_own: bool, items: list[Value]) -> Value:  # noqa: FBT001
    base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
    new = base.__new__(kind)
    if isinstance(new, defaultdict):
        new.default_factory = factory
    for key, item in zip(keys, items, strict=True):
        base.__setitem__(new, key, item)
    if is_own:  # there are dicts that are their own __dict__
        new.__dict__ = new
    return new


def _list(kind: Any, maxlen: int | None, items: list[Value]) -> Value:
    base: Any = list if issubclass(kind, list) else deque
    new = base.__new__(kind)
    if base is deque:
        deque.__init__(new, maxlen=maxlen)
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
    make = partial(_set_attributes, new, len(items), list(found))
    return Parts([*items, *found.values()], [*keys, *found], len(items), make)


def _set_attributes(
    new: Callable[[list[Value]], Value], items: int, names: list[str], children: list[Value]
) -> Value:
    made = new(children[:items])
    for name, child in zip(names, children[items:], strict=True):
        # Past a frozen dataclass, and past a __setattr__ that also writes an item.
        object.__setattr__(made, name, child)
    return made


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

        kinds = list(map(_kind, children))
        unflatten = partial(_unflattened, node.unflatten_fn, context)
        make = partial(_make_node, type(value), unflatten, keys, kinds)
        return Parts(children, keys, items, make)
    return None


def _unflattened(unflatten: Any, context: Any, children: list[Value]) -> Value:
    with suppress(Exception):  # what cannot be copied is passed as it is
        context = copy.deepcopy(context)
    return unflatten(children, context)


def _make_node(
    kind: type,
    unflatten: Callable[[list[Value]], Value],
    keys: Sequence[Any],
    kinds: list[type],
    new: list[Value],
) -> Value:
    # In the place of a tensor, anything else may be refused, or silently taken for something else.
    if kinds == list(map(_kind, new)):
        with suppress(Exception):
            made = unflatten(new)
            if type(made) is kind:
                return made
    return _stand_in(kind, keys, new)


def _kind(child: Value) -> type:
    return Tensor if isinstance(child, Tensor) else type(child)


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


def _mapping(value: Mapping[Any, Value]) -> Parts | None:
    """A mapping of another kind, which nobody but its class knows how to make."""
    with suppress(Exception):
        keys = list(value)
        children = [value[key] for key in keys]
        make = partial(_stand_in, type(value), keys)
        return Parts(children, keys, len(keys), make, is_own=False)
    return None


def _stand_in(kind: type, keys: Sequence[Any], children: list[Value]) -> Fields:
    return Fields(qualified(kind), zip(keys, children, strict=True))


def is_array(value: Any) -> bool:
    """Whether ``value`` is a NumPy array, or a scalar of NumPy's, that holds nothing but numbers."""
    numpy = sys.modules.get("numpy")  # whoever has an array has imported it
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return False
    return not value.dtype.hasobject
