"""Opening a recording of very many shards: time and memory for each of them, up to a million.

The shards are not on a disk: a stand-in for the folder makes the header of each when it is asked for, in a few
microseconds that count as actrec's. What is measured is what a reader does with a header, and what it keeps of it.
Each size is measured in a process of its own.
"""

from __future__ import annotations

import io
import re
import zlib
from time import process_time
from typing import TYPE_CHECKING

import torch

from actrec.store.description import LayerInfo, Manifest
from actrec.store.disk import Disk
from actrec.store.format import Slot
from actrec.store.reader import Rank, StoredRecording, shard_name
from actrec.store.shard import Call, Heading, write
from actrec.store.stream import encoded

from .memory import anonymous, printed_by
from .timing import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (1_000, 10_000, 100_000, 1_000_000)
LAYERS, PASSES = 12, 20  # in each shard
FLAT = 1.3  # what a shard of a million takes over one of a thousand
MOST_MEMORY = 2000.0  # bytes for each shard
_NUMBER, _COMMITTED, _FIRST = 111_111_111, 222_222_222, 333_333_333  # stand for what differs


class Simulated(Disk):
    """A folder of shards that are alike."""

    def __init__(self, count: int) -> None:
        super().__init__("simulated/rank-00000")
        self.manifest = Manifest(
            "Model", tuple(LayerInfo(f"layers.{i}", "MLP") for i in range(LAYERS))
        )
        self.count = count
        self.template, self.rest = _template(self.manifest)

    def names(self) -> list[str]:
        return [shard_name(number) for number in range(self.count)]

    def size(self, name: str) -> int:
        return len(self._header(name)) + self.rest

    def read(self, name: str, most: int) -> bytes:
        return self._header(name)[:most]

    def _header(self, name: str) -> bytes:
        number = int(name.partition(".")[0])
        content = self.template
        for stand_in, value in (
            (_NUMBER, number),
            (_COMMITTED, (number + 1) * PASSES),
            (_FIRST, number * PASSES),
        ):
            content = content.replace(b"%d" % stand_in, b"%d" % value)
        content += b" " * (-(8 + len(content)) % 64)
        checksum = b"%08x" % zlib.crc32(content)
        content = content.replace(b"00000000", checksum, 1)
        return len(content).to_bytes(8, "little") + content


class _File(io.BytesIO):
    def write_at_start(self, data: bytes) -> None:
        self.seek(0)
        self.write(data)


def _template(manifest: Manifest) -> tuple[bytes, int]:
    """The header of a shard, with stand-ins and without its checksum, and how many bytes follow it."""
    value = encoded(torch.ones(2, 4, dtype=torch.bfloat16))
    calls = [
        Call(
            Slot("output", at, layer.name, layer.type),
            _FIRST + n,
            value.structure,
            [torch.ones(2, 4)],
            0,
        )
        for n in range(PASSES)
        for at, layer in enumerate(manifest.layers)
    ]
    file = _File()
    write(file, Heading(manifest.recording, 0, _NUMBER, _COMMITTED), calls)
    content = file.getvalue()
    length = int.from_bytes(content[:8], "little")
    header = re.sub(
        rb'("header_crc32":)"[0-9a-f]{8}"', rb'\1"00000000"', content[8 : 8 + length], count=1
    )
    return header.rstrip(), len(content) - 8 - length


def measure(*, quick: bool) -> Iterator[Row]:
    sizes = (10, 20) if quick else SIZES
    found = {count: _in_a_process_of_its_own(count) for count in sizes}
    for count, (opening, memory, table, call) in found.items():
        what = f"{count:,} shards of {LAYERS} layers"
        if count != sizes[0]:
            growth = [opening / found[sizes[0]][0]]
            yield Row.of(f"opening {what}: each / each of {sizes[0]:,}", growth, FLAT)
        yield Row.of(f"opening {what}: each", [opening * 1e6], unit="us")
        target = MOST_MEMORY if count == sizes[-1] else None
        yield Row.of(f"opening {what}: memory for each", [memory], target, "B")
        yield Row.of(f"opening {what}: then the table", [table * 1e3], unit="ms")
        yield Row.of(f"opening {what}: then where a call is", [call * 1e6], unit="us")


def _in_a_process_of_its_own(count: int) -> tuple[float, float, float, float]:
    opening, memory, table, call = printed_by(__name__, f"print_measured({count})")
    return opening, memory, table, call


def print_measured(count: int) -> None:
    """Print the seconds and bytes that opening takes for each shard, and the seconds of the table and of a call."""
    warm = Simulated(4)
    repr(StoredRecording(warm, warm.manifest, [Rank(warm, warm.manifest)]))
    disk = Simulated(count)
    memory, start = anonymous(), process_time()
    acts = StoredRecording(disk, disk.manifest, [Rank(disk, disk.manifest)])
    opened = process_time()
    kept = anonymous() - memory
    repr(acts)
    shown = process_time()
    for at in range(10):
        acts["layers.0"]._place(count * PASSES * at // 10)
    print((opened - start) / count, kept / count, shown - opened, (process_time() - shown) / 10)
