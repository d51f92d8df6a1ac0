"""The objects that were read last. If parts that follow each other are read from one, ``fsspec`` keeps its blocks."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Any, BinaryIO, Final

from actrec.errors import OptionError

from .per_process import PerProcess

CACHE_BYTES: Final = 1 << 30

BLOCK: Final = 4 << 20  #: bytes that are downloaded at a time
_EACH: Final = 8  # blocks of one object
_NEAR: Final = 1 << 16  # bytes, at most, between a part and one that follows it
#: The arguments with which ``fs.open()`` keeps blocks.
CACHED: Final[dict[str, Any]] = {
    "block_size": BLOCK,
    "cache_type": "blockcache",
    "cache_options": {"maxblocks": _EACH},
}


class Kept:
    """An object that was read. A thread that reads from it holds its lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.head: bytes | None = None  #: the bytes at its begin, when they were read
        self.file: BinaryIO | None = None  #: open, with some blocks in memory
        self._ends: deque[int] = deque(maxlen=_EACH)

    def goes_on(self, begin: int, end: int) -> bool:
        """Whether a part is near one that was read lately, so more parts near it may be read."""
        near = next((other for other in self._ends if abs(begin - other) <= _NEAR), None)
        if near is not None:
            self._ends.remove(near)
        self._ends.append(end)
        return near is not None


class _Opened:
    """The objects that are open in this process, the least recently used one first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: OrderedDict[str, Kept] = OrderedDict()


class Blocks:
    """Open objects of a recording, those that were read last.

    Args:
        limit: about how many bytes of them are cached in memory, all ranks together.
    """

    def __init__(self, limit: Any) -> None:
        if not isinstance(limit, (int, float)) or not limit > 0:  # "not >": also for NaN
            message = f"cache_bytes={limit!r}: expected a number of bytes greater than 0."
            raise OptionError(message)
        self._limit = limit
        self._opened = PerProcess(_Opened)

    def of(self, url: str) -> Kept:
        """Return the object at ``url``, a new one if none is kept."""
        opened = self._opened()
        with opened.lock:
            kept = opened.objects.setdefault(url, Kept())
            opened.objects.move_to_end(url)
            while len(opened.objects) > max(1, self._limit // (BLOCK * _EACH)):
                opened.objects.popitem(last=False)  # closed when its last reader is done
            return kept
