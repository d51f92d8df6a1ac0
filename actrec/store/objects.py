"""The objects below a URL, through ``fsspec``: requests for them, and reading parts of one.

Threads download announced parts, in the order of the announcement. Other parts are downloaded when they are read; where small
parts are read one after the other, in blocks that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from typing import Any, BinaryIO, Final, TypeVar, cast

from actrec.errors import OptionError, ReadError

from .blocks import BLOCK, CACHED, Blocks
from .disk import GONE, Later
from .format import ANOTHER, corrupt
from .per_process import PerProcess

T = TypeVar("T")

_MOST: Final = 1 << 26  # bytes of a large part that are downloaded at a time
_STREAM: Final[dict[str, Any]] = {"block_size": 1 << 24, "cache_type": "readahead"}


class Objects:
    """The objects below a URL. A name is the rest of an object's URL; the empty name is the URL itself."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self.options = dict(options)  # of the file system: credentials, an endpoint
        self._connected = PerProcess(partial(_filesystem, self.url, self.options))

    def shown(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    @property
    def fs(self) -> Any:
        """The file system."""
        return self._connected()[0]

    def at(self, name: str) -> str:
        """Return the path of an object in the file system."""
        root = self._connected()[1]
        return f"{root}/{name}" if name else root

    def ask(self, name: str, request: Callable[[], T]) -> T:
        """Return ``request()``. Errors become a ``ReadError``, except ``FileNotFoundError``."""
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:  # file systems raise whatever their libraries do
            message = f"{self.shown(name)} could not be read: {said(error)}."
            raise ReadError(message) from error

    def info(self, name: str) -> dict[str, Any]:
        """Return the current ``size`` of an object, and its ``type``, which may be a folder."""
        return dict(self.ask(name, lambda: self.fs.info(self.at(name))))

    def download(self, name: str, begin: int, end: int) -> bytes:
        """Return the bytes of an object from ``begin`` to ``end``, which must exist."""
        if begin >= end:
            return b""
        return bytes(self.ask(name, lambda: self.fs.cat_file(self.at(name), start=begin, end=end)))

    def open(self, name: str, options: Mapping[str, Any] = _STREAM) -> BinaryIO:
        """Open an object, by default to read it from one end to the other."""
        opened = self.ask(name, lambda: self.fs.open(self.at(name), "rb", **options))
        return cast("BinaryIO", opened)


class Object:
    """An object that began with ``head`` when the recording was opened. Raises ``CorruptRecordingError`` if something is wrong."""

    def __init__(self, objects: Objects, name: str, head: bytes, blocks: Blocks) -> None:
        self._objects, self._name, self._head, self._blocks = objects, name, head, blocks
        self._url = objects.shown(name)
        self._same: Future[None] | None = None  # checks that it still begins with `head`
        self._coming: dict[tuple[int, int], Future[bytes]] = {}

    def into(self, begin: int, *views: memoryview) -> None:
        """Fill ``views``, one after the other, with the bytes from ``begin`` on."""
        view = views[0] if len(views) == 1 else memoryview(bytearray(sum(map(len, views))))
        end = begin + len(view)
        read = self._read_large if len(view) > BLOCK else self._read_small
        read = self._read_coming if (begin, end) in self._coming else read
        try:
            found = begin + read(begin, view)
        except FileNotFoundError:
            raise corrupt(self._url, GONE) from None
        except ReadError:
            # If the object is shorter by now, that is a clearer message than the store's.
            found = self._objects.info(self._name)["size"]
            if found >= end:
                raise
        if found < end:
            raise corrupt(self._url, f"it has become shorter, and ends at byte {found}")
        if len(views) > 1:
            for one in views:
                one[:] = view[: len(one)]
                view = view[len(one) :]

    def _read_large(self, begin: int, view: memoryview) -> int:
        self._check()
        return self._read_at_once(begin, view)

    def _read_at_once(self, begin: int, view: memoryview) -> int:
        done = 0
        for at in range(0, len(view), _MOST):
            end = begin + min(at + _MOST, len(view))
            part = self._download(begin + at, end)
            view[at : at + len(part)] = part
            done += len(part)
        return done

    def _read_coming(self, begin: int, view: memoryview) -> int:
        coming = self._coming.pop((begin, begin + len(view)))
        cast("Future[None]", self._same).result()
        part = coming.result()
        view[: len(part)] = part
        return len(part)

    def _read_small(self, begin: int, view: memoryview) -> int:
        kept = self._blocks.of(self._url)
        with kept.lock:
            if kept.head != self._head:
                self._check()
                kept.head = self._head
            if kept.goes_on(begin, begin + len(view)):
                file = kept.file = kept.file or self._objects.open(self._name, CACHED)
                file.seek(begin)
                return self._objects.ask(self._name, lambda: file.readinto(view))  # type: ignore[attr-defined,no-any-return]
        return self._read_at_once(begin, view)

    def _check(self) -> None:
        if self._download(0, len(self._head)) != self._head:
            raise corrupt(self._url, ANOTHER)

    def _download(self, begin: int, end: int) -> bytes:
        return self._objects.download(self._name, begin, end)

    def announce(self, begin: int, nbytes: int, later: Later) -> None:
        """Let a thread download a part that will be read next."""
        self._same = self._same or later(self._check)
        part = begin, begin + nbytes
        self._coming[part] = later(self._download, *part)

    def gather(self, parts: Iterable[tuple[int, int]], later: Later) -> None:
        """Let threads download several parts, given as first byte and number of bytes."""
        for begin, nbytes in parts:
            self.announce(begin, nbytes, later)

    def close(self) -> None:
        """Cancel downloads that have not begun. The file is closed when other objects are read."""
        for coming in self._coming.values():
            coming.cancel()


def said(error: Exception) -> str:
    """Return the message of an error with its type: few of these messages make sense without it."""
    return f"{type(error).__name__}: {error}".rstrip(". ")


def _filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the file system of ``fsspec`` for a URL, and the path of the URL in it."""
    try:
        url_to_fs = import_module("fsspec.core").url_to_fs
        fs, path = url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        message = f"{url!r} needs a package that is not installed: {error}. For s3:// install s3fs, for gs:// gcsfs."
        raise OptionError(message) from error
    except (ValueError, TypeError) as error:
        message = f"{url!r} with storage_options {sorted(options)}: fsspec says: {error}."
        raise OptionError(message) from error
    return fs, str(path).rstrip("/")
