"""Summaries of the calls of a layer for tables: types, dtypes, devices and the range of their shapes.

The size of a summary depends on how much the calls differ, not on their number. It reads no element of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import torch
from torch import Tensor

from actrec._text import shown

from .containers import Value
from .outline import drawn, outline, outline_of_shape
from .spec import Spec, flatten

#: A size of a tensor; the ragged dimension of a nested tensor is a name.
Size: TypeAlias = "int | str"

#: The least and the largest sizes.
_Bounds: TypeAlias = "tuple[list[int], list[int]]"

#: So many kinds of values are distinguished; the rest counts as "...".
MOST: Final = 16


def shape_of(tensor: Tensor) -> tuple[Size, ...]:
    """Return the shape of a tensor of any kind; ``("nested",)`` for a nested tensor without one."""
    if tensor.is_nested and tensor.layout is torch.strided:
        return ("nested",)
    # The ragged dimension of a jagged tensor is a symbol, different for each tensor.
    return tuple(size if type(size) is int else "ragged" for size in tensor.shape)


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return a dtype as text, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


@dataclass(slots=True)
class Summary:
    """The types, dtypes, devices and shapes of some values.

    >>> import torch
    >>> summary = Summary()
    >>> summary.add(torch.zeros(3, 4))
    >>> summary.add(torch.zeros(2, 4))
    >>> summary.shape, list(summary.dtypes)
    ('(2-3, 4)', ['float32'])
    """

    kinds: dict[str, None] = field(default_factory=dict)  #: as :attr:`Spec.kind` says it
    dtypes: dict[str, None] = field(default_factory=dict)
    devices: dict[str, None] = field(default_factory=dict)
    #: The least and the largest sizes of single tensors, by their outlines.
    shapes: dict[str, _Bounds] = field(default_factory=dict)
    #: The same of nested values; ``None`` if not all are known.
    nested: dict[str, _Bounds] | None = field(default_factory=dict)
    _latest: object = field(default=None, compare=False, repr=False)

    def add(self, value: Value) -> None:
        """Add a value."""
        self.add_flat(*flatten(value))

    def add_flat(self, tensors: Sequence[Tensor], spec: Spec) -> None:
        """Add a value that was taken apart."""
        shapes = [shape_of(t) for t in tensors]
        self.add_spec(spec, shapes, shapes)
        for tensor in tensors:
            self.dtypes[dtype_name(tensor.dtype)] = None
            self.devices[str(tensor.device)] = None

    def add_spec(
        self, spec: Spec, low: Sequence[Sequence[Size]], high: Sequence[Sequence[Size]]
    ) -> None:
        """Add the structure of values, and the least and the largest shapes of their tensors."""
        kind = spec.kind
        self._add_kind(kind)
        if not kind:
            self.add_shape(low[0], high[0])
        elif (spec, low, high) != self._latest:
            template, sizes = outline(spec, low)
            self.add_outline(template, sizes, outline(spec, high)[1])
            self._latest = spec, low, high  # most equal the one before

    def add_outline(self, template: str, low: Sequence[int], high: Sequence[int]) -> None:
        """Add the outline of nested values, with its sizes."""
        if self.nested is None:
            return
        _widen(self.nested, template, low, high)
        if len(self.nested) > MOST:
            self.nested = None

    def _add_kind(self, kind: str) -> None:
        if kind not in self.kinds:
            self.kinds["..." if len(self.kinds) >= MOST else kind] = None

    def add_shape(self, low: Sequence[Size], high: Sequence[Size]) -> None:
        """Add the least and the largest sizes of values that are single tensors."""
        template, least = outline_of_shape(low)
        _widen(self.shapes, template, least, [size for size in high if isinstance(size, int)])

    def update(self, other: Summary) -> None:
        """Add another summary."""
        for kind in other.kinds:
            self._add_kind(kind)
        self.dtypes.update(other.dtypes)
        self.devices.update(other.devices)
        for template, sizes in other.shapes.items():
            _widen(self.shapes, template, *sizes)
        if other.nested is None:
            self.nested = None
        else:
            for template, sizes in other.nested.items():
                self.add_outline(template, *sizes)

    @property
    def what(self) -> str:
        """The shapes of the values, also of nested tensors; or their kinds, if that would be too long."""
        if not any(self.kinds):
            return self.shape
        if self.nested and len(self.nested) <= _SHOWN:
            texts = [self.shape] * ("" in self.kinds)
            texts += [drawn(template, *sizes) for template, sizes in self.nested.items()]
            if max(map(len, texts)) <= _LONGEST:
                return " | ".join(map(shown, texts))
        return " | ".join(shown(kind or "Tensor") for kind in self.kinds)

    @property
    def shape(self) -> str:
        """The shapes of the values that are single tensors, as text; a dimension that varies shows its range."""
        if len(self.shapes) > _SHOWN:
            return f"{len(self.shapes)} kinds of shapes"
        return " | ".join(drawn(template, *sizes) for template, sizes in self.shapes.items())


def _widen(
    known: dict[str, _Bounds], template: str, low: Sequence[int], high: Sequence[int]
) -> None:
    """Include further sizes in the least and the largest ones of an outline."""
    least, largest = known.setdefault(template, ([*low], [*high]))
    least[:] = map(min, least, low)
    largest[:] = map(max, largest, high)


_SHOWN: Final = 3
_LONGEST: Final = 72
