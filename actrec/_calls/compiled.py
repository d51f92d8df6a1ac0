"""Compiled models run eagerly while they are recorded.

Hooks that are added after ``torch.compile`` has compiled a model are ignored without a word, and whether
some compiled *function* calls the model cannot be seen from the model. So while a block is open, the
compiler has a stance in which it runs eagerly what users have compiled. It is process-wide, costs
microseconds, and throws no compiled code away.

Operators of PyTorch that compile themselves (``torch.cond``, ``scan``, ``map``, ``while_loop``,
``flex_attention``) go on doing so where gradients are enabled: without it they cannot be differentiated.
Under ``no_grad()`` they can do without, and the layers in their bodies are recorded.

Importing the compiler takes more than a second, and while nobody has, nothing is compiled. So it is not
imported here. The block takes the stance when it begins, when a pass begins, or when the compiler reads one
of its hooks, whichever comes first after the import.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from actrec._torch import compiles_itself, is_compiler_loaded, stance, stance_setter
from actrec.errors import ActrecError

from .hooks import Hook

COMPILING = (
    "record() was called inside a function that torch.compile is compiling, where hooks do not run. "
    "Open the block outside of the compiled function."
)


#: The compiler has one stance, and the blocks of several threads take it and give it back.
_taking = threading.RLock()


class Stance(AbstractContextManager[None]):
    """What a block does to the compiler while it is open."""

    hook: type[Hook[Any]] = Hook  # what the block places on modules
    in_graph = False  # whether compiled code stays compiled, and tells of its calls itself
    replaced = False  # by one that the user has set inside the block
    made_way = False  # for an operator that compiles itself

    def hold(self) -> None:
        """Take it now, if the compiler was not there when the block began."""

    def marks(
        self,
        model: nn.Module,  # noqa: ARG002
        plan: Sequence[tuple[nn.Module, Hook[Any]]],  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """What makes the compiler see the hooks of a plan. It goes off the model before they do."""
        return nullcontext()


class Eager(Stance):
    """A stance of the compiler while a block is open; after that, it is the one that it took the place of.

    So it does no harm where it is left: a stance that the user sets inside the block stays, and may bring this
    one back when it ends.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._public: Any = None
        self._set: Any = None
        self._ended = False

    @property
    def stance(self) -> str:
        """What the compiler asks before it runs anything that is compiled."""
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
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # the compiler forbids it in what it compiles
            raise ActrecError(COMPILING) from error

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
    """``stance``, or the one that it took the place of, if it is that of a block that has ended."""
    while isinstance(stance, Eager) and stance._ended:
        stance = stance._before
    return stance
