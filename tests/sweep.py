"""Wide sweeps, of which the ordinary tests see a few cases: ``nox -s sweeps`` goes through all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["WHOLE", "some"]

T = TypeVar("T")

#: Whether sweeps are whole.
WHOLE: Final = os.environ.get("ACTREC_SWEEPS") == "whole"


def some(cases: Iterable[T], few: int) -> list[T]:
    """All cases, if sweeps are whole; else so few of them, from every part of the list.

    >>> some("abcdefgh", 3) if not WHOLE else ["a", "c", "f"]
    ['a', 'c', 'f']
    """
    found = list(cases)
    many = len(found)
    return found if WHOLE or many <= few else [found[at * many // few] for at in range(few)]
