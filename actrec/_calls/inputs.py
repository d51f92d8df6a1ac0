"""The arguments of a call: named after the parameters of ``forward``, and paired with the call's output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import nn

from actrec._recordings.layer import Layer
from actrec._selection.names import wrapped
from actrec._torch import version
from actrec._values.containers import Value
from actrec._values.spec import tensors

from .capture import Capture


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The parameters of a module's ``forward`` that can be given by position."""

    positional: tuple[str, ...] = ()
    rest: str = "args"

    @classmethod
    def of(cls, module: nn.Module) -> _Parameters:
        """Read them from the signature, where there is one."""
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):  # a forward that is written in C
            return cls()
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        rest = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
        positional = tuple(p.name for p in parameters if p.kind in by_position)
        inner = None if positional else wrapped(module)  # a wrapper has no names
        return cls(positional, *rest) if inner is None else cls.of(inner)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments as a dict; surplus positional ones are one tuple, as in ``forward`` itself."""
        given = dict(zip(self.positional, args, strict=False))
        if len(args) > len(self.positional):
            given[self.rest] = args[len(self.positional) :]
        given.update(kwargs)
        return given


@dataclass(eq=False, slots=True)
class Arrival:
    """A call that has begun and not ended yet."""

    number: int  # of its pass
    kwargs: object  # Python makes a new dict for every call, so it identifies this one
    received: Value
    #: If hooks of others run after ours: the args that ours got, and the versions of the tensors.
    late: tuple[tuple[Any, ...], dict[int, int | None]] | None

    def is_late(self, args: tuple[Any, ...], kwargs: Any) -> tuple[bool, bool]:
        """Whether hooks that ran after ours have given the call other arguments, and whether these were written in place.

        By such a hook, or later, by forward: nobody knows which.
        """
        assert self.late is not None  # noqa: S101  # the caller has checked it
        before, known = self.late
        now = versions((args, kwargs))
        written = any(version is None or version != known.get(t, 0) for t, version in now.items())
        return args is not before or kwargs is not self.kwargs, written


@dataclass(eq=False, slots=True)
class Inputs:
    """The arguments of the calls of one layer. Each thread has a stack of calls, because a module may call itself."""

    calls: Layer[Any]
    capture: Capture
    parameters: _Parameters
    #: The name of the first parameter, if a tensor there is kept just as it is: a shortcut for calls with one tensor.
    alone: str | None = field(init=False)
    _stacks: dict[int, list[Arrival]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.parameters.positional
        self.alone = names[0] if names and self.capture.is_twin else None

    @classmethod
    def of(cls, module: nn.Module, calls: Layer[Any], capture: Capture) -> Inputs:
        """Return the inputs of ``module``, which are captured by ``capture`` and go to ``calls``."""
        return cls(calls, capture, _Parameters.of(module))

    def begin(self, arrival: Arrival) -> None:
        """A call begins."""
        stack = self._stacks.setdefault(get_ident(), [])
        if stack:  # drop calls of earlier passes, which raised
            stack[:] = [earlier for earlier in stack if earlier.number == arrival.number]
        stack.append(arrival)

    def pop(self, kwargs: object) -> Arrival | None:
        """The call with these ``kwargs`` ends: return it, or ``None`` if no own call has begun with them."""
        stack = self._stacks.get(get_ident(), [])
        if stack and stack[-1].kwargs is kwargs:
            return stack.pop()
        same = [at for at, earlier in enumerate(stack) if earlier.kwargs is kwargs]
        if not same:
            return None
        arrival = stack[same[-1]]
        del stack[same[-1] :]
        return arrival

    def pop_latest(self) -> Arrival | None:
        """An own call ends whose ``kwargs`` a pre-hook after ours has replaced: it is the one that began last."""
        stack = self._stacks.get(get_ident())
        return stack.pop() if stack else None


def versions(values: Value) -> dict[int, int | None]:
    """Return how often each tensor (by id) was written to; ``None`` for inference tensors, which do not count it."""
    return {id(t): None if t.is_inference() else version(t) for t in tensors(values)}
