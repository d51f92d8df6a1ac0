"""Parts of objects that the worker processes of a ``DataLoader`` fetch for each other.

All of them need rows of all blocks. The process that first needs a block downloads it, and leaves it in a local file for the
others, which wait for as long as that file is locked; the system unlocks it if the process dies. The files save
requests and nothing else: a part whose file is not there, or too short, is downloaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from actrec.store.disk import Later

flock: Any
try:
    from fcntl import LOCK_EX, flock
except ImportError:  # pragma: no cover  # on Windows each worker downloads for itself
    flock = None

#: The files hold at most so many bytes, and no fewer than the batches by which one worker is ahead of another.
_MOST: Final = 1 << 28


class Between:
    """What the workers that have a copy of it have between them: a folder of this machine, which the process that made it removes."""

    def __init__(self) -> None:
        self._name = f"actrec-{token_hex(16)}"
        weakref.finalize(self, _remove, self._name, os.getpid())

    def fetching(self, file: str, later: Later) -> Later:
        """Return what lets a thread download a part of a file, unless another worker has done so."""

        def fetched(work: Callable[..., Any], *part: int) -> Future[Any]:
            return later(self._fetched, file, work, *part) if part else later(work)

        return later if flock is None else fetched

    def _fetched(
        self, file: str, download: Callable[[int, int], bytes], begin: int, end: int
    ) -> bytes:
        try:
            shared = self._locked(f"{file} {begin} {end}")
        except OSError:
            return download(begin, end)
        with shared:
            found = shared.read()
            if len(found) != end - begin:
                found = download(begin, end)
                with suppress(OSError):  # there is no room on this disk
                    shared.truncate(0)
                    shared.write(found)
                    _trim(self._folder)
        return found

    def _locked(self, part: str) -> FileIO:
        """The file of a part, once no other worker has it."""
        shared = FileIO(self._folder / blake2b(part.encode()).hexdigest(), "a+")
        try:
            flock(shared, LOCK_EX)
            shared.seek(0)
        except OSError:
            shared.close()
            raise
        return shared

    @cached_property
    def _folder(self) -> Path:
        folder = _folder(self._name)
        folder.mkdir(mode=0o700, exist_ok=True)  # once: what was removed stays so
        return folder


def _folder(name: str) -> Path:
    return Path(tempfile.gettempdir(), name)


def _trim(folder: Path) -> None:
    """Remove the oldest files, so that what is left is not too much."""
    with os.scandir(folder) as entries:
        about = [(one.stat(), one.path) for one in entries]
    room = _MOST
    for stat, path in sorted(about, key=lambda one: one[0].st_mtime_ns, reverse=True):
        room -= stat.st_size
        if room < 0:
            Path(path).unlink(missing_ok=True)


def _remove(name: str, pid: int) -> None:
    if os.getpid() == pid:  # forked processes have copies
        with suppress(OSError):
            shutil.rmtree(_folder(name))
