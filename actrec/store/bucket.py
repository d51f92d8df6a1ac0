"""A prefix in an object store, through ``fsspec``, as a place for recordings.

What a disk has and an object store has not, and what stands for it here:

* No folders: they are there when something is in them. Nothing is made.
* No rename: an object is put whole, in one request or several, and is there when the last one has succeeded. So a
  shard is written to a local file, and then uploaded.
* No locks: every object is created exclusively. A run that is resumed begins with a shard of its own, and a run that was thought
  to be dead, and is not, finds that name taken and ends with an error.
"""

from __future__ import annotations

import errno
import inspect
import os
import tempfile
import threading
import time
from collections import OrderedDict
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, TypeVar, cast

import torch
from typing_extensions import override

from actrec._values.memory import writable
from actrec.errors import OptionError, ReadError, WriteError

from .disk import GONE, FileBeingWritten
from .format import ANOTHER, Defect, need

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .safetensors import Writable

T = TypeVar("T")

__all__ = ["CACHE_BYTES", "Bucket"]

#: How many seconds to wait after each failed try to upload; there is one more try than waits. A file system like
#: ``s3fs`` has tried several times before it fails.
WRITE_WAITS: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16)
#: Errors that come again.
_FINAL: Final = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    ValueError, TypeError, NotImplementedError,
)  # fmt: skip

CACHE_BYTES: Final = 1 << 30
_BLOCK: Final = 4 << 20  # bytes that are downloaded at a time
_BLOCKS: Final = 8  # of each object that is open
_HEAD: Final = 1 << 16  # bytes in which the header of a shard is expected
_HEADS: Final = 16
_CHUNK: Final = 1 << 24  # bytes that are sent at a time
_SENDERS: Final = 4  # of such chunks

#: What tells versions of an object apart, by the names that file systems have for it: the best first.
_VERSIONS: Final = ("ETag", "etag", "generation", "created", "mtime", "LastModified")


class _About(NamedTuple):
    """What the store says of an object."""

    size: int
    version: object


def _about(info: Mapping[str, Any]) -> _About:
    version = next((info[key] for key in _VERSIONS if info.get(key)), None)
    stamp = version.timestamp() if isinstance(version, datetime) else version
    return _About(int(info["size"]), stamp)


