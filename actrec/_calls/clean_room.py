"""Runs the user's code inside the recorder: a transform, or the ``append()`` of a container.

The code and the model must not influence each other: the code runs without the autocast and inference mode of the
model, draws random numbers of its own, and its calls of layers are not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from threading import get_ident
from typing import Any

import torch
from torch import is_autocast_enabled
from torch.autograd.graph import saved_tensors_hooks

from actrec._calls.draws import OwnDraws
from actrec._torch import pop_function_mode, push_function_mode
from actrec._values.modes import normal_mode_unseen
from actrec._values.spec import itself, tensors

#: How many pieces of such code each thread is running, one inside the other.
inside: dict[int, int] = {}


def depth() -> int:
    """How many pieces of such code this thread is running, one inside the other."""
    return inside.get(get_ident(), 0)


def devices_of(value: Any) -> set[torch.device]:
    """Return the devices of the value's tensors, besides the CPU."""
    return {tensor.device for tensor in tensors(value) if not tensor.is_cpu}


def in_a_clean_room(
    function: Callable[[Any], Any], value: Any, devices: Collection[torch.device], *, grad: bool
) -> Any:
    """Return ``function(value)``. ``devices`` are those of the value's tensors, besides the CPU."""
    thread = get_ident()
    outside = inside.get(thread, 0)
    inside[thread] = outside + 1
    try:
        draws = OwnDraws()
        with normal_mode_unseen():  # which does not turn gradients off
            push_function_mode(draws)  # "with" would take as long as four function calls
            try:
                result = _called(function, value, devices, grad=grad)
            finally:
                pop_function_mode()
        draws.check_unseeded()
    finally:
        if outside:
            inside[thread] = outside
        else:
            del inside[thread]
    return result


def _called(
    function: Callable[[Any], Any], value: Any, devices: Collection[torch.device], *, grad: bool
) -> Any:
    if not (devices or grad or is_autocast_enabled("cpu")):  # the shortest way
        return _without_graph(function, value)
    autocasting = [t for t in {"cpu", *(device.type for device in devices)} if _autocasts(t)]
    with ExitStack() as clean_room:
        for device_type in autocasting:
            clean_room.enter_context(torch.autocast(device_type, enabled=False))
        if not grad:
            return _without_graph(function, value)
        # What it saves for its backward is none of the checkpoint's that the layer may run in.
        clean_room.enter_context(saved_tensors_hooks(itself, itself))
        return function(value)


def _without_graph(function: Callable[[Any], Any], value: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(value)
    torch.set_grad_enabled(False)  # called, not entered, which is quicker
    try:
        return function(value)
    finally:
        torch.set_grad_enabled(True)


def _autocasts(device_type: str) -> bool:
    # Every PyTorch has it for the CPU; for a device without it, is_autocast_enabled() raises.
    available = device_type == "cpu" or torch.amp.is_autocast_available(device_type)
    return available and is_autocast_enabled(device_type)
