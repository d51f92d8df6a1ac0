"""A file that is being written: it gets its name once it is synced, and never replaces another file."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from .format import UNFINISHED

Buffer: TypeAlias = bytes | bytearray | memoryview

_PATIENCE = 2.0  # seconds that another process may take to name a file
_TAKEN: Final = "another run has written it"
_TAKEN_OVER: Final = "the unfinished file is gone: another run has taken over the folder, or somebody has removed the file"


class Unfinished:
    """A file that is neither synced nor named yet."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        # Several processes may write the same name: each has its own file until one gets the name.
        self._path = folder / f"{name}.{uuid.uuid4().hex}{UNFINISHED}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._fd = os.open(self._path, flags, 0o666)

    def write(self, write: Callable[[FileBeingWritten], object]) -> None:
        """Let ``write`` write the content."""
        try:
            write(FileBeingWritten(self._fd))
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Sync the file, and then name it; ``FileExistsError`` if there is a file with its name."""
        try:
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
            _name(self._path, self._folder / self._name)
        except FileNotFoundError as error:
            raise FileExistsError(errno.EEXIST, _TAKEN_OVER, str(self._folder)) from error
        finally:
            self._unlink()
        sync(self._folder)

    def discard(self) -> None:
        """Close and remove the file."""
        os.close(self._fd)
        self._unlink()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


class FileBeingWritten:
    """A file that is being written."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, data: Buffer) -> None:
        """Append."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def write_at_start(self, data: Buffer) -> None:
        """Overwrite the beginning."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.write(data)


def sync(folder: Path) -> None:
    """Sync the names in a folder, so that they survive a power loss."""
    if not hasattr(os, "O_DIRECTORY"):  # pragma: no cover  # Windows does this itself
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- Names -------------------------------------------------------------------------------------------


def _name(path: Path, name: Path) -> None:
    """Give a file a name; ``FileExistsError`` if another file has it."""
    try:
        os.link(path, name)
    except OSError as error:
        if name.exists():
            if name.samefile(path):  # it succeeded, but the file server's answer was lost
                return
            raise FileExistsError(errno.EEXIST, _TAKEN, str(name)) from error
        _name_without_links(path, name)


def _name_without_links(path: Path, name: Path) -> None:
    """Rename a file while no other process uses that name: each first creates a second file, which only one can."""
    turn = name.with_name(name.name + ".turn" + UNFINISHED)
    _take(turn)
    try:
        if name.exists():
            raise FileExistsError(errno.EEXIST, _TAKEN, str(name))
        path.replace(name)
    finally:
        turn.unlink(missing_ok=True)


def _take(turn: Path) -> None:
    """Create a file; wait while it exists, unless it stays so long that the process that created it must be dead."""
    seen: object = None
    since = time.monotonic()
    while True:
        try:
            os.close(os.open(turn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                about = turn.stat()
                if (about.st_ino, about.st_mtime_ns) != seen:
                    seen, since = (about.st_ino, about.st_mtime_ns), time.monotonic()
                elif time.monotonic() > since + _PATIENCE:
                    turn.unlink()
            time.sleep(_PATIENCE / 200)
        else:
            return
