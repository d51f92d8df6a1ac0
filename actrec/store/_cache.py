"""What was downloaded: files without names, of which the system keeps in memory what fits.

A file is as long as the object that it stands for, and has those blocks of it that were asked for: the rest is a hole.
It is mapped, and its name removed, so that nothing is left of it when the process ends, however it ends. A
file that is dropped because the limit is reached lives on as long as a value is a view of it. Until all of it is there
it is open, and a process may have a thousand files open or so: so few such files are kept.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from actrec.errors import OptionError, ReadError

from ._disk import _MAPPED, _File

if TYPE_CHECKING:
    from collections.abc import Callable

    #: Fetches the blocks that begin and end at these bytes.
    Fetch = Callable[[list[tuple[int, int]]], list[bytes]]

__all__ = ["BLOCK", "CACHE_BYTES", "Cache"]

CACHE_BYTES: Final = 4 << 30
BLOCK: Final = 4 << 20  # what is fetched at a time: a multiple of any system's pages
_MOST_FILLING: Final = 128  # objects of which there are parts
_MOST_MAPPED: Final = 4096  # objects, each of which is a map
_AT_ONCE: Final = 16  # blocks that are fetched together, and are in memory meanwhile


class Cache:
    """The downloaded parts of objects: the last ``limit`` bytes that were asked for, or a little more."""

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, limit: Any = CACHE_BYTES
    ) -> None:
        if not isinstance(limit, (int, float)) or not limit > 0:  # which NaN is not
            message = f"cache_bytes={limit!r}: expected a number of bytes greater than 0."
            raise OptionError(message)
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.limit = limit
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _Sparse] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return sum(file.nbytes for file in self._files.values())

    def part(
        self, name: str, size: int, begin: int, end: int, fetch: Fetch
    ) -> torch.UntypedStorage:
        """The bytes from ``begin`` to ``end`` of an object of ``size`` bytes, fetched if they are not here."""
        if self._pid != os.getpid():
            self._begin()  # in a forked process the lock may be held by a thread that does not exist
        with self._lock:
            try:
                if name not in self._files:
                    self._files[name] = _Sparse(self.folder, size)
                file = self._files[name]
                self._files.move_to_end(name)
                before = file.nbytes
                file.fill(begin, end, fetch)
            except (OSError, RuntimeError) as error:  # PyTorch says so when it cannot map a file
                if isinstance(error, ReadError):
                    raise
                message = (
                    f"the cache in {self.folder}: {error}. load(..., cache=...) puts it elsewhere."
                )
                raise ReadError(message) from error
            if file.nbytes > before:
                self._shrink()
            part = file.storage[begin:end]
        # What is kept of a file keeps its map.
        return cast("torch.UntypedStorage", part if end - begin >= _MAPPED else part.clone())

    def _shrink(self) -> None:
        """Drop what was used the longest ago; never what is used now."""
        held = self.nbytes
        while (held > self.limit or len(self._files) > _MOST_MAPPED) and len(self._files) > 1:
            _, file = self._files.popitem(last=False)
            held -= file.nbytes
        filling = [name for name, file in self._files.items() if file.is_filling]
        for name in filling[:-_MOST_FILLING]:
            del self._files[name]


class _Sparse:
    """The parts of one object that are here, mapped."""

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._fd, path = tempfile.mkstemp(prefix="actrec-", dir=folder)
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            os.truncate(self._fd, size)
            self.storage = torch.UntypedStorage.from_file(path, shared=False, nbytes=size)
        finally:
            with suppress(PermissionError):  # Windows does not remove the name of what is in use
                Path(path).unlink()
        self._size = size
        self._blocks: set[int] = set()
        self.nbytes = 0

    @property
    def is_filling(self) -> bool:
        """Whether there are holes in it, so that the file is open."""
        return self._close.alive

    def fill(self, begin: int, end: int, fetch: Fetch) -> None:
        """See to it that these bytes are here."""
        wanted = range(begin // BLOCK, -(-end // BLOCK))
        missing = [block for block in wanted if block not in self._blocks]
        for first in range(0, len(missing), _AT_ONCE):
            blocks = missing[first : first + _AT_ONCE]
            parts = [(at * BLOCK, min((at + 1) * BLOCK, self._size)) for at in blocks]
            # What is mapped privately shows what is written to the file, where nobody has written to the memory.
            for (at, _), data in zip(parts, fetch(parts), strict=True):
                os.lseek(self._fd, at, os.SEEK_SET)
                _File(self._fd).write(data)
                self.nbytes += len(data)
            self._blocks.update(blocks)
        if len(self._blocks) * BLOCK >= self._size:
            self._close()
