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
    dispatch_mode_at,
    function_mode_at,
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


def normal_mode() -> AbstractContextManager[object]:
    """Make normal tensors in this block, also under ``inference_mode``: a probe can train on them.

    Enter it immediately: PyTorch's guard takes effect when it is made.
    """
    return InferenceMode(_OFF) if is_inference_mode_enabled() else _AS_IT_IS


def is_seen() -> bool:
    """Whether a mode of the user's would see operations of actrec's, and could change their results."""
    return any(map(_is_hidden_from, _modes())) or any(map(_is_hidden_from, _function_modes()))


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
    """Combine :func:`normal_mode` and :func:`unseen`. Enter it immediately, too."""
    if not (count_dispatch_modes() or count_function_modes()):  # the shortest way
        return normal_mode()
    both = ExitStack()
    both.enter_context(normal_mode())
    both.enter_context(unseen())
    return both


@contextmanager
def _without_modes() -> Iterator[None]:
    modes, functions = _modes(), _function_modes()
    try:
        _replace(modes=modes, functions=functions, hidden=True)
        yield
    finally:
        _replace(modes=modes, functions=functions, hidden=False)


def _replace(*, modes: list[Any], functions: list[Any], hidden: bool) -> None:
    """Make these the modes of this thread, or those of them that nothing is hidden from."""
    for _ in range(count_dispatch_modes()):
        pop_dispatch_mode(None)
    for _ in range(count_function_modes()):
        pop_function_mode()
    for some, push in ((modes, push_dispatch_mode), (functions, push_function_mode)):
        for mode in some:
            if not (hidden and _is_hidden_from(mode)):
                push(mode)


def _modes() -> list[Any]:
    return [dispatch_mode_at(at) for at in range(count_dispatch_modes())]


def _function_modes() -> list[Any]:
    return [function_mode_at(at) for at in range(count_function_modes())]
