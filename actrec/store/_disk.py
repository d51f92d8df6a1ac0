"""A folder on disk: what is in it, and putting a file into it whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
import warnings
from collections import OrderedDict
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import torch

from actrec.errors import UnlockedWarning

from ._format import UNFINISHED, Defect, corrupt, need

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
LOCK: Final = "writer.lock"
_PATIENCE = 2.0  # seconds that another process may take to give a file its name


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

    def map(self, name: str, size: int, head: bytes) -> _Parts:
        """Return the memory of a file of ``size`` bytes that begins with ``head``. Writing to it never reaches the file."""
        return _Parts(str(self.path / name), size, head)

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
        """Write a new file, so that all that is left to do is to ``finish()`` it; ``FileExistsError`` if it is there then."""
        unfinished = Unfinished(self, name, exclusive=True)
        unfinished.write(write)
        return unfinished

    def unmake(self) -> None:
        """Remove the folder, if it is there and has nothing in it but its lock."""
        with contextlib.suppress(OSError):
            if self.names() == [LOCK]:
                (self.path / LOCK).unlink()
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
        """Lock the folder; ``BlockingIOError`` if somebody else has. The lock ends with the process, too.

        The lock is one of a file that is open for writing: those network file systems pass on, from one machine to another.
        """
        try:
            return Lock(_locked(self.path / LOCK))
        except (BlockingIOError, FileNotFoundError):
            raise
        except OSError as error:
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
        # Several processes may write the same name: each has a file of its own until one has won.
        self._path = Path(str(by or disk)) / f"{name}.{uuid.uuid4().hex}{UNFINISHED}"
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
            path = self._disk.path / self._name
            if self._exclusive:
                _name(self._path, path)
            else:
                self._path.replace(path)
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


# --- Reading parts -----------------------------------------------------------------------------------

#: A part of so many bytes is mapped, and a smaller one read.
_MAPPED: Final = 1 << 18
#: In a file of so many bytes, also a part that somebody may keep.
_LARGE: Final = 1 << 26
#: So many files stay mapped that nobody looks at, of all that the process reads. Linux allows it 65,530 maps.
_MOST_MAPPED: Final = 64


class _Parts:
    """A file that is there, of which parts are asked for.

    Where it was replaced or cut short since it was opened, that is found before each part is read. A map that is looked at
    while the file is cut short ends the process, so it is for what is large.
    """

    def __init__(self, path: str, size: int, head: bytes) -> None:
        self._path = path
        self._size = size
        self._head = head

    def __getitem__(self, part: slice, /) -> torch.UntypedStorage:
        return self._part(part.start, part.stop, mapped=self._size >= _LARGE)

    def view(self, begin: int, end: int) -> torch.UntypedStorage:
        return self._part(begin, end, mapped=True)

    def _part(self, begin: int, end: int, *, mapped: bool) -> torch.UntypedStorage:
        try:
            with FileIO(self._path) as file:
                about = os.fstat(file.fileno())
                need(about.st_size == self._size, self._cut_short(about.st_size))
                need(file.read(len(self._head)) == self._head, ANOTHER)
                if mapped and end - begin >= _MAPPED:
                    whole = self._whole((about.st_dev, about.st_ino))
                    if whole is not None:
                        return cast("torch.UntypedStorage", whole[begin:end])
                data = bytearray(end - begin)
                view = memoryview(data)
                file.seek(begin)
                while view:
                    many = file.readinto(view)
                    need(many, self._cut_short(file.seek(0, os.SEEK_END)))
                    view = view[many:]
        except FileNotFoundError:
            raise corrupt(self._path, "it was there when it was opened, and is gone") from None
        except Defect as defect:
            raise corrupt(self._path, defect) from None
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()

    def _cut_short(self, size: int) -> str:
        return f"it had {self._size} bytes when it was opened, and has {size} now"

    def _whole(self, identity: tuple[int, int]) -> torch.UntypedStorage | None:
        """All of the file, mapped; ``None`` if that cannot be: the process may have too many maps already."""
        then, whole = _maps.pop(self, (None, None))
        if then != identity:
            try:
                mapped = torch.UntypedStorage.from_file(self._path, shared=False, nbytes=self._size)
                whole = cast("torch.UntypedStorage", mapped)
            except (
                RuntimeError,
                UnicodeEncodeError,
            ):  # PyTorch wants text, and names of files need be none
                return None
        _maps[self] = identity, whole
        while len(_maps) > _MOST_MAPPED:
            _maps.popitem(last=False)
        return whole


#: The files that are mapped, and which they were; the one used last is the last.
_maps: OrderedDict[_Parts, tuple[tuple[int, int], torch.UntypedStorage | None]] = OrderedDict()


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
