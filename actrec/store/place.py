"""Where a recording is: a folder on disk, or a prefix in an object store. Everything the store does to files, it does there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol
from urllib.request import url2pathname

from actrec.errors import OptionError

from .blocks import CACHE_BYTES, Blocks
from .bucket import Bucket
from .disk import Disk
from .folder import Folder
from .objects import Objects

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from types import TracebackType

    import torch

    from .safetensors import Writable

__all__ = ["Lock", "Mapped", "Place", "Reading", "Unfinished", "place"]

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://(.*)", re.DOTALL)


class Place(Protocol):
    """A folder, or what stands for one."""

    @property
    def name(self) -> str:
        """The last part of where it is."""

    @property
    def parent(self) -> str:
        """Where it is, without that part."""

    def __truediv__(self, name: str) -> Place:
        """A folder in it."""

    def shown(self, name: str) -> str:
        """Where a file in it is, for a message."""

    def exists(self) -> bool:
        """Whether there is such a folder."""

    def is_file(self) -> bool:
        """Whether there is a file instead."""

    def names(self) -> list[str]:
        """What is in the folder, sorted; nothing if there is no folder."""

    def size(self, name: str) -> int:
        """The size of a file; ``FileNotFoundError`` if it is not there."""

    def read(self, name: str, begin: int, most: int) -> bytes:
        """Up to ``most`` bytes of a file from ``begin`` on."""

    def read_into(self, name: str, head: bytes, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``begin`` on of a file that began with ``head`` when it was opened."""

    def reading(self, name: str, head: bytes) -> Reading:
        """Open a file that began with ``head`` when the recording was opened, to read parts of it."""

    def open(self, name: str) -> BinaryIO:
        """Open a file, to read it from one end to the other."""

    def map(self, name: str, size: int, head: bytes) -> Mapped:
        """The memory of a file that had ``size`` bytes, the first of them ``head``, when it was opened, for this process alone."""

    def make(self) -> None:
        """Make the folder; if it is there, it stays."""

    def lock(self) -> Lock:
        """Lock the folder that is there; ``BlockingIOError`` if somebody else has."""

    def commit(self, name: str, write: Callable[[Writable], object]) -> None:
        """Write a new file in one step: it is there whole, or not at all; ``FileExistsError`` if it is there already."""

    def begin(self, name: str, write: Callable[[Writable], object]) -> Unfinished:
        """Write a new file, so that all that is left to do is to ``finish()`` it."""

    def remove(self, name: str) -> None:
        """Remove a file that this process has written, and that nobody has any use for."""

    def sweep(self) -> None:
        """Remove files that were never finished."""


class Reading(Protocol):
    """A file of which parts are read. What is wrong with it is a ``Defect``."""

    def into(self, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``begin`` on."""

    def announce(self, begin: int, nbytes: int) -> None:
        """Let the system fetch a part while we do something else, if it can."""

    def close(self) -> None:
        """Let go of the file."""


class Mapped(Protocol):
    """The memory of a file, of which parts are asked for: ``CorruptRecordingError`` if it is another file by now."""

    def __getitem__(self, part: slice, /) -> torch.UntypedStorage:
        """A part that may be kept."""


class Unfinished(Protocol):
    """A file that is written, and not in its folder yet."""

    def finish(self) -> None:
        """Put it there, for certain. If there is a file of its name: ``FileExistsError``."""

    def discard(self) -> None:
        """Take it away."""


class Lock(Protocol):
    """A folder is locked until this is released."""

    def release(self) -> None:
        """Let others have the folder. May be called again."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> bool | None: ...


def place(
    path: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    cache_bytes: float = CACHE_BYTES,
) -> Place:
    """Where ``path`` leads: a URL, which a ``pathlib.Path`` never is, to an object store; a path to the disk."""
    folder = Folder.of(path)
    url = _URL.match(text := folder.__fspath__())
    if url is None:
        return Disk(text)
    if url[1].lower() in {"file", "local"}:
        return Disk(_path_of(text, url[2]))
    if not url[2].strip("/"):
        message = f"{text!r}: there is nothing behind the ://. Name a bucket and a folder, as in 's3://bucket/run'."
        raise OptionError(message)
    options = {**(folder.storage_options or {}), **(storage_options or {})}
    return Bucket(Objects(text, options), folder.spool, Blocks(cache_bytes))


def _path_of(url: str, rest: str) -> str:
    """The path that a ``file://`` URL means: what stands behind the slashes is a host, and only this one will do."""
    path = rest.removeprefix("localhost")
    if not path.startswith("/"):
        message = (
            f"{url!r}: a file URL has three slashes and then the whole path, as in 'file:///runs/a'. A relative path is "
            "written without file://."
        )
        raise OptionError(message)
    # From Python 3.14 on, url2pathname() takes what follows # or ? for no part of the path, and // for a host.
    path = "/" + path.lstrip("/").replace("#", "%23").replace("?", "%3F")
    return url2pathname(path)
