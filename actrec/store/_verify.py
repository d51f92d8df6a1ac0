"""``verify()``: every problem that a stored recording has, its data included."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from actrec.errors import CorruptRecordingError

from ._checksums import shard_problems
from ._index import open_shard
from ._manifest import read_ending, read_manifest, read_own
from ._place import place
from ._reader import check_identity, opened, rank_folders, rank_number, shard_name, shard_names

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from ._manifest import Manifest
    from ._place import Place

__all__ = ["verify"]


def verify(
    path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
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
    compared. A recording that was not closed properly is no problem: what was committed is whole.

    Of an object store everything is downloaded, a part at a time, and nothing of it kept.

    Raises ``RecordingNotFoundError`` if there is no recording at ``path``, and ``ReadError`` if it is in an
    object store that cannot be reached, or refuses.
    """
    return list(dict.fromkeys(_problems(place(path, storage_options))))


def _problems(disk: Place) -> Iterator[str]:
    manifest: Manifest | None = None
    try:
        for layer in opened(disk)._wholes:
            yield from layer.problems()
    except CorruptRecordingError as error:
        yield str(error)
    with suppress(CorruptRecordingError, FileNotFoundError):
        manifest = read_manifest(disk)
    for rank in rank_folders(disk):
        if manifest is not None:
            yield from _description_problems(rank, manifest)
        for number, name in _expected(rank):
            try:
                shard = open_shard(rank, name)
                if manifest is not None:
                    check_identity(shard.shard, manifest.recording, rank_number(rank.name), number)
            except CorruptRecordingError as error:
                yield str(error)
            else:
                yield from shard_problems(rank, shard)


def _description_problems(rank: Place, manifest: Manifest) -> Iterator[str]:
    names = rank.names()
    for read in (
        partial(read_own, rank, names, manifest),
        partial(read_ending, rank, names, manifest.recording),
    ):
        try:
            read()
        except CorruptRecordingError as error:
            yield str(error)


def _expected(disk: Place) -> Iterator[tuple[int, str]]:
    """The numbers and names of all shards that there should be, judging by the last that there is."""
    names = shard_names(disk)
    last = int(names[-1].partition(".")[0]) if names else -1
    # A number that is far off is a name, not a count.
    yield from ((n, shard_name(n)) for n in range(min(last, 2 * len(names)) + 1))
