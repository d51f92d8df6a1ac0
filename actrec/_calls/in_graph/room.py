"""Raises the compiler's limits for code that is compiled once more because it is recorded.

The compiler makes a limited number of versions of a piece of code; beyond that, it runs the code eagerly, or raises. The
versions that are compiled for a block must not count against the user's own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

from torch import nn
from typing_extensions import override

from actrec._calls.compiled import Stance
from actrec._calls.hooks import Hook
from actrec._torch import LIMITS, compiler_config, count_graphs

from .hook import HookInGraph
from .mark import Marks

_changing: Final = threading.RLock()


class _Open:
    """How many blocks are open, by how much the limits were raised, and how many graphs there were before."""

    blocks = 0
    graphs = 0
    given: dict[str, int]


class Room(Stance):
    """Doubles the limits while a block is open; afterwards they stay raised by the number of graphs that it compiled."""

    hook = HookInGraph
    in_graph = True

    @override
    def marks(
        self, model: nn.Module, plan: Sequence[tuple[nn.Module, Hook[Any]]]
    ) -> AbstractContextManager[None]:
        kinds = [(module, hook.kind) for module, hook in plan if isinstance(hook, HookInGraph)]
        return Marks(model, kinds)

    @override
    def __enter__(self) -> None:
        config = compiler_config()
        with _changing:
            _Open.blocks += 1
            if _Open.blocks == 1:
                _Open.graphs = count_graphs()
                _Open.given = {limit: getattr(config, limit) for limit in LIMITS}
                for limit, given in _Open.given.items():
                    setattr(config, limit, getattr(config, limit) + given)

    @override
    def __exit__(self, *_: object) -> None:
        config = compiler_config()
        with _changing:
            _Open.blocks -= 1
            if _Open.blocks == 0:
                # Somebody may have reset the counter.
                used = max(0, count_graphs() - _Open.graphs)
                for limit, given in _Open.given.items():
                    setattr(config, limit, getattr(config, limit) - given + min(used, given))
