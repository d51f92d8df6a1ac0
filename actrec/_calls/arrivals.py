"""Hooks on the tensors that a call returned, which report its gradients.

They are placed when the layer returns. (Full backward hooks of modules put a view around the output, and the next in-place
layer fails on it.) So a gradient belongs to the value as the layer returned it, also where an in-place layer follows. The
graph owns the hooks, and they refer weakly to the recording: neither keeps the other alive.

Two kinds of tensors need more than a hook: views that are written in place (:class:`View`), and leaves. A leaf, such as a
parameter that a layer returns as it is, outlives every graph, and a hook on it would get the gradients of all of them. So only
the hook of the latest pass stays on it, and when the block ends, that hook moves from the leaf into the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from actrec._torch import base_of, listen
from actrec._values.containers import Value
from actrec._values.spec import tensors

from .views import View


class Told(Protocol):
    """A call that gradients may reach. The graph keeps it."""

    number: int  #: of its pass

    def tell(self, index: int, grad: Tensor, view: View | None = None) -> None:
        """The gradient of its tensor number ``index`` is there, or that of the base of this ``view``."""


@dataclass(eq=False, slots=True)
class _Arrival:
    """The hook on tensor number ``index`` of what a call returned."""

    call: Told
    index: int
    view: View | None

    def __call__(self, grad: Tensor | None) -> None:
        if grad is None:  # of several outputs of one operation, no gradient has reached this one
            return
        if self.view is not None and self.view.is_written():
            self.view.uses(grad)  # the rest of the gradient arrives at the base
        else:
            self.call.tell(self.index, grad)

    def at_base(self, grad: Tensor | None) -> None:
        """The hook on the base of the tensor, if it is a view."""
        if grad is not None and self.view is not None and self.view.is_written():
            self.call.tell(self.index, grad, self.view)

    def at_node(self, grads: tuple[Tensor | None, ...]) -> None:
        """The same as ``__call__``, as a hook on the node that accumulates the gradients of a leaf."""
        self(grads[0])


class _Leaf(NamedTuple):
    """The hook on a leaf that a call returned."""

    arrival: _Arrival
    handle: RemovableHandle
    node: Node  # until an operation has used the leaf, only this keeps the node alive

    def hand_over(self) -> None:
        """Listen in the graph from now on, no longer at the leaf."""
        self.handle.remove()
        self.node.register_prehook(self.arrival.at_node)

    def gives_way_to(self, call: Told) -> bool:
        """Whether ``call``, which has returned the same leaf, is of another pass, or is its own call run again."""
        own = self.arrival.call
        return own is call or own.number != call.number


def _is_in_graph(tensor: Tensor) -> bool:
    if not tensor.requires_grad:
        return False
    try:
        return tensor.is_leaf or tensor.grad_fn is not None
    except RuntimeError:
        # One of several views that one operation made, and their memory was written since: PyTorch refuses to use it.
        return False


@dataclass(eq=False, slots=True)
class Arrivals:
    """The hooks for the calls of one layer."""

    lock: threading.Lock  # that of the layer
    _leaves: list[_Leaf] = field(default_factory=list)

    def watch(self, call: Told, output: Value, kept: Value) -> bool:
        """Listen for the gradients of what a call returned, of which ``kept`` is recorded. Return whether any can come."""
        found = {at: t for at, t in enumerate(tensors(output)) if _is_in_graph(t)}
        for index, tensor in found.items():
            view = None
            if base_of(tensor) is not None:  # not a variable: View counts references
                view = View.of(tensor, [*found.values()], kept)
            arrival = _Arrival(call, index, view)
            if tensor.is_leaf:
                handle: RemovableHandle = tensor.register_hook(arrival)  # type: ignore[no-untyped-call]
                self._add_leaf(_Leaf(arrival, handle, get_gradient_edge(tensor).node))
            else:
                listen(tensor, arrival)
            if view is not None:
                listen(base_of(tensor), arrival.at_base)  # type: ignore[arg-type]
        return bool(found)

    def _add_leaf(self, new: _Leaf) -> None:
        with self.lock:
            same = [leaf for leaf in self._leaves if leaf.node is new.node]
            for leaf in same:
                if leaf.gives_way_to(new.arrival.call):
                    leaf.handle.remove()
                    self._leaves.remove(leaf)
            self._leaves.append(new)

    def end(self) -> None:
        """The block ends: move the hooks off the leaves, which may be part of the model."""
        while self._leaves:
            self._leaves.pop().hand_over()


class _Instead(threading.local):
    watch: Callable[[Any, Value, Value], bool] | None = None


#: What this thread does instead of placing hooks, if anything: compiled code reports gradients itself.
instead: Final = _Instead()
