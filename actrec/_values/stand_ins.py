"""What stands for an object that a recording does not hold itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from typing_extensions import override


@dataclass(frozen=True)
class Opaque:
    """Stands where a layer returned an object that actrec does not take apart, such as a cache.

    >>> Opaque("transformers.cache_utils.DynamicCache")
    Opaque('transformers.cache_utils.DynamicCache')

    The object itself is not kept: it may be large, and the model goes on changing it. To record
    something of it, take that out with a ``transform``.

    Attributes:
        type: the name of its class, with the module.
    """

    type: str

    @override
    def __repr__(self) -> str:
        return f"Opaque({self.type!r})"


class Fields(dict[Any, Any]):
    """Stands for a container whose class cannot be had: what is in it, by key or by name.

    >>> out = Fields("transformers.modeling_outputs.BaseModelOutput", {"hidden": 1})
    >>> out["hidden"], out.hidden
    (1, 1)
    >>> out
    BaseModelOutput({'hidden': 1})

    In a recording that was loaded it stands for a dataclass, a ``ModelOutput`` or another kind of dict: the
    class itself would have to be imported, and a file does not get to say what is imported. In memory it stands
    for a ``Mapping`` of a kind of its own, which nobody but its class knows how to make.
    """

    def __init__(self, kind: str, fields: Any = (), more: Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(fields)
        self.__dict__["_type"] = kind
        self.__dict__.update(more)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            kind = self.__dict__.get("_type", "Fields")
            message = f"this {kind} has no {name!r}; it has {', '.join(map(repr, self))}"
            raise AttributeError(message) from None

    @override
    def __repr__(self) -> str:
        return f"{self._type.rpartition('.')[2]}({dict.__repr__(self)})"


def opaque(value: object) -> Opaque:
    """Return the placeholder for ``value``."""
    return Opaque(qualified(type(value)))


def qualified(kind: type) -> str:
    """Return the name of a class, with its module unless it is a builtin."""
    builtin = kind.__module__ == "builtins"
    return kind.__qualname__ if builtin else f"{kind.__module__}.{kind.__qualname__}"
