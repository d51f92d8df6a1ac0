"""Wide sweeps, of which the ordinary tests see a few cases: ``nox -s sweeps`` goes through all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["WHOLE", "only_in_sweeps", "some"]

T = TypeVar("T")

#: Whether sweeps are whole.
WHOLE: Final = os.environ.get("ACTREC_SWEEPS") == "whole"


def only_in_sweeps(test: Any) -> Any:
    """Leave a test to ``nox -s sweeps``: it starts many processes."""
    return pytest.mark.sweep(pytest.mark.skipif(not WHOLE, reason="nox -s sweeps")(test))


def some(cases: Iterable[T], few: int) -> list[T]:
    """All cases, if sweeps are whole; else so few of them, from every part of the list.

    >>> some("abcdefgh", 3) if not WHOLE else ["a", "c", "f"]
    ['a', 'c', 'f']
    """
    found = list(cases)
    many = len(found)
    return found if WHOLE or many <= few else [found[at * many // few] for at in range(few)]
