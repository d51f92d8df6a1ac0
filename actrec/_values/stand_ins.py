"""Replacements of objects that a recording cannot keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from typing_extensions import override


@dataclass(frozen=True)
class Opaque:
    """Replaces an object that actrec does not take apart, such as a key-value cache.

    >>> Opaque("transformers.cache_utils.DynamicCache")
    Opaque('transformers.cache_utils.DynamicCache')

    The object itself is not kept: it may be large, and the model may still change it. To record
    something of it, extract that with a ``transform``.

    Attributes:
        type: the name of its class, with the module.
    """

    type: str

    @override
    def __repr__(self) -> str:
        return f"Opaque({self.type!r})"


class Fields(dict[Any, Any]):
    """Replaces a container whose class is not available: its content, by key or by attribute.

    >>> out = Fields("transformers.modeling_outputs.BaseModelOutput", {"hidden": 1})
    >>> out["hidden"], out.hidden
    (1, 1)
    >>> out
    BaseModelOutput({'hidden': 1})

    In a loaded recording it replaces a dataclass, a ``ModelOutput`` or another dict subclass, because actrec never
    imports a class that a file names. In memory it replaces a ``Mapping`` that is not a dict: only its class could
    make one.
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
