"""The names closest to one that does not exist, for messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import takewhile

from actrec._text import listed


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``"Did you mean 'conv1'?"``, or, if no name is close, a list of the names that there are.

    Names with the longest common prefix with ``name`` come first, and otherwise in the order of ``names``.

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
    """Return the names that ``name`` may mean, in order: those of the first kind that has any."""
    if not name:
        return []
    kinds: list[Callable[[str], object]] = [
        lambda other: other == name,  # written in another way
        # Often a prefix is missing, "conv1" for "backbone.conv1", or there is one too many: "model.conv1", "self.conv1".
        lambda other: other.endswith(f".{name}") or (other and name.endswith(f".{other}")),
        lambda other: "." in name and leaves_out(name, other),
        set(get_close_matches(name, names, n=6, cutoff=0.6)).__contains__,
    ]
    found = ([other for other in names if is_like(other)] for is_like in kinds)
    return next(filter(None, found), [])


def _dotted(name: str) -> str:
    """Return a name with dots, if it was written as Python or as a path: ``layer[0].conv``, ``layer/0/conv``."""
    return re.sub(r"\[(\d+)\]", r".\1", name).replace("/", ".").strip(".")


def leaves_out(name: str, other: str) -> bool:
    """Return whether a name is another one without some of its segments."""
    rest = iter(other.split("."))
    return all(segment in rest for segment in name.split("."))


def _in_common(one: str, other: str) -> int:
    """Return the length of the common prefix of two names."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
