"""What is wrong with a shard that can be opened: all of its data is read, and its checksums compared."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, BinaryIO, Final

from actrec.errors import CorruptRecordingError

from ._format import corrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._index import Opened
    from ._place import Place

__all__ = ["shard_problems"]

_CHUNK: Final = 1 << 24


def shard_problems(disk: Place, opened: Opened) -> Iterator[str]:
    """Every problem of a shard whose header is whole: descriptions that describe no value, and data that has changed."""
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
