"""Globs over dotted names: ``layer*.*.conv1``, ``blocks.**.attn``."""

from __future__ import annotations

import re

__all__ = ["glob", "is_glob"]


def is_glob(query: str) -> bool:
    """Return whether a query that is no name stands for a pattern of names."""
    return "*" in query


def glob(pattern: str) -> re.Pattern[str]:
    """Return what names match: ``*`` stays inside one segment; ``**`` crosses dots, and may be no segment at all.

    >>> pattern = glob("blocks.**.conv*")
    >>> [bool(pattern.fullmatch(name)) for name in ("blocks.conv1", "blocks.0.a.conv2", "blocks.0")]
    [True, True, False]
    """
    *front, last = pattern.split(".")
    parts = [r"(?:[^.]+\.)*" if segment == "**" else _segment(segment) + r"\." for segment in front]
    return re.compile("".join(parts) + (".+" if last == "**" else _segment(last)))


def _segment(text: str) -> str:
    return ".*".join(r"[^.]*".join(map(re.escape, part.split("*"))) for part in text.split("**"))
