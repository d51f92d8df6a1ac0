"""Words for people: sizes, counts and names, as tables and messages show them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from typing import Final

KILO: Final = 1000
UNITS: Final = ("kB", "MB", "GB", "TB", "PB")


def own_version() -> str:
    """Return the version of actrec, as the package says it; ``"unknown"`` where it was never installed."""
    try:
        return version("actrec")
    except PackageNotFoundError:
        return "unknown"


def size(nbytes: int) -> str:
    """Return ``"4.9 MB"``: powers of 1,000, as disks and torch's own messages about files count.

    >>> size(120), size(4_900_000)
    ('120 B', '4.9 MB')
    """
    if nbytes < KILO:
        return f"{nbytes} B"
    amount, units = nbytes / KILO, iter(UNITS)
    unit = next(units)
    while round(amount, 1) >= KILO and unit != UNITS[-1]:
        amount, unit = amount / KILO, next(units)
    return f"{amount:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """Return ``"1 layer"``, ``"2,000 passes"``.

    >>> count(1, "layer"), count(2000, "pass")
    ('1 layer', '2,000 passes')
    """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def shown(name: str) -> str:
    r"""Return a name as it is, or quoted if it is empty or would upset a table.

    >>> shown("conv1"), shown(""), shown("two\nlines")
    ('conv1', "''", "'two\\nlines'")
    """
    return name if name and name.isprintable() and name == name.strip() else repr(name)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return names for the middle of a message: ``"'a', 'b' and 3 more"``.

    >>> listed("abcde", most=2)
    "'a', 'b' and 3 more"
    """
    quoted = [repr(name) for name in names]
    first = ", ".join(quoted[:most])
    return first if len(quoted) <= most else f"{first} and {len(quoted) - most} more"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``"Did you mean 'conv1'?"``, or what there is where nothing comes close.

    Those come first that have the longest prefix in common with ``name``, and otherwise those that come first in ``names``.

    >>> nearest("conv1", ["backbone.conv1", "head"]), nearest("x", ["head"])
    ("Did you mean 'backbone.conv1'?", "There are 'head'.")
    >>> nearest("layer1.conv1", ["layer0.0.conv1", "layer1.0.conv1", "layer1.1.conv1"])
    "Did you mean 'layer1.0.conv1' or 'layer1.1.conv1'?"
    """
    names = list(names)
    close = sorted(_like(_dotted(name), names), key=lambda other: -_in_common(name, other))
    if close:
        return f"Did you mean {' or '.join(map(repr, close[:3]))}?"
    return f"There are {listed(names)}." if names else "There are none."


def _like(name: str, names: list[str]) -> list[str]:
    """Return the names that ``name`` may stand for, in order; those of the first kind of which there are any."""
    if not name:
        return []
    segments = name.split(".")
    kinds: list[Callable[[str], object]] = [
        lambda other: other == name,  # written in another way
        # Often only the front is missing, "conv1" for "backbone.conv1", or there is one: "model.conv1", "self.conv1".
        lambda other: other.endswith(f".{name}") or (other and name.endswith(f".{other}")),
        lambda other: _leaves_out(segments, other.split(".")),
        set(get_close_matches(name, names, n=6, cutoff=0.6)).__contains__,
    ]
    found = ([other for other in names if is_like(other)] for is_like in kinds)
    return next(filter(None, found), [])


def _dotted(name: str) -> str:
    """A name with dots, where it was written as Python or as a path: ``layer[0].conv``, ``layer/0/conv``."""
    return re.sub(r"\[(\d+)\]", r".\1", name).replace("/", ".").strip(".")


def _leaves_out(segments: list[str], others: Iterable[str]) -> bool:
    """Whether ``segments`` are ``others`` less some of them."""
    rest = iter(others)
    return len(segments) > 1 and all(segment in rest for segment in segments)


def _in_common(one: str, other: str) -> int:
    """How many characters two names begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def function_name(function: Callable[..., object] | None) -> str | None:
    """Return the name of a function, or of the class of what can be called like one; ``None`` where there is none.

    >>> function_name(print), function_name(None)
    ('print', None)
    """
    if function is None:
        return None
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def folded(names: Iterable[str], least: int = 3) -> list[str]:
    """Return names in which numbers are stars, where that makes one of ``least`` or more: ``h.*.attn``.

    >>> folded(["h.0.attn", "h.1.attn", "h.2.attn", "head"])
    ['h.*.attn', 'head']
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(pattern if pattern.strip("*.") else name, []).append(name)
    return [
        one
        for pattern, group in groups.items()
        for one in ([pattern] if len(group) >= least else group)
    ]
