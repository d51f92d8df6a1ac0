"""Stopping early: a forward ends as soon as every chosen layer has run in it.

The hook of the last layer raises :class:`Stop`, which is no ``Exception``: models that catch those do not
hold it up, and where a bare ``except:`` does, the end of the block says so. It is caught around
``model.forward``, so that the call of the model ends like any other one, with ``None`` as its result. For
that, while the block is open, an :class:`EarlyStop` runs the forward of the model (:mod:`forwards`).
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from actrec._values.fsdp import sharded
from actrec.errors import UnsupportedModelError

from .forwards import Forward


class Stop(BaseException):
    """Ends a forward; its argument is the :class:`EarlyStop` that wants it to end."""


class _Thread(threading.local):
    """What one thread is doing: whether it is inside a forward, and which layers have not run in it."""

    def __init__(self) -> None:
        self.inside = False
        self.stopped = False
        self.missing: set[str] = set()


class EarlyStop:
    """Counts off, for each thread, the chosen layers that have run, and ends the forward after the last."""

    def __init__(self) -> None:
        self.layers: frozenset[str] = frozenset()
        #: Forwards that went on to their end, for the model had caught what ends them.
        self.caught = 0
        self._thread = _Thread()

    def ran(self, layer: str) -> None:
        """A chosen layer has run."""
        if self._thread.inside:
            self._thread.missing.discard(layer)

    def when_done(self) -> None:
        """End the forward if no chosen layer is missing."""
        if self._thread.inside and not self._thread.missing:
            self._thread.stopped = True
            raise Stop(self)

    def run(self, stood_for: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward up to that point. A model that calls itself runs inside one such call."""
        thread = self._thread
        forward = stood_for.forward_of(stood_for.called())
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
