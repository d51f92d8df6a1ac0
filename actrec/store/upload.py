"""Writes an object: into a local file first, which is then uploaded as a whole, with several tries."""

from __future__ import annotations

import errno
import inspect
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from actrec.errors import ReadError, WriteError

from .new_file import FileBeingWritten
from .objects import Objects, said

#: How many seconds to wait after each try that failed; there is one more try than waits.
WAITS: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16)
#: Errors that another try cannot avoid.
_FINAL: Final = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    ValueError, TypeError, NotImplementedError,
)  # fmt: skip
_HEAD: Final = 1 << 16  # bytes of an object that are compared with the file
_CHUNK: Final = 1 << 24  # bytes that are sent at a time
_SENDERS: Final = 4  # chunks that are sent at the same time


class Upload:
    """An object that was written to a local file, in the folder ``spool``, and is not uploaded yet."""

    def __init__(
        self,
        objects: Objects,
        name: str,
        write: Callable[[FileBeingWritten], object],
        spool: str | os.PathLike[str] | None,
    ) -> None:
        self._objects = objects
        self._name = name
        try:
            if spool is not None:
                Path(spool).mkdir(parents=True, exist_ok=True)
            fd, path = tempfile.mkstemp(suffix=f"-{name}", prefix="actrec-", dir=spool)
            self._path = Path(path)
            self._fill(fd, write)
        except OSError as error:
            where = tempfile.gettempdir() if spool is None else spool
            message = (
                f"the spool in {where}: {error}. Folder(..., spool=...) chooses another folder"
            )
            raise WriteError(message) from error

    def _fill(self, fd: int, write: Callable[[FileBeingWritten], object]) -> None:
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                write(FileBeingWritten(file.fileno()))
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Create the object; ``FileExistsError`` if another one exists. If all tries fail, the file is kept."""
        try:
            self._try_for_long()
        except FileExistsError:
            self.discard()
            raise
        except Exception as error:
            message = f"{said(error)} (tried {len(WAITS) + 1} times at most). The file is kept as {self._path}"
            raise WriteError(message) from error
        self.discard()

    def discard(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self._path.unlink()

    def _try_for_long(self) -> None:
        for wait in WAITS:
            try:
                return self._try()
            except Exception as error:  # file systems raise whatever their libraries do
                if _is_final(error):
                    raise
            time.sleep(wait)
        return self._try()

    def _try(self) -> None:
        """Create the object, unless an earlier try has created it, and check its size."""
        if not self._is_there():
            fs, path = self._objects.fs, self._objects.at(self._name)
            try:
                fs.put_file(str(self._path), path, mode="create", **_sending(fs))
            except Exception as error:
                # Some servers do not report that the object exists, and sometimes it was created but the answer was lost.
                taken = isinstance(error, FileExistsError) or not _is_final(error)
                if not (taken and self._is_there()):
                    raise
        sent, arrived = self._path.stat().st_size, self._objects.info(self._name)["size"]
        if sent != arrived:
            message = f"{sent} bytes were sent, and {arrived} have arrived"
            raise OSError(errno.EIO, message)

    def _is_there(self) -> bool:
        """Whether the object exists; ``FileExistsError`` if it has other content.

        Comparing the beginnings is enough: the header of a shard has the checksums of the rest, and the description of a
        rank has the time at which it began.
        """
        with self._path.open("rb") as file:
            own = file.read(_HEAD)
        try:
            size = self._objects.info(self._name)["size"]
            found = self._objects.download(self._name, 0, min(len(own), size))
        except FileNotFoundError:
            return False
        if found != own[: len(found)]:  # if only a part has arrived, they are equal
            taken = "another run has written it"
            raise FileExistsError(errno.EEXIST, taken, self._objects.shown(self._name))
        return True


def _is_final(error: BaseException) -> bool:
    """Whether another try would fail the same way."""
    cause = error.__cause__ if isinstance(error, ReadError) else None
    return isinstance(cause or error, _FINAL)


def _sending(fs: Any) -> dict[str, int]:
    """Return options that bound the memory of an upload, if the file system has them."""
    known = inspect.signature(getattr(fs, "_put_file", fs.put_file)).parameters
    options = {"chunksize": _CHUNK, "max_concurrency": _SENDERS}
    return {name: value for name, value in options.items() if name in known}
