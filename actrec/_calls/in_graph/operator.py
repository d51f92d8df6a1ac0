"""The operator that compiled code calls in place of a hook, and that passes the value on to the hook.

Its schema declares that it writes to one of its arguments, a token that nobody reads. So a compiler neither removes a call
nor exchanges two of them, also with graphs from its cache on disk. The name of the operator has a version, for that cache.

A tensor says which hook a call is for (:func:`key_to`): a number would be a constant of the graph, and twelve blocks that
are compiled alike would need twelve graphs.

One call of it passes on one value, or several in their order (:mod:`.together`): its lists hold what belongs to each,
and its text describes one after the other.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Collection
from typing import Any, Final

import torch
from torch import Tensor, nn

from actrec._calls.arrivals import instead
from actrec._calls.gradients import Call
from actrec._torch import rewinding, version
from actrec._values.snapshot import twin
from actrec.errors import CaptureError

from .outline import values

#: The hooks (``HookInGraph``) that compiled code reports values to, by their keys. Values for one that is gone are dropped.
_hooks: Final[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()

_numbers: Final = itertools.count()
#: For each module, the keys of its hooks, by their numbers.
_keys: Final[weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[int, Tensor]]]] = (
    weakref.WeakKeyDictionary()
)


def key_to(hook: Any, module: nn.Module, at: int) -> Tensor:
    """Return the tensor by which compiled code identifies ``hook``, number ``at`` on the module, as long as that exists.

    It is the same tensor for each hook of this number on the module: where weights are constants of the graph, the key is too.
    """
    of_module = _keys.setdefault(module, {})
    if at not in of_module:
        number = next(_numbers)
        with torch.inference_mode(mode=False):
            of_module[at] = number, torch.tensor(number, device="cpu")
    number, key = of_module[at]
    _hooks[number] = hook
    return key


with torch.inference_mode(mode=False):
    TOKEN: Final = torch.zeros((), dtype=torch.int64, device="cpu")
_rewind: Final = rewinding(TOKEN)


def _tell(
    tensors: list[Tensor],
    numbers: list[int],
    outlines: str,
    keys: list[Tensor],
    late: bool,  # noqa: FBT001, ARG001  # an operator has no keywords alone; together.py reads it
    _: Tensor,
) -> None:
    # A graph that recomputes in its backward has saved the token, and would raise if its version had changed since.
    if version(TOKEN):
        _rewind()
    for key, value in zip(keys, values(outlines, tensors, numbers), strict=True):
        hook = _hooks.get(int(key))
        if hook is not None:
            hook.hear(value)


# --- Gradients -------------------------------------------------------------------------------------------


class _Ticket(bytearray):
    """The memory of a tensor that represents a call in the autograd graph, and keeps the call alive as long as the graph."""

    call: Call | None = None  # if it is recorded

    def watch(self, call: Call, views: Collection[int], *, has_leaf: bool) -> bool:
        """The call is recorded. Its gradients will be reported, also those of its tensors number ``views``, which are views."""
        if has_leaf:
            raise CaptureError(_LEAF)
        self.call = call
        call.expect_views(views)
        return True


_LEAF: Final = (
    "it returned a leaf of the graph, such as a parameter or an input of the model, and compiled code cannot separate the "
    "gradients of its single calls. Record it without grads, or without compiled=True"
)


#: By their number, which is also their content.
_tickets: Final[weakref.WeakValueDictionary[int, _Ticket]] = weakref.WeakValueDictionary()
_ticket_numbers: Final = itertools.count()


def _tell_watched(
    tensors: list[Tensor],
    numbers: list[int],
    outline: str,
    has_leaf: bool,  # noqa: FBT001
    views: list[int],
    *to: Tensor,
) -> Tensor:
    """The same, for a value that gradients may reach. Return the ticket to pass to :func:`_tell_gradient` with them."""
    number = next(_ticket_numbers)
    ticket = _tickets[number] = _Ticket(number.to_bytes(8, sys.byteorder))
    instead.watch = lambda call, *_: ticket.watch(call, views, has_leaf=has_leaf)
    try:
        _tell(tensors, numbers, outline, [to[0]], False, to[1])  # noqa: FBT003
    finally:
        instead.watch = None
    return torch.frombuffer(ticket, dtype=torch.int64).view(())


def _tell_gradient(grad: Tensor, ticket: Tensor, index: int) -> Tensor:
    """Report a gradient, and return a copy of it, which continues through the graph instead of it.

    (Writing to a token would not do: the graphs of several forwards would have saved it, and raise because it changed.)
    """
    call = _tickets[int(ticket)].call
    if call is not None:
        call.tell(index, grad)
    if grad.requires_grad:
        message = (
            "record(compiled=True, grads=...): compiled code cannot compute gradients of gradients (create_graph=True). "
            "Record without compiled=True"
        )
        raise CaptureError(message)
    copy = twin(grad)
    return grad.clone() if copy is None else copy


def _any_ticket(*_: object) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


# --- The operators -----------------------------------------------------------------------------------------


def _alike(grad: Tensor, *_: object) -> Tensor:
    return grad.clone()


def _nothing(*_: object) -> None:
    """The fake version of an operator that returns nothing."""


_library: Final[Any] = torch.library.Library("actrec", "FRAGMENT")  # type: ignore[no-untyped-call]
_VALUE = "Tensor[] tensors, SymInt[] numbers, str outlines"
_TO = "Tensor(a!) token"
_OPERATORS: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    f"tell_2({_VALUE}, Tensor[] keys, bool late, {_TO}) -> ()": (_tell, _nothing),
    f"tell_watched_3({_VALUE}, bool has_leaf, int[] views, Tensor key, {_TO}) -> Tensor": (
        _tell_watched,
        _any_ticket,
    ),
    "tell_gradient_1(Tensor grad, Tensor ticket, int index) -> Tensor": (_tell_gradient, _alike),
}
#: Keeps the operators out of CUDA graphs, whose replays run no Python, if this version of PyTorch has the tag.
_TAGS: Final = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
for _schema, (_body, _fake) in _OPERATORS.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=_TAGS)
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"actrec::{_name}", _fake, lib=_library)

tell: Final[Any] = torch.ops.actrec.tell_2.default
tell_watched: Final[Any] = torch.ops.actrec.tell_watched_3.default
tell_gradient: Final[Any] = torch.ops.actrec.tell_gradient_1.default
