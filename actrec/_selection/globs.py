"""Globs over dotted names: ``layer*.*.conv1``, ``blocks.**.attn``, ``h.[0-3].mlp``; and which names a pattern matches."""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache
from typing import Final

from .names import Name


def is_glob(query: str) -> bool:
    """Return whether a query is a pattern of names."""
    return _SIGNS.search(query) is not None


@lru_cache(maxsize=1024)
def glob(pattern: str) -> re.Pattern[str]:
    """Return a glob as a regular expression: ``*``, ``?`` and ``[12]`` stay inside one segment; ``**`` matches any number of segments.

    >>> pattern = glob("blocks.**.conv[12]")
    >>> [bool(pattern.fullmatch(name)) for name in ("blocks.conv1", "blocks.0.a.conv2", "blocks.0.conv3")]
    [True, True, False]
    """
    *front, last = pattern.split(".")
    parts = [r"(?:[^.]+\.)*" if segment == "**" else _segment(segment) + r"\." for segment in front]
    return re.compile("".join(parts) + (".+" if last == "**" else _segment(last)))


def matching(names: list[Name], pattern: re.Pattern[str]) -> tuple[list[Name], bool]:
    """Return the names that match without their wrapper segments, and true; if there are none, those that match in full."""
    inside_weights = "parametrizations" in pattern.pattern
    names = [name for name in names if inside_weights or not name.is_machinery]
    short = [name for name in names if name.short and pattern.fullmatch(name.short)]
    return short or [n for n in names if n.full and pattern.fullmatch(n.full)], bool(short)


#: The special signs. A bracket that is not closed is an ordinary character.
_SIGNS: Final = re.compile(r"\*\*|\*|\?|\[!?\]?[^\]]*\]")
_MEANING: Final = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}


def _segment(text: str) -> str:
    parts, end = [], 0
    for sign in _SIGNS.finditer(text):
        parts += [re.escape(text[end : sign.start()]), _MEANING.get(sign[0]) or _one_of(sign[0])]
        end = sign.end()
    return "".join([*parts, re.escape(text[end:])])


def _one_of(brackets: str) -> str:
    """Return a pattern for ``[12]`` or ``[!12]``, which never matches a dot."""
    return rf"(?!\.){fnmatch.translate(brackets)[:-2]}"  # without the sign for the end of the text
