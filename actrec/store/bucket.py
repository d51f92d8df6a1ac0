"""A prefix in an object store, through ``fsspec``, as a place for recordings.

What a disk has and an object store has not, and what stands for it here:

* No folders: they are there when something is in them. Nothing is made.
* No rename: an object is put whole, in one request or several, and is there when the last one has succeeded. So a
  shard is written to a local file, and then uploaded.
* No locks: every object is created exclusively. A run that is resumed begins with a shard of its own, and a run that was
  thought to be dead, and is not, finds that name taken and ends with an error.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import torch
from typing_extensions import override

from actrec._values.memory import writable
from actrec.errors import ReadError

from .blocks import BLOCK, CACHED, Blocks
from .disk import GONE
from .format import ANOTHER, Defect, need
from .upload import Upload

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from .objects import Objects
    from .safetensors import Writable

__all__ = ["Bucket"]

_HEAD: Final = 1 << 16  # bytes in which the header of a shard is expected
_HEADS: Final = 16  # that are kept
_MOST: Final = 1 << 26  # bytes of a large tensor that are downloaded at a time
_STREAM: Final[dict[str, Any]] = {"block_size": 1 << 24, "cache_type": "readahead"}


class Bucket:
    """A prefix in an object store: a :class:`~actrec.store.place.Place` in the network.

    Args:
        objects: what is there.
        spool: the folder of files that are to be uploaded; ``None`` for the system's temporary one.
        blocks: what was downloaded and is kept.
    """

    def __init__(
        self, objects: Objects, spool: str | os.PathLike[str] | None, blocks: Blocks
    ) -> None:
        self._objects = objects
        self._spool = spool
        self._blocks = blocks
        self._heads = lru_cache(maxsize=_HEADS)(self._head)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self._objects, self._spool, self._blocks)

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(self._objects.below(name), self._spool, self._blocks)

    @override
    def __str__(self) -> str:
        return self._objects.url

    @override
    def __repr__(self) -> str:
        return f"Bucket({str(self)!r})"

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> str:
        """The URL without that part."""
        return str(self).rpartition("/")[0]

    def shown(self, name: str) -> str:
        """Return the URL of an object in it."""
        return self._objects.shown(name)

    # --- What is there ---------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether anything is there."""
        return bool(self.names())

    def is_file(self) -> bool:
        """Whether there is an object with this very URL."""
        try:
            return self._objects.about("").kind == "file"
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        """Return what is there, sorted, as if there were folders."""
        return self._objects.names()

    def size(self, name: str) -> int:
        """Return the size of an object, whose first bytes are asked for next, as a rule."""
        return self._heads(name)[1]

    # --- Reading ---------------------------------------------------------------------------------------

    def read(self, name: str, begin: int, most: int) -> bytes:
        """Return up to ``most`` bytes of an object from ``begin`` on."""
        head, size = self._heads(name)
        end = min(begin + most, size)
        return head[begin:end] if end <= len(head) else self._objects.download(name, begin, end)

    def _head(self, name: str) -> tuple[bytes, int]:
        """The first bytes of an object, and how many it has."""
        size = self._objects.about(name).size
        return self._objects.download(name, 0, min(_HEAD, size)), size

    def read_into(self, name: str, head: bytes, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``begin`` on of an object that begins with ``head``."""
        read = self._read_large if len(view) > BLOCK else self._read_blocks
        end = begin + len(view)
        try:
            found = begin + read(name, head, begin, view)
        except FileNotFoundError:
            raise Defect(GONE) from None
        except ReadError:
            # That it is shorter by now says more than how the store puts it.
            found = self._objects.about(name).size
            if found >= end:
                raise
        need(found >= end, f"it has become shorter, and ends at byte {found}")

    def _read_large(self, name: str, head: bytes, begin: int, view: memoryview) -> int:
        self._check(name, head)
        done = 0
        for at in range(0, len(view), _MOST):
            part = self._objects.download(name, begin + at, begin + min(at + _MOST, len(view)))
            view[at : at + len(part)] = part
            done += len(part)
        return done

    def _read_blocks(self, name: str, head: bytes, begin: int, view: memoryview) -> int:
        def opened() -> BinaryIO:
            self._check(name, head)
            return cast("BinaryIO", self._objects.open(name, **CACHED))

        def read() -> int:
            return self._blocks.read_into(self.shown(name), opened, begin, view)

        return self._objects.ask(name, read)

    def _check(self, name: str, head: bytes) -> None:
        need(self._objects.download(name, 0, len(head)) == head, ANOTHER)

    def open(self, name: str) -> BinaryIO:
        """Open an object, to read it from one end to the other."""
        return cast("BinaryIO", self._objects.open(name, **_STREAM))

    def reading(self, name: str, head: bytes) -> _Object:
        """Return what reads parts of an object that begins with ``head``; it is opened when the first is asked for."""
        return _Object(self, name, head)

    def map(self, name: str, size: int, head: bytes) -> _Object:  # noqa: ARG002
        """Return what downloads those parts of an object that are asked for."""
        return _Object(self, name, head)

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

    def begin(self, name: str, write: Callable[[Writable], object]) -> Upload:
        """Write a new object to a local file, so that all that is left to do is to upload it."""
        return Upload(self._objects, name, write, self._spool)

    def remove(self, name: str) -> None:
        """Remove an object that this process has written, and that nobody has any use for."""
        self._objects.remove(name)


class _NoLock(nullcontext[None]):
    """Stands for a lock where there is none."""

    def release(self) -> None:
        """There is nothing to let go of."""


class _Object:
    """An object of which parts are read: what is asked for is downloaded."""

    def __init__(self, bucket: Bucket, name: str, head: bytes) -> None:
        self._bucket, self._name, self._head = bucket, name, head

    def into(self, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``begin`` on."""
        self._bucket.read_into(self._name, self._head, begin, view)

    def announce(self, begin: int, nbytes: int) -> None:
        """Nothing is fetched before it is asked for."""

    def close(self) -> None:
        """What is open is closed once other objects are read."""

    def __getitem__(self, part: slice, /) -> torch.UntypedStorage:
        data = torch.empty(part.stop - part.start, dtype=torch.uint8, device="cpu")
        self.into(part.start, writable(data))
        return data.untyped_storage()
