"""Places the hooks of a block on the model, all or none, and removes them however the block ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from actrec._torch import forward_hooks, hook_tables

from .foreign_hooks import put_stops_last
from .hooks import Hook


class Hooks:
    """The hooks of one block."""

    def __init__(self) -> None:
        self._placed: list[tuple[nn.Module, Hook[Any]]] = []

    def place(self, plan: Iterable[tuple[nn.Module, Hook[Any]]]) -> None:
        """Register every hook; if one fails, remove those before it."""
        plan = list(plan)
        _reserve_ids(module for module, _ in plan)
        try:
            for module, hook in plan:
                self._placed.append((module, hook))
                hook.register(module)
                if len(forward_hooks(module)) > 1:
                    put_stops_last(module)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove every hook, whatever happened to the model meanwhile. May be called again."""
        try:
            self._take_off()
        except BaseException:
            self._take_off()  # the rest, after an interrupt
            raise

    def _take_off(self) -> None:
        failures: list[BaseException] = []
        while self._placed:
            module, hook = self._placed[-1]
            try:
                hook.remove(module)
            except BaseException as error:  # noqa: BLE001  # raised below, once all are off
                failures.append(error)
            self._placed.pop()
        if failures:
            raise failures[0]


def _reserve_ids(modules: Iterable[nn.Module]) -> None:
    """Raise PyTorch's counter of hook ids above all ids in use.

    A model that was unpickled with hooks has their ids, while the process counts from 0: a new handle
    with the same id would replace another library's hook.
    """
    used = [key for module in modules for table in hook_tables(module) for key in [*table]]
    lowest = max(used, default=-1) + 1
    # Not max(): another thread could count between the call and the assignment.
    if lowest > RemovableHandle.next_id:  # noqa: PLR1730
        RemovableHandle.next_id = lowest
