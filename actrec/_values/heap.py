"""Giving memory back that nobody uses.

The allocator of glibc often cannot use again what was freed between two tensors that are kept: a hole of the size of
a tensor is too small for another one, which has to be aligned. Where values wait for the disk, the holes between them
came to as much as the values. What is in a hole can be given back to the system all the same.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WORTH_IT", "give_back"]

WORTH_IT: Final = 1 << 25  # bytes: it takes the time of writing a few megabytes


def _found() -> Callable[[int], int]:
    """``malloc_trim`` where the C library has it, which is glibc alone."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another system
        return lambda _: 0
    return trim


_trim = _found()


def give_back(kept: int) -> None:
    """Give back the holes between values of so many bytes."""
    if kept >= WORTH_IT:
        _trim(0)
