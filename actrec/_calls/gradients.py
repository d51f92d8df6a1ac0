"""The gradients of the calls of a layer: each is put where it belongs as soon as it arrives, and added to what came before.

A call has a place in the layer as soon as it is kept, in one step with its value. Where that is when a gradient arrives is
counted from the end, for the recording may have been cleared, or be bounded, or units before it may have been dropped. The
calls that :mod:`reentrant` checkpointing runs again have the places of the first time.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from actrec._values.containers import Value
from actrec._values.spec import TENSOR, Spec, flatten, rebuild, tensors
from actrec.errors import CaptureError, MissingGradientWarning

from .arrivals import Arrivals, instead
from .capture import SKIPPED, Capture
from .reentrant import Regions
from .views import View


def _zeros_like(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Return a function that makes zeros in the place of a gradient of ``tensor``, which it does not keep."""
    if tensor.is_nested:  # it has no shape for torch.zeros()
        return lambda: None
    shape, zero = tensor.shape, partial(torch.zeros, (), dtype=tensor.dtype, device=tensor.device)
    return lambda: zero().expand(shape)


@dataclass(eq=False, slots=True)
class Call:
    """A call that gradients may reach. The graph keeps it alive, and so does a region that may run again."""

    gradients: weakref.ref[Gradients]
    number: int  # of its pass
    spec: Spec  # of what it returned
    zeros: list[Callable[[], Tensor | None]]  # for a transform: in place of other gradients
    #: Of a nested output, the gradients that have arrived, by the number of the tensor. Only the recording keeps them alive.
    arrived: MutableMapping[int, Tensor] | None = None
    ticket: int = -1  # which call of the layer it is; -1 if its container gets it later, or never
    held: int = -1  # which of those of its pass that the container gets later, or never
    dropped: bool = False  # its unit has failed
    #: In compiled code: the views among its tensors, by their numbers, that no gradient has come of.
    views: Collection[int] = ()

    def tell(self, index: int, grad: Tensor, view: View | None = None) -> None:
        """The gradient of tensor number ``index`` has arrived, or, with a ``view``, that of its base."""
        gradients = self.gradients()
        if gradients is None:
            return
        if index in self.views:
            self.views = [at for at in self.views if at != index]
            gradients.views_waiting -= 1
        gradients.arrived(self, index, grad, view)

    def expect_views(self, views: Collection[int]) -> None:
        """Compiled code will report the gradients of these views, unless they are written in place."""
        gradients = self.gradients()
        assert gradients is not None  # noqa: S101  # they are asking
        self.views = views
        gradients.views_waiting += len(views)


