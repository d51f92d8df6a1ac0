"""One container: split into its children, and made again with other children.

:func:`parts` supports tuples, lists, deques and dicts and their subclasses, ``UserDict`` and ``UserList``,
dataclasses, attrs classes and namespaces. It reads and makes them by the methods of Python's own classes: none of the
model's code runs.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

#: What a layer returned: a tensor, or any nesting of tuples, lists, dicts and dataclasses of them.
Value: TypeAlias = Any


@dataclasses.dataclass(slots=True)
class Container:
    """A container without its children."""

    type: type
    keys: Sequence[Any]  #: of the children
    items: int  #: how many of them are keys of items; the others are names of attributes
    #: Makes a container like it, with other children. It does not refer to the original children.
    make: Callable[[list[Value]], Value] = dataclasses.field(compare=False, repr=False)
    maxlen: int | None = None  #: of a deque

    @property
    def kind(self) -> str:
        """A description for messages and tables: ``"tuple of 2"``."""
        many = len(self.keys) if issubclass(self.type, tuple) else self.items
        counts = many or issubclass(self.type, (tuple, list, dict))
        return f"{self.type.__name__} of {many}" if counts else self.type.__name__

    @property
    def paths(self) -> list[str]:
        """The index or attribute of each child, as one writes it after the container."""
        items = (f"[{key!r}]" for key in self.keys[: self.items])
        return [*items, *(f".{name}" for name in self.keys[self.items :])]


def parts(value: Value) -> tuple[Container, list[Value]] | None:
    """Return the container without its children, and the children; ``None`` if its kind is not supported."""
    kind = type(value)
    if kind is tuple or kind is list:
        return Container(kind, range(len(value)), len(value), kind), list(value)
    if kind is dict:
        keys = list(value)
        return Container(kind, keys, len(keys), partial(_plain_dict, keys)), list(value.values())
    if isinstance(value, tuple):
        return _tuple(value)
    if isinstance(value, dict):
        return _dict(value)
    if isinstance(value, (list, deque)):
        return _list(value)
    return _object(value)


# --- Items -----------------------------------------------------------------------------------------


def _tuple(value: tuple[Value, ...]) -> tuple[Container, list[Value]]:
    kind, items = type(value), list(tuple.__iter__(value))
    in_c = kind.__module__ == "torch.return_types"  # made of one sequence
    new = kind if in_c else partial(tuple.__new__, kind)
    names = getattr(kind, "_fields", ())
    is_named = len(names) == len(items)
    keys = names if is_named else range(len(items))
    container, children = _with_attributes(value, keys, items, new)
    if is_named:
        container.items = 0
    return container, children


def _plain_dict(keys: list[Any], items: list[Value]) -> dict[Any, Value]:
    return dict(zip(keys, items, strict=True))


def _dict(value: dict[Any, Value]) -> tuple[Container, list[Value]]:
    # An OrderedDict stores its order itself.
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    keys, children = list(base.keys(value)), list(base.values(value))
    factory = value.default_factory if isinstance(value, defaultdict) else None
    new = partial(_new_dict, type(value), base, keys, factory)
    if getattr(value, "__dict__", None) is value:
        new = partial(_new_namespace, new)
    return _with_attributes(value, keys, children, new)


def _new_dict(kind: type, base: Any, keys: list[Any], factory: Any, items: list[Value]) -> Value:
    new = base.__new__(kind)
    if factory is not None:
        new.default_factory = factory
    for key, item in zip(keys, items, strict=True):
        base.__setitem__(new, key, item)
    return new


def _new_namespace(new_dict: Callable[[list[Value]], Value], items: list[Value]) -> Value:
    """Make a dict that is its own ``__dict__``."""
    new = new_dict(items)
    new.__dict__ = new
    return new


def _list(value: Any) -> tuple[Container, list[Value]]:
    base: Any = list if isinstance(value, list) else deque
    items = list(base.__iter__(value))
    maxlen = value.maxlen if base is deque else None
    new = partial(_new_list, type(value), base, maxlen)
    container, children = _with_attributes(value, range(len(items)), items, new)
    container.maxlen = maxlen
    return container, children


def _new_list(kind: type, base: Any, maxlen: int | None, items: list[Value]) -> Value:
    new = base.__new__(kind)
    if base is deque:
        deque.__init__(new, maxlen=maxlen)
    base.extend(new, items)
    return new


# --- Attributes ------------------------------------------------------------------------------------


def _object(value: Any) -> tuple[Container, list[Value]] | None:
    kind = type(value)
    if isinstance(value, (UserDict, UserList)) and type(vars(value).get("data")) in {dict, list}:
        inner, items = _dict(value.data) if isinstance(value, UserDict) else _list(value.data)
        new = partial(_new_user, kind, inner.make)
        return _with_attributes(value, inner.keys, items, new, besides="data")
    if isinstance(value, SimpleNamespace) or _is_record(value):
        return _with_attributes(value, (), [], partial(_bare, kind))
    return None


def _new_user(kind: type, make: Callable[[list[Value]], Value], items: list[Value]) -> Value:
    new = _bare(kind)
    new.__dict__["data"] = make(items)
    return new


def _is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass or an attrs class, and has the declared fields as attributes.

    A ``tensorclass`` of tensordict looks like a dataclass, but keeps its fields elsewhere.
    """
    kind = type(value)
    is_dataclass = dataclasses.is_dataclass(kind)
    fields = dataclasses.fields(kind) if is_dataclass else getattr(kind, "__attrs_attrs__", None)
    if not fields:
        return is_dataclass or fields is not None
    held = _attributes(value)
    return any(field.name in held for field in fields)


def _attributes(value: object) -> dict[str, Value]:
    """Return the attributes of an object that are set, by name."""
    state: Any = object.__getstate__(value)
    held, slots = state if isinstance(state, tuple) else (state, {})
    return {} if held is value else {**(held or {}), **slots}  # a dict may be its own __dict__


def _with_attributes(
    value: Any,
    keys: Sequence[Any],
    items: list[Value],
    new: Callable[[list[Value]], Value],
    besides: str = "",
) -> tuple[Container, list[Value]]:
    """Return the container with these items, which ``new`` makes from items, and with the attributes of ``value``."""
    kind, held = type(value), _attributes(value)
    held.pop(besides, None)
    if not held:
        return Container(kind, keys, len(items), new), items
    make = partial(_set_attributes, new, len(items), list(held))
    return Container(kind, [*keys, *held], len(items), make), [*items, *held.values()]


def _set_attributes(
    new: Callable[[list[Value]], Value], many: int, names: list[str], children: list[Value]
) -> Value:
    made = new(children[:many])
    for name, child in zip(names, children[many:], strict=True):
        # Bypasses a frozen dataclass, and a __setattr__ that also writes an item.
        object.__setattr__(made, name, child)
    return made


_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that was made in Python


def _bare(kind: type, _: object = None) -> Any:
    """Make an empty object of the class, with the ``__new__`` of its base class in C."""
    base: Any = next(base for base in kind.__mro__ if not base.__flags__ & _HEAP)
    return base.__new__(kind)
