"""Checks the form of JSON from a file, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final

from .format import MAX_SIZE, Defect

_NAMES: Final = {
    int: f"number from 0 to {MAX_SIZE}",
    str: "string",
    bool: "boolean",
    list: "list",
    dict: "JSON object",
}
_SHOWN: Final = 60


@dataclass(frozen=True, slots=True)
class Maybe:
    """A form of which the value may also be null."""

    form: Any


def checked(value: Any, form: Any, what: str) -> Any:
    """Return ``value`` if it has the given form, which is written like JSON with types instead of values.

    >>> checked({"name": "a", "shape": [2, 3]}, {"name": str, "shape": [int]}, "a layer")
    {'name': 'a', 'shape': [2, 3]}
    >>> checked({"name": "a", "shape": [2, -3]}, {"name": str, "shape": [int]}, "a layer")
    Traceback (most recent call last):
    actrec.store.format.Defect: a layer.shape[1] is -3, which is not a number from 0 to 4611686018427387904

    Args:
        value: the value that was read.
        form: a type, or ``None`` for anything. ``[form]`` is a list of any length, ``(form, form)`` a list of two,
            ``{"key": form}`` an object with these keys and perhaps others, ``{str: form}`` one with any keys, and
            ``Maybe(form)`` may be null.
        what: what the value is, for the message.

    Raises:
        Defect: ``value`` has another form; the message says where.
    """
    misfit = _misfit(value, form)
    if misfit is not None:
        where, why = misfit
        message = f"{what}{where[:200]} {why}"
        raise Defect(message)
    return value


def _misfit(value: Any, form: Any) -> tuple[str, str] | None:
    """Return where a value differs from the form, and how; ``None`` if it does not."""
    if isinstance(form, Maybe):
        return None if value is None else _misfit(value, form.form)
    why = None if form is None else _why_not(value, form)
    if why is not None:
        return "", why
    for key, inner in _children(value, form):
        found = _misfit(value[key], inner)
        if found is not None:
            where = f".{key}" if isinstance(value, dict) else f"[{key}]"
            return where + found[0], found[1]
    return None


def _why_not(value: Any, form: Any) -> str | None:
    """Return how a value differs from the form; its items are not checked."""
    kind: Any = form if isinstance(form, type) else dict if isinstance(form, dict) else list
    if type(value) is not kind or (kind is int and not 0 <= value <= MAX_SIZE):
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return f"is {shown}, which is not a {_NAMES[kind]}"
    if isinstance(form, tuple) and len(value) != len(form):
        return f"has {len(value)} items, and should have {len(form)}"
    if isinstance(form, dict):
        return next(
            (f"has no {key!r}" for key in form if key is not str and key not in value), None
        )
    return None


def _children(value: Any, form: Any) -> Iterable[tuple[Any, Any]]:
    """Return the keys or indices of an object or a list, each with its form."""
    if isinstance(form, tuple):
        return enumerate(form)
    if isinstance(form, list):
        return zip(range(len(value)), repeat(form[0]), strict=False)
    if isinstance(form, dict):
        return [(key, form[str]) for key in value] if str in form else form.items()
    return ()
