"""The operator that carries what a hook is told out of compiled code, to the hook itself.

It says that it writes to one of its arguments, a token that nobody reads. So no compiler removes a call of it, or exchanges
two of them; and as all of this stands in its schema, what a compiler keeps on disk is right about it too. Its name says
which version of it that is.

Which hook it is for, a tensor tells (:func:`new_key`): a number would be a constant of the graph, and each of twelve blocks
that are compiled alike would have a graph of its own.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from .outline import decode

__all__ = ["RECEIVER_OF", "TOKEN", "Receiver", "new_key", "tell", "tell_nested"]


class Receiver(Protocol):
    """What is told something by compiled code."""

    def hear(self, value: Any) -> None:
        """Take what it was told."""


#: By their keys. What compiled code tells nobody any more is dropped.
RECEIVER_OF: Final[weakref.WeakValueDictionary[int, Receiver]] = weakref.WeakValueDictionary()

_numbers: Final = itertools.count()


def new_key(receiver: Receiver) -> Tensor:
    """Return the tensor by which compiled code knows ``receiver``, as long as that is there."""
    number = next(_numbers)
    RECEIVER_OF[number] = receiver
    with torch.inference_mode(mode=False):
        return torch.tensor(number, device="cpu")


with torch.inference_mode(mode=False):
    TOKEN: Final = torch.zeros((), dtype=torch.int64, device="cpu")


def _tell(value: Tensor | None, key: Tensor, _: Tensor) -> None:
    receiver = RECEIVER_OF.get(int(key))
    if receiver is not None:
        receiver.hear(value)


def _tell_nested(
    tensors: list[Tensor], numbers: list[int], outline: str, key: Tensor, _: Tensor
) -> None:
    receiver = RECEIVER_OF.get(int(key))
    if receiver is not None:
        receiver.hear(decode(outline, tensors, numbers))


_library: Final[Any] = torch.library.Library("actrec", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _body in {
    "tell_1(Tensor? value, Tensor key, Tensor(a!) token) -> ()": _tell,
    "tell_nested_1(Tensor[] tensors, SymInt[] numbers, str outline, Tensor key, Tensor(a!) token) -> ()": _tell_nested,
}.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    _library.impl(_name, lambda *_: None, "Meta")

tell: Final[Any] = torch.ops.actrec.tell_1.default
tell_nested: Final[Any] = torch.ops.actrec.tell_nested_1.default
