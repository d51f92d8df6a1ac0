"""Compiled models run eagerly while they are recorded.

Hooks that are added after ``torch.compile`` has compiled a model are ignored without a word, and whether
some compiled *function* calls the model cannot be seen from the model. So while any recorder is open,
``torch.compiler.set_stance("force_eager")`` holds. It is process-wide, costs microseconds, throws no
compiled code away, and ends with the last recorder.

Importing the compiler takes more than a second, and while nobody has, nothing is compiled. So it is not
imported, only watched for: a model may be compiled for the first time inside the block.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

import torch

from .errors import ActrecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["COMPILING", "eager"]

COMPILING = (
    "record() was called inside a function that torch.compile is compiling, where hooks do not run. "
    "Open the block outside of the compiled function."
)

_COMPILER = "torch._dynamo"


class _Stance(MetaPathFinder):
    """Holds the stance as long as somebody wants it."""

    def __init__(self) -> None:
        self._wanted = 0
        self._held: Any = None
        self._lock = threading.RLock()

    def want(self) -> None:
        """One recorder more is open."""
        with self._lock:
            if _COMPILER in sys.modules:
                try:
                    self._hold()
                except (
                    RuntimeError,
                    AssertionError,
                ) as error:  # the compiler forbids it in what it compiles
                    raise ActrecError(COMPILING) from error
            elif self not in sys.meta_path:
                sys.meta_path.insert(0, self)
            self._wanted += 1

    def release(self) -> None:
        """One recorder less is open."""
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                self._stop_watching()
                if self._held is not None:
                    self._held.__exit__(None, None, None)
                    self._held = None

    def _hold(self) -> None:
        if self._held is None:
            self._held = torch.compiler.set_stance("force_eager")

    def _stop_watching(self) -> None:
        if self in (sys.meta_path or ()):  # there is none when Python ends with a block still open
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python asks this of every import; for the compiler's, hold the stance as soon as it is there."""
        if fullname != _COMPILER:
            return None
        self._stop_watching()
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_hold(module: ModuleType) -> None:
                execute(module)
                with self._lock:
                    if self._wanted:
                        self._hold()

            spec.loader.exec_module = execute_and_hold  # type: ignore[method-assign]
        return spec


_stance = _Stance()


@contextmanager
def eager() -> Iterator[None]:
    """Let nothing run compiled in here."""
    _stance.want()
    try:
        yield
    finally:
        _stance.release()
