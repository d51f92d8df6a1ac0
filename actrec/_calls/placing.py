"""How hooks come onto a model and off it again: all together or not at all, and on every path."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from actrec._torch import forward_hooks, hook_tables

from .foreign_hooks import put_stops_last
from .hooks import Hook, delete


class Hooks:
    """The hooks of one block."""

    def __init__(self) -> None:
        self._placed: list[tuple[nn.Module, Hook[Any], RemovableHandle]] = []

    def place(self, plan: Iterable[tuple[nn.Module, Hook[Any]]]) -> None:
        """Register every hook; if one cannot be, take those before it off again."""
        plan = list(plan)
        _reserve_ids(module for module, _ in plan)
        try:
            for module, hook in plan:
                self._placed.append((module, hook, hook.register(module)))
                if len(forward_hooks(module)) > 1:
                    put_stops_last(module)
        except BaseException:
            self.remove()
            for module, hook in plan:  # one that was interrupted is there, and no handle for it
                delete(module, hook)
            raise

    def remove(self) -> None:
        """Take every hook off, whatever happened to the model meanwhile. May be called again."""
        try:
            self._take_off()
        except BaseException:
            self._take_off()  # the rest, after an interrupt
            raise

    def _take_off(self) -> None:
        failures: list[BaseException] = []
        while self._placed:
            module, hook, handle = self._placed[-1]
            for off in (handle.remove, partial(delete, module, hook)):
                try:
                    off()
                except BaseException as error:  # noqa: BLE001  # raised below, once all are off
                    failures.append(error)
            self._placed.pop()
        if failures:
            raise failures[0]


def _reserve_ids(modules: Iterable[nn.Module]) -> None:
    """Keep new ids clear of those in use.

    A model that was pickled with hooks brings their ids into a process that counts from 0, and a handle
    that gets the same id would replace another library's hook.
    """
    used = [key for module in modules for table in hook_tables(module) for key in [*table]]
    lowest = max(used, default=-1) + 1
    # No call in between, as in max(): it would set back what another thread has counted on meanwhile.
    if lowest > RemovableHandle.next_id:  # noqa: PLR1730
        RemovableHandle.next_id = lowest
