"""What happens when a chosen layer is called: find the call's pass, capture its value, keep it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from actrec._calls.capture import SKIPPED
from actrec._calls.clean_room import depth, inside
from actrec._calls.compiled import Eager
from actrec._calls.inputs import Arrival, Arrivals, Parameters, versions
from actrec._calls.passes import Passes, checking, is_own_call, is_tracing
from actrec._torch import backward_number, count_function_modes, is_jit_tracing, is_recomputing
from actrec._values.constants import Constant
from actrec._values.snapshot import snapshot
from actrec._values.spec import flatten
from actrec._values.stand_ins import Opaque
from actrec.errors import CaptureError, TransformError, WriteError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actrec._values.containers import Value

    from .capture import Capture
    from .gradients import Gradients
    from .stop_early import EarlyStop
    from .transfer import Offload

__all__ = ["Session", "Track"]


_pausing = threading.Lock()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Session:
    """What the hooks of one ``with`` block share."""

    recording: bool = False  # what a hook asks: active, and not paused
    active: bool = False
    interrupted: bool = False
    pauses: int = 0
    was_paused: bool = False
    passes: Passes = field(default_factory=Passes)
    eager: Eager = field(default_factory=Eager)  # what keeps compiled code from running
    order: dict[str, None] = field(
        default_factory=dict
    )  # the layers, by the end of their first call
    error: Exception | None = None  # the first one that capturing a value raised
    replaced: dict[int, int] = field(
        default_factory=dict
    )  # modules (ids) that others have replaced in the model, and the pass that found out
    surfaced: bool = False  # that error left the model (or else the model swallowed it)
    stop: EarlyStop | None = None
    offload: Offload | None = None  # what moves values from a GPU into memory
    unseen: Exception | None = None  # what went wrong with the last of them
    depth: int = 0  # how deep in code of the user's, which the recorder runs, the block was begun

    def begin(self) -> None:
        """The block begins."""
        self.depth = depth()
        self.active = self.recording = True

    def is_aside(self) -> bool:
        """Whether this thread runs a transform or a container's ``append()``: what it calls is no call of the model's."""
        return depth() > self.depth

    def end(self, *, interrupted: bool) -> None:
        """The block ends; hooks that are still somewhere do nothing from now on."""
        self.active = self.recording = False
        self.interrupted = interrupted
        if interrupted:
            self.passes.abandon()

    def pause(self, by: int) -> None:
        """Pause once more (1) or once less (-1)."""
        with _pausing:
            self.pauses += by
            self.was_paused = True
            self.recording = self.active and not self.pauses

    def deliver(self) -> None:
        """Wait for the values that are on their way from a device, and raise what went wrong."""
        if self.offload is not None:
            self.offload.deliver()

    def close(self) -> None:
        """Wait for the last of them. What goes wrong now, the block raises."""
        try:
            self.deliver()
        except Exception as error:  # noqa: BLE001  # kept until all hooks are off
            self.unseen = error

    def replace(self, module: nn.Module) -> None:
        """Another module stands in the place of this one, and of those in it."""
        for gone in module.modules():
            self.replaced.setdefault(id(gone), max(0, self.passes.count - 1))

    def failed(self, error: Exception) -> None:
        """Remember the first error, in case the model swallows it."""
        if self.error is None:
            self.error = error
            self.surfaced = not self.passes.running


class Calls(Protocol):
    """Where the values of a layer go."""

    def keep(self, value: Value, number: int) -> None:
        """Append a value of pass ``number``."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Track:
    """One chosen layer while the block runs."""

    session: Session
    capture: Capture
    outputs: Calls
    inputs: Calls | None = None
    parameters: Parameters = field(default_factory=Parameters)
    grads: Gradients | None = None
    receives: Capture = field(init=False)  # of inputs
    called: int = 0
    kept: int = 0
    recomputed: int = 0
    backward: int = 0  # calls inside backward() that are no such repetitions
    paused: int = 0
    has_tensors: bool = False  # whether one was in anything that was kept
    placeholder: Opaque | None = None  # the first one, in what was kept before
    overtaken: int = 0  # calls that hooks of others may have changed behind ours
    error: str | None = None  # the first one that recording a call raised
    compiled: int = 0  # how many calls the compiler has read and hooks do not run in
    traced: int = 0  # how many calls were made to write down what the model does
    _is_direct: bool = field(init=False)  # whether a tensor is kept just as it is
    _arrivals: Arrivals = field(default_factory=Arrivals)
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while a call is kept

    def __post_init__(self) -> None:
        self._is_direct = self.capture.is_direct()
        self.receives = self.capture

    def elsewhere(self) -> int:
        """How many calls there were that are not recorded."""
        return self.paused + self.backward + self.recomputed + self.traced

    def overtake(self) -> None:
        """Hooks that were registered while a forward ran come behind ours this time."""
        if self.session.recording:
            self.overtaken += 1

    def begin(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        is_late: bool = False,
    ) -> None:
        """Take what a call receives, before the call can change it.

        Where hooks that come behind ours may still replace it (``is_late``), the call's end looks again.
        """
        session = self.session
        if not session.recording or not is_own_call():
            return
        if inside and session.is_aside():
            return
        is_tensor = len(args) == 1 and type(args[0]) is Tensor
        if not is_tensor and _is_symbolic((*args, *kwargs.values())):
            return
        try:
            names = self.parameters.positional
            if is_tensor and names and not kwargs and self._is_direct and args[0].is_cpu:
                inputs = {names[0]: snapshot(args[0])}
            else:
                inputs = self.receives.received(self.parameters.named(args, kwargs))
        except Exception as error:
            self._failed(error, self.called)
            raise
        number = session.passes.thread.current
        if number is None:
            number = session.passes.number(module)
        late = (args, versions((args, kwargs))) if is_late else None
        self._arrivals.push((number, kwargs, inputs, late))

    def end(  # noqa: C901, PLR0912  # one function, see below
        self, module: nn.Module, args: tuple[Any, ...], kwargs: object, output: Value
    ) -> None:
        """Keep what a call returned, and what it had received.

        This runs for every call. So a tensor that is kept just as it is takes the shortest way, and two small
        functions are written out.
        """
        session = self.session
        if not session.recording or (inside and session.is_aside()):
            self.paused += session.pauses > 0
            return
        if backward_number() != -1:
            self._end_again(output)
            return
        is_tensor = type(output) is Tensor
        # Whatever reads the model is_tracing(): of a plain tensor, in one of these ways.
        if (not is_tensor or is_jit_tracing() or count_function_modes() or checking) and (
            is_tracing() or (not is_tensor and _is_symbolic((*args, output)))
        ):
            self.traced += 1
            return
        arrival = None if self.inputs is None else self._arrivals.pop(kwargs)
        number = session.passes.thread.current if arrival is None else arrival[0]
        if number is None:
            number = session.passes.number(module)
        call = self.called
        self.called = call + 1
        try:
            received = arrival and self._received(arrival, args, kwargs)
            if is_tensor and self._is_direct and output.is_cpu:
                value = snapshot(output)
                self.has_tensors = True
            else:
                value = self.capture(output, call)
                if not self.has_tensors:
                    self._look_for_tensors(value)
        except Exception as error:
            self._failed(error, call)
            raise
        ticket = None
        try:
            if value is not SKIPPED:
                if not self.kept:
                    session.order.setdefault(self.capture.layer)
                self.kept += 1
                with self.lock:
                    if session.offload is None:
                        self._keep(value, received, number)
                    else:
                        session.offload.keep(partial(self._arrived, call, value, received, number))
                    if self.grads is not None:
                        ticket = self.grads.reserve(output, value, number)
            if self.grads is not None:
                self.grads.expect(output, value, ticket)
        except Exception as error:  # from the disk, or the user's container
            self._failed(error, call)
            raise
        if session.stop is not None:
            session.stop.ran(self.capture.layer)

    def _keep(self, value: Value, received: Value, number: int) -> None:
        """Put a call of pass ``number`` into its layer, and what it had received."""
        self.outputs.keep(value, number)
        if self.inputs is not None:
            self.inputs.keep(received, number)

    def _arrived(self, call: int, value: Value, received: Value, number: int) -> None:
        """The same, when its values have come from a device; nobody knows by then which call it was."""
        try:
            self._keep(value, received, number)
        except Exception as error:
            error.add_note(f"raised while actrec kept call {call} of layer {self.capture.layer!r}")
            raise

    def _received(self, arrival: Arrival, args: tuple[Any, ...], kwargs: Any) -> Value:
        """What a call received of hooks that may have replaced what ours was told."""
        _, kwargs_before, inputs, late = arrival
        if late is None:
            return inputs
        args_before, before = late
        now = versions((args, kwargs))
        if any(version is None or version != before.get(t, 0) for t, version in now.items()):
            self.overtake()  # written to: by such a hook, or later, by forward
        elif args is args_before and kwargs is kwargs_before:
            return inputs
        return self.receives.received(self.parameters.named(args, kwargs))

    def _look_for_tensors(self, value: Value) -> None:
        tensors, spec = flatten(value)
        self.has_tensors = bool(tensors)
        constants = (step.value for step in spec.steps if isinstance(step, Constant))
        placeholders = (one for one in constants if isinstance(one, Opaque))
        self.placeholder = self.placeholder or next(placeholders, None)

    def _end_again(self, output: Value) -> None:
        """A call ran inside ``backward()``: one that was recorded before, run again, or another one."""
        if not is_recomputing():
            self.backward += 1
            return
        self.recomputed += 1
        if self.grads is not None:
            self.grads.expect_again(output)

    def _failed(self, error: Exception, call: int) -> None:
        """Say where it happened: on the error, or in one that says more."""
        layer = self.capture.layer
        self.error = self.error or f"{type(error).__name__}: {error}"
        if isinstance(error, CaptureError):
            located = CaptureError(f"record() cannot keep call {call} of layer {layer!r}: {error}.")
            self.session.failed(located)
            raise located from error
        if not isinstance(error, (TransformError, WriteError)):
            error.add_note(f"raised while actrec recorded call {call} of layer {layer!r}")
        self.session.failed(error)


def _is_symbolic(values: tuple[Value, ...]) -> bool:
    """Whether ``torch.fx`` is reading the model: no tensor has a value then."""
    return any(isinstance(value, torch.fx.Proxy) for value in values)
