"""What the hooks of one ``with`` block share: whether they record, and where a pass begins and ends."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from dataclasses import dataclass, field

from torch import nn

from actrec._torch import compiles_itself, is_compiler_loaded, is_exporting, is_replica
from actrec._values.snapshot import explain

from .clean_room import depth, inside
from .compiled import Eager, Stance
from .own_calls import is_own_call
from .passes import Passes
from .stop_early import EarlyStop
from .transfer import Offload

_pausing = threading.Lock()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Session:
    """What the hooks of one ``with`` block share."""

    stop: EarlyStop | None = None
    offload: Offload | None = None  # moves values from a GPU into memory
    passes: Passes = field(default_factory=Passes)
    stance: Stance = field(default_factory=Eager)  # of the compiler while the block is open
    recording: bool = False  # active, and not paused
    active: bool = False
    interrupted: bool = False
    pauses: int = 0
    was_paused: bool = False
    #: Whether DataParallel has called replicas; only set where functions are recorded.
    has_replicas: bool = False
    depth: int = 0  # of the clean room (see depth()) in which the block was begun
    #: The layers, in the order in which their first calls ended.
    order: dict[str, None] = field(default_factory=dict)
    #: Modules (ids) that others have replaced in the model, and the pass in which that was found.
    replaced: dict[int, int] = field(default_factory=dict)
    error: Exception | None = None  # the first one that capturing a value raised
    surfaced: bool = False  # that error left the model (or else the model swallowed it)
    unseen: Exception | None = None  # what went wrong with the last values from a device

    # --- The block -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The block begins."""
        _begun.add(self)
        self.depth = depth()
        self.active = self.recording = True

    def end(self, *, interrupted: bool) -> None:
        """The block ends; hooks that are still on some module do nothing from now on."""
        self.active = self.recording = False
        self.interrupted = interrupted
        if interrupted or self.stance.in_graph:
            # Compiled code that raised has not reported the end of its pass.
            self.passes.abandon()

    def pause(self, by: int) -> None:
        """Pause once more (1) or once less (-1)."""
        with _pausing:
            self.pauses += by
            self.was_paused = True
            self.recording = self.active and not self.pauses

    def listens(self) -> bool:
        """Whether the calls of this thread are recorded now: those of a transform or a container's ``append()`` are not."""
        return self.recording and not (inside and depth() > self.depth)

    def met_by_compiler(self) -> bool:
        """The compiler reads a hook: forbid it to compile the recorded code, and return whether the hook has to run."""
        if is_exporting():  # which is no call of the model's own
            return False
        self.stance.hold()
        # An operator that compiles itself cannot contain a hook that is not compiled.
        return self.recording and not compiles_itself()

    # --- A pass ------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, *, is_root: bool) -> bool:
        """A call of the root, or of a module on the way to a chosen layer, begins. Return whether it is recorded."""
        if not self.recording or (inside and not self.listens()) or not is_own_call():
            self.passes.skip(module)
            return False
        if is_root:
            if is_compiler_loaded():
                self.stance.hold()
            if self.offload is not None and self.passes.running:
                self.offload.finish()  # a pass that was interrupted may be about to be closed
        self.passes.begin(module, is_root=is_root)
        return True

    def look_for_replicas(self, _: object, module: nn.Module, *__: object) -> None:
        """Note whether the module whose call begins is a replica that ``DataParallel`` has made."""
        self.has_replicas = self.has_replicas or is_replica(module)

    def leave(self, _: object, module: nn.Module, __: object, ___: object, output: object) -> None:
        """A call that :meth:`enter` got has ended, also by an exception."""
        error = sys.exception()
        try:
            if self.offload is not None and self.passes.opened_by(module):
                self.offload.finish()  # before the pass counts as complete
                if error is None:  # PyTorch would drop a second one
                    self.offload.deliver()
        except Exception as failure:
            error = failure
            raise
        finally:
            self.passes.end(module, output, error)
        if error is not None:
            explain(error)
            if error is self.error:
                self.surfaced = not self.passes.running

    def may_stop(self, *_: object) -> None:
        """All other hooks of a layer's call have run: end the forward if no chosen layer is missing."""
        assert self.stop is not None  # noqa: S101  # or there would be no such hook
        self.stop.when_done()

    # --- What goes wrong -----------------------------------------------------------------------------------------

    def failed(self, error: Exception) -> None:
        """Remember the first error, in case the model swallows it."""
        if self.error is None:
            self.error = error
            self.surfaced = not self.passes.running

    def deliver(self) -> None:
        """Wait for the values that are being moved from a device, and raise an error of theirs."""
        if self.offload is not None:
            self.offload.deliver()

    def close(self) -> None:
        """Wait for the last of them. The end of the block raises an error of theirs."""
        try:
            self.deliver()
        except Exception as error:  # noqa: BLE001  # kept until all hooks are off
            self.unseen = error


# --- Forked processes --------------------------------------------------------------------------------

_begun: weakref.WeakSet[Session] = weakref.WeakSet()


def _end_all() -> None:
    """Disable recording in a forked process: nobody could read the results."""
    for session in _begun:
        session.end(interrupted=True)


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows
    os.register_at_fork(after_in_child=_end_all)
