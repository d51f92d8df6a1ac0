"""What a call is, without its data: shape, dtype and device of every tensor in it.

Tables are made of forms, so they cost nothing: no value is read, no device waited for. A layer that lies
on disk knows the forms of its calls without opening them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._nested import Opaque, Value, leaves

__all__ = ["Form", "Leaf", "form", "shape_of"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a value."""

    path: str  #: what one writes behind the value to reach it; "" if it is the value
    shape: tuple[
        int | str, ...
    ]  #: ("nested",) for a tensor that has none, "ragged" for a size that varies
    dtype: str  #: without "torch."
    device: str


@dataclass(frozen=True, slots=True)
class Form:
    """One call. Calls of equal form have equal forms."""

    kind: str  #: "" for a tensor, or what the value is: "tuple of 2", "dict of 3", "int"
    leaves: tuple[Leaf, ...]


def form(value: Value) -> Form:
    """Return the form of ``value``.

    >>> form(torch.zeros(2, 3))
    Form(kind='', leaves=(Leaf(path='', shape=(2, 3), dtype='float32', device='cpu'),))
    >>> form((torch.zeros(2), None)).kind
    'tuple of 2'
    """
    kind = "" if isinstance(value, Tensor) else _kind(value)
    return Form(kind, tuple(_leaf(path, tensor) for path, tensor in leaves(value)))


def _leaf(path: str, tensor: Tensor) -> Leaf:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Leaf(path, shape_of(tensor), dtype, str(tensor.device))


def shape_of(tensor: Tensor) -> tuple[int | str, ...]:
    """Return the shape of a tensor of any kind."""
    # A strided nested tensor has no shape to ask for.
    nested = tensor.is_nested and tensor.layout is torch.strided
    return ("nested",) if nested else tuple(map(_size, tensor.shape))


def _size(size: object) -> int | str:
    # The ragged dimension of a jagged tensor is a symbol, and another one for each tensor.
    return size if type(size) is int else "ragged"


def _kind(value: Value) -> str:
    if isinstance(value, Opaque):
        return value.type.rpartition(".")[2]
    if isinstance(value, (tuple, list, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
