"""``verify()``: every problem that a stored recording has, its data included."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from actrec.errors import CorruptRecordingError

from .description import read_description
from .format import corrupt
from .index import shard_name, shard_names
from .place import place
from .reader import opened, rank_folders, rank_number
from .shard import Shard
from .whole import WholeLayer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from .ledger import Heading
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

    Args:
        path: the folder, or the URL.
        storage_options: what ``fsspec`` passes to the file system of a URL.

    Returns:
        A sentence for each problem.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        ReadError: it is in an object store that cannot be reached, or refuses.
    """
    return list(dict.fromkeys(_problems(place(path, storage_options))))


def _problems(disk: Place) -> Iterator[str]:
    try:
        for layer in opened(disk).everything():
            if isinstance(layer, WholeLayer):
                yield from layer.problems()
    except CorruptRecordingError as error:
        yield str(error)
    for rank in rank_folders(disk):
        yield from _rank_problems(rank)


def _rank_problems(rank: Place) -> Iterator[str]:
    try:
        recording: str | None = read_description(rank).recording
    except (CorruptRecordingError, FileNotFoundError) as error:
        if isinstance(error, CorruptRecordingError):
            yield str(error)
        recording = None
    counted: dict[object, int] = {}
    before: Heading | None = None
    for number, name in _expected(rank):
        try:
            shard = Shard(rank, name)
            if recording is not None:
                shard.check_identity(recording, rank_number(rank.name), number)
        except CorruptRecordingError as error:
            yield str(error)
            continue
        if before is not None and shard.heading.committed < before.committed:
            yield str(corrupt(shard.path, "it commits fewer passes than the shard before it"))
        before = shard.heading
        yield from _shard_problems(shard, counted)


def _expected(disk: Place) -> Iterator[tuple[int, str]]:
    """The numbers and names of all shards that there should be, judging by the last that there is."""
    names = shard_names(disk)
    last = int(names[-1].partition(".")[0]) if names else -1
    # A number that is far off is a name, not a count.
    yield from ((n, shard_name(n)) for n in range(min(last, 2 * len(names)) + 1))


def _shard_problems(shard: Shard, counted: dict[object, int]) -> Iterator[str]:
    """What is wrong with a shard; ``counted`` has the calls of each layer in the shards before it."""
    owners: dict[str, str] = {}
    for key, listed in shard.layers.items():
        if counted.get(key, listed.before) != listed.before:
            defect = f"it says that {listed.before} calls of layer {listed.slot.name[:60]!r} are before it, and there are {counted[key]}"
            yield str(corrupt(shard.path, defect))
        counted[key] = listed.so_far.stored
        for tensor in shard.container.tensors:
            if tensor.startswith(listed.slot.key + "."):
                owners[tensor] = listed.slot.name
        try:
            shard.part(*key)
        except CorruptRecordingError as error:
            yield str(error)
    with shard.disk.open(shard.name) as file:
        for tensor, extent in shard.container.tensors.items():
            file.seek(extent.begin)
            found = _checksum(file, extent.end - extent.begin)
            if found != extent.checksum:
                layer = owners.get(tensor, tensor)[:60]
                defect = f"the checksum of the data of layer {layer!r} is {found:08x}, and should be {extent.checksum:08x}"
                yield str(corrupt(shard.path, defect))


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            break
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum
