"""Compiled models run eagerly while they are recorded.

Hooks that are added after ``torch.compile`` has compiled a model are silently ignored, and the model does not
show whether some compiled *function* calls it. So while a block is open, it sets a stance of the compiler in
which everything that users have compiled runs eagerly. The stance is process-wide, costs microseconds, and
discards no compiled code.

Operators of PyTorch that compile themselves (``torch.cond``, ``scan``, ``map``, ``while_loop``,
``flex_attention``) still do where gradients are enabled: they cannot be differentiated otherwise.
Under ``no_grad()`` they run eagerly, and the layers in their bodies are recorded.

Importing the compiler takes more than a second, and until it is imported, nothing is compiled. So it is not
imported here. The block sets the stance when it begins, when a pass begins, or when the compiler reads one
of its hooks, whichever comes first after the import.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling  # a constant in what the compiler reads
from typing_extensions import override

from actrec._torch import compiles_itself, is_compiler_loaded, stance, stance_setter
from actrec.errors import ActrecError

from .hooks import Hook
from .own_calls import is_tracing

_COMPILING = (
    "record() was called inside a function that torch.compile is compiling, where hooks do not run. "
    "Open the block outside of the compiled function."
)


def refuse_compiling() -> None:
    """Raise ``ActrecError`` where the compiler, or a tracer, is reading this code in place of running it."""
    if is_dynamo_compiling() or is_tracing():
        raise ActrecError(_COMPILING)


#: The compiler has one stance, and the blocks of several threads set and reset it.
_taking = threading.RLock()


class Stance(AbstractContextManager[None]):
    """How a block affects the compiler while it is open; this base does nothing."""

    hook: type[Hook[Any]] = Hook  # what the block places on modules
    in_graph = False  # whether compiled code stays compiled and reports its calls itself
    replaced = False  # whether the user has set another stance inside the block
    made_way = False  # whether an operator that compiles itself has run compiled

    def hold(self) -> None:
        """Set the stance now, if the compiler was not imported yet when the block began."""

    def marks(
        self,
        model: nn.Module,  # noqa: ARG002
        plan: Sequence[tuple[nn.Module, Hook[Any]]],  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Return a context that makes the compiler see the hooks of a plan. It exits before they are removed."""
        return nullcontext()


class Eager(Stance):
    """A stance of the compiler: eager while a block is open, and after that the same as the stance before it.

    So it does no harm where it remains set: a stance that the user sets inside the block stays, and may restore
    this one when it ends.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._public: Any = None
        self._set: Any = None
        self._ended = False

    @property
    def stance(self) -> str:
        """The compiler reads this before it runs anything that is compiled."""
        makes_way = torch.is_grad_enabled() and compiles_itself()
        if self._ended or makes_way:
            self.made_way |= makes_way
            before: str = self._before.stance
            return before
        return "force_eager"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)

    @override
    def __enter__(self) -> None:
        try:
            self._take()
        except (RuntimeError, AssertionError) as error:  # the compiler is compiling this
            raise ActrecError(_COMPILING) from error

    @override
    def hold(self) -> None:
        if self._before is None and is_compiler_loaded():
            with suppress(RuntimeError):  # as above
                self._take()

    @override
    def __exit__(self, *_: object) -> None:
        with _taking:
            self._ended = True
            if self._public is not None:
                self._public.__exit__(None, None, None)
            elif self._before is None:
                return
            elif stance() is self:
                with suppress(RuntimeError):  # as above
                    self._set(_running(self._before))
            else:
                self.replaced = not isinstance(stance(), Eager)

    def _take(self) -> None:
        with _taking:
            if self._before is not None or not is_compiler_loaded():
                return
            self._set = stance_setter()
            if self._set is None:
                self._before = self._public = torch.compiler.set_stance("force_eager")
                return
            self._before = _running(stance())
            try:
                self._set(self)
            except BaseException:
                self._before = None
                raise


def _running(stance: Any) -> Any:
    """Return ``stance``, or the stance before it, if it belongs to a block that has ended."""
    while isinstance(stance, Eager) and stance._ended:
        stance = stance._before
    return stance
