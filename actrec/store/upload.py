"""Writing an object: into a local file first, which is then uploaded whole, by as many tries as it takes."""

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
from .safetensors import Writable

#: How many seconds to wait after each try that failed; there is one more try than waits.
WAITS: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16)
#: Errors that come again.
_FINAL: Final = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    ValueError, TypeError, NotImplementedError,
)  # fmt: skip
_HEAD: Final = 1 << 16  # bytes by which an object is compared with what was sent
_CHUNK: Final = 1 << 24  # bytes that are sent at a time
_SENDERS: Final = 4  # of such chunks


class Upload:
    """An object that is written to a local file, in the folder ``spool``, and not in the store yet."""

    def __init__(
        self,
        objects: Objects,
        name: str,
        write: Callable[[Writable], object],
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
            message = f"the spool in {where}: {error}. Folder(..., spool=...) puts it elsewhere"
            raise WriteError(message) from error

    def _fill(self, fd: int, write: Callable[[Writable], object]) -> None:
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                write(FileBeingWritten(file.fileno()))
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Create the object; ``FileExistsError`` if there is one. If that fails, for good, the file is kept."""
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
        """Take the file away."""
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
        """Create the object, unless an earlier try has, and check that all of it has arrived."""
        if not self._is_there():
            fs, path = self._objects.fs, self._objects.at(self._name)
            try:
                fs.put_file(str(self._path), path, mode="create", **_sending(fs))
            except Exception as error:
                # Some servers do not say that there is one, and of some answers nothing but an error arrives.
                taken = isinstance(error, FileExistsError) or not _is_final(error)
                if not (taken and self._is_there()):
                    raise
        sent, arrived = self._path.stat().st_size, self._objects.info(self._name)["size"]
        if sent != arrived:
            message = f"{sent} bytes were sent, and {arrived} have arrived"
            raise OSError(errno.EIO, message)

    def _is_there(self) -> bool:
        """Whether the object is there; ``FileExistsError`` if it is another one.

        The header of a shard has the checksums of the rest, and the description of a rank says when it began.
        """
        with self._path.open("rb") as file:
            own = file.read(_HEAD)
        try:
            size = self._objects.info(self._name)["size"]
            found = self._objects.download(self._name, 0, min(len(own), size))
        except FileNotFoundError:
            return False
        if found != own[: len(found)]:  # or of what was sent a part has arrived
            taken = "another run has written it"
            raise FileExistsError(errno.EEXIST, taken, self._objects.shown(self._name))
        return True


def _is_final(error: BaseException) -> bool:
    """Whether another try would fail the same way."""
    cause = error.__cause__ if isinstance(error, ReadError) else None
    return isinstance(cause or error, _FINAL)


def _sending(fs: Any) -> dict[str, int]:
    """Options that bound the memory which an upload takes, for the file systems that have them."""
    known = inspect.signature(getattr(fs, "_put_file", fs.put_file)).parameters
    options = {"chunksize": _CHUNK, "max_concurrency": _SENDERS}
    return {name: value for name, value in options.items() if name in known}
