"""Gradients: a place for each call, filled when ``backward()`` reaches what the call returned.

The hooks are tensor hooks, placed on the output when the layer returns. (Full backward hooks of modules
put a view around the output, and the next in-place layer fails on it.) So a gradient belongs to the value
as the layer returned it, also where an in-place layer follows. The hooks live and die with the graph and
refer weakly to what they report to: a graph never keeps a recording, nor a recording a graph.

Three kinds of output need more than that:

* Under reentrant activation checkpointing a layer first runs without a graph, and again, with one, inside
  ``backward()``. :class:`_Regions` finds the call that is being run again.
* A leaf, such as a parameter that a layer returns as it is, outlives every graph, and a hook on it would
  hear of all of them. So it reports to the latest pass only, and when the block ends, the hook moves from the
  leaf into the graph.
* A view that is written in place has another node in the graph from then on: see :class:`View`.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from actrec._torch import backward_number, base_of, checkpoint_frames
from actrec._values.spec import rebuild, tensors
from actrec.errors import CaptureError, MissingGradientWarning

from .capture import SKIPPED
from .views import View

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping, MutableMapping

    from torch.autograd.graph import Node
    from torch.utils.hooks import RemovableHandle

    from actrec._values.containers import Value

    from .capture import Capture

__all__ = ["Gradients"]


class _Place:
    """Stands for tensor number ``index`` in a nested value."""

    def __init__(self, index: int, tensor: Tensor) -> None:
        self.index = index
        # A nested tensor has no shape that zeros could have.
        self.shape = None if tensor.is_nested else tensor.shape
        self.dtype, self.device = tensor.dtype, tensor.device

    def gradient(self, found: Mapping[int, Tensor], *, zeros: bool) -> Tensor | None:
        """The gradient that has arrived, or else zeros or ``None``."""
        if self.index in found or not zeros or self.shape is None:
            return found.get(self.index)
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass(slots=True)
class _Nested:
    """The structure of a nested output, and which gradients have arrived."""

    structure: Value
    # It is the recording that keeps them, as long as its user does.
    found: MutableMapping[int, Tensor] = field(default_factory=weakref.WeakValueDictionary)

    @classmethod
    def of(cls, output: Value) -> _Nested:
        number = count()
        return cls(rebuild(output, lambda tensor: _Place(next(number), tensor)))

    def filled(self, found: Mapping[int, Tensor], *, zeros: bool) -> Value:
        """The structure with the gradients in it, and zeros or ``None`` where there are none."""

        def gradient(place: object) -> object:
            return place.gradient(found, zeros=zeros) if isinstance(place, _Place) else place

        return rebuild(self.structure, gradient, unknown=gradient)


class _Arrival:
    """The hook on one tensor: tells which gradient arrived for which call."""

    __slots__ = ("gradients", "index", "ticket", "view")

    def __init__(
        self, gradients: Gradients, ticket: int, index: int, view: View | None = None
    ) -> None:
        self.gradients = weakref.ref(gradients)
        self.ticket = ticket
        self.index = index
        self.view = view

    def __call__(self, grad: Tensor | None) -> None:
        gradients = self.gradients()
        # None: of several outputs of one operation, no gradient has reached this one.
        if gradients is None or grad is None:
            return
        if self.view is not None and self.view.is_written():
            self.view.uses(grad)  # and the rest is heard of at the base
        else:
            gradients.arrived(self.ticket, self.index, grad)

    def at_base(self, grad: Tensor | None) -> None:
        """The hook on the base of the tensor, if it is a view."""
        gradients = self.gradients()
        if gradients is None or grad is None or not (self.view and self.view.is_written()):
            return
        gradients.arrived(self.ticket, self.index, grad, self.view)

    def at_node(self, grads: tuple[Tensor | None, ...]) -> None:
        """The same, as a hook on the node that adds up the gradients of a leaf."""
        self(grads[0])


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A leaf that a call of pass ``number`` returned."""

    number: int
    arrival: _Arrival
    handle: RemovableHandle
    node: Node  # until an operation has used the leaf, only this keeps it

    def hand_over(self) -> None:
        """Listen in the graph from now on, no longer at the leaf."""
        self.handle.remove()
        self.node.register_prehook(self.arrival.at_node)


def _is_in_graph(tensor: Tensor) -> bool:
    if not tensor.requires_grad:
        return False
    try:
        return tensor.is_leaf or tensor.grad_fn is not None
    except RuntimeError:
        # One of several views that one operation made, whose memory was written since: PyTorch lets nobody use it.
        return False


# --- Reentrant checkpointing -------------------------------------------------------------------------


class _Regions:
    """Which call of a layer it is that a checkpointed region runs again."""

    def __init__(self) -> None:
        self._tickets: weakref.WeakKeyDictionary[Any, list[int | None]] = (
            weakref.WeakKeyDictionary()
        )
        self._again: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()

    def remember(self, ticket: int | None) -> None:
        """A call ran without a graph, in regions that will run again: all that have begun and not been left."""
        for run, frame in checkpoint_frames():
            if run != "forward":
                return
            self._tickets.setdefault(frame.f_locals["ctx"], []).append(ticket)

    def find(self) -> int | None:
        """A call runs again: return its ticket."""
        run, frame = next(
            (item for item in checkpoint_frames() if item[0] != "forward"), ("", None)
        )
        if frame is None or run != "backward":
            return None
        region = frame.f_locals["ctx"]
        number, place = self._again.get(region, (-1, 0))
        if number != backward_number():  # another backward through the same graph starts over
            place = 0
        self._again[region] = (backward_number(), place + 1)
        tickets = self._tickets.get(region, [])
        return tickets[place] if place < len(tickets) else None

    def __bool__(self) -> bool:
        return bool(self._tickets)


