"""The objects below a URL, as ``fsspec`` has them: what is asked of an object store, and how it says that it cannot."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from typing_extensions import override

from actrec.errors import OptionError, ReadError, WriteError

from .format import Defect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

__all__ = ["About", "Objects", "said"]


class About(NamedTuple):
    """What the store says of an object."""

    kind: str  #: ``"file"``, for it may be a folder
    size: int


def said(error: Exception) -> str:
    """Return what an error says, with its type, for few of these texts make sense without."""
    return f"{type(error).__name__}: {error}".rstrip(". ")


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


class Objects:
    """The objects below a URL. A name is what stands behind it; the empty one is the URL itself.

    Args:
        url: where they are.
        options: what ``fsspec`` passes to the file system: credentials, an endpoint.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self._options = dict(options)
        self._connect()

    def _connect(self) -> None:
        self._pid = os.getpid()
        self._fs, self._root = _filesystem(self.url, self._options)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_options": self._options}  # others need them, credentials or not

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def below(self, name: str) -> Objects:
        """Return the objects below a name."""
        return Objects(self.shown(name), self._options)

    def shown(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def at(self, name: str) -> str:
        """Return the path of an object, as the file system knows it."""
        return f"{self._root}/{name}" if name else self._root

    @property
    def fs(self) -> Any:
        """The file system; in a forked process another one, for connections are not inherited."""
        if self._pid != os.getpid():
            self._connect()
        return self._fs

    def ask(self, name: str, request: Callable[[], T]) -> T:
        """Ask for something; ``FileNotFoundError`` if it is not there, ``ReadError`` for everything else."""
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError, Defect, ReadError):
            raise
        except Exception as error:  # file systems raise whatever their libraries do
            message = f"{self.shown(name)} could not be read: {said(error)}."
            raise ReadError(message) from error

    def about(self, name: str) -> About:
        """Return what the store says of an object now."""
        info = self.ask(name, lambda: self.fs.info(self.at(name)))
        return About(info["type"], int(info["size"] or 0))

    def names(self) -> list[str]:
        """Return the names of what is there, sorted, as if there were folders."""
        try:
            found = self.ask("", lambda: self.fs.ls(self._root, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = {str(path).rstrip("/") for path in found} - {self._root}
        return sorted(path.rpartition("/")[2] for path in paths)

    def download(self, name: str, begin: int, end: int) -> bytes:
        """Return the bytes of an object from ``begin`` to ``end``, which it has."""
        if begin >= end:
            return b""
        return bytes(self.ask(name, lambda: self.fs.cat_file(self.at(name), start=begin, end=end)))

    def open(self, name: str, **options: Any) -> Any:
        """Open an object, with options of ``fsspec``."""
        return self.ask(name, lambda: self.fs.open(self.at(name), "rb", **options))

    def remove(self, name: str) -> None:
        """Remove an object."""
        try:
            self.fs.rm_file(self.at(name))
        except Exception as error:
            message = f"{self.shown(name)} could not be removed: {said(error)}."
            raise WriteError(message) from error
