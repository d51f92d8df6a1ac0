"""A folder on disk: what is in it, and putting a file into it whole or not at all."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ._format import UNFINISHED, need

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._container import Buffer, Writable

fcntl: Any
try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows
    fcntl = None

__all__ = ["Disk", "Lock", "Unfinished"]


class Disk:
    """A folder. Everything the store does to files, it does here."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # the working directory may change

    def __truediv__(self, name: str) -> Disk:
        return Disk(self.path / name)

    def names(self) -> list[str]:
        """What is in the folder, sorted; nothing if there is no folder."""
        try:
            return sorted(path.name for path in self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        """The size of a file."""
        return (self.path / name).stat().st_size

    def read(self, name: str, most: int) -> bytes:
        """The first ``most`` bytes of a file."""
        with (self.path / name).open("rb") as file:
            return file.read(most)

    def map(self, name: str, size: int) -> torch.UntypedStorage:
        """Map a file of ``size`` bytes. Writing to the memory copies the page, and never reaches the file."""
        path = self.path / name
        need(path.exists(), "it was there when it was opened, and is gone")
        found = path.stat().st_size
        need(found == size, f"it had {size} bytes when it was opened, and has {found} now")
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        return cast("torch.UntypedStorage", storage)

    def make(self) -> None:
        """Make the folder, for one caller alone: ``FileExistsError`` for the others."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir()
        self.sync()
        Disk(self.path.parent).sync()

    def commit(self, name: str, write: Callable[[Writable], object]) -> None:
        """Put a file into the folder, in one step: it is there whole, and on the disk, or not at all."""
        self.begin(name, write).finish()

    def begin(self, name: str, write: Callable[[Writable], object]) -> Unfinished:
        """Write a file, so that all that is left to do is to ``finish()`` it."""
        unfinished = Unfinished(self, name)
        unfinished.write(write)
        return unfinished

    def unmake(self) -> None:
        """Remove the folder, if it is there and empty."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)
        self.sync()

    def sync(self) -> None:
        """Make what names there are in the folder survive a power loss."""
        if not hasattr(os, "O_DIRECTORY"):  # pragma: no cover  # Windows does this itself
            return
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self) -> Lock:
        """Lock the folder; ``BlockingIOError`` if somebody else has. The lock ends with the process, too."""
        if fcntl is None:  # pragma: no cover  # Windows
            return Lock(None)
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise
        except OSError:  # a network file system without locks
            os.close(fd)
            return Lock(None)
        return Lock(fd)


class Lock(AbstractContextManager[None]):
    """A folder is locked until this is released."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def release(self) -> None:
        """Let others have the folder. May be called again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __exit__(self, *_: object) -> None:
        self.release()


class Unfinished:
    """A file that is written, but has neither reached the disk for certain nor got its name."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._disk = disk
        self._name = name
        self._path = disk.path / (name + UNFINISHED)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._fd = os.open(self._path, flags, 0o666)

    def write(self, write: Callable[[Writable], object]) -> None:
        """Let ``write`` write all that it is."""
        try:
            write(_File(self._fd))
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Put it onto the disk, and then into the folder."""
        try:
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
            self._path.replace(self._disk.path / self._name)
        except BaseException:
            self._unlink()
            raise
        self._disk.sync()

    def finish_first(self, disk: Disk) -> bool:
        """Put it onto the disk, and then into another folder, unless there is a file of that name; whether it is there."""
        try:
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
            _link(self._path, disk.path / self._name)
        except FileExistsError:
            return False
        finally:
            self._unlink()
        disk.sync()
        return True

    def discard(self) -> None:
        """Take it away."""
        os.close(self._fd)
        self._unlink()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def _link(path: Path, name: Path) -> None:
    """Give a file another name, which nobody else has given: ``FileExistsError`` otherwise."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with name.open("xb") as file:
            file.write(path.read_bytes())
            file.flush()
            os.fsync(file.fileno())


class _File:
    """A file that is being written."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def write_at_start(self, data: Buffer) -> None:
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.write(data)
