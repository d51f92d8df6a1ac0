"""The lock of a rank's folder: a file that is open for writing, which network file systems lock on all machines.

The package ``filelock`` is not used: on a disk without locks it falls back to files that outlive a killed process, while
this module warns, and what it does in a forked process depends on its version.
"""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from actrec.errors import UnlockedWarning

fcntl: Any
try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows
    fcntl = None

LOCK: Final = "writer.lock"
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def locked(folder: Path) -> ExitStack:
    """Lock a folder until the result is closed or the process ends; ``BlockingIOError`` if another process has locked it.

    Where the file system has no locks, warn, and lock nothing.
    """
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    lock = ExitStack()
    lock.callback(os.close, fd)
    try:
        _lock(fd)
    except OSError as error:
        lock.close()
        if error.errno not in _NO_LOCKS:
            raise
        message = (
            f"{folder} cannot be locked: {error}. So another run could record there at the same time. If one does, committed "
            "data stays intact, and the run that is second to write a file ends with a WriteError."
        )
        warnings.warn(message, UnlockedWarning, stacklevel=2)
    _held.add(lock)
    return lock


def _lock(fd: int) -> None:
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # noqa: PLC0415  # pragma: no cover  # Windows

    try:  # pragma: no cover  # Windows
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except PermissionError as error:  # pragma: no cover  # Windows
        raise BlockingIOError(*error.args) from error


# --- Forked processes --------------------------------------------------------------------------------

_held: weakref.WeakSet[ExitStack] = weakref.WeakSet()


def _release_all() -> None:
    """Close the copies of a forked process, without unlocking: that would end the lock of its parent."""
    for lock in _held:
        lock.close()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows
    os.register_at_fork(after_in_child=_release_all)
