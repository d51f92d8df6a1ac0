"""Whether recording arrives from compiled code on this PyTorch: a small model is compiled and recorded before the first one.

It takes half a second, once in a process. Where it fails, nothing is recorded silently wrong: ``compiled=True`` is refused.
"""

from __future__ import annotations

import threading
from typing import Final

import torch

from actrec.errors import OptionError

_testing: Final = threading.Lock()
#: What went wrong; ``None`` if nothing did.
_results: list[str | None] = []


def prepare() -> None:
    """Raise ``OptionError`` unless recording works in what this PyTorch compiles."""
    with _testing:
        if not _results:
            _results.append(_failure())
    if _results[0] is not None:
        message = (
            f"record(compiled=True): recording in compiled code does not work on torch {torch.__version__}, as a test of it "
            f"has shown ({_results[0]}). It was made for torch 2.13. Without compiled=True the model runs eagerly in the block, "
            "and is recorded on every version."
        )
        raise OptionError(message)


def _failure() -> str | None:
    """What goes wrong."""
    try:
        from .trial import failure  # noqa: PLC0415  # it needs what this PyTorch may not have

        return failure()
    except Exception as error:  # noqa: BLE001  # whatever that raises
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
