"""Replaces a recording on disk: the new one is written next to it, and then takes its place."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from actrec.errors import RecordingExistsError

from .disk import Disk
from .file_names import rank_folders, shard_names
from .format import DESCRIPTION, UNFINISHED
from .lock import LOCK
from .new_file import sync
from .warned import is_warnings


@contextmanager
def replacing(there: Disk) -> Iterator[Path]:
    """Yield the path of a new folder, which takes the place of ``there`` when the ``with`` block ends without an error.

    Args:
        there: a folder with a recording, which stays unchanged until then.

    Raises:
        RecordingExistsError: there is something else in the folder, or a run is recording there; it was not changed.
    """
    path = there.path.resolve()  # so that a link still leads there
    old = Disk(path)
    ranks = [old / name for name in sorted(old.names())]
    if foreign := _foreign(old, ranks):
        raise _refused(old, f"that folder has other things in it ({foreign[:60]!r})")
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    with ExitStack() as locks:
        for rank in ranks:
            try:
                locks.enter_context(rank.lock())
            except BlockingIOError:
                raise _refused(old, "a run is recording there now") from None
        try:
            yield new
            _swap(path, new)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _foreign(disk: Disk, ranks: list[Disk]) -> str | None:
    """Return the name of something in a folder that is not part of a recording; ``None`` if there is none."""
    known = {folder.name for folder in rank_folders(disk)}
    described = False
    for rank in ranks:
        names = sorted(rank.names())
        if rank.name not in known or not rank.exists():
            return rank.name
        described |= DESCRIPTION in names
        own = {DESCRIPTION, LOCK, *shard_names(rank)}
        for name in names:
            if name not in own and not name.endswith(UNFINISHED) and not is_warnings(name):
                return f"{rank.name}/{name}"
    return None if described else ranks[0].name


def _refused(disk: Disk, why: str) -> RecordingExistsError:
    message = (
        f"save({str(disk)!r}, overwrite=True): {why}. It was not changed: choose another path."
    )
    return RecordingExistsError(message)


def _swap(path: Path, new: Path) -> None:
    """Put a folder in the place of another one, which is removed. At any time, one of them exists, complete."""
    old = new.with_suffix(f".old{UNFINISHED}")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old)
