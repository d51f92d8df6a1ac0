"""Values are trees: tensors inside tuples, dicts, dataclasses and what libraries derive from them.

:func:`rebuild` makes a new tree of the same types with every tensor replaced, so that nothing of the
model's own containers is kept: a list that the caller appends to later, a cache that grows with every
token. What it does not know it does not touch (iterating a generator would consume it): an
:class:`Opaque` stands in its place.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict, defaultdict, deque
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Opaque",
    "Value",
    "attributes",
    "is_array",
    "leaves",
    "opaque",
    "rebuild",
    "steps",
    "tensors",
]

#: What a layer returned: a tensor, or any nesting of tuples, lists, dicts and dataclasses of them.
Value: TypeAlias = Any

# Immutable, or as good as: kept as they are.
_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type(...), type, Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


# Nothing but their items.
_PLAIN = frozenset({dict, list, tuple})


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


def opaque(value: object) -> Opaque:
    """The placeholder for ``value``."""
    if isinstance(value, Opaque):
        return value
    kind = type(value)
    builtin = kind.__module__ == "builtins"
    return Opaque(kind.__qualname__ if builtin else f"{kind.__module__}.{kind.__qualname__}")


def is_array(value: Any) -> bool:
    """Whether ``value`` is a NumPy array, or a scalar of NumPy's, that holds nothing but numbers."""
    numpy = sys.modules.get("numpy")  # whoever has an array has imported it
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return False
    return not value.dtype.hasobject


def rebuild(
    value: Value,
    tensor: Callable[[Tensor], Value],
    unknown: Callable[[object], Value] = opaque,
) -> Value:
    """Return a tree like ``value``, made anew, with ``tensor(t)`` in the place of every tensor ``t``.

    Types are kept: named tuples (``PackedSequence`` and ``torch.return_types`` among them), dict, list
    and tuple subclasses, dataclasses, the ``ModelOutput`` of transformers. A tensor that stands in
    several places is replaced once and stays one tensor. NumPy arrays are copied. ``unknown(x)`` says
    what stands for an object of any other kind.
    """
    return tensor(value) if type(value) is Tensor else _Rebuilder(tensor, unknown).tree(value)


class _Rebuilder:
    def __init__(
        self, tensor: Callable[[Tensor], Value], unknown: Callable[[object], Value]
    ) -> None:
        self.tensor = tensor
        self.unknown = unknown
        self.made: dict[
            int, Value
        ] = {}  # by id: what stands for a tensor, or for a container on the way down

    def tree(self, value: Value) -> Value:
        if type(value) is not Tensor and isinstance(value, _CONSTANTS):
            return value
        if id(value) not in self.made:
            # A container that contains itself is not finished when it is met again.
            self.made[id(value)] = opaque(value)
            self.made[id(value)] = self._rebuilt(value)
        return self.made[id(value)]

    def _rebuilt(self, value: Value) -> Value:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        if isinstance(value, (list, deque)):
            return self._list(value)
        if isinstance(value, dict):
            return self._dict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, Opaque):
            return self._attributes(value, object.__new__(type(value)))
        return copy.copy(value) if is_array(value) else self.unknown(value)

    def _tuple(self, value: tuple[Value, ...]) -> Value:
        items = [self.tree(item) for item in value]
        try:
            return self._attributes(value, tuple.__new__(type(value), items))
        except TypeError:  # torch.return_types are tuples in C, made from one sequence
            return type(value)(items)

    def _list(self, value: list[Value] | deque[Value]) -> Value:
        base = list if isinstance(value, list) else deque
        new: Any = base.__new__(type(value))
        if isinstance(value, deque):
            deque.__init__(new, maxlen=value.maxlen)
        base.extend(new, [self.tree(item) for item in value])
        return self._attributes(value, new)

    def _dict(self, value: dict[Any, Value]) -> Value:
        base = OrderedDict if isinstance(value, OrderedDict) else dict
        new: Any = base.__new__(type(value))
        if isinstance(value, defaultdict):
            new.default_factory = value.default_factory
        for key in base.keys(value):
            base.__setitem__(new, key, self.tree(base.__getitem__(value, key)))
        return self._attributes(value, new)

    def _attributes(self, value: Value, new: Value) -> Value:
        """Give ``new`` what ``value`` has besides its items: a ``ModelOutput`` has both."""
        if type(value) in _PLAIN:
            return new
        if getattr(value, "__dict__", None) is value:
            new.__dict__ = new
        for name in attributes(value):
            if hasattr(value, name):
                # Past a frozen dataclass, and past a __setattr__ that also writes an item.
                object.__setattr__(new, name, self.tree(getattr(value, name)))
        return new


def attributes(value: Value) -> dict[str, None]:
    """The names of what a container has besides its items; not all of them need be set."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    named = getattr(value, "__dict__", {})
    # There are dicts that are their own __dict__: what looks like an attribute is an item.
    return dict.fromkeys([*(field.name for field in fields), *(() if named is value else named)])


def tensors(value: Value) -> Iterator[Tensor]:
    """The tensors of a recorded value, each once, in order.

    >>> [t.shape for t in tensors((torch.zeros(2), {"h": torch.zeros(3), "cache": Opaque("Cache")}))]
    [torch.Size([2]), torch.Size([3])]
    """
    found: list[Tensor] = []
    if isinstance(value, Tensor):
        found.append(value)
    else:
        rebuild(value, found.append)
    return iter(found)


def leaves(value: Value) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a recorded value in the order of :func:`tensors`, each with the way to it.

    >>> [path for path, _ in leaves((torch.zeros(2), {"h": torch.zeros(3)}))]
    ['[0]', "[1]['h']"]

    The way is what one writes behind the value: ``acts["lstm"][0][1]['h']``. A tensor that stands in
    several places is found in each of them.
    """
    return _walk(value, "", frozenset())


def _walk(value: Value, path: str, above: frozenset[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif not isinstance(value, _CONSTANTS) and id(value) not in above:
        for step, item in steps(value):
            yield from _walk(item, path + step, above | {id(value)})


def steps(value: Value) -> Iterator[tuple[str, Value]]:
    """What is directly inside a container, in the order in which :func:`rebuild` meets it."""
    items: list[tuple[str, Value]] = []
    if isinstance(value, tuple):
        names = getattr(value, "_fields", ())
        ways = [f".{n}" for n in names] if len(names) == len(value) else map("[{}]".format, count())
        items += zip(ways, value, strict=False)
    elif isinstance(value, (list, deque)):
        items += ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, dict):
        base = OrderedDict if isinstance(value, OrderedDict) else dict
        items += ((f"[{key!r}]", base.__getitem__(value, key)) for key in base.keys(value))
    elif not dataclasses.is_dataclass(value):
        return
    yield from items
    met = {id(item) for _, item in items}  # a ModelOutput has each of its values twice
    for name in attributes(value):
        if hasattr(value, name) and id(item := getattr(value, name)) not in met:
            yield f".{name}", item
