"""Leaves inference mode and selective checkpointing of the running model, for tensors that actrec makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import is_inference_mode_enabled

from actrec._torch import (
    InferenceMode,
    count_dispatch_modes,
    count_function_modes,
    dispatch_modes,
    function_modes,
    is_of_pytorch,
    pop_dispatch_mode,
    pop_function_mode,
    push_dispatch_mode,
    push_function_mode,
)

_OFF = False
_AS_IT_IS = nullcontext()
#: Modes that do nothing to values: those that record functions.
UNCONCERNED: set[type] = set()


def is_seen() -> bool:
    """Whether a mode of the user's would see operations of actrec's, and could change their results."""
    return any(map(_is_hidden_from, dispatch_modes() + function_modes()))


def _is_hidden_from(mode: Any) -> bool:
    """Not the modes in which PyTorch reads a model, that of a default device, and those that record functions."""
    return type(mode) not in UNCONCERNED and not is_of_pytorch(mode)


def unseen() -> AbstractContextManager[object]:
    """Hide operations in this block from modes of the user's, and from selective activation checkpointing.

    A mode may count operations, or change their results. Selective checkpointing numbers those of a
    forward, and when ``backward()`` runs them again, it returns the kept results by number: with one more, those of others.
    """
    return _without_modes() if is_seen() else _AS_IT_IS


def normal_mode_unseen() -> AbstractContextManager[object]:
    """Do as :func:`unseen`, and make normal tensors, also under ``inference_mode``: a probe can train on them.

    Enter it immediately: PyTorch's guard takes effect when it is made.
    """
    normal = InferenceMode(_OFF) if is_inference_mode_enabled() else _AS_IT_IS
    if not (count_dispatch_modes() or count_function_modes()):  # the shortest way
        return normal
    both = ExitStack()
    both.enter_context(normal)
    both.enter_context(unseen())
    return both


@contextmanager
def _without_modes() -> Iterator[None]:
    stacks = dispatch_modes(), function_modes()
    others = ([mode for mode in stack if not _is_hidden_from(mode)] for stack in stacks)
    try:
        _replace(*others)
        yield
    finally:
        _replace(*stacks)


def _replace(modes: list[Any], functions: list[Any]) -> None:
    """Make these the modes of this thread."""
    while count_dispatch_modes():
        pop_dispatch_mode(None)
    while count_function_modes():
        pop_function_mode()
    for mode in modes:
        push_dispatch_mode(mode)
    for mode in functions:
        push_function_mode(mode)
