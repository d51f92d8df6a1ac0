"""Which layer a selector means, and which tensor in its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from actrec._recordings.layer import Layer
from actrec._recordings.recording import Recording
from actrec._values.dtensor import is_distributed
from actrec._values.spec import Spec, flatten, tensors
from actrec.errors import AlignmentError, OptionError
from actrec.store.joined_ranks import WholeLayer
from actrec.store.layers import StoredLayer
from actrec.store.live import LiveLayer
from actrec.store.read_only import ChosenLayer

#: A layer by its name, or one that is at hand; with steps, what they lead to in each of its values.
Selector: TypeAlias = str | Layer[Any] | tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Selected:
    """A layer, and the indices of a tensor in its values."""

    call: str  #: for messages
    title: str
    layer: Layer[Any]
    steps: tuple[Any, ...]
    among: list[int] | None  #: the selected calls of the layer; ``None`` for all

    def tensor(self, value: Any, which: str = "a call") -> Tensor:
        """Return the selected tensor of a value."""
        for step in self.steps:
            try:
                value = value[step]
            except (LookupError, TypeError):
                message = f"{self.call}: {self.title}: {kind(value)} has no [{step!r}]."
                raise AlignmentError(message) from None
        if not is_plain(value):
            message = (
                f"{self.call}: {which} of {self.title} is {kind(value)}, and rows are cut out of plain tensors. "
                f"{_fix(value, self.layer)}"
            )
            raise AlignmentError(message)
        return value  # type: ignore[no-any-return]

    def number(self, spec: Spec) -> int:
        """Return which of the tensors of a value is selected."""
        marks = [torch.empty(0, device="cpu") for _ in range(spec.count)]
        found = self.tensor(spec.fill(marks))
        return next(at for at, mark in enumerate(marks) if mark is found)

    def value(self, number: int) -> Tensor:
        """Return the tensor in a call of the layer."""
        return self.tensor(self.layer[number])

    @property
    def origins(self) -> set[str]:
        """The ids of the stored recordings of the layer."""
        layer = self.layer.recorded if isinstance(self.layer, WholeLayer) else self.layer
        sources = layer._sources if isinstance(layer, StoredLayer) else ()
        return {source.rank.description.recording for source in sources}


def _fix(value: Any, layer: Layer[Any]) -> str:
    if tensors(value) and not isinstance(value, Tensor):
        return f"Name what is in it, as in ({layer.name!r}, 0), or record with a transform that returns a tensor."
    if layer.type == "added":
        return (
            f"Add a tensor with a row for each sample: acts.add({layer.name!r}, torch.tensor(...))."
        )
    return "Record with a transform that returns a plain tensor."


def kind(value: Any) -> str:
    """Return what a value is, for messages."""
    if not isinstance(value, Tensor):
        return flatten(value)[1].kind
    if is_plain(value):
        return "a tensor"
    if is_distributed(value):
        return "a DTensor, of which each rank has a part"
    return f"a tensor of layout {value.layout}, quantized, nested or without data"


def is_plain(value: Any) -> bool:
    """Whether rows can be cut out of a value."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested or value.is_meta or is_distributed(value))
    )


def select(call: str, recording: Recording[Any], selector: Selector) -> Selected:
    """Return the layer that a selector selects."""
    layer, *steps = selector if selector and isinstance(selector, tuple) else (selector,)
    if isinstance(layer, str):
        layer = recording[layer]
    if not isinstance(layer, Layer):
        message = (
            f"{call}: {selector!r} is not a layer. Give the name of one, a layer such as acts.inputs['conv1'], or a "
            "tuple of either and the index of a tensor in its values: ('lstm', 0)."
        )
        raise OptionError(message)
    title = repr(layer.name) + "".join(f"[{step!r}]" for step in steps)
    layer = layer._stored if isinstance(layer, LiveLayer) else layer
    if isinstance(layer, ChosenLayer):
        return Selected(call, title, layer.base, tuple(steps), layer.calls)
    return Selected(call, title, layer, tuple(steps), None)
