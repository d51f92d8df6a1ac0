"""What a block changes in the settings of the compiler while it is open.

The compiler makes a limited number of versions of a piece of code; beyond that, it runs the code eagerly, or raises. The
versions that are compiled for a block must not count against the user's own. And Inductor joins the calls of the operator
(:mod:`.together`), unless the user has a pass of their own there.

Since 2.13 each thread, and each task, has settings of its own: a block that ends in another one changes none there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Final

from torch import nn
from typing_extensions import override

from actrec._calls.compiled import Stance
from actrec._calls.hooks import Hook
from actrec._torch import (
    CHANGES_GRAPHS,
    LIMITS,
    compiler_config,
    count_graphs,
    inductor_config,
    own_pass,
)

from .hook import HookInGraph
from .mark import Marks
from .operator import tell
from .together import join

#: The blocks that are open in this thread, or task.
_open: Final[ContextVar[tuple[Room, ...]]] = ContextVar("actrec rooms", default=())

_JOIN: Final = own_pass(join, str(tell))


class Room(Stance):
    """Doubles the limits while a block is open; afterwards they stay raised by the number of graphs that it compiled."""

    hook = HookInGraph
    in_graph = True
    _graphs = 0
    _given: dict[str, int]

    @override
    def marks(
        self, model: nn.Module, plan: Sequence[tuple[nn.Module, Hook[Any]]]
    ) -> AbstractContextManager[None]:
        kinds = [(module, hook.kind) for module, hook in plan if isinstance(hook, HookInGraph)]
        return Marks(model, kinds)

    @override
    def __enter__(self) -> None:
        config = compiler_config()
        self._graphs = count_graphs()
        self._given = {limit: getattr(config, limit) for limit in LIMITS}
        for limit, given in self._given.items():
            setattr(config, limit, getattr(config, limit) + given)
        _replace_pass(None, _JOIN)
        _open.set((*_open.get(), self))

    @override
    def __exit__(self, *_: object) -> None:
        rooms = _open.get()
        if self not in rooms:
            return
        _open.set(tuple(room for room in rooms if room is not self))
        config = compiler_config()
        # Somebody may have reset the counter.
        used = max(0, count_graphs() - self._graphs)
        for limit, given in self._given.items():
            setattr(config, limit, getattr(config, limit) - given + min(used, given))
        if not _open.get():
            _replace_pass(_JOIN, None)


def _replace_pass(expected: Any, new: Any) -> None:
    config = inductor_config()
    if getattr(config, CHANGES_GRAPHS, new) is expected:
        setattr(config, CHANGES_GRAPHS, new)
