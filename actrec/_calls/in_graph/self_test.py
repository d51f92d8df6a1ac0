"""Tests whether recording in compiled code works on this version of PyTorch, before it is first used.

A small model is compiled and recorded. This takes half a second, once in a process. If it fails, ``compiled=True`` is refused.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Final

import torch

from actrec.errors import OptionError

_testing: Final = threading.Lock()


def prepare() -> None:
    """Raise ``OptionError`` unless recording works in code that this PyTorch compiles."""
    with _testing:
        failure = _failure()
    if failure is not None:
        message = (
            f"record(compiled=True): recording in compiled code does not work on torch {torch.__version__}: a self-test "
            f"failed ({failure}). It needs torch 2.13, for which it was made. Without compiled=True the model runs eagerly in the block, "
            "and is recorded on every version."
        )
        raise OptionError(message)


@cache
def _failure() -> str | None:
    """Run the test, once. Return what goes wrong, if anything does."""
    try:
        from .trial import failure  # noqa: PLC0415  # the import fails if this PyTorch lacks something

        return failure()
    except Exception as error:  # noqa: BLE001  # whatever that raises
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
