"""A folder on disk: lists it, reads parts of its files, and adds files atomically."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias, cast

import torch
from typing_extensions import override

from .format import ANOTHER, UNFINISHED, corrupt
from .lock import locked
from .new_file import FileBeingWritten, Unfinished, sync

#: Runs a function in a thread.
Later: TypeAlias = Callable[..., Future[Any]]

GONE: Final = "it was there when it was opened, and is gone"


class Disk:
    """A folder. :class:`~actrec.store.bucket.Bucket` has the same methods."""

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

    def shown(self, name: str) -> str:
        """Return the path of a file in it, for a message."""
        return str(self.path / name)

    # --- What is there ---------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self.path.is_dir()

    def is_file(self) -> bool:
        """Whether there is something else at the path."""
        return self.path.exists() and not self.path.is_dir()

    def names(self) -> list[str]:
        """Return the names in the folder, in any order; none if there is no folder."""
        try:
            return os.listdir(self.path)  # noqa: PTH208  # a million names in half a second; sorting them takes as long
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        """Return the size of a file; ``FileNotFoundError`` if it is not there."""
        return (self.path / name).stat().st_size

    # --- Reading ---------------------------------------------------------------------------------------

    def read(self, name: str, begin: int, most: int) -> bytes:
        """Return up to ``most`` bytes of a file from ``begin`` on."""
        with (self.path / name).open("rb", buffering=0) as file:
            file.seek(begin)
            return file.read(most) or b""

    def reading(self, name: str, head: bytes) -> Reading:
        """Open a file that began with ``head`` when the recording was opened, to read parts of it."""
        return Reading(self.path / name, head)

    def open(self, name: str) -> BinaryIO:
        """Open a file, to read it from one end to the other."""
        return (self.path / name).open("rb")

    def map(self, name: str, size: int, head: bytes) -> Mapped:
        """Return the memory of a file that had ``size`` bytes, the first of them ``head``, when the recording was opened."""
        return Mapped(self.path / name, size, head)

    # --- Writing ---------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the folder and its parents, unless they exist, in a way that survives a power loss."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Also those that exist already: the process that made them may have been killed before syncing.
        for folder in self.path.parents:
            if os.access(folder, os.R_OK | os.W_OK):
                sync(folder)

    def lock(self) -> ExitStack:
        """Lock the folder; ``BlockingIOError`` if another process has locked it."""
        return locked(self.path)

    def begin(self, name: str, write: Callable[[FileBeingWritten], object]) -> Unfinished:
        """Write a new file; ``finish()`` of the result gives it its name."""
        unfinished = Unfinished(self.path, name)
        unfinished.write(write)
        return unfinished

    def commit(self, name: str, write: Callable[[FileBeingWritten], object]) -> None:
        """Write a new file atomically: completely, or not at all; ``FileExistsError`` if it exists."""
        self.begin(name, write).finish()

    def remove(self, name: str) -> None:
        """Remove a file that this process has written and that is not needed."""
        (self.path / name).unlink()

    def sweep(self) -> None:
        """Remove files that were never finished."""
        for name in self.names():
            if name.endswith(UNFINISHED):
                (self.path / name).unlink(missing_ok=True)


class Reading:
    """A file of which parts are read. Raises ``CorruptRecordingError`` if something is wrong with it."""

    def __init__(self, path: Path, head: bytes) -> None:
        self._path = path
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise corrupt(path, GONE) from None
        self._fd = self._file.fileno()
        if self._file.read(len(head)) != head:
            self.close()
            raise corrupt(path, ANOTHER)

    def into(self, begin: int, *views: memoryview) -> None:
        """Fill ``views``, one after the other, with the bytes from ``begin`` on."""
        many = _read(self._fd, views, begin)
        while many < sum(map(len, views)):
            if not many:
                now = os.fstat(self._fd).st_size
                defect = f"it has become shorter: it had more bytes when it was opened, and has {now} now"
                raise corrupt(self._path, defect)
            begin, views = begin + many, _after(many, views)
            many = _read(self._fd, views, begin)

    def announce(self, begin: int, nbytes: int, later: Later) -> None:  # noqa: ARG002
        """Let the system read a part ahead, if it can."""
        if _announce is not None:
            _announce(self._file.fileno(), begin, nbytes, os.POSIX_FADV_WILLNEED)

    def gather(self, parts: Iterable[tuple[int, int]], later: Later) -> None:
        """Do nothing: the parts are read one after the other."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _after(many: int, views: Sequence[memoryview]) -> tuple[memoryview, ...]:
    """Return the views without their first ``many`` bytes."""
    at = 0
    while many >= len(views[at]):
        many -= len(views[at])
        at += 1
    return views[at][many:], *views[at + 1 :]


def _read_one(fd: int, views: Sequence[memoryview], begin: int) -> int:
    """Fill the first view, and return how many bytes were read."""
    os.lseek(fd, begin, os.SEEK_SET)
    found = os.read(fd, len(views[0]))
    views[0][: len(found)] = found
    return len(found)


_read: Any = getattr(os, "preadv", _read_one)  # not on Windows
_announce: Any = getattr(os, "posix_fadvise", None)  # not on macOS, nor on Windows


class Mapped:
    """A file that is mapped privately: writing to the memory copies the page, and never changes the file."""

    def __init__(self, path: Path, size: int, head: bytes) -> None:
        self._path, self._size, self._head = path, size, head
        self._memory: torch.UntypedStorage | None = None

    def part(self, begin: int, nbytes: int) -> torch.UntypedStorage | None:
        """Return a part of the memory, which stays valid; ``None`` if the file cannot be mapped.

        Raises ``CorruptRecordingError`` if another file is there by now.
        """
        try:
            found = self._path.stat().st_size
        except FileNotFoundError:
            raise corrupt(self._path, GONE) from None
        # Reading mapped memory after the end of the file would kill the process (SIGBUS).
        if found != self._size:
            defect = f"it had {self._size} bytes when it was opened, and has {found} now"
            raise corrupt(self._path, defect)
        if self._memory is None:
            Reading(self._path, self._head).close()  # has compared the first bytes
            try:
                self._memory = _map(self._path, self._size)
            except (RuntimeError, UnicodeEncodeError):
                # The number of maps of a process is limited, and PyTorch requires file names to be valid text.
                return None
        return cast("torch.UntypedStorage", self._memory[begin : begin + nbytes])


def _map(path: Path, size: int) -> Any:
    return torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
