"""A chosen layer while the block runs: whether a call is recorded, and how its values are kept."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from actrec._recordings.layer import Layer
from actrec._selection.treatment import What
from actrec._torch import (
    backward_number,
    compiles_itself,
    count_function_modes,
    is_jit_tracing,
    is_recomputing,
    is_recomputing_in_graph,
)
from actrec._values.constants import Constant
from actrec._values.containers import Value
from actrec._values.snapshot import twin
from actrec._values.spec import flatten
from actrec._values.stand_ins import Opaque
from actrec.errors import CaptureError, TransformError, WriteError

from .capture import SKIPPED, Capture
from .clean_room import inside
from .foreign_hooks import put_after_others
from .gradients import Gradients
from .hooks import Hook
from .inputs import Arrival, Inputs, versions
from .own_calls import Unrecorded, comparing, is_own_call, is_symbolic, is_written_down
from .parameters import named
from .session import Session


@dataclass(eq=False, slots=True, weakref_slot=True)
class Track:
    """One chosen layer while the block runs."""

    session: Session
    capture: Capture
    layers: Mapping[What, Layer[Any]]  # of the recording, that its values go to
    outputs: Layer[Any] | None = field(init=False)
    inputs: Inputs | None = None
    grads: Gradients | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while a call is kept
    called: int = 0
    earlier: int = 0  # calls that were kept in the runs that this one resumes
    lost: int = 0  # calls that were skipped, or could not be kept
    unrecorded: dict[Unrecorded, int] = field(default_factory=partial(defaultdict, int))
    overtaken: int = 0  # calls that hooks of others may have changed after ours
    compiled: int = 0  # calls that were compiled in a way in which hooks do not run
    has_tensors: bool = False  # whether any kept value had a tensor
    placeholder: Opaque | None = None  # the first Opaque, in values without tensors
    error: str | None = None  # the first one that recording a call raised
    #: Whether keeping a call is no more than appending: there are tensors, and neither gradients, transfers nor an early stop.
    #: Set by the first call.
    _is_plain: bool = False
    #: ``outputs._keep``, if outputs are kept: looked up once, because attribute access on layers is slow.
    _keep_output: Callable[[Value, int], None] = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = self.layers.get("output")
        if self.outputs is not None:
            self._keep_output = self.outputs._keep

    @property
    def kept(self) -> int:
        """How many calls are in the recording."""
        return self.earlier + self.called - self.lost

    def met_by_compiler(self) -> bool:
        """As :meth:`Session.met_by_compiler`; calls that the hook misses are counted."""
        runs = self.session.met_by_compiler()
        if compiles_itself() and not runs:
            self.compiled += 1
        return runs

    # --- All calls ---------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all calls."""
        with self.lock:
            for layer in self.layers.values():
                layer.clear()
                if layer._overflows is not None:
                    layer._overflows.clear()

    def drop(self, number: int) -> None:
        """Forget the calls of pass ``number``, a unit that has failed."""
        with self.lock:
            for layer in self.layers.values():
                layer._drop(number)
                if layer._overflows is not None:
                    layer._overflows.drop(number)
            if self.grads is not None:
                self.grads.drop(number)

    def settle(self, number: int) -> None:
        """Keep the calls of pass ``number``, a unit that has ended."""
        with self.lock:
            for layer in self.layers.values():
                layer._settle(number)
            if self.grads is not None:
                self.grads.settle(number)

    # --- A call ------------------------------------------------------------------------------------------------

    def receives(
        self,
        hook: Hook[Track],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        _: object,
    ) -> None:
        """A call begins: capture its arguments, before the call can change them."""
        session = self.session
        if not session.recording or (inside and not session.listens()) or not is_own_call():
            return
        is_tensor = len(args) == 1 and not kwargs and type(args[0]) is Tensor
        if not is_tensor and is_symbolic((*args, *kwargs.values())):
            return
        inputs = self.inputs
        assert inputs is not None  # noqa: S101  # or this hook would not be there
        late = None
        if RemovableHandle.next_id != hook.checked_at and put_after_others(hook, module):
            late = args, versions((args, kwargs))
        copy = twin(args[0]) if is_tensor and inputs.alone is not None else None
        received: Value = {inputs.alone: copy}  # the shortest way
        if copy is None:
            received = self._received(inputs.parameters.named(args, kwargs))
        inputs.begin(Arrival(session.passes.number_of(module), kwargs, received, late))

    def returns(
        self,
        hook: Hook[Track],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Any,
        output: Value,
    ) -> None:
        """A call has returned ``output``: keep it, and the arguments of the call."""
        session = self.session
        if not session.recording or (inside and not session.listens()):
            self.unrecorded[Unrecorded.PAUSED] += session.pauses > 0
            return
        arrival = None if self.inputs is None else self.inputs.pop(kwargs)
        if arrival is None or type(output) is not Tensor:  # or it is known to be an own call
            if backward_number() != -1:
                self._returns_in_backward(output)
                return
            # Cheap signs first, in this frame: a dispatch mode that traces uses a subclass of Tensor.
            signs = type(output) is not Tensor or is_jit_tracing() or count_function_modes()
            if (signs or comparing) and is_written_down(args, output):
                self.unrecorded[Unrecorded.TRACED] += 1
                return
        if RemovableHandle.next_id != hook.checked_at and put_after_others(hook, module):
            self.overtaken += 1
        if arrival is None and self.inputs is not None:
            arrival = self.inputs.pop_latest()
        if arrival is None:  # no inputs are recorded, or the call began before it was hooked
            self.keep(output, session.passes.number_of(module))
        elif arrival.late is None:
            self.keep(output, arrival.number, arrival.received)
        else:
            self.keep(output, arrival.number, self._received_late(arrival, args, kwargs))

    def _received_late(self, arrival: Arrival, args: tuple[Any, ...], kwargs: Any) -> Value:
        """Return the arguments of a call after the hooks that ran after ours."""
        assert self.inputs is not None  # noqa: S101  # the arrival comes from there
        are_others, are_written = arrival.is_late(args, kwargs)
        if are_written:
            self.overtaken += 1
        if are_others or are_written:
            return self._received(self.inputs.parameters.named(args, kwargs))
        return arrival.received

    def _received(self, given: dict[str, Any]) -> Value:
        """Return what is kept of the arguments of the next call."""
        assert self.inputs is not None  # noqa: S101  # the caller has checked it
        try:
            return self.inputs.capture.received(given, self.called)
        except Exception as error:
            self._failed(error, self.called)
            raise

    def _returns_in_backward(self, output: Value) -> None:
        """A call ran inside ``backward()``: a recorded one, recomputed by checkpointing, or another one."""
        again = is_recomputing() or is_recomputing_in_graph()
        self.unrecorded[Unrecorded.RECOMPUTED if again else Unrecorded.BACKWARD] += 1
        if again and self.grads is not None:
            self.grads.expect_again(output)

    # --- A call of a function ---------------------------------------------------------------------------------

    def takes(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Value:
        """A function is about to be called: return the arguments to keep."""
        if not self.session.listens() or backward_number() != -1:
            return None
        return self._received(named(function, args, kwargs))

    def gives(self, module: nn.Module, output: Value, received: Value) -> None:
        """A function that ``module`` has called returned ``output``: keep it, and the arguments."""
        session = self.session
        if not session.listens():
            self.unrecorded[Unrecorded.PAUSED] += session.pauses > 0
        elif backward_number() != -1:
            self._returns_in_backward(output)
        else:
            self.keep(output, session.passes.number_of(module), received)

    # --- A value -------------------------------------------------------------------------------------------------

    def keep(self, output: Value, number: int, received: Value = None) -> None:
        """Keep the output of a call of pass ``number``, and its arguments. All recorded values go through here."""
        call = self.called
        self.called = call + 1
        try:
            value = twin(output) if self.capture.is_twin else None
            if value is None and self.outputs is not None:
                value = self.capture(output, call)
            # The shortest way:
            if self._is_plain and value is not SKIPPED and received is not SKIPPED:
                self.lock.acquire()  # "with" takes twice the time
                try:
                    self._keep_output(value, number)
                    if self.inputs is not None:
                        self.inputs.calls._keep(received, number)
                finally:
                    self.lock.release()
            else:
                self._keep(output, value, received, number, call)
        except Exception as error:  # from the transform, the disk, or the user's container
            self.lost += 1
            self._failed(error, call)
            raise

    def _keep(self, output: Value, value: Value, received: Value, number: int, call: int) -> None:
        """Keep ``value``, made of the output of a call, and all else that is recorded of the call."""
        session, grads = self.session, self.grads
        if value is SKIPPED or received is SKIPPED:
            self.lost += 1
            if grads is not None:
                grads.expect(output, value, None)
        else:
            if not self.has_tensors:
                recorded = output if self.inputs is None else received
                self._look_at_first(recorded if self.outputs is None else value)
            with self.lock:
                if session.offload is None:
                    self._put(value, received, number)
                else:
                    put = partial(self._put, value, received, number)
                    session.offload.keep(put, f"call {call} of layer {self.capture.layer!r}")
                place = None if grads is None else grads.reserve(output, value, number)
            if grads is not None:
                grads.expect(output, value, place)
        if session.stop is not None:
            session.stop.ran(self.capture.layer)

    def _put(self, value: Value, received: Value, number: int) -> None:
        """Append a call to its layers."""
        if self.outputs is not None:
            self._keep_output(value, number)
        if self.inputs is not None:
            self.inputs.calls._keep(received, number)

    def _look_at_first(self, value: Value) -> None:
        """Look at the first call that is kept, or at a later one if those before had no tensors."""
        self.session.order.setdefault(self.capture.layer)
        tensors, spec = flatten(value)
        self.has_tensors = bool(tensors)
        if not tensors and self.placeholder is None:
            constants = (step.value for step in spec.steps if isinstance(step, Constant))
            self.placeholder = next((one for one in constants if isinstance(one, Opaque)), None)
        beside = (self.grads, self.session.offload, self.session.stop)
        self._is_plain = self.has_tensors and self.outputs is not None and not any(beside)

    def _failed(self, error: Exception, call: int) -> None:
        """Add the call and the layer to the error, as a note or in a new error, and remember it."""
        layer = self.capture.layer
        self.error = self.error or f"{type(error).__name__}: {error}"
        if isinstance(error, CaptureError):
            located = CaptureError(f"record() cannot keep call {call} of layer {layer!r}: {error}.")
            self.session.failed(located)
            raise located from error
        if not isinstance(error, (TransformError, WriteError)):
            error.add_note(f"raised while actrec recorded call {call} of layer {layer!r}")
        self.session.failed(error)
