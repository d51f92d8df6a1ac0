"""Containers that only their own class can take apart: nodes of PyTorch's pytree, and mappings of any kind.

Their methods are the model's code. Errors of these must not reach the model, and if they cannot make a container of other
children, a :class:`Fields` takes its place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from actrec._torch import PYTREE_NODES

from .containers import Container, Value
from .stand_ins import Fields, qualified


def parts(value: Value, *, stand_ins: bool) -> tuple[Container, list[Value]] | None:
    """Return the container without its children, and the children; ``None`` if it is not such a container.

    Args:
        value: any object.
        stand_ins: whether to take a ``Mapping`` apart, which can only be rebuilt as a stand-in.
    """
    with suppress(Exception):
        if type(value) in PYTREE_NODES:
            return _node(value)
        if stand_ins and isinstance(value, Mapping):
            keys = list(value)
            make = partial(_stand_in, type(value), keys)
            return Container(type(value), keys, len(keys), make), [value[key] for key in keys]
    return None


def _stand_in(kind: type, keys: Sequence[Any], children: list[Value]) -> Fields:
    return Fields(qualified(kind), zip(keys, children, strict=True))


def _node(value: Any) -> tuple[Container, list[Value]]:
    registered = PYTREE_NODES[type(value)]
    children, context = registered.flatten_fn(value)
    children = list(children)
    keys, items = _keys(registered, value, children)
    types = list(map(_type, children))
    make = partial(_make, registered, context, keys, types)
    return Container(type(value), keys, items, make), children


def _make(
    registered: Any, context: Any, keys: Sequence[Any], types: list[type], children: list[Value]
) -> Value:
    # If a child is not a tensor as before, the class may refuse it, or misinterpret it silently.
    if types == list(map(_type, children)):
        with suppress(Exception):  # if it cannot be copied, it is passed as it is
            context = copy.deepcopy(context)
        with suppress(Exception):
            made = registered.unflatten_fn(children, context)
            if type(made) is registered.type:
                return made
    return _stand_in(registered.type, keys, children)


def _type(child: Value) -> type:
    return Tensor if isinstance(child, Tensor) else type(child)


def _keys(registered: Any, value: Any, children: list[Value]) -> tuple[Sequence[Any], int]:
    """Return the keys of the children of a node, and how many of them are keys of items."""
    number = len(children)
    entries: list[Any] = []
    with suppress(Exception):  # it may have no keys, or no such function
        entries = [entry for entry, _ in registered.flatten_with_keys_fn(value)[0]]
    names = [entry.name for entry in entries if hasattr(entry, "name")]
    if not entries:
        held = {id(item): name for name, item in getattr(value, "__dict__", {}).items()}
        names = [held[id(child)] for child in children if id(child) in held]
    if len(set(names)) == number:
        return names, 0
    keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in entries]
    return keys if len(set(map(repr, keys))) == number else range(number), number
