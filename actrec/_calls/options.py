"""The options of ``record()``, checked before any side effect.

Adding one takes three places: the arguments of ``record()``, a field with its check here, and where it is used.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from actrec._recordings.reduced import why_not_stored
from actrec._selection.selection import Selection
from actrec._selection.treatment import Make, Reducer, is_reduction, maker
from actrec._torch import compiles_tensor_hooks
from actrec.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of :func:`actrec.record`, besides those that say which layers: see there.

    Raises:
        OptionError: an option is invalid, or not supported with another one.
    """

    grads: bool = False  #: whether gradients are recorded
    detach: bool = True
    device: torch.device | None
    dtype: torch.dtype | None = None
    stop_early: bool = False
    compiled: bool = False
    into: Callable[[], Any] | Reducer | os.PathLike[str] = list
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("detach", "stop_early", "compiled", "resume"):
            if not isinstance(flag := getattr(self, name), bool):
                message = f"record({name}={flag!r}): expected True or False."
                raise OptionError(message)
        self._check_into()
        self._check_gradients()
        self._check_compiled()
        _check_dtype(self.dtype)

    @property
    def path(self) -> os.PathLike[str] | None:
        """Where the recording is written to; ``None`` if it stays in memory."""
        return self.into if isinstance(self.into, os.PathLike) else None

    @property
    def make(self) -> Make | None:
        """Makes the reduction of each layer, if ``into`` is one."""
        return None if self.path is not None else maker(self.into)

    def container(self, name: str) -> Any:
        """Return a new container, or a new reduction, for the calls of the layer ``name``, as ``into`` makes it."""
        make = self.make or self.into
        assert callable(make)  # noqa: S101  # a path has none
        container = make()
        if is_reduction(container):
            if self.grads:
                raise OptionError(_late(name))
            return container
        if not hasattr(container, "append"):
            raise OptionError(_bad_container(self.into))
        held = len(container) if hasattr(container, "__len__") else 0
        if held:
            message = (
                f"record(into={self.into!r}): the {type(container).__name__} that it made holds {held} items already. "
                "Make a new, empty one for each layer."
            )
            raise OptionError(message)
        if self.grads and type(container).append not in {list.append, deque.append}:
            message = (
                f"record(grads=True, into={self.into!r}): a gradient comes after its call, and its place is counted from the "
                f"latest one, so the container must keep each call at its end. {type(container).__name__} has an append() of "
                "its own. Use list or functools.partial(collections.deque, maxlen=10)."
            )
            raise OptionError(message)
        return container

    def check(self, selection: Selection) -> None:
        """Check the options against what was selected, before any side effect."""
        if self.compiled and selection.functions:
            message = (
                f"record({selection.functions[0].query!r}, compiled=True): compiled code fuses the functions that the model calls, and does not call them. "
                "Record the modules around them, or without compiled=True."
            )
            raise OptionError(message)
        path = None if self.path is None else os.fspath(self.path)
        everywhere = self.make
        chosen = [(one.key, *pair) for one in selection.choices for pair in one.treatments.items()]
        chosen += [(one.query, one.what, one.treatment) for one in selection.functions]
        reduced: dict[Make, str] = {}  # with the first layer of each
        for name, what, treatment in chosen:
            make = treatment.make or everywhere
            if make is not None:
                if what == "gradient":
                    raise OptionError(_late(name))
                reduced.setdefault(make, name)
        for make, name in reduced.items():
            why = None if path is None else why_not_stored(make)
            if why is not None:
                message = (
                    f"record(into={path!r}): {name!r} is reduced by {make!r}, whose state cannot be stored: "
                    f"{why}. Record into memory."
                )
                raise OptionError(message)

    def _check_into(self) -> None:
        if not (callable(self.into) or self.path is not None or self.make is not None):
            raise OptionError(_bad_container(self.into))
        if self.path is None:
            if self.resume:
                message = f"record(into={self.into!r}, resume=True): only a recording into a path can be resumed."
                raise OptionError(message)
            return
        call = f"record(into={os.fspath(self.path)!r}"
        if not self.detach:
            message = f"{call}, detach=False): a graph cannot be stored. Record into memory."
            raise OptionError(message)

    def _check_gradients(self) -> None:
        if self.grads and self.stop_early and self.detach:
            message = (
                "record(grads=True, stop_early=True): the model returns None, so there is no loss that could send a gradient "
                "back. Record without stop_early, or pass detach=False and take the loss of what was recorded."
            )
            raise OptionError(message)

    def _check_compiled(self) -> None:
        if not self.compiled:
            return
        if self.stop_early:
            message = (
                "record(compiled=True, stop_early=True): compiled code cannot be left in the middle. Without compiled=True the "
                "model runs eagerly in the block, and stops early."
            )
            raise OptionError(message)
        if self.grads and not compiles_tensor_hooks():
            message = (
                f"record(compiled=True, grads=...): torch {torch.__version__} cannot compile hooks on tensors; torch 2.13 can. "
                "Record gradients without compiled=True."
            )
            raise OptionError(message)
        if not self.detach:
            message = (
                "record(compiled=True, detach=False): the graph of compiled code has no nodes for single layers. Record with "
                "grads=True, or let the model return what the loss needs; or record without compiled=True."
            )
            raise OptionError(message)


def _late(name: str) -> str:
    return (
        f"record(grads=...): the gradient of {name!r} comes after its call, perhaps in several parts, so it cannot be reduced as it "
        "comes. Record gradients without a reduction, and pass them to its update()."
    )


def _bad_container(into: object) -> str:
    return (
        f"record(into={into!r}): expected a function that makes a container with append(), such as list or "
        "functools.partial(collections.deque, maxlen=10), or a metric with update() and compute(), such as "
        "actrec.reduce.Moments, or a path to record into. For a reduction that goes to a path, pass it with its query: "
        "record(model, {layers: actrec.reduce.Moments()}, into=path)."
    )


def checked_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return the device as tensors have it: "cuda:0" for "cuda".

    Raises:
        OptionError: PyTorch has no such device here.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        if isinstance(device, str) and device.partition(":")[0].lower() in {"gpu", "nvidia"}:
            reason = "PyTorch calls the first GPU 'cuda'"
        message = f"record(device={device!r}): {reason}. None keeps values where they are."
        raise OptionError(message) from error


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        message = f"record(dtype={dtype!r}): expected a floating-point dtype such as torch.float16, or None."
        raise OptionError(message)
