"""A folder on disk: what is in it, and putting a file into it whole or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

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

ANOTHER: Final = "it is another file than when it was opened"


class Disk:
    """A folder: a :class:`~actrec.store._place.Place` on disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # the working directory may change

    def __truediv__(self, name: str) -> Disk:
        return Disk(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def parent(self) -> str:
        """The path of the folder that it is in."""
        return str(self.path.parent)

    def shown(self, name: str) -> str:
        """The path of a file in it."""
        return str(self.path / name)

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self.path.is_dir()

    def is_file(self) -> bool:
        """Whether there is something else at the path."""
        return self.path.exists() and not self.path.is_dir()

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

    def open(self, name: str) -> BinaryIO:
        """Open a file, to read it from one end to the other."""
        return (self.path / name).open("rb")

    def map(self, name: str, size: int, head: bytes) -> torch.UntypedStorage:
        """Map a file of ``size`` bytes that begins with ``head``. Writing to the memory copies the page, and never reaches the file."""
        path = self.path / name
        need(path.exists(), "it was there when it was opened, and is gone")
        found = path.stat().st_size
        need(found == size, f"it had {size} bytes when it was opened, and has {found} now")
        need(self.read(name, len(head)) == head, ANOTHER)
        try:
            storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        except UnicodeEncodeError:  # PyTorch wants text, and the names of files need be none
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
            storage = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return cast("torch.UntypedStorage", storage)

    def make(self) -> None:
        """Make the folder, for one caller alone: ``FileExistsError`` for the others."""
        try:
            self.path.mkdir(parents=True)
        finally:
            # Also the names of folders that are there already: whoever made them may have been killed before this.
            for folder in [one for one in self.path.parents if os.access(one, os.R_OK | os.W_OK)]:
                Disk(folder).sync()

    def commit(
        self,
        name: str,
        write: Callable[[Writable], object],
        *,
        exclusive: bool = False,
        by: object = None,
    ) -> None:
        """Put a file into the folder, in one step: it is there whole, and on the disk, or not at all.

        If it is there already it is replaced, or, if this is ``exclusive``, stays: ``FileExistsError``. Until
        it has its name it is in the folder of whom it is ``by``.
        """
        unfinished = Unfinished(self, name, exclusive=exclusive, by=by)
        unfinished.write(write)
        unfinished.finish()

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

    def __init__(
        self, disk: Disk, name: str, *, exclusive: bool = False, by: object = None
    ) -> None:
        self._disk = disk
        self._name = name
        self._exclusive = exclusive
        # Where several may write the same name, each has a file of its own until one has won.
        own = f".{uuid.uuid4().hex}" if exclusive else ""
        self._path = Path(str(by or disk)) / (name + own + UNFINISHED)
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
            self._name_it(self._disk.path / self._name)
        except BaseException:
            self._unlink()
            raise
        self._disk.sync()

    def _name_it(self, path: Path) -> None:
        if self._exclusive:
            _link(self._path, path)
            self._path.unlink()
        else:
            self._path.replace(path)

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
