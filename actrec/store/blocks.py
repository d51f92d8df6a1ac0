"""Objects that are open for reading, of which ``fsspec`` keeps the blocks that it has downloaded last."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from typing_extensions import override

from actrec.errors import OptionError

CACHE_BYTES: Final = 1 << 30

BLOCK: Final = 4 << 20  #: bytes that are downloaded at a time
_EACH: Final = 8  # blocks of one object
#: What makes ``fs.open()`` keep them.
CACHED: Final[dict[str, Any]] = {
    "block_size": BLOCK,
    "cache_type": "blockcache",
    "cache_options": {"maxblocks": _EACH},
}


class Blocks:
    """The objects of a recording that were read last.

    Args:
        limit: about how many bytes of them are kept in memory, all ranks together.
    """

    def __init__(self, limit: Any) -> None:
        if not isinstance(limit, (int, float)) or not limit > 0:  # which NaN is not
            message = f"cache_bytes={limit!r}: expected a number of bytes greater than 0."
            raise OptionError(message)
        self._limit = limit
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, tuple[BinaryIO, threading.Lock]] = OrderedDict()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit}  # another process has connections of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def read_into(
        self, url: str, opened: Callable[[], BinaryIO], begin: int, view: memoryview
    ) -> int:
        """Fill ``view`` with the bytes of an object from ``begin`` on, and return how many there were.

        Args:
            url: which object.
            opened: opens it.
            begin: the first byte.
            view: what is filled.
        """
        if self._pid != os.getpid():  # forked off
            self._begin()
        with self._lock:
            file, lock = self._open.pop(url, (None, threading.Lock()))
        if file is None:
            file = opened()
        with self._lock:
            self._open[url] = file, lock
            while len(self._open) > max(1, self._limit // (BLOCK * _EACH)):
                self._open.popitem(last=False)  # it is closed once nobody reads from it
        with lock:
            file.seek(begin)
            return file.readinto(view)  # type: ignore[attr-defined,no-any-return]
