"""Sizes, counts and names, as tables and messages show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Final

KILO: Final = 1000
UNITS: Final = ("kB", "MB", "GB", "TB", "PB")


def own_version() -> str:
    """Return the version of actrec from the package metadata; ``"unknown"`` if it is not installed."""
    try:
        return version("actrec")
    except PackageNotFoundError:
        return "unknown"


def size(nbytes: int) -> str:
    """Return ``"4.9 MB"``: with powers of 1,000, like sizes of disks.

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
    r"""Return a name unchanged, or quoted if it is empty or would break a table.

    >>> shown("conv1"), shown(""), shown("two\nlines")
    ('conv1', "''", "'two\\nlines'")
    """
    return name if name and name.isprintable() and name == name.strip() else repr(name)


def listed(names: Iterable[object], most: int = 8) -> str:
    """Return names for the middle of a message: ``"'a', 'b' and 3 more"``.

    >>> listed("abcde", most=2)
    "'a', 'b' and 3 more"
    """
    quoted = [repr(name) for name in names]
    first = ", ".join(quoted[:most])
    return first if len(quoted) <= most else f"{first} and {len(quoted) - most:,} more"


def function_name(function: Callable[..., object] | None) -> str | None:
    """Return the name of a function, or of the class of another callable; ``None`` for ``None``.

    >>> function_name(print), function_name(None)
    ('print', None)
    """
    if function is None:
        return None
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def folded(names: Iterable[str], least: int = 3) -> list[str]:
    """Return names, with ``least`` or more that differ only in numbers as one pattern: ``h.*.attn``.

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
