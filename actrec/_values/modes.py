"""Leaves inference mode and selective checkpointing of the running model, for tensors that actrec makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import is_inference_mode_enabled

from actrec._torch import (
    InferenceMode,
    count_dispatch_modes,
    dispatch_mode_at,
    is_caching,
    pop_dispatch_mode,
    push_dispatch_mode,
)

_OFF = False
_AS_IT_IS = nullcontext()


def normal_mode() -> AbstractContextManager[object]:
    """Make normal tensors in this block, also under ``inference_mode``: a probe can train on them.

    Enter it immediately: PyTorch's guard takes effect when it is made.
    """
    return InferenceMode(_OFF) if is_inference_mode_enabled() else _AS_IT_IS


def unseen() -> AbstractContextManager[object]:
    """Hide operations in this block from selective activation checkpointing.

    It numbers the operations of a forward, and when ``backward()`` runs them again, it returns the kept results by
    number. With an additional operation, it would return the results of other operations.
    """
    number = count_dispatch_modes()
    if number and any(is_caching(dispatch_mode_at(at)) for at in range(number)):
        return _without_caching()
    return _AS_IT_IS


def normal_mode_unseen() -> AbstractContextManager[object]:
    """Combine :func:`normal_mode` and :func:`unseen`. Enter it immediately, too."""
    if not count_dispatch_modes():  # the shortest way: nothing to hide from
        return normal_mode()
    both = ExitStack()
    both.enter_context(normal_mode())
    both.enter_context(unseen())
    return both


@contextmanager
def _without_caching() -> Iterator[None]:
    modes = _popped()
    try:
        for mode in modes:
            if not is_caching(mode):
                push_dispatch_mode(mode)
        yield
    finally:
        _popped()
        for mode in modes:
            push_dispatch_mode(mode)


def _popped() -> list[Any]:
    """Pop all modes off the stack; the lowest comes first."""
    return [pop_dispatch_mode(None) for _ in range(count_dispatch_modes())][::-1]
