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
    if value is None or isinstance(value, _LITERALS):
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
        children = [_encode(item, tensors, numbers) for item in value]
        return f"('sequence', {name!r}, [{', '.join(children)}])"
    if isinstance(value, dict):
        children = [
            f"({_encode(key, tensors, numbers)}, {_encode(item, tensors, numbers)})"
            for key, item in value.items()
        ]
        return f"('mapping', {name!r}, [{', '.join(children)}])"
    if dataclasses.is_dataclass(kind):
        fields = [
            f"({field.name!r}, {_encode(getattr(value, field.name), tensors, numbers)})"
            for field in dataclasses.fields(kind)
            if hasattr(value, field.name)
        ]
        return f"('record', {name!r}, [{', '.join(fields)}])"
    return f"('opaque', {name!r})"


_named: dict[str, Any] = {}


@as_constant
def _name(constant: Any) -> str:
    """Return a name by which :func:`decode` finds a class, or a constant that has no literal."""
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
    return [(tensors, numbers, _filling(what)) for tensors, numbers, what in parsed]


def _filling(parsed: tuple[Any, ...]) -> _Fill:
    """Return a function that makes the value that the parsed text describes."""
    if parsed == _ALONE:
        return _first
    what, *rest = parsed
    return _FILLING[what](*rest)


def _first(tensors: Sequence[Tensor], _: Sequence[int]) -> Any:
    return tensors[0]


def _tensor(at: int) -> _Fill:
    return lambda tensors, _: tensors[at]


def _number(at: int) -> _Fill:
    return lambda _, numbers: numbers[at]


def _constant(value: Any) -> _Fill:
    return lambda _, __: value


def _sequence(name: str, children: list[tuple[Any, ...]]) -> _Fill:
    kind, fills = _named[name], [*map(_filling, children)]
    is_in_c = kind is torch.Size or kind.__module__ == "torch.return_types"  # made of one sequence

    def fill(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Any:
        items = [child(tensors, numbers) for child in fills]
        if kind is list:
            return items
        if issubclass(kind, tuple):
            return kind(items) if is_in_c else tuple.__new__(kind, items)
        made = list.__new__(kind)
        list.extend(made, items)
        return made

    return fill


def _mapping(name: str, children: list[tuple[tuple[Any, ...], tuple[Any, ...]]]) -> _Fill:
    kind, keys = _named[name], [_filling(key) for key, _ in children]
    fills = [_filling(item) for _, item in children]
    base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
    is_record = dataclasses.is_dataclass(kind)  # its items are attributes too

    def fill(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Any:
        made = base.__new__(kind)
        for key, item in zip(keys, fills, strict=True):
            name, value = key(tensors, numbers), item(tensors, numbers)
            base.__setitem__(made, name, value)
        if is_record:
            for field in dataclasses.fields(kind):
                object.__setattr__(made, field.name, base.get(made, field.name))
        return made

    return fill


def _record(name: str, children: list[tuple[str, tuple[Any, ...]]]) -> _Fill:
    kind, fills = _named[name], [(field, _filling(item)) for field, item in children]

    def fill(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Any:
        made = object.__new__(kind)
        for field, item in fills:
            object.__setattr__(made, field, item(tensors, numbers))
        return made

    return fill


#: The outline of a tensor alone, which most are.
_ALONE: Final = ("tensor", 0)

_FILLING: Final[dict[str, Callable[..., _Fill]]] = {
    "tensor": _tensor,
    "number": _number,
    "literal": _constant,
    "float": lambda text: _constant(float(text)),
    "complex": lambda text: _constant(complex(text)),
    "named": lambda name: _constant(_named[name]),
    "opaque": lambda name: _constant(Opaque(qualified(_named[name]))),
    "sequence": _sequence,
    "mapping": _mapping,
    "record": _record,
}