# --- The gradients of one layer --------------------------------------------------------------------


@dataclass(eq=False, slots=True, weakref_slot=True)
class Gradients:
    """The gradients of the calls of one layer."""

    capture: Capture
    layer: Any  # a Layer whose items can be replaced
    lock: threading.Lock  # that of the calls that the gradients belong to
    watched: bool = False  # whether there was anything that a gradient could reach
    _warned: bool = False
    regions: _Regions = field(default_factory=_Regions)
    _nested: dict[int, _Nested] = field(default_factory=dict)
    _leaves: list[_Leaf] = field(default_factory=list)
    _next: int = 0  # the ticket of the next call
    _oldest: int = 0  # the ticket of the oldest call that is in the recording

    def reserve(self, output: Value, kept: Value, number: int) -> int:
        """Make a place for a call of pass ``number``, in one step with its value, and return its ticket.

        It returned ``output``, of which ``kept`` was recorded. The caller holds the lock.
        """
        ticket = self._next
        self._next += 1
        self.layer.keep(rebuild(kept, lambda _: None), number)
        if not isinstance(output, Tensor):
            self._nested[ticket] = _Nested.of(output)
        self._forget()
        return ticket

    def expect(self, output: Value, kept: Value, ticket: int | None, number: int) -> None:
        """Listen for the gradients of what a call of pass ``number`` returned, if it has a place."""
        if ticket is not None:
            self._watch(output, kept, ticket, number)
        if not torch.is_grad_enabled():
            self.regions.remember(ticket)

    def expect_again(self, output: Value) -> None:
        """Checkpointing has run a call again, perhaps with the graph that it did not have before."""
        ticket = self.regions.find()
        if ticket is None:
            return
        self._watch(output, None, ticket, -1)
        if not torch.is_grad_enabled():
            self.regions.remember(ticket)

    def end(self) -> None:
        """The block ends: leave nothing on a leaf, which may be part of the model."""
        while self._leaves:
            self._leaves.pop().hand_over()

    def _watch(self, output: Value, kept: Value, ticket: int, number: int) -> None:
        found = {index: t for index, t in enumerate(tensors(output)) if _is_in_graph(t)}
        for index, tensor in found.items():
            self.watched = True
            view = View.of(tensor, found.values(), kept)
            arrival = _Arrival(self, ticket, index, view)
            handle: RemovableHandle = tensor.register_hook(arrival)  # type: ignore[no-untyped-call]
            if view is not None:
                base_of(tensor).register_hook(arrival.at_base)  # type: ignore[union-attr]
            elif tensor.is_leaf:
                self._watch_leaf(tensor, number, arrival, handle)

    def _watch_leaf(
        self, tensor: Tensor, number: int, arrival: _Arrival, handle: RemovableHandle
    ) -> None:
        node = get_gradient_edge(tensor).node
        with self.lock:
            earlier = [leaf for leaf in self._leaves if leaf.node is node and leaf.number != number]
            for leaf in earlier:
                leaf.handle.remove()
                self._leaves.remove(leaf)
            self._leaves.append(_Leaf(number, arrival, handle, node))

    def _forget(self) -> None:
        """Forget the structures of calls that are no longer in the recording."""
        while self._oldest < self._next - len(self.layer):
            self._nested.pop(self._oldest, None)
            self._oldest += 1

    def arrived(self, ticket: int, index: int, grad: Tensor, view: View | None = None) -> None:
        """The gradient of tensor number ``index`` of a call is there, or that of the base of this ``view``."""
        with self.lock:
            # Counted from the end: the recording may have been cleared, or be bounded.
            place = len(self.layer) - (self._next - ticket)
            if place < 0:
                return
            try:
                known = grad if view is None else view.gradient(grad)
                if known is not None:
                    self.layer[place] = self._merged(ticket, index, known, self.layer[place])
            except CaptureError as error:
                message = f"record() cannot keep {self.capture.what} {ticket} of layer {self.capture.layer!r}: {error}."
                raise CaptureError(message) from error
        if known is None:
            self._warn()

    def _warn(self) -> None:
        """A gradient is left out, for nobody knows it: say so, once for the layer."""
        if not self._warned:
            self._warned = True
            message = (
                f"record(grads=True): a gradient of layer {self.capture.layer!r} is left out. The layer returned a view "
                "of a tensor that the model may have used elsewhere too, and then one of them was written in place, so "
                "that what came from where cannot be told. Let the operation that writes make a new tensor "
                "(y = y + x, ReLU(inplace=False)), or the layer return a clone()."
            )
            warnings.warn(message, MissingGradientWarning, stacklevel=2)

    def _merged(self, ticket: int, index: int, grad: Tensor, known: Value) -> Value:
        nested = self._nested.get(ticket)
        if self.capture.transform is not None:
            return self._transformed(ticket, index, grad, known)
        new = self.capture.keep(grad)
        if nested is None:
            return new if known is None else known + new
        nested.found[index] = new = nested.found[index] + new if index in nested.found else new
        return nested.filled(nested.found, zeros=False)

    def _transformed(self, ticket: int, index: int, grad: Tensor, known: Value) -> Value:
        """A transform is applied to what arrived, with zeros for the rest of the output, and added up."""
        nested = self._nested.get(ticket)
        new = self.capture(
            grad if nested is None else nested.filled({index: grad}, zeros=True), ticket
        )
        if new is SKIPPED:
            return known
        earlier = iter(tensors(known))
        return rebuild(new, lambda t: t + next(earlier, 0))
