"""What a call received: named after the parameters of ``forward``, and paired with what it returned."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeAlias

from actrec._torch import version
from actrec._values.spec import tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from actrec._values.containers import Value

__all__ = ["Arrival", "Arrivals", "Parameters", "versions"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a module's ``forward`` that can be given by position."""

    positional: tuple[str, ...] = ()
    rest: str = "args"

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        """Read them from the signature, where there is one."""
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):  # a forward that is written in C
            return cls()
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        rest = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
        return cls(tuple(p.name for p in parameters if p.kind in by_position), *rest)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was given as a dict; surplus positions are one tuple, as in ``forward`` itself."""
        given = dict(zip(self.positional, args, strict=False))
        if len(args) > len(self.positional):
            given[self.rest] = args[len(self.positional) :]
        given.update(kwargs)
        return given


#: A call that began and has not ended yet: the number of its pass, its kwargs, its inputs, and if hooks of others
#: were still to come, its args and the versions of the tensors in them. Python makes the kwargs anew for every call, so they identify this one. (A named tuple
#: would take as long as all of this.)
Arrival: TypeAlias = (
    "tuple[int, object, Value, tuple[tuple[Any, ...], dict[int, int | None]] | None]"
)


def versions(values: Value) -> dict[int, int | None]:
    """How often each tensor (by id) has been written to; of those that do not count it, ``None``."""
    return {id(t): None if t.is_inference() else version(t) for t in tensors(values)}


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The calls of one layer that have begun: a stack for each thread, for a module may call itself."""

    _stacks: dict[int, list[Arrival]] = field(default_factory=dict)

    def push(self, arrival: Arrival) -> None:
        """A call begins. Those of earlier passes that never ended have raised: they are forgotten."""
        stack = self._stacks.setdefault(get_ident(), [])
        if stack:
            stack[:] = [earlier for earlier in stack if earlier[0] == arrival[0]]
        stack.append(arrival)

    def pop(self, kwargs: object) -> Arrival | None:
        """The call with these ``kwargs`` ends; ``None`` if it began before it was hooked.

        A pre-hook that ran after ours may have replaced ``kwargs``: then it is the last call to begin.
        """
        stack = self._stacks.get(get_ident(), [])
        if stack and stack[-1][1] is kwargs:
            return stack.pop()
        same = [at for at, earlier in enumerate(stack) if earlier[1] is kwargs]
        at = same[-1] if same else len(stack) - 1
        arrival = stack[at] if stack else None
        del stack[max(at, 0) :]
        return arrival
