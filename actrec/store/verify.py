"""``verify()``: every problem that a stored recording has, its data included."""

from __future__ import annotations

import zlib
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from actrec.errors import CorruptRecordingError

from .description import read_ending, read_manifest, read_own
from .format import corrupt
from .index import open_shard
from .place import place
from .reader import (
    check_identity,
    opened,
    rank_folders,
    rank_number,
    shard_name,
    shard_names,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from .description import Manifest
    from .index import Opened
    from .place import Place

__all__ = ["verify"]

_CHUNK: Final = 1 << 24


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
                yield from _shard_problems(rank, shard)


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


def _shard_problems(disk: Place, opened: Opened) -> Iterator[str]:
    shard, container, parts = opened
    for part in parts:
        for group in part.groups:
            try:
                group.example(0)
            except CorruptRecordingError as error:
                yield str(error)
    owners: dict[str, str] = {}
    for part in parts:
        for tensor in container.tensors:
            if tensor.startswith(part.slot.key + "."):
                owners[tensor] = part.slot.name
    with disk.open(shard.name) as file:
        for tensor, extent in container.tensors.items():
            file.seek(extent.begin)
            found = _checksum(file, extent.end - extent.begin)
            if found != extent.checksum:
                layer = owners.get(tensor, tensor)[:60]
                yield str(
                    corrupt(
                        shard.path,
                        f"the checksum of the data of layer {layer!r} is {found:08x}, and should be {extent.checksum:08x}",
                    )
                )


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            break
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum
