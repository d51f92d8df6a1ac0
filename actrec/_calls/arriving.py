"""Layers whose latest calls may still be on their way from a device: whoever looks at one waits for them.

A list that PyTorch reads on its own, as ``torch.cat(acts["x"])`` does, asks nobody. So a call that is on its
way is not in the list at all; it is put there when it is complete, at the latest when somebody looks
from Python, or when its pass ends.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, SupportsIndex

from actrec._recordings.recording import Layer, ListLayer, PassNumbers, SinkLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from .overflow import Overflows
    from .transfer import Offload

__all__ = ["ArrivingList", "ArrivingSink"]


class _Arriving(Layer):
    """What both kinds of layers have in common."""

    _offload: Offload

    def _complete(self) -> None:
        self._offload.finish()

    @property
    def passes(self) -> PassNumbers:
        self._complete()
        return super().passes  # type: ignore[safe-super,return-value]  # the other parent has them


class ArrivingList(_Arriving, ListLayer):
    """A list that is complete whenever one of its methods is called."""

    def __init__(self, offload: Offload, name: str, kind: str) -> None:
        self._offload = offload
        super().__init__(name, (), kind)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # What is copied or pickled is a list, with all that is in it now.
        return _plain_list, (self.name, self.type, [*self.passes], [*self], self.overflows)


def _plain_list(
    name: str, kind: str, passes: list[int], values: list[Any], overflows: Overflows | None
) -> ListLayer:
    layer = ListLayer(name, values, kind)
    layer._passes = passes
    layer.overflows = overflows
    return layer


class ArrivingSink(_Arriving, SinkLayer):
    """A container of the user's that is complete whenever it is looked at through its layer."""

    def __init__(self, offload: Offload, layer: SinkLayer) -> None:
        vars(self).update(vars(layer))
        self._offload = offload

    def __getattr__(self, name: str) -> Any:
        self._complete()
        return super().__getattr__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # Likewise the layer, without what makes it arrive.
        self._complete()
        state = {name: value for name, value in self.__getstate__().items() if name != "_offload"}
        return _plain_sink, (), state


def _plain_sink() -> SinkLayer:
    return SinkLayer.__new__(SinkLayer)


def _complete_first(kind: type[Any], names: list[str]) -> None:
    """Let these methods of ``kind`` see to it that nothing is missing."""

    def completing(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def complete_first(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._complete()
            return method(self, *args, **kwargs)

        return complete_first

    for name in names:
        setattr(kind, name, completing(getattr(kind, name)))


_SEQUENCE = ["__contains__", "__getitem__", "__iter__", "__len__", "__reversed__", "__setitem__"]
_complete_first(
    ArrivingList,
    [
        *_SEQUENCE,
        "__add__",
        "__delitem__",
        "__eq__",
        "__ge__",
        "__gt__",
        "__iadd__",
        "__imul__",
        "__le__",
        "__lt__",
        "__mul__",
        "__ne__",
        "__rmul__",
        "append",
        "clear",
        "copy",
        "count",
        "extend",
        "index",
        "insert",
        "pop",
        "remove",
        "reverse",
        "sort",
    ],
)
_complete_first(ArrivingSink, [*_SEQUENCE, "clear", "_readable"])