def _filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system that ``fsspec`` has for a URL, and the path that it knows it by."""
    try:
        url_to_fs = import_module("fsspec.core").url_to_fs
        fs, path = url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        message = f"{url!r} needs a package that is not installed: {error}. For s3:// that is s3fs, for gs:// gcsfs."
        raise OptionError(message) from error
    except (ValueError, TypeError) as error:
        message = f"{url!r} with storage_options {sorted(options)}: fsspec says: {error}."
        raise OptionError(message) from error
    return fs, str(path).rstrip("/")


class Bucket:
    """A prefix in an object store: a :class:`~actrec.store.place.Place` in the network.

    Args:
        url: where it is.
        options: what ``fsspec`` passes to the file system.
        spool: the folder of files that are to be uploaded.
        cache_bytes: how much of what was downloaded is kept in memory.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        spool: str | os.PathLike[str] | None = None,
        cache_bytes: float = CACHE_BYTES,
    ) -> None:
        if not isinstance(cache_bytes, (int, float)) or not cache_bytes > 0:  # which NaN is not
            message = f"cache_bytes={cache_bytes!r}: expected a number of bytes greater than 0."
            raise OptionError(message)
        self.url = url.rstrip("/")
        self._options = dict(options)
        self._spool = spool
        self._cache_bytes = cache_bytes
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._fs, self._root = _filesystem(self.url, self._options)
        self._lock = threading.RLock()
        self._known: dict[str, _About] = {}  # what is there, as it was when it was asked for
        self._heads: OrderedDict[str, bytes] = OrderedDict()
        self._files: OrderedDict[str, BinaryIO] = (
            OrderedDict()
        )  # with the blocks that fsspec keeps of each

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Other processes need the options, credentials or not.
        return {name: getattr(self, name) for name in ("url", "_options", "_spool", "_cache_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(self.shown(name), self._options, self._spool, self._cache_bytes)

    @override
    def __str__(self) -> str:
        return self.url

    @override
    def __repr__(self) -> str:
        return f"Bucket({self.url!r})"

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """The URL without that part."""
        return self.url.rpartition("/")[0]

    def shown(self, name: str) -> str:
        """Return the URL of an object in it."""
        return f"{self.url}/{name}"

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @property
    def fs(self) -> Any:
        """The file system; in a forked process another one, for connections are not inherited."""
        if self._pid != os.getpid():
            self._begin()
        return self._fs

    # --- Reading ---------------------------------------------------------------------------------------

    def _get(self, name: str, request: Callable[[], T]) -> T:
        """Ask for something; ``FileNotFoundError`` if it is not there."""
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:
            message = f"{self.shown(name) if name else self.url} could not be read: {_said(error)}."
            raise ReadError(message) from error

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._get(name, lambda: self.fs.info(self._at(name)))
        return found

    def exists(self) -> bool:
        """Whether anything is there."""
        return bool(self.names())

    def is_file(self) -> bool:
        """Whether there is an object with this very URL."""
        try:
            return bool(self._info("")["type"] == "file")
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        """Return what is there, sorted, as if there were folders."""
        try:
            found = self._get("", lambda: self.fs.ls(self._root, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = {str(path).rstrip("/") for path in found} - {self._root}
        return sorted(path.rpartition("/")[2] for path in paths)

    def size(self, name: str) -> int:
        """Return the size of an object."""
        return self._what(name).size

    def _what(self, name: str) -> _About:
        fs = self.fs  # which may begin anew
        if name not in self._known:
            self._known[name] = _about(self._get(name, lambda: fs.info(self._at(name))))
        return self._known[name]

    def read(self, name: str, begin: int, most: int) -> bytes:
        """Return up to ``most`` bytes of an object from ``begin`` on."""
        end = min(begin + most, self.size(name))
        if end > _HEAD:
            return self._range(name, begin, end)
        with self._lock:
            if name not in self._heads:
                self._heads[name] = self._range(name, 0, min(_HEAD, self.size(name)))
            while len(self._heads) > _HEADS:
                self._heads.popitem(last=False)
            return self._heads[name][begin:end]

    def _range(self, name: str, begin: int, end: int) -> bytes:
        if begin >= end:
            return b""
        found = self._get(name, lambda: self.fs.cat_file(self._at(name), start=begin, end=end))
        return bytes(found)

    def read_into(self, name: str, head: bytes, begin: int, view: memoryview) -> None:  # noqa: ARG002  # see _file()
        """Fill ``view`` with the bytes of an object from ``begin`` on."""
        with self._lock:
            file = self._file(name)

            def fill() -> int:
                file.seek(begin)
                return file.readinto(view)  # type: ignore[attr-defined,no-any-return]

            try:
                many = self._get(name, fill)
            except (FileNotFoundError, ReadError) as error:
                self._check(
                    name
                )  # that an object is another one says more than how the store puts it
                raise Defect(GONE) from error if isinstance(error, FileNotFoundError) else error
        need(many == len(view), f"it has become shorter, and ends at byte {begin + many}")

    def reading(self, name: str, head: bytes) -> _Reading:
        """Return what reads parts of an object; it is opened when the first is asked for."""
        return _Reading(self, name, head)

    def _file(self, name: str) -> BinaryIO:
        """Return an object that is open, if it is still what it was; ``fsspec`` keeps the last blocks of it."""
        fs = self.fs
        file = self._files.pop(name, None)
        if file is None:
            self._check(name)
            options = {"cache_type": "blockcache", "cache_options": {"maxblocks": _BLOCKS}}
            opened = self._get(
                name, lambda: fs.open(self._at(name), "rb", block_size=_BLOCK, **options)
            )
            file = cast("BinaryIO", opened)
        self._files[name] = file
        while len(self._files) > max(1, self._cache_bytes // (_BLOCK * _BLOCKS)):
            self._files.popitem(last=False)[1].close()
        return file

    def _check(self, name: str) -> None:
        """Check that an object is what it was when it was opened."""
        try:
            found = _about(self._info(name))
        except FileNotFoundError:
            raise Defect(GONE) from None
        was = self._what(name)
        same = (
            f" It had {was.size} bytes then, and has {found.size} now"
            if was.size != found.size
            else ""
        )
        need(found == was, ANOTHER + same)

    def open(self, name: str) -> BinaryIO:
        """Open an object, to read it from one end to the other."""
        options = {"block_size": _CHUNK, "cache_type": "readahead"}
        opened = self._get(name, lambda: self.fs.open(self._at(name), "rb", **options))
        return cast("BinaryIO", opened)

    def map(self, name: str, size: int, head: bytes) -> _Remote:  # noqa: ARG002  # the store knows the size
        """Return what downloads those parts of an object that are asked for."""
        return _Remote(self, name, head)

    # --- Writing ---------------------------------------------------------------------------------------

    def make(self) -> None:
        """There are no folders to make."""

    def lock(self) -> _NoLock:
        """There are no locks. Whoever creates an object that is there fails."""
        return _NoLock()

    def sweep(self) -> None:
        """What was never finished is not there."""

    def commit(self, name: str, write: Callable[[Writable], object]) -> None:
        """Write a new object in one step: it is there whole, or not at all; ``FileExistsError`` if it is there already."""
        self.begin(name, write).finish()

    def begin(self, name: str, write: Callable[[Writable], object]) -> _Spooled:
        """Write an object to a local file, so that all that is left to do is to upload it."""
        try:
            if self._spool is not None:
                Path(self._spool).mkdir(parents=True, exist_ok=True)
            fd, path = tempfile.mkstemp(suffix=f"-{name}", prefix="actrec-", dir=self._spool)
        except OSError as error:
            raise self._no_spool(error) from error
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                write(FileBeingWritten(file.fileno()))
        except BaseException as error:
            Path(path).unlink(missing_ok=True)
            raise self._no_spool(error) from error if isinstance(error, OSError) else error
        return _Spooled(self, name, Path(path))

    def _no_spool(self, error: OSError) -> WriteError:
        where = tempfile.gettempdir() if self._spool is None else self._spool
        return WriteError(
            f"the spool in {where}: {error}. Folder(..., spool=...) puts it elsewhere"
        )

    def upload(self, name: str, source: Path) -> None:
        """Create an object of a file's content, and check that all of it has arrived."""
        for wait in WRITE_WAITS:
            try:
                self._upload_once(name, source)
            except Exception as error:  # file systems raise whatever their libraries do
                if _is_final(error):
                    raise
                time.sleep(wait)
            else:
                return
        self._upload_once(name, source)

    def _upload_once(self, name: str, source: Path) -> None:
        self._known.pop(name, None)
        if self._is_there(name) and not self._is_same(name, source):
            raise FileExistsError(errno.EEXIST, "another run has written it", self.shown(name))
        try:
            self.fs.put_file(str(source), self._at(name), mode="create", **_sending(self.fs))
        except Exception as error:
            # What a try has done whose answer was lost is done: it is there. Some servers do not say which condition
            # was not met.
            taken = isinstance(error, FileExistsError) or not _is_final(error)
            if not (taken and self._is_there(name)):
                raise
            if not self._is_same(name, source):
                message = "another run has written it"
                raise FileExistsError(errno.EEXIST, message, self.shown(name)) from error
        size, found = source.stat().st_size, self._info(name)["size"]
        if found != size:
            message = f"{size} bytes were sent, and {found} have arrived"
            raise OSError(errno.EIO, message)

    def _is_there(self, name: str) -> bool:
        try:
            self._info(name)
        except FileNotFoundError:
            return False
        return True

    def _is_same(self, name: str, source: Path) -> bool:
        """Whether an object is what was sent: of a shard, the header has the checksums of the rest."""
        with source.open("rb") as file:
            own = file.read(_HEAD)
        return self._range(name, 0, len(own)) == own


def _is_final(error: BaseException) -> bool:
    """Whether another try would fail the same way."""
    cause = error.__cause__ if isinstance(error, ReadError) else None
    return isinstance(cause or error, _FINAL)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(". ")


def _sending(fs: Any) -> dict[str, int]:
    """Options that bound the memory which an upload takes, for the file systems that have them."""
    known = inspect.signature(getattr(fs, "_put_file", fs.put_file)).parameters
    options = {"chunksize": _CHUNK, "max_concurrency": _SENDERS}
    return {name: value for name, value in options.items() if name in known}


class _Spooled:
    """A local file, on its way to the store."""

    def __init__(self, bucket: Bucket, name: str, path: Path) -> None:
        self._bucket = bucket
        self._name = name
        self._path = path

    def finish(self) -> None:
        """Upload it. If that fails, for good, the file is kept."""
        try:
            self._bucket.upload(self._name, self._path)
        except FileExistsError:
            self.discard()
            raise
        except Exception as error:
            message = f"{_said(error)} (tried {len(WRITE_WAITS) + 1} times at most). The file is kept as {self._path}"
            raise WriteError(message) from error
        self.discard()

    def discard(self) -> None:
        """Take it away."""
        with suppress(OSError):
            self._path.unlink()


class _NoLock(AbstractContextManager[None]):
    """Stands for a lock where there is none."""

    def release(self) -> None:
        """There is nothing to let go of."""

    @override
    def __exit__(self, *_: object) -> None:
        self.release()


class _Reading(NamedTuple):
    """An object of which parts are read."""

    bucket: Bucket
    name: str
    head: bytes

    def into(self, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``begin`` on."""
        self.bucket.read_into(self.name, self.head, begin, view)

    def announce(self, begin: int, nbytes: int) -> None:
        """Nothing is fetched before it is asked for."""

    def close(self) -> None:
        """The bucket closes what it has opened."""


class _Remote:
    """The memory of an object: what is asked for is downloaded."""

    def __init__(self, bucket: Bucket, name: str, head: bytes) -> None:
        self._bucket, self._name, self._head = bucket, name, head

    def __getitem__(self, part: slice, /) -> torch.UntypedStorage:
        data = torch.empty(part.stop - part.start, dtype=torch.uint8, device="cpu")
        self._bucket.read_into(self._name, self._head, part.start, writable(data))
        return data.untyped_storage()
