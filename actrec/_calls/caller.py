"""The root, and the modules on the way from it to the chosen layers: a call of one of them may begin and end a pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.utils.hooks import RemovableHandle

from actrec._selection.names import WRAPPERS, is_called
from actrec._torch import children_of

from .foreign_hooks import put_after_others
from .hooks import Event, Hook
from .session import Session

_Children: TypeAlias = Mapping[str, nn.Module | None]


class Caller:
    """Such a module, and the modules that it calls. Others may replace these while a block runs."""

    __slots__ = ("_checked_at", "_children", "_hooks", "_is_root")

    def __init__(
        self, module: nn.Module, hooks: Mapping[nn.Module, Iterable[Hook[Any]]], *, is_root: bool
    ) -> None:
        """``hooks`` are those of the chosen layers."""
        self._is_root = is_root
        self._children = [(owner, dict(children_of(owner))) for owner in _containers(module)]
        called = {
            child for _, known in self._children for child in known.values() if child is not None
        }
        self._hooks = [(child, hook) for child in called for hook in hooks.get(child, ())]
        # The call itself has begun: PyTorch has already looked up its pre-hooks.
        own = [hook for hook in hooks.get(module, ()) if hook.event is not Event.RECEIVE]
        self._hooks += [(module, hook) for hook in own]
        self._checked_at = -1  # as Hook.checked_at

    def enters(self, session: Session, _: object, module: nn.Module, *__: object) -> None:
        """A call begins: put the hooks of the layers after those of others, and remember which layers were replaced."""
        if not session.enter(module, is_root=self._is_root):
            return
        if RemovableHandle.next_id != self._checked_at:
            self._checked_at = RemovableHandle.next_id
            for layer, hook in self._hooks:
                put_after_others(hook, layer)
        for owner, known in self._children:
            if children_of(owner) != known:
                _look_for_replaced(session, children_of(owner), known)
                known.clear()
                known.update(children_of(owner))


def _look_for_replaced(session: Session, children: _Children, known: _Children) -> None:
    now = max(0, session.passes.count - 1)
    for segment, child in known.items():
        other = children.get(segment)
        if child is not None and other is not None and not _holds(other, child):
            for gone in child.modules():
                session.replaced.setdefault(id(gone), now)


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and the containers inside it that are never called: its forward looks up modules in them."""
    yield module
    for child in children_of(module).values():
        if child is not None and child is not module and not is_called(child):
            yield from _containers(child)


def _holds(other: nn.Module | None, module: nn.Module) -> bool:
    """Whether ``other`` is ``module``, or wraps it."""
    while other is not module and other is not None:
        wrapped = [child for segment, child in children_of(other).items() if segment in WRAPPERS]
        other = wrapped[0] if len(wrapped) == len(children_of(other)) and wrapped else None
    return other is module
