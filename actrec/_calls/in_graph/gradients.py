"""The gradients of calls in compiled code, which reports them itself, by the number of a tensor of a call."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from actrec._calls.arrivals import instead
from actrec._calls.gradients import Call
from actrec._values.containers import Value
from actrec.errors import CaptureError


@dataclass(eq=False, slots=True)
class Watched:
    """A call whose gradients compiled code reports, if it is recorded."""

    call: Call | None = None
    #: The views among its tensors whose gradient has not arrived.
    views: Collection[int] = ()

    def tell(self, index: int, grad: Tensor) -> None:
        """The gradient of tensor number ``index`` has arrived."""
        if self.call is None:
            return
        gradients = self.call.gradients()
        if gradients is not None and index in self.views:
            self.views = [at for at in self.views if at != index]
            gradients.views_waiting -= 1
        self.call.tell(index, grad)


@contextmanager
def watching(leaf: int, views: Collection[int]) -> Iterator[Watched]:
    """Find the call that is recorded in this ``with`` block: no hooks are placed for its gradients.

    ``leaf`` is the number of a tensor that is a leaf; -1 if there is none. ``views`` are the numbers of those that are views.
    """
    watched = Watched(views=views)

    def watch(call: Call, _: Value, __: Value) -> bool:
        if leaf >= 0:
            raise CaptureError(_LEAF)
        watched.call = call
        gradients = call.gradients()
        assert gradients is not None  # noqa: S101  # they are asking
        gradients.views_waiting += len(views)
        return True

    instead.watch = watch
    try:
        yield watched
    finally:
        instead.watch = None


_LEAF: Final = (
    "it returned a leaf of the graph, such as a parameter or an input of the model, and compiled code cannot separate the "
    "gradients of its single calls. Record it without grads, or without compiled=True"
)
