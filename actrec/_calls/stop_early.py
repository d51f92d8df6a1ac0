"""Stopping early: a forward ends as soon as every chosen layer has run in it.

The hook of the last layer raises :class:`Stop`, which is no ``Exception``: models that catch those do not
hold it up, and where a bare ``except:`` does, the end of the block says so. It is caught around
``model.forward``, so that the call of the model ends like any other one, with ``None`` as its result. For
that, while the block is open, the model has a ``forward`` of its own, that of its class inside a
:class:`StoppableForward`.
"""

from __future__ import annotations

import copy
import threading
import types
import weakref
from functools import partial, update_wrapper
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from actrec._values.fsdp import sharded
from actrec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["EarlyStop", "StoppableForward", "refuse_sharded", "when_copied"]


#: A model has one ``forward``, and blocks of several threads may be about to change it.
_placing = threading.RLock()


class Stop(BaseException):
    """Ends a forward; its argument is the :class:`EarlyStop` that wants it to end."""


class _Thread(threading.local):
    """What one thread is doing: whether it is inside a forward, and which layers have not run in it."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None  # whose forward comes next
        self.inside = False
        self.stopped = False
        self.missing: set[str] = set()


class EarlyStop:
    """Counts off, for each thread, the chosen layers that have run, and ends the forward after the last."""

    def __init__(self) -> None:
        self.layers: frozenset[str] = frozenset()
        self.caught = (
            0  # forwards that went on to their end, for the model had caught what ends them
        )
        self._thread = _Thread()

    def enters(self, module: nn.Module) -> None:
        """A call of the model begins, or of a replica of it that DataParallel has made."""
        self._thread.module = module

    def ran(self, layer: str) -> None:
        """A chosen layer has run."""
        if self._thread.inside:
            self._thread.missing.discard(layer)

    def when_done(self) -> None:
        """End the forward if no chosen layer is missing."""
        if self._thread.inside and not self._thread.missing:
            self._thread.stopped = True
            raise Stop(self)

    def run(
        self, stoppable: StoppableForward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a forward up to that point. A model that calls itself runs inside one such call."""
        thread = self._thread
        forward = stoppable.forward_of(thread.module)
        thread.module = None  # or the recording would keep the model
        if thread.inside:
            return forward(*args, **kwargs)
        thread.inside, thread.stopped, thread.missing = True, False, set(self.layers)
        try:
            result = forward(*args, **kwargs)
        except Stop as stop:
            if stop.args != (self,):
                raise
            return None
        finally:
            thread.inside = False
        if thread.stopped:
            self.caught += 1
            return None  # the result was made without what the stopped layer returned
        return result


class StoppableForward:
    """Stands in for ``model.forward``, and lets an :class:`EarlyStop` end it.

    It refers weakly to what stops it: wherever it is left, it is the forward that it stands for.
    """

    forward: Callable[..., Any]
    own: Any  # what was set on the model itself, normally nothing

    def __init__(self, model: nn.Module, stop: EarlyStop) -> None:
        self.model = model
        self._stop: Callable[[], EarlyStop | None] = weakref.ref(stop)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stop = self._stop()
        if stop is None:
            return self.forward(*args, **kwargs)
        return stop.run(self, args, kwargs)

    def forward_of(self, module: nn.Module | None) -> Callable[..., Any]:
        """The forward of the model, or of a replica: it has the attributes of the model, this one included."""
        replicated = module is not None and module is not self.model and self.own is None
        return types.MethodType(type(self.model).forward, module) if replicated else self.forward

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # In a pickle of the model, its forward, in words that a process without actrec knows too.
        if self.own is None:
            return getattr, (self.model, "forward")
        return itemgetter(0), ((self.own,),)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        """In a copy of the model, nothing: it has the forward of its class. Until it is complete, that is it."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        copied = copy.deepcopy(self.model, memo)  # which has begun
        forward = types.MethodType(type(copied).forward, copied)
        when_copied(memo, partial(vars(copied).pop, "forward", None))
        return forward

    def place(self) -> None:
        """Put it on the model."""
        with _placing:
            self.forward = self.model.forward
            self.own = vars(self.model).get("forward")
            update_wrapper(self, self.forward, updated=())
            vars(self.model)["forward"] = self

    def remove(self) -> None:
        """Take it off again, unless somebody has put another forward in its place meanwhile."""
        self._stop = _nothing
        attributes = vars(self.model)
        with _placing:
            above = attributes.get("forward")
            if above is self:
                del attributes["forward"]
                if self.own is not None:
                    attributes["forward"] = self.own
            # A block that was entered later ends later: from now on it stands for what we stood for.
            while isinstance(above, StoppableForward):
                if above.own is self:
                    above.forward, above.own = self.forward, self.own
                above = above.own


def _nothing() -> None:
    """What a weak reference returns when what it referred to is gone."""


class _WhenCopied(list[Any]):
    """What is to be done when the memo of a ``deepcopy`` goes, that is, when the copy is complete."""

    def __del__(self) -> None:
        for undo in self:
            undo()


def when_copied(memo: dict[Any, Any], undo: Callable[[], object]) -> None:
    """Call ``undo`` when what is being copied with ``memo`` is complete."""
    memo.setdefault(_WhenCopied, _WhenCopied()).append(undo)


def refuse_sharded(model: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` for a model under FSDP.

    FSDP gathers the weights of a module before it runs, and frees them behind it: a module that is left
    in the middle would keep them gathered.
    """
    for name, module in sharded(model):
        message = (
            f"record(stop_early=True): {name or 'the model'!r} is sharded by FSDP ({type(module).__name__}), which "
            "would keep the weights of the modules that are left early gathered. Record without stop_early."
        )
        raise UnsupportedModelError(message)