AGAIN: Final = (
    "activation checkpointing runs compiled code again in backward(), and it is unknown which call that repeats. Record it without "
    "grads, or without compiled=True"
)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Gradients:
    """The gradients of the calls of one layer."""

    capture: Capture
    layer: Any  # a Layer whose items can be replaced
    lock: threading.Lock  # that of the calls that the gradients belong to
    #: Whether they are nested like the recorded outputs: both have the same transform, or none.
    alike: bool = True
    undecided: Collection[int] = ()  # the passes that may still be dropped; it changes
    watched: bool = False  # whether there was anything that a gradient could reach
    came: bool = False  # whether one has arrived
    views_waiting: int = 0  # how many views of compiled code no gradient has come of
    regions: Regions[Call] = field(default_factory=Regions)
    reentrant: bool = False  # whether calls ran in such regions, which may be gone by now
    #: What is told of gradients that go to a path; ``None`` in memory.
    backwards: Any = field(init=False)
    arrivals: Arrivals = field(init=False)
    _itself: weakref.ref[Gradients] = field(init=False)  # for the graph
    _warned: set[str] = field(default_factory=set)
    _calls: int = 0  # that have had a place
    _open: dict[int, list[Call]] = field(default_factory=dict)  # of the undecided passes
    _gone: list[int] = field(default_factory=list)  # tickets of dropped calls, ascending

    def __post_init__(self) -> None:
        self.backwards = self.layer._backwards
        self.arrivals = Arrivals(self.lock)
        self._itself = weakref.ref(self)

    def reserve(self, output: Value, kept: Value, number: int) -> Call:
        """Make a place for a call of pass ``number``, in one step with its value.

        The call returned ``output``, and ``kept`` was recorded of it, or ``None``. The caller holds the lock.
        """
        found, spec = flatten(output)
        zeros = [] if self.capture.transform is None else [*map(_zeros_like, found)]
        call = Call(self._itself, number, spec, zeros)
        if spec is not TENSOR and spec != TENSOR:
            call.arrived = weakref.WeakValueDictionary()
        if not self.alike:
            kept = output if self.capture.transform is None else None
        self.layer._keep(None if type(kept) is Tensor else rebuild(kept, lambda _: None), number)
        if number in self.undecided:
            self._open.setdefault(number, []).append(call)
        held = self.layer._held_back.get(number)
        if held is None:
            self._enter(call)
        else:
            call.held = len(held) - 1
        return call

    def _enter(self, call: Call) -> None:
        """The call is the latest in its layer."""
        call.ticket = self._calls
        self._calls += 1

    def settle(self, number: int) -> None:
        """The unit of pass ``number`` is kept, with its gradients. The caller holds the lock."""
        for call in self._open.pop(number, ()):
            call.held = -1  # to a path they go as they are now
            if call.ticket < 0 and self.backwards is None:
                self._enter(call)

    def drop(self, number: int) -> None:
        """The unit of pass ``number`` was dropped, with its gradients. The caller holds the lock."""
        for call in self._open.pop(number, ()):
            if call.ticket >= 0:
                insort(self._gone, call.ticket)
            call.dropped = True

    def _place(self, call: Call) -> tuple[Any, int]:
        """Where the gradient of a call is, and its index there: -1 if it is nowhere."""
        if call.dropped:
            return self.layer, -1
        if call.ticket < 0:
            held = self.layer._held_back.get(call.number)
            return held, -1 if held is None else call.held
        # Counted from the end: the recording may have been cleared, or be bounded.
        gone_since = len(self._gone) - bisect_left(self._gone, call.ticket)
        since = self._calls - call.ticket - gone_since
        return self.layer, max(len(self.layer) - since, -1)

    def expect(self, output: Value, kept: Value, call: Call | None) -> None:
        """Listen for the gradients of ``output``, of a call that has a place (or else ``None``)."""
        watch = instead.watch or self.arrivals.watch
        comes = call is not None and watch(call, output, kept)
        comes_again = not torch.is_grad_enabled() and self.regions.remember(call)
        self.watched |= comes
        self.reentrant |= comes_again
        if call is not None and (comes or comes_again) and self.backwards is not None:
            self.backwards.expect(call.number)

    def expect_again(self, output: Value) -> None:
        """Checkpointing has run a call again, perhaps with a graph, which the first run did not have."""
        call = self.regions.find()
        if call is not None:
            self.expect(output, None, call)
        elif instead.watch is not None:
            message = (
                f"record() cannot keep the gradients of layer {self.capture.layer!r}: {AGAIN}."
            )
            raise CaptureError(message)

    def arrived(self, call: Call, index: int, grad: Tensor, view: View | None = None) -> None:
        """The gradient of tensor number ``index`` of a call is there, or that of the base of this ``view``."""
        backwards = self.backwards
        with self.lock, nullcontext() if backwards is None else backwards.lock:
            found = self._put(call, index, grad, view)
        if found is not None:
            self._warn(found)
        elif backwards is not None:
            backwards.arrive(call.number)

    def _put(self, call: Call, index: int, grad: Tensor, view: View | None) -> str | None:
        """Put a gradient where it belongs; return why it is left out, if that is to be said."""
        values, place = self._place(call)
        if place < 0:
            return _LATE if self.backwards is not None and not call.dropped else None
        try:
            known = grad if view is None else view.gradient(grad)
            if known is None:
                return _INSEPARABLE
            values[place] = self._merged(call, index, known, values[place])
        except CaptureError as error:
            message = (
                f"record() cannot keep {self.capture.what} {call.ticket} of layer "
                f"{self.capture.layer!r}: {error}."
            )
            raise CaptureError(message) from error
        self.came = True
        return None

    def _merged(self, call: Call, index: int, grad: Tensor, known: Value) -> Value:
        """What is recorded of the gradients of a call, ``known``, with another one added."""
        if self.capture.transform is not None:
            return self._transformed(call, index, grad, known)
        new = self.capture.keep(grad)
        if call.arrived is None:
            return new if known is None else known + new
        call.arrived[index] = new = call.arrived[index] + new if index in call.arrived else new
        return call.spec.fill([call.arrived.get(at) for at in range(call.spec.count)])

    def _transformed(self, call: Call, index: int, grad: Tensor, known: Value) -> Value:
        """A transform is applied to what arrived, with zeros for the rest of the output, and added up."""
        grads = [grad if at == index else zeros() for at, zeros in enumerate(call.zeros)]
        new = self.capture(call.spec.fill(grads), call.ticket)
        if new is SKIPPED:
            return known
        earlier = iter(tensors(known))
        return rebuild(new, lambda t: t + next(earlier, 0))

    def _warn(self, why: str) -> None:
        """Warn that a gradient is left out, once for the layer and reason."""
        if why not in self._warned:
            self._warned.add(why)
            message = (
                f"record(grads=True): a gradient of layer {self.capture.layer!r} is left out. {why}"
            )
            warnings.warn(message, MissingGradientWarning, stacklevel=2)


_INSEPARABLE = (
    "The layer returned a view of a tensor that the model may have used elsewhere too, and then one of them was written in "
    "place, so that their gradients cannot be separated. Let the operation that writes make a new tensor "
    "(y = y + x, ReLU(inplace=False)), or the layer return a clone()."
)
_LATE = (
    "It came after its pass was written to the path: that is, after the block, after the unit of the pass, or after the "
    "backward of a later pass. Call backward() in the order of the passes, inside the block or the unit; or record into memory, "
    "and write the recording with acts.save()."
)
