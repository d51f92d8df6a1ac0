"""What a mapping of queries gives a layer: a transform of each value, what reduces all of them, or both."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

from actrec.errors import OptionError

from .queries import Transform

#: Makes what reduces the values of a layer, a new one for each.
Make: TypeAlias = "Callable[[], Any]"


class Reduces(Protocol):
    """What reduces values: a reduction of :mod:`actrec.reduce`, or a metric of torchmetrics."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a value."""

    def compute(self) -> Any:
        """Return the result."""


#: What is given for values to be reduced by: one like which each layer gets a new one, its class, or a partial of that.
Reducer: TypeAlias = "Reduces | Callable[..., Any]"


class Treatment(NamedTuple):
    """What becomes of the values of a layer."""

    transform: Transform | None = None
    make: Make | None = None  #: what reduces them; ``None`` if they are kept

    @classmethod
    def of(cls, query: object, given: Any, default: Treatment) -> Treatment:
        """Return what a mapping gives for a query, where it says nothing, the ``default``.

        Raises:
            OptionError: it is no transform, no reduction, and not both.
        """
        if given is None:
            return default
        make = maker(given)
        if make is not None:
            return cls(default.transform, make)
        if type(given) is tuple and len(given) == 2:  # noqa: PLR2004  # both
            transform, made = given[0], maker(given[1])
            if (transform is None or callable(transform)) and made is not None:
                return cls(transform, made)
        elif callable(given):
            return cls(given, default.make)
        message = (
            f"record(): the mapping gives {query!r} {given!r}; expected a transform, which is callable, a reduction, such as "
            "actrec.reduce.Moments(), both as (transform, reduction), or None."
        )
        raise OptionError(message)

    @property
    def reduction(self) -> str | None:
        """What the values are reduced by, for people, and to be compared with."""
        if self.make is None:
            return None
        made = self.make()
        return repr(made) if hasattr(made, "settings") else type(made).__name__

    def is_same(self, other: Treatment) -> bool:
        """Return whether it is the same in both."""
        return all(mine is theirs for mine, theirs in zip(self, other, strict=True))


def is_reduction(made: object) -> bool:
    """Return whether values go to it by ``update()``, and a result comes from ``compute()``, as in torchmetrics."""
    return not hasattr(made, "append") and all(
        callable(getattr(made, method, None)) for method in ("update", "compute")
    )


def maker(given: Any) -> Make | None:
    """Return what makes a new reduction for each layer: of a class, of one with arguments, or like ``given``.

    ``None`` if it is none of these.
    """
    kind = given
    while isinstance(kind, partial):
        kind = kind.func
    if not is_reduction(kind):
        return None
    if isinstance(kind, type):
        return given  # type: ignore[no-any-return]
    rows = getattr(given, "rows", 0)
    if rows:
        message = (
            f"record(): the {type(given).__name__} has taken in {int(rows)} rows already. Give a new one; each layer gets "
            "one like it."
        )
        raise OptionError(message)
    return partial(deepcopy, given)
