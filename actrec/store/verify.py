"""``verify()``: finds every problem of a stored recording, including its data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from actrec.errors import CorruptRecordingError

from .check import shard_problems
from .file_names import rank_folders
from .load import opened
from .place import Place, place


def verify(
    path: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[str]:
    """Check all of a stored recording, and return every problem found: an empty list if there is none.

    >>> import tempfile, torch, actrec
    >>> path = tempfile.mkdtemp() + "/run"
    >>> model = torch.nn.Linear(4, 3)
    >>> with actrec.record(model, "", into=path):
    ...     output = model(torch.randn(5, 4))
    >>> actrec.verify(path)
    []

    Everything is read: headers, the description of every value, and all data, whose checksums are
    compared. It is not a problem if a recording was not closed properly: committed passes are complete.
    From an object store everything is downloaded, a part at a time, and nothing is kept.

    Args:
        path: the folder, or the URL.
        storage_options: options that ``fsspec`` passes to the file system of a URL.
        progress: whether to show the progress, as in :meth:`Recording.stats`.

    Returns:
        A sentence for each problem.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        ReadError: an object store could not be reached, or refused the request.
    """
    return list(dict.fromkeys(_problems(place(path, storage_options), progress=progress)))


def _problems(disk: Place, *, progress: bool) -> Iterator[str]:
    try:
        yield from opened(disk)._misfits(progress=progress)
    except CorruptRecordingError as error:
        yield str(error)
    yield from shard_problems(rank_folders(disk), "verify", progress=progress)
