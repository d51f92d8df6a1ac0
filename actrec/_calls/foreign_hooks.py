"""Hooks of others: actrec's hooks run after them, to record the values that they have replaced."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from actrec._torch import forward_hooks, forward_pre_hooks

from .hooks import Event, Hook


def put_after_others(hook: Hook[Any], module: nn.Module) -> bool:
    """Put this hook after those of others, from the next call on. Return whether any had come after it.

    To be called when a hook was registered since the last time: when ``hook.checked_at`` is out of date.
    """
    hook.checked_at = RemovableHandle.next_id
    table = forward_pre_hooks(module) if hook.event is Event.RECEIVE else forward_hooks(module)
    hooks = [*table.values()]
    if hooks and hooks[-1] is hook:  # the shortest way
        return False
    place = next((place for place, found in enumerate(hooks) if found is hook), len(hooks))
    if all(isinstance(other, Hook) for other in hooks[place:]):
        return False
    _put_last(module)
    return True


def _put_last(module: nn.Module) -> None:
    """Put the hooks of all open blocks after those of others.

    Other threads may be calling the module, and see each order in between. In none of them may a hook that records come
    after one that ends a pass or a forward: so of the forward hooks, those of others are moved.
    """
    for key, hook in [*forward_pre_hooks(module).items()]:
        if isinstance(hook, Hook) and hook.event is Event.RECEIVE:
            _move(forward_pre_hooks(module), key, last=True)
    for key, hook in reversed([*forward_hooks(module).items()]):
        if not isinstance(hook, Hook):
            _move(forward_hooks(module), key, last=False)


def put_stops_last(module: nn.Module) -> None:
    """Put the hooks that stop a forward last, so that hooks placed after them still get the call that they end."""
    for key, hook in [*forward_hooks(module).items()]:
        if isinstance(hook, Hook) and hook.event is Event.STOP:
            _move(forward_hooks(module), key, last=True)


def _move(table: Any, key: int, *, last: bool) -> None:
    with suppress(KeyError):  # another thread has taken it off
        table.move_to_end(key, last=last)
