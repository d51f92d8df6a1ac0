"""A folder on disk: what is in it, and putting a file into it whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
import uuid
import warnings
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import torch
from typing_extensions import override

from actrec._values.memory import writable
from actrec.errors import UnlockedWarning

from .format import ANOTHER, UNFINISHED, Defect, need

if TYPE_CHECKING:
    from collections.abc import Callable

    from .safetensors import Buffer, Writable

fcntl: Any
try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows
    fcntl = None

__all__ = ["Disk", "Lock", "Reading", "Unfinished"]

GONE: Final = "it was there when it was opened, and is gone"
LOCK: Final = "writer.lock"
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_PATIENCE = 2.0  # seconds that another process may take to give a file its name


class Disk:
    """A folder: a :class:`~actrec.store.place.Place` on disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # the working directory may change

    def __truediv__(self, name: str) -> Disk:
        return Disk(self.path / name)

    @override
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
            return sorted(os.listdir(self.path))  # noqa: PTH208  # a million names in half a second
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        """The size of a file."""
        return (self.path / name).stat().st_size

    def read(self, name: str, begin: int, most: int) -> bytes:
        """Up to ``most`` bytes of a file from ``begin`` on."""
        with (self.path / name).open("rb", buffering=0) as file:
            file.seek(begin)
            return file.read(most) or b""

    def read_into(self, name: str, head: bytes, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``begin`` on of a file that begins with ``head``."""
        with closing(self.reading(name, head)) as file:
            file.into(begin, view)

    def reading(self, name: str, head: bytes) -> Reading:
        """Open a file that begins with ``head``, to read parts of it."""
        return Reading(self.path / name, head)

    def open(self, name: str) -> BinaryIO:
        """Open a file, to read it from one end to the other."""
        return (self.path / name).open("rb")

    def map(self, name: str, size: int, head: bytes) -> _Mapped:
        """Return the memory of a file of ``size`` bytes that begins with ``head``, mapped when a part of it is asked for."""
        return _Mapped(self, name, size, head)

    def make(self) -> None:
        """Make the folder, and those that it is in; if they are there, they stay. They survive a power loss."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Also the names of folders that are there already: whoever made them may have been killed before this.
        for folder in self.path.parents:
            if os.access(folder, os.R_OK | os.W_OK):
                Disk(folder).sync()

    def commit(self, name: str, write: Callable[[Writable], object]) -> None:
        """Write a new file in one step: it is there whole, and on the disk, or not at all. See :meth:`begin`."""
        self.begin(name, write).finish()

    def begin(self, name: str, write: Callable[[Writable], object]) -> Unfinished:
        """Write a new file, so that all that is left to do is to ``finish()`` it; ``FileExistsError`` if it is there then."""
        unfinished = Unfinished(self, name)
        unfinished.write(write)
        return unfinished

    def remove(self, name: str) -> None:
        """Remove a file that this process has written, and that nobody has any use for."""
        (self.path / name).unlink()

    def sweep(self) -> None:
        """Remove files that were never finished."""
        for name in self.names():
            if name.endswith(UNFINISHED):
                (self.path / name).unlink(missing_ok=True)

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
        """Lock the folder; ``BlockingIOError`` if somebody else has. The lock ends with the process, too.

        The lock is one of a file that is open for writing: those network file systems pass on, from one machine to another.
        (The library ``filelock`` does the same, but falls back to files that outlive a killed process, and what
        it does in a forked one depends on its version.)
        """
        try:
            return Lock(_locked(self.path / LOCK))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            message = (
                f"{self} cannot be locked: {error}. Nothing keeps another run from recording there at the same time. If one "
                "does, what is committed stays whole, and the run that comes second with a file ends with a WriteError."
            )
            warnings.warn(message, UnlockedWarning, stacklevel=2)
            return Lock(None)


def _locked(path: Path) -> int:
    """Open a file and lock it; ``BlockingIOError`` if somebody else has, another ``OSError`` if no lock can be had."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _lock(fd: int) -> None:
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # noqa: PLC0415  # pragma: no cover  # Windows

    try:  # pragma: no cover  # Windows
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except PermissionError as error:  # pragma: no cover  # Windows
        raise BlockingIOError(*error.args) from error


class _Mapped:
    """A file in memory. Writing to the memory copies the page, and never reaches the file."""

    def __init__(self, disk: Disk, name: str, size: int, head: bytes) -> None:
        self._disk, self._name, self._size, self._head = disk, name, size, head
        self._memory: torch.UntypedStorage | None = None

    def __getitem__(self, part: slice, /) -> torch.UntypedStorage:
        path = self._disk.path / self._name
        need(path.exists(), GONE)
        found = path.stat().st_size  # to read memory behind the end of a file would end the process
        need(
            found == self._size,
            f"it had {self._size} bytes when it was opened, and has {found} now",
        )
        if self._memory is None:
            need(self._disk.read(self._name, 0, len(self._head)) == self._head, ANOTHER)
            try:
                self._memory = _map(path, self._size)
            except RuntimeError:  # a process can have so many maps and no more
                return self._read(part)
        return cast("torch.UntypedStorage", self._memory[part])

    def _read(self, part: slice) -> torch.UntypedStorage:
        data = torch.empty(part.stop - part.start, dtype=torch.uint8, device="cpu")
        self._disk.read_into(self._name, self._head, part.start, writable(data))
        return data.untyped_storage()


def _map(path: Path, size: int) -> torch.UntypedStorage:
    try:
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        return cast("torch.UntypedStorage", storage)
    except UnicodeEncodeError:  # PyTorch wants text, and the names of files need be none
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


class Lock(AbstractContextManager[None]):
    """A folder is locked until this is released."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def release(self) -> None:
        """Let others have the folder. May be called again."""
        # A forked process closes its copy, with which the lock stays; to unlock would end that of its parent.
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    @override
    def __exit__(self, *_: object) -> None:
        self.release()


class Reading:
    """A file of which parts are read."""

    def __init__(self, path: Path, head: bytes) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise Defect(GONE) from None
        if self._file.read(len(head)) != head:
            self.close()
            raise Defect(ANOTHER)

    def into(self, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``begin`` on."""
        self._file.seek(begin)
        while view:
            many = self._file.readinto(view)
            if not many:
                now = os.fstat(self._file.fileno()).st_size
                defect = f"it has become shorter: it had more bytes when it was opened, and has {now} now"
                raise Defect(defect)
            view = view[many:]

    def announce(self, begin: int, nbytes: int) -> None:
        """Let the system fetch a part while we do something else."""
        if _announce is not None:
            _announce(self._file.fileno(), begin, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


_announce: Any = getattr(os, "posix_fadvise", None)  # not on macOS, nor on Windows


class Unfinished:
    """A file that is written, but has neither reached the disk for certain nor got its name."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._disk = disk
        self._name = name
        # Several processes may write the same name: each has a file of its own until one has won.
        self._path = disk.path / f"{name}.{uuid.uuid4().hex}{UNFINISHED}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._fd = os.open(self._path, flags, 0o666)

    def write(self, write: Callable[[Writable], object]) -> None:
        """Let ``write`` write all that it is."""
        try:
            write(FileBeingWritten(self._fd))
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
            _name(self._path, self._disk.path / self._name)
        except FileNotFoundError as error:
            raise FileExistsError(errno.EEXIST, _TAKEN_OVER, str(self._disk)) from error
        finally:
            self._unlink()
        self._disk.sync()

    def discard(self) -> None:
        """Take it away."""
        os.close(self._fd)
        self._unlink()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def _name(path: Path, name: Path) -> None:
    """Give a file a name that no other file has: ``FileExistsError`` if one has."""
    try:
        os.link(path, name)
    except OSError as error:
        if name.exists():
            if name.samefile(path):  # it was done, though the file server's answer was lost
                return
            raise FileExistsError(errno.EEXIST, _TAKEN, str(name)) from error
        _name_without_links(path, name)


_TAKEN: Final = "another run has written it"
_TAKEN_OVER: Final = (
    "the unfinished file is gone: another run has taken the folder over, or somebody has removed it"
)


def _name_without_links(path: Path, name: Path) -> None:
    """Rename a file while nobody else gives that name: whoever does makes a file beside it first, which only one can."""
    turn = name.with_name(name.name + ".turn" + UNFINISHED)
    _take(turn)
    try:
        if name.exists():
            raise FileExistsError(errno.EEXIST, _TAKEN, str(name))
        path.replace(name)
    finally:
        turn.unlink(missing_ok=True)


def _take(turn: Path) -> None:
    """Make a file that is not there; wait while it is, unless it stays for so long that who made it must be dead."""
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


class FileBeingWritten:
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
