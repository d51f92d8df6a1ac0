"""Stopping early: a forward ends as soon as every chosen layer has run in it.

The hook of the last layer raises :class:`Stop`, a ``BaseException``, so that the model's own ``except Exception``
does not catch it; if a bare ``except:`` does, the end of the block warns. ``Stop`` is caught around
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
    """Ends a forward; its argument is the :class:`EarlyStop` that raised it."""


class _Thread(threading.local):
    """Whether one thread is inside a forward, and which layers have not run in it."""

    def __init__(self) -> None:
        self.inside = False
        self.stopped = False
        self.missing: set[str] = set()


class EarlyStop:
    """Tracks, for each thread, which chosen layers have run, and ends the forward after the last."""

    def __init__(self) -> None:
        self.layers: frozenset[str] = frozenset()
        #: How many forwards ran to their end, because the model caught the Stop.
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
        """Run a forward until all chosen layers have run. If a model calls itself, only the outer call is ended."""
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
            return None  # the result was computed without the output of the stopped layer
        return result


def refuse_sharded(model: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` for a model under FSDP.

    FSDP gathers the weights of a module before it runs, and frees them afterwards: a module that is left
    in the middle would keep them gathered.
    """
    for name, module in sharded(model):
        message = (
            f"record(stop_early=True): {name or 'the model'!r} is sharded by FSDP ({type(module).__name__}), which "
            "would keep the weights of the modules that are left early gathered. Record without stop_early."
        )
        raise UnsupportedModelError(message)
