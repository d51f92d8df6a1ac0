"""What a mapping of queries specifies for a layer: a transform of each value, a reduction of all values, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

from actrec.errors import OptionError

from .queries import Query, Transform

#: What of a layer is recorded.
What: TypeAlias = Literal["output", "input", "gradient"]
WHATS: Final[tuple[What, ...]] = ("output", "input", "gradient")

#: Makes a reduction, a new one for each layer.
Make: TypeAlias = Callable[[], Any]


class Reduces(Protocol):
    """A reduction of :mod:`actrec.reduce`, or a metric of torchmetrics."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Add a value."""

    def compute(self) -> Any:
        """Return the result."""


#: How the user gives a reduction: an object, of which each layer gets a copy, its class, or a partial of its class.
Reducer: TypeAlias = Reduces | Callable[..., Any]


#: One query or several. A mapping gives each query a transform, a reduction, or both as ``(transform, reduction)``.
Queries: TypeAlias = (
    Query
    | Iterable[Query]
    | Mapping[Query, Transform | Reducer | tuple[Transform | None, Reducer] | None]
)


class Treatment(NamedTuple):
    """How the values of a layer are treated."""

    transform: Transform | None = None
    make: Make | None = None  #: makes their reduction; ``None`` if they are kept

    @classmethod
    def by_default(cls, transform: Any) -> Treatment:
        """Return the treatment of layers for which no mapping gives one.

        Raises:
            OptionError: ``transform`` is no transform.
        """
        if maker(transform) is not None:
            message = (
                f"record(transform={transform!r}): this is a reduction, which combines all values, and a transform changes each. Pass it "
                "with the layers: record(model, {layers: reduction}), or as into=."
            )
            raise OptionError(message)
        if not (transform is None or callable(transform)):
            message = (
                f"record(transform={transform!r}): a transform is a function of the value, such as "
                "lambda t: t.mean(1)."
            )
            raise OptionError(message)
        return cls(transform)

    @classmethod
    def of(cls, query: object, given: Any, default: Treatment) -> Treatment:
        """Return the treatment that a mapping gives for a query; the ``default`` where it gives none.

        Raises:
            OptionError: ``given`` is neither a transform nor a reduction, nor a pair of them.
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
        """The reduction as text, for messages and comparisons; ``None`` without one."""
        if self.make is None:
            return None
        made = self.make()
        return repr(made) if hasattr(made, "settings") else type(made).__name__

    def is_same(self, other: Treatment) -> bool:
        """Return whether transform and reduction are the same objects."""
        return all(mine is theirs for mine, theirs in zip(self, other, strict=True))


def is_reduction(made: object) -> bool:
    """Return whether it has ``update()`` for values and ``compute()`` for the result, as in torchmetrics."""
    return not hasattr(made, "append") and all(
        callable(getattr(made, method, None)) for method in ("update", "compute")
    )


def maker(given: Any) -> Make | None:
    """Return a function that makes a new reduction for each layer: ``given`` itself if it is a class or a partial, else copies.

    ``None`` if it is not a reduction.
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
        message = f"record(): the {type(given).__name__} has {int(rows)} rows already. Give a new one; each layer gets a copy of it."
        raise OptionError(message)
    return partial(deepcopy, given)
