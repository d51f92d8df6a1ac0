"""Words for people: sizes, counts and names, as tables and messages show them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["count", "listed", "nearest", "shown", "size"]

KILO: Final = 1000
UNITS: Final = ("kB", "MB", "GB", "TB", "PB")


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

    >>> nearest("conv1", ["backbone.conv1", "head"]), nearest("x", ["head"])
    ("Did you mean 'backbone.conv1'?", "There are 'head'.")
    """
    names = list(names)
    # Often only the front is missing: "conv1" for "backbone.conv1".
    close = [other for other in names if name and other.endswith("." + name)]
    close += get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(map(repr, list(dict.fromkeys(close))[:3]))}?"
    return f"There are {listed(names)}." if names else "There are none."
