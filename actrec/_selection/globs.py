"""Globs over dotted names: ``layer*.*.conv1``, ``blocks.**.attn``, ``h.[0-3].mlp``."""

from __future__ import annotations

import fnmatch
import re
from typing import Final


def is_glob(query: str) -> bool:
    """Return whether a query that is no name stands for a pattern of names."""
    return _SIGNS.search(query) is not None


def glob(pattern: str) -> re.Pattern[str]:
    """Return what names match: ``*``, ``?`` and ``[12]`` stay inside one segment; ``**`` crosses dots, and may be no segment at all.

    >>> pattern = glob("blocks.**.conv[12]")
    >>> [bool(pattern.fullmatch(name)) for name in ("blocks.conv1", "blocks.0.a.conv2", "blocks.0.conv3")]
    [True, True, False]
    """
    *front, last = pattern.split(".")
    parts = [r"(?:[^.]+\.)*" if segment == "**" else _segment(segment) + r"\." for segment in front]
    return re.compile("".join(parts) + (".+" if last == "**" else _segment(last)))


#: What stands for other characters; a bracket that is not closed stands for itself.
_SIGNS: Final = re.compile(r"\*\*|\*|\?|\[!?\]?[^\]]*\]")
_MEANING: Final = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}


def _segment(text: str) -> str:
    parts, end = [], 0
    for sign in _SIGNS.finditer(text):
        parts += [re.escape(text[end : sign.start()]), _MEANING.get(sign[0]) or _one_of(sign[0])]
        end = sign.end()
    return "".join([*parts, re.escape(text[end:])])


def _one_of(brackets: str) -> str:
    """What ``[12]`` and ``[!12]`` match, which is no dot."""
    return rf"(?!\.){fnmatch.translate(brackets)[:-2]}"  # less the sign for the end of the text
