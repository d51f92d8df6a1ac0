"""A prefix in an object store, through ``fsspec``, as a place for recordings.

What a disk has and an object store has not, and what stands for it here:

* No folders: they are there when something is in them. Nothing is made.
* No rename: an object is put whole, in one request or several, and is there when the last one has succeeded. So a
  shard is written to a local file, the spool, and then uploaded.
* No locks: a writer has a *claim*, an object that only one of them can create. A run that is resumed takes
  the claim over, for it cannot know whether the run before is dead. That one, if it is not, finds after its next
  upload that the claim is not its own, and ends with an error. Shards are created exclusively, too: whoever comes second fails.
  On one machine the spool is locked, so that there nobody takes over from a run that lives.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import io
import json
import os
import socket
import tempfile
import time
import uuid
from bisect import bisect_left
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, TypeVar

from actrec.errors import OptionError, ReadError, WriteError

from ._cache import Cache
from ._disk import LOCK, Disk, _File
from ._format import corrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ._container import Buffer, Writable
    from ._disk import Lock

    T = TypeVar("T")

__all__ = ["Bucket"]

CLAIM: Final = "claim.json"
SHARD: Final = ".safetensors"

#: How many seconds to wait after each failed try; there is one more try than waits. A file system like ``s3fs`` has
#: tried several times before it fails.
READ_WAITS: tuple[float, ...] = (0.5,)
WRITE_WAITS: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16)
#: Errors that come again.
_FINAL: Final = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    ValueError, TypeError, NotImplementedError,
)  # fmt: skip

_LENGTH: Final = 8  # bytes at the start of a shard, which tell the length of the header
_GUESS: Final = (
    1 << 16
)  # bytes in which the header of a shard is expected, until a longer one was met,
_MOST_GUESS: Final = 1 << 20  # up to this
_AHEAD: Final = 64  # shards whose headers are fetched together
_CHUNK: Final = 1 << 24  # bytes that are sent or streamed at a time
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
    """A prefix in an object store: a :class:`~actrec.store._place.Place` in the network."""

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        spool: str | os.PathLike[str] | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._options = dict(options)
        self._spool = spool
        self._cache = cache or Cache()
        self._known: dict[str, _About] = {}  # what is there, as it was when it was listed
        self._listed: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._fs, self._root = _filesystem(self.url, self._options)
        self._heads: dict[str, bytes] = {}
        self._guess = 0
        self._claim: bytes | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Other processes need the options, credentials or not. A claim is of one process.
        kept = ("url", "_options", "_spool", "_cache", "_known", "_listed")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(self.shown(name), self._options, self._spool, self._cache)

    def __str__(self) -> str:
        return self.url

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
        """The URL of an object in it."""
        return f"{self.url}/{name}"

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    # --- Requests --------------------------------------------------------------------------------------

    @property
    def fs(self) -> Any:
        """The file system; in a forked process another one, for connections are not inherited."""
        if self._pid != os.getpid():
            self._begin()
        return self._fs

    def _get(self, name: str, request: Callable[[], T]) -> T:
        """Ask for something, and again if that may help; ``FileNotFoundError`` if it is not there."""
        try:
            return _tried(request, READ_WAITS)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:
            message = f"{self.shown(name) if name else self.url} could not be read: {_said(error)}."
            raise ReadError(message) from error

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._get(name, lambda: self.fs.info(self._at(name)))
        return found

    # --- Reading ---------------------------------------------------------------------------------------

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
        """What is there, sorted, as if there were folders."""
        try:
            found = self._get("", lambda: self.fs.ls(self._root, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            found = []
        paths = {str(info["name"]).rstrip("/"): info for info in found}
        paths.pop(self._root, None)  # an object that stands for the folder
        by_name = {path.rpartition("/")[2]: info for path, info in paths.items()}
        self._known = {
            name: _about(info) for name, info in by_name.items() if info["type"] == "file"
        }
        self._listed = sorted(by_name)
        return self._listed

    def size(self, name: str) -> int:
        """The size of an object."""
        return self._what(name).size

    def _what(self, name: str) -> _About:
        if name not in self._known:
            self._known[name] = _about(self._info(name))
        return self._known[name]

    def read(self, name: str, most: int) -> bytes:
        """The first ``most`` bytes of an object. Of shards, many are fetched in one go."""
        size = self.size(name)
        most = min(most, size)
        if not name.endswith(SHARD):
            return self._ranges(name, [(0, most)])[0]
        if name not in self._heads:
            self._fetch_heads(name)
        head = self._heads[name]
        if len(head) < most:
            head += self._ranges(name, [(len(head), most)])[0]
        if most > _LENGTH:  # that was the header
            self._guess = max(self._guess, min(most, _MOST_GUESS))
            del self._heads[name]
        return head[:most]

    def _fetch_heads(self, name: str) -> None:
        """Fetch the beginning of a shard and, once the length of a header is known, of those behind it."""
        at = bisect_left(self._listed, name)
        names = [other for other in self._listed[at : at + _AHEAD] if other.endswith(SHARD)]
        if not self._guess or name not in names:
            names = [name]
        guess = max(self._guess, _GUESS)
        ends = [min(self._what(other).size, guess) for other in names]
        paths = [self._at(other) for other in names]

        def fetch() -> list[Any]:
            found: list[Any] = self.fs.cat_ranges(paths, [0] * len(paths), ends, on_error="return")
            if isinstance(found[0], Exception):  # what is wrong with others is found at their turn
                raise found[0]
            return found

        pairs = zip(names, self._get(name, fetch), strict=True)
        self._heads = {other: head for other, head in pairs if isinstance(head, bytes)}

    def _ranges(self, name: str, parts: list[tuple[int, int]]) -> list[bytes]:
        """Parts of an object, fetched at once."""
        paths = [self._at(name)] * len(parts)
        begins, ends = [list(each) for each in zip(*parts, strict=True)]
        found: list[bytes] = self._get(
            name, lambda: self.fs.cat_ranges(paths, begins, ends, on_error="raise")
        )
        return found

    def open(self, name: str) -> BinaryIO:
        """Stream an object, in chunks."""
        return io.BufferedReader(_Streamed(self, name), _CHUNK)

    def map(
        self,
        name: str,
        size: int,
        head: bytes,  # noqa: ARG002  # the store tells versions apart
    ) -> _Remote:
        """The memory of an object, of which is downloaded what is asked for."""
        return _Remote(self, name, size, self._what(name))

    # --- Writing ---------------------------------------------------------------------------------------

    def make(self) -> None:
        """Claim the folder, for one caller alone: ``FileExistsError`` for the others."""
        claim = self._new_claim()
        self.commit(CLAIM, lambda file: file.write(claim), exclusive=True)
        self._claim = claim

    def unmake(self) -> None:
        """There are no folders to remove; the claim goes with the lock."""

    @staticmethod
    def _new_claim() -> bytes:
        about = {"claim": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        return json.dumps(about).encode()

    def lock(self) -> _Claim:
        """Take over the claim, unless the run that has it is one on this machine: ``BlockingIOError``."""
        with ExitStack() as undo:
            undo.callback(self.give_up)
            spool = self._spooling()
            lock = spool.lock()
            undo.callback(lock.release)
            for leftover in spool.names():
                if leftover != LOCK:
                    spool.remove(leftover)
            if self._claim is None:
                claim = self._new_claim()
                self.commit(CLAIM, lambda file: file.write(claim))
                self._claim = claim
            undo.pop_all()
        return _Claim(self, spool, lock)

    def check_claim(self) -> None:
        """Raise ``WriteError`` if another run has taken over."""
        if self._claim is None:
            return
        found = self._claimed()
        if found != self._claim:
            message = f"another run has taken over {self.url}: its claim says {found.decode(errors='replace')[:300]!r}"
            raise WriteError(message)

    def _claimed(self) -> bytes:
        try:
            return self._ranges(CLAIM, [(0, 4096)])[0]
        except FileNotFoundError:
            return b""

    def give_up(self) -> None:
        """Remove the claim, if it is our own. If that fails it stays, which does no harm."""
        claim, self._claim = self._claim, None
        with suppress(OSError):
            if claim is not None and self._claimed() == claim:
                self.remove(CLAIM)

    def commit(
        self,
        name: str,
        write: Callable[[Writable], object],
        *,
        exclusive: bool = False,
        by: object = None,  # noqa: ARG002  # there is nothing until it is there
    ) -> None:
        """Put a small object, by way of memory. If it is ``exclusive``, one that is there stays: ``FileExistsError``."""
        made = _Memory()
        write(made)
        if exclusive and self._is_there(name):
            raise FileExistsError(errno.EEXIST, "it is there already", self.shown(name))
        self.check_claim()
        data = made.getvalue()
        try:
            self._put(name, data, exclusive=exclusive)
        except (FileExistsError, WriteError):
            raise
        except Exception as error:
            message = f"{self.shown(name)} could not be written: {_said(error)}"
            raise WriteError(message) from error

    def _is_there(self, name: str) -> bool:
        try:
            self._info(name)
        except FileNotFoundError:
            return False
        return True

    def begin(self, name: str, write: Callable[[Writable], object]) -> _Spooled:
        """Write an object to the spool, so that all that is left to do is to upload it."""
        spool = self._spooling()
        try:
            return _Spooled(self, name, spool.path / name, write)
        except OSError as error:
            message = f"the spool in {spool}: {error}. Folder(..., spool=...) puts it elsewhere"
            raise WriteError(message) from error

    def _spooling(self) -> Disk:
        """The folder of what is to be uploaded: of this URL, and of nobody else."""
        base = Path(tempfile.gettempdir() if self._spool is None else self._spool)
        user = getattr(os, "getuid", int)()
        where = f"{self._options.get('endpoint_url', '')} {self.url}".encode()
        path = base / f"actrec-{user}-{hashlib.sha256(where).hexdigest()[:16]}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()
        except OSError as error:
            message = f"the spool in {path}: {error}. Folder(..., spool=...) puts it elsewhere"
            raise WriteError(message) from error
        if path.is_symlink() or found.st_uid != user:
            message = f"the spool in {path}: it belongs to somebody else. Folder(..., spool=...) puts it elsewhere"
            raise WriteError(message)
        return Disk(path)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._known.pop(name, None)
        try:
            _tried(lambda: self.fs.rm_file(self._at(name)), WRITE_WAITS)
        except FileNotFoundError:
            return
        except Exception as error:
            message = f"{self.shown(name)} could not be removed: {_said(error)}"
            raise WriteError(message) from error

    def _put(self, name: str, source: bytes | Path, *, exclusive: bool) -> None:
        """Upload bytes or a file, and check that all of it has arrived."""
        self._known.pop(name, None)
        _tried(lambda: self._put_once(name, source, exclusive=exclusive), WRITE_WAITS)

    def _put_once(self, name: str, source: bytes | Path, *, exclusive: bool) -> None:
        path, options = self._at(name), {"mode": "create"} if exclusive else {}
        try:
            if isinstance(source, bytes):
                self.fs.pipe_file(path, source, **options)
            else:
                self.fs.put_file(str(source), path, **options, **_sending(self.fs))
        except Exception as error:
            # What a try has done whose answer was lost is done: it is there. Some servers do not say which condition
            # was not met.
            taken = isinstance(error, FileExistsError) or not _is_final(error)
            if not (exclusive and taken and self._is_there(name)):
                raise
            if not self._is_same(name, source):
                raise FileExistsError(
                    errno.EEXIST, "another run has written it", self.shown(name)
                ) from error
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        found = self._info(name)["size"]
        if found != size:
            message = f"{size} bytes were sent, and {found} have arrived"
            raise OSError(errno.EIO, message)

    def _is_same(self, name: str, source: bytes | Path) -> bool:
        """Whether an object is what was sent: of a shard, the header has the checksums of the rest."""
        own = (
            source[:_GUESS]
            if isinstance(source, bytes)
            else Disk(source.parent).read(source.name, _GUESS)
        )
        return self._ranges(name, [(0, len(own))])[0] == own


def _tried(request: Callable[[], T], waits: tuple[float, ...]) -> T:
    """What ``request`` returns, the first time that it does not fail."""
    for wait in waits:
        try:
            return request()
        except Exception as error:  # file systems raise whatever their libraries do
            if _is_final(error):
                raise
            time.sleep(wait)
    return request()


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


class _Memory(io.BytesIO):
    """A small file that is being written."""

    def write_at_start(self, data: Buffer) -> None:
        self.seek(0)
        self.write(data)
        self.seek(0, os.SEEK_END)


class _Spooled:
    """A file in the spool, on its way to the store."""

    def __init__(
        self, bucket: Bucket, name: str, path: Path, write: Callable[[Writable], object]
    ) -> None:
        self._bucket = bucket
        self._name = name
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        fd = os.open(path, flags, 0o600)
        try:
            try:
                write(_File(fd))
            finally:
                os.close(fd)
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Upload it. If that fails, for good, the file is kept."""
        try:
            self._bucket._put(self._name, self._path, exclusive=True)
        except Exception as error:
            message = f"{_said(error)} (tried {len(WRITE_WAITS) + 1} times at most). The file is kept as {self._path}"
            raise WriteError(message) from error
        self.discard()
        self._bucket.check_claim()

    def discard(self) -> None:
        """Take it away."""
        with suppress(OSError):
            self._path.unlink()


