"""How a nested value leaves compiled code: as its tensors, its integers, and a text that describes the rest.

The compiler traces :func:`encode`: it knows the structure of a value while it traces, and keeps the text as a constant of
the graph. So the function uses only Python that the compiler supports, and takes apart whatever a compiled model can return;
anything else becomes an :class:`Opaque`, as it does in eager mode. :func:`values` rebuilds the values when the graph runs.
"""

from __future__ import annotations

import ast
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from actrec._torch import as_constant
from actrec._values.spec import itself
from actrec._values.stand_ins import Opaque, qualified

# --- What the compiler reads -----------------------------------------------------------------------------

_LITERALS = (type(None), bool, str, bytes)
_NUMBERS = (float, complex)  # whose texts are no literals where they are inf or nan
_NAMED = (
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(type, type(...), slice, range, Enum),
)


#: The texts of ``None``, and of a tensor alone.
NOTHING: Final = "(0, 0, ('literal', None))"
ALONE: Final = "(1, 0, ('tensor', 0))"


def encode(value: Any, tensors: list[Tensor], numbers: list[int]) -> str:
    """Append the tensors and integers of ``value`` to empty lists, each tensor once, and return the rest as a text."""
    text = _encode(value, tensors, numbers)
    return f"({len(tensors)}, {len(numbers)}, {text})"


def _encode(value: Any, tensors: list[Tensor], numbers: list[int]) -> str:
    if isinstance(value, Tensor):
        for at, known in enumerate(tensors):
            if known is value:
                return f"('tensor', {at})"
        tensors.append(value)
        return f"('tensor', {len(tensors) - 1})"
    if isinstance(value, _LITERALS):
        return f"('literal', {value!r})"
    if isinstance(value, int):
        numbers.append(value)
        return f"('number', {len(numbers) - 1})"
    if isinstance(value, _NAMED):
        return f"('named', {_name(value)!r})"
    return _encode_object(value, tensors, numbers)


def _encode_object(value: Any, tensors: list[Tensor], numbers: list[int]) -> str:
    kind = type(value)
    name = _name(kind)
    if kind in _NUMBERS:
        return f"('{kind.__name__}', '{value!r}')"
    if isinstance(value, (tuple, list)):
        what, items = "sequence", [*value]
    elif isinstance(value, dict):
        what, items = "mapping", [one for pair in value.items() for one in pair]
    elif dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind) if hasattr(value, field.name)]
        what, items = "record", [one for key in names for one in (key, getattr(value, key))]
    else:
        return f"('opaque', {name!r})"
    children = [_encode(item, tensors, numbers) for item in items]
    return f"('{what}', {name!r}, [{', '.join(children)}])"


_named: dict[str, Any] = {}


@as_constant
def _name(constant: Any) -> str:
    """Return a name by which :func:`values` finds a class, or a constant that has no literal."""
    name = what = qualified(constant) if isinstance(constant, type) else repr(constant)
    number = 1
    while _named.setdefault(name, constant) != constant:  # another one of the same name
        number += 1
        name = f"{what} #{number}"
    return name


# --- When the graph runs -----------------------------------------------------------------------------------

_Fill: TypeAlias = Callable[["Sequence[Tensor]", "Sequence[int]"], Any]


def values(outlines: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[Any]:
    """Rebuild the values of texts with commas between them, each from the next of the tensors and integers."""
    tensor = number = 0
    for of_tensors, of_numbers, fill in _parsed(outlines):
        if fill is _first:  # the shortest way
            yield tensors[tensor]
        else:
            more = tensors[tensor : tensor + of_tensors], numbers[number : number + of_numbers]
            yield fill(*more)
        tensor += of_tensors
        number += of_numbers


@lru_cache(maxsize=4096)
def _parsed(outlines: str) -> list[tuple[int, int, _Fill]]:
    parsed = ast.literal_eval(f"[{outlines}]")
    return [(tensors, numbers, _filling(*what)) for tensors, numbers, what in parsed]


def _filling(what: str, given: Any, children: Sequence[Any] = ()) -> _Fill:
    """Return a function that makes the value that the parsed text describes: most often once for many calls."""
    if what == "tensor":
        return _first if given == 0 else lambda tensors, _: tensors[given]
    if what == "number":
        return lambda _, numbers: numbers[given]
    if what in _MAKING:
        kind, make, fills = _named[given], _MAKING[what], [_filling(*child) for child in children]
        return lambda tensors, numbers: make(kind, [fill(tensors, numbers) for fill in fills])
    constant = _CONSTANTS[what](given)
    return lambda _, __: constant


def _first(tensors: Sequence[Tensor], _: Sequence[int]) -> Any:
    return tensors[0]


def _sequence(kind: Any, items: list[Any]) -> Any:
    if kind is tuple or kind is list:
        return kind(items)
    if issubclass(kind, tuple):
        is_in_c = kind is torch.Size or kind.__module__ == "torch.return_types"
        return kind(items) if is_in_c else tuple.__new__(kind, items)
    made = list.__new__(kind)
    list.extend(made, items)
    return made


def _mapping(kind: Any, items: list[Any]) -> Any:
    pairs = zip(items[::2], items[1::2], strict=True)
    if kind is dict:
        return dict(pairs)
    base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
    made = base.__new__(kind)
    for key, item in pairs:
        base.__setitem__(made, key, item)
    if dataclasses.is_dataclass(kind):  # its items are attributes too
        for field in dataclasses.fields(kind):
            object.__setattr__(made, field.name, base.get(made, field.name))
    return made


def _record(kind: Any, items: list[Any]) -> Any:
    made = object.__new__(kind)
    for name, item in zip(items[::2], items[1::2], strict=True):
        object.__setattr__(made, name, item)
    return made


_MAKING: Final[dict[str, Callable[[Any, list[Any]], Any]]] = {
    "sequence": _sequence,
    "mapping": _mapping,
    "record": _record,
}
#: How the constants are made of their texts.
_CONSTANTS: Final[dict[str, Callable[[Any], Any]]] = {
    "literal": itself,
    "float": float,
    "complex": complex,
    "named": lambda name: _named[name],
    "opaque": lambda name: Opaque(qualified(_named[name])),
}
