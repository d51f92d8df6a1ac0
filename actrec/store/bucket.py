"""A prefix in an object store, through ``fsspec``, as a place for recordings.

An object store lacks three things that a disk has:

* Folders: they exist when something is in them. Nothing is made.
* Renaming: an object is uploaded in one request or several, and appears when the last one has succeeded. So a
  shard is written to a local file first, and then uploaded.
* Locks: every object is created exclusively. A resumed run begins with a new shard; if the earlier run was believed to be
  dead but is not, it finds that name taken and ends with an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, Final

from typing_extensions import override

from actrec.errors import WriteError

from .blocks import Blocks
from .new_file import FileBeingWritten
from .objects import Object, Objects, said
from .upload import Upload

_HEAD: Final = 1 << 16  # bytes in which the header of a shard is expected
_HEADS: Final = 16  # such first bytes, of the last objects, are cached


class Bucket(Objects):
    """A prefix in an object store, with the methods of :class:`~actrec.store.disk.Disk`.

    Args:
        url: of the prefix.
        options: of the file system.
        spool: the folder of files that are to be uploaded; ``None`` for the system's temporary folder.
        blocks: the cache of downloaded blocks.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        spool: str | os.PathLike[str] | None,
        blocks: Blocks,
    ) -> None:
        super().__init__(url, options)
        self._spool = spool
        self._blocks = blocks
        self._head = lru_cache(maxsize=_HEADS)(self._ask_head)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.url, self.options, self._spool, self._blocks)

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(self.shown(name), self.options, self._spool, self._blocks)

    @override
    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    # --- What is there ---------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether anything is there."""
        return bool(self.names())

    def is_file(self) -> bool:
        """Whether there is an object with this very URL."""
        try:
            return bool(self.info("")["type"] == "file")
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        """Return what is there, sorted, as if there were folders."""
        try:
            found = self.ask("", lambda: self.fs.ls(self.at(""), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = {str(path).rstrip("/") for path in found} - {self.at("")}
        return sorted(path.rpartition("/")[2] for path in paths)

    def size(self, name: str) -> int:
        """Return the size of an object; its first bytes are downloaded too, which are usually read next."""
        return self._head(name)[1]

    # --- Reading ---------------------------------------------------------------------------------------

    def read(self, name: str, begin: int, most: int) -> bytes:
        """Return up to ``most`` bytes of an object from ``begin`` on."""
        head, size = self._head(name)
        end = min(begin + most, size)
        return head[begin:end] if end <= len(head) else self.download(name, begin, end)

    def _ask_head(self, name: str) -> tuple[bytes, int]:
        """Return the first bytes of an object, and its size."""
        size = self.info(name)["size"]
        return self.download(name, 0, min(_HEAD, size)), size

    def reading(self, name: str, head: bytes) -> Object:
        """Return a reader of parts of an object, which opens it at the first read."""
        return Object(self, name, head, self._blocks)

    def map(self, *_: Any) -> None:
        """An object has no memory to map."""

    # --- Writing ---------------------------------------------------------------------------------------

    def make(self) -> None:
        """There are no folders to make."""

    def lock(self) -> ExitStack:
        """Return a lock that locks nothing: creating an object that exists fails."""
        return ExitStack()

    def sweep(self) -> None:
        """There are no unfinished objects to remove."""

    def begin(self, name: str, write: Callable[[FileBeingWritten], object]) -> Upload:
        """Write a new object to a local file; ``finish()`` of the result uploads it."""
        return Upload(self, name, write, self._spool)

    def commit(self, name: str, write: Callable[[FileBeingWritten], object]) -> None:
        """Write a new object atomically: completely, or not at all; ``FileExistsError`` if it exists."""
        self.begin(name, write).finish()

    def remove(self, name: str) -> None:
        """Remove an object that this process has written and that is not needed."""
        try:
            self.fs.rm_file(self.at(name))
        except Exception as error:
            message = f"{self.shown(name)} could not be removed: {said(error)}."
            raise WriteError(message) from error