class _Claim(AbstractContextManager[None]):
    """A claim is ours until this is released."""

    def __init__(self, bucket: Bucket, spool: Disk, lock: Lock) -> None:
        self._bucket = bucket
        self._spool = spool
        self._lock = lock
        self._pid = os.getpid()
        self._released = False

    def release(self) -> None:
        """Give the claim up, and the spool unless something is kept there. May be called again."""
        if not self._released and self._pid == os.getpid():  # what is forked off has no claim
            self._bucket.give_up()
            self._spool.unmake()
        self._released = True
        self._lock.release()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Streamed(io.RawIOBase):
    """An object, read from one end to the other."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._size = bucket.size(name)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert whence == os.SEEK_SET  # noqa: S101  # nobody asks for anything else
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(_CHUNK) or b"", b""))

    def readinto(self, buffer: Any, /) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        (data,) = self._bucket._ranges(self._name, [(self._position, end)])
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _Remote:
    """The memory of an object: what is asked for is downloaded first, into the cache."""

    def __init__(self, bucket: Bucket, name: str, size: int, about: _About) -> None:
        self._bucket, self._name, self._size, self._about = bucket, name, size, about

    def __getitem__(self, part: slice, /) -> torch.UntypedStorage:
        return self.view(part.start, part.stop)

    def view(self, begin: int, end: int) -> torch.UntypedStorage:
        shown = self._bucket.shown(self._name)
        return self._bucket._cache.part(shown, self._size, begin, end, self._fetch)

    def _fetch(self, parts: list[tuple[int, int]]) -> list[bytes]:
        """Download blocks, if the object is still what it was."""
        try:
            found = self._bucket._ranges(self._name, parts)
            self._check()
        except FileNotFoundError:
            defect = "it was there when it was opened, and is gone"
            raise corrupt(self._bucket.shown(self._name), defect) from None
        except ReadError:
            self._check()  # that an object became too short says more than how the store puts it
            raise
        return found

    def _check(self) -> None:
        about = _about(self._bucket._info(self._name))
        if about != self._about:
            was, now = self._about.size, about.size
            defect = (
                f"it was changed since it was opened: it had {was} bytes then, and has {now} now"
            )
            raise corrupt(self._bucket.shown(self._name), defect)
