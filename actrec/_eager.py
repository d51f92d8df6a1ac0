"""Compiled models run eagerly while they are recorded.

Hooks that are added after ``torch.compile`` has compiled a model are ignored without a word, and whether
some compiled *function* calls the model cannot be seen from the model. So while any recorder is open,
``torch.compiler.set_stance("force_eager")`` holds. It is process-wide, costs microseconds, throws no
compiled code away, and ends with the last recorder.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["eager"]

_lock = threading.Lock()
_open = 0
_stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """Let nothing run compiled in here."""
    global _open, _stance
    with _lock:
        # Importing the compiler takes seconds, and while nobody has, nothing is compiled.
        if _stance is None and "torch._dynamo" in sys.modules:
            _stance = torch.compiler.set_stance("force_eager")
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0 and _stance is not None:
                _stance.__exit__(None, None, None)
                _stance = None
