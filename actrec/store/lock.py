"""The lock of a rank's folder: a file that is open for writing, which network file systems lock on all machines.

The package ``filelock`` is not used: on a disk without locks it falls back to files that outlive a killed process, while
this module warns, and what it does in a forked process depends on its version.
"""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from typing_extensions import override

from actrec.errors import UnlockedWarning

fcntl: Any
try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows
    fcntl = None

LOCK: Final = "writer.lock"
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Lock(AbstractContextManager[None]):
    """Keeps a folder locked until it is released or the process ends. Without a file, it locks nothing."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Unlock the folder. May be called again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    @override
    def __exit__(self, *_: object) -> None:
        self.release()


def locked(folder: Path) -> Lock:
    """Lock a folder; ``BlockingIOError`` if another process has locked it. Warn if the file system has no locks."""
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(fd)
    except OSError as error:
        os.close(fd)
        if error.errno not in _NO_LOCKS:
            raise
        message = (
            f"{folder} cannot be locked: {error}. So another run could record there at the same time. If one does, committed "
            "data stays intact, and the run that is second to write a file ends with a WriteError."
        )
        warnings.warn(message, UnlockedWarning, stacklevel=2)
        return Lock()
    return Lock(fd)


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

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_all() -> None:
    """Close the copies of a forked process, without unlocking: that would end the lock of its parent."""
    for lock in _held:
        lock.release()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows
    os.register_at_fork(after_in_child=_release_all)
