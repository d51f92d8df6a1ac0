"""From the value a layer returned to the value that is kept: transform, snapshot, move, cast.

Nothing that runs here may change what the model computes. Tensors are snapshotted, containers rebuilt, and the
user's transform runs in a clean room (``clean_room.py``): without gradients, autocast and inference mode, on tensors
and with random numbers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from actrec._recordings.overflow import Overflows
from actrec._selection.queries import Transform
from actrec._text import listed
from actrec._torch import version
from actrec._values.constants import CONSTANTS
from actrec._values.containers import Value
from actrec._values.dtensor import cloned, detached, is_distributed, on_part
from actrec._values.modes import normal_mode_unseen, unseen
from actrec._values.snapshot import check, snapshot, twin
from actrec._values.spec import itself, rebuild
from actrec.errors import CaptureError, TransformError

from .clean_room import in_a_clean_room
from .device import refuse_graph_capture
from .options import Options
from .transfer import Offload

#: What :class:`Capture` returns for a call that its transform skips.
SKIPPED: Final = object()


@dataclass(eq=False, slots=True)
class Capture:
    """How the values of one layer are kept."""

    layer: str = ""
    transform: Transform | None = None
    detach: bool = True
    share: bool = True  # memory with the model, copy-on-write
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    what: str = "call"  # in messages, before the number of the call
    offload: Offload | None = None  # moves values while the model continues
    overflows: Overflows | None = None  # counts values that do not fit into the dtype
    direct: bool = False  # whether a tensor on the CPU is kept just as it is
    is_twin: bool = False  # whether that is so of what a layer returns

    @classmethod
    def asked_for(cls, options: Options, *, share: bool) -> Capture:
        """Return what the options ask for, of any layer; ``share`` says whether memory may be shared with the model."""
        detach, device, dtype = options.detach, options.device, options.dtype
        moved = device is not None and device.type != "cpu"
        direct = dtype is None and detach and share and not moved
        return cls(detach=detach, share=share, device=device, dtype=dtype, direct=direct)

    def of(
        self, layer: str, transform: Transform | None, what: str, offload: Offload | None
    ) -> Capture:
        """Return the same for the values of one layer."""
        asked = (self.detach, self.share, self.device, self.dtype)
        return Capture(layer, transform, *asked, what, offload, direct=self.direct)

    def __call__(self, value: Value, call: int) -> Value:
        """Return the value to keep for ``value``, which call number ``call`` returned, or ``SKIPPED``."""
        if self.transform is None:
            return rebuild(value, self.keep)
        value = self._transformed(self.transform, value, call)
        # What the user's own function made is kept, also where it is no tensor.
        return SKIPPED if value is None else rebuild(value, self.keep, unknown=itself)

    def received(self, given: dict[str, Value], call: int) -> Value:
        """Return the dict to keep for the arguments of call number ``call``, or ``SKIPPED``."""
        if self.transform is not None:
            try:
                return self(given, call)
            except TransformError as error:
                message = (
                    f"{error}. It gets a dict from parameter name to value, here of {listed(given)}"
                )
                raise TransformError(message) from error.__cause__
        values = given.values()
        found = [id(value) for value in values if type(value) is Tensor]
        # No object can occur twice: each value may be rebuilt by itself.
        if len(given) == 1 or (
            len({*found}) == len(found)
            and all(type(value) is Tensor or isinstance(value, CONSTANTS) for value in values)
        ):
            return {name: rebuild(value, self.keep) for name, value in given.items()}
        return rebuild(given, self.keep)

    def added(self, value: Value) -> Value:
        """Return what is kept of a value that the user adds: not cast, and never part of the graph."""
        return rebuild(value, replace(self, detach=True, dtype=None).keep, unknown=itself)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return one tensor snapshotted, moved and cast as the options say."""
        if self.direct and tensor.is_cpu:  # the shortest way
            return snapshot(tensor)
        if tensor.is_cuda:
            refuse_graph_capture()
        move = self.device is not None and tensor.device != self.device and not tensor.is_meta
        cast = self.dtype is not None and tensor.dtype != self.dtype and tensor.is_floating_point()
        if self.offload is not None and self.offload.takes(tensor):
            check(tensor)
            with unseen():
                if cast and self.overflows is not None:
                    self.overflows.look(tensor)
                return self.offload.start(tensor, self.dtype if cast else None)
        if not (move or cast):
            return snapshot(tensor, detach=self.detach, share=self.share)
        check(tensor)
        with normal_mode_unseen():
            if cast and self.overflows is not None:
                self.overflows.look(tensor)
            if self.detach and not move and is_distributed(tensor):
                return on_part(tensor, lambda part: part.to(self.dtype, copy=True))
            return (detached(tensor) if self.detach else tensor).to(
                device=self.device if move else tensor.device,
                dtype=self.dtype if cast else tensor.dtype,
                copy=True,
            )

    def _transformed(self, transform: Transform, value: Value, call: int) -> Value:
        loan = _Loan(detach=self.detach, share=self.share)
        try:
            lent = rebuild(value, loan, unknown=itself, stand_ins=False)
            result = in_a_clean_room(transform, lent, loan.devices, grad=not self.detach)
            if loan.aliases:
                loan.check_untouched()
        except CaptureError:
            raise
        except Exception as error:
            kind = type(error).__name__
            message = f"the transform of layer {self.layer!r} raised {kind} on {self.what} {call}: {error}"
            raise TransformError(message) from error
        return result


#: So few elements are cloned for a transform on any device; on the CPU, all that cannot be shared.
SMALL = 4096


class _Loan:
    """Gives tensors to a transform: copies, or aliases of large tensors on another device."""

    __slots__ = ("aliases", "detach", "devices", "share")

    def __init__(self, *, detach: bool, share: bool) -> None:
        self.detach = detach
        self.share = share
        self.devices: set[torch.device] = set()  # besides the CPU
        self.aliases: list[tuple[Tensor, int]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        is_free = self.detach and self.share
        copy = twin(tensor) if is_free else None
        if copy is not None:  # the shortest way
            return copy
        if not tensor.is_cpu:
            self.devices.add(tensor.device)
            if tensor.is_cuda:
                refuse_graph_capture()
        if not is_free:
            return snapshot(tensor, detach=self.detach, share=self.share)
        check(tensor)
        with unseen():
            alias = detached(tensor)
        if alias.numel() <= SMALL:
            with normal_mode_unseen():
                return cloned(alias)
        if alias.is_cpu:  # NumPy could write to an alias, and nobody would notice
            return snapshot(alias)
        if not alias.is_inference():  # torch itself refuses to write to those in place
            self.aliases.append((alias, version(alias)))
        return alias

    def check_untouched(self) -> None:
        if any(version(alias) != before for alias, before in self.aliases):
            message = (
                "it wrote in place to a tensor that the model still uses; let it write to a clone()"
            )
            raise ValueError(message)
