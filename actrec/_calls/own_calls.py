"""Whether a call is one of the model's own: neither repeated by checkpointing nor made by something that traces the model."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from enum import Enum

from torch import fx

from actrec._torch import (
    backward_number,
    count_dispatch_modes,
    count_function_modes,
    function_mode_at,
    is_jit_comparing,
    is_jit_tracing,
    is_read,
)
from actrec._values.containers import Value
from actrec._values.modes import UNCONCERNED


class Unrecorded(Enum):
    """Where calls run that are not recorded, as messages say it. The first is the likeliest cause."""

    PAUSED = "inside acts.pause()"
    BACKWARD = (
        "inside backward(), where calls are not recorded: they may repeat those of the forward. If these do not, keep what they "
        "return with acts.add()"
    )
    RECOMPUTED = (
        "inside backward(), where activation checkpointing recomputes what was recorded before"
    )
    TRANSFORMED = "inside torch.func (vmap, grad, jvp), where a tensor represents many"
    TRACED = "by something that reads the model (torch.jit.trace, make_fx, torch.export)"


#: The threads in which torch.jit.trace may be comparing its trace with the model.
comparing: set[int] = set()


def is_own_call() -> bool:
    """Whether the call that is running is one of the model's own.

    Activation checkpointing calls modules again while ``backward()`` runs, to recompute what it did not
    keep; for other callers see :func:`is_tracing`.
    """
    if backward_number() != -1:
        return False
    modes = is_jit_tracing() or count_dispatch_modes() or count_function_modes()
    return not ((modes or comparing) and is_tracing())


def is_tracing() -> bool:
    """Whether this thread is running the model only to trace it.

    ``torch.jit.trace`` does, and calls the model again to compare it with the trace. So do ``make_fx``, AOT
    autograd and ``torch.export``, with tensors that have no values. (``torch.compiler.is_compiling()`` is not
    used: it is also true while other threads compile or export.)
    """
    if is_jit_tracing():
        comparing.add(threading.get_ident())
        return True
    if (count_dispatch_modes() or (count_function_modes() and not _is_own_mode())) and is_read():
        return True
    return bool(comparing) and _is_compared()


def _is_own_mode() -> bool:
    """Whether the only function mode of this thread is one that records functions."""
    return count_function_modes() == 1 and type(function_mode_at(0)) in UNCONCERNED


def _is_compared() -> bool:
    """Whether torch.jit.trace, after a trace in this thread, is comparing it with the model."""
    if threading.get_ident() not in comparing:
        return False
    if is_jit_comparing():
        return True
    comparing.discard(threading.get_ident())
    return False


def is_written_down(args: tuple[Value, ...], output: Value) -> bool:
    """Whether the call that returned ``output`` was made only to trace the model."""
    return is_tracing() or is_symbolic((*args, output))


def is_symbolic(values: Iterable[Value]) -> bool:
    """Whether ``torch.fx`` is tracing the model: tensors have no values then."""
    return any(isinstance(value, fx.Proxy) for value in values)
