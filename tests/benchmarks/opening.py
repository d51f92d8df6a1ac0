"""Opening a recording of very many shards and finding a call in it: time and memory, up to a million.

The folder has as many names as there are shards. Those shards that are looked at are written before the clock runs; all
others are hard links to an empty file, which nobody may open. Each size is measured in a process of its own.
"""

from __future__ import annotations

import os
import tempfile
from copy import copy
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, BinaryIO

import torch
from typing_extensions import override

from actrec import load
from actrec._values.shapes import Summary
from actrec.store.call import Call
from actrec.store.description import Description, LayerInfo
from actrec.store.disk import Disk
from actrec.store.file_names import shard_name
from actrec.store.format import Slot
from actrec.store.ledger import Commit, Ledger, SoFar
from actrec.store.new_shard import lay_out, write
from actrec.store.rank import Rank
from actrec.store.reader import StoredRecording

from .memory import anonymous, printed_by
from .timing import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (1_000, 10_000, 100_000, 1_000_000)
LAYERS, PASSES = 12, 20  # in each shard
TARGET = 1000.0  # milliseconds for a million shards, a call and the table
LINKS = 50_000  # to one file; some file systems have no more than 65,000


class Written(Disk):
    """The folder of a rank whose shards are written when they are first looked at."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(path)
        self.path.mkdir(parents=True)
        layers = [LayerInfo(f"layers.{i}", "MLP") for i in range(LAYERS)]
        self.slots = [Slot("output", at, one.name, one.type) for at, one in enumerate(layers)]
        self.description = Description("Model", tuple(layers))
        (self.path / "rank.json").write_bytes(self.description.content())
        self.count = count
        for number in range(count):
            name = self.path / shard_name(number)
            if number % LINKS == 0:
                name.touch()
                first = name
            else:
                os.link(first, name)

    @override
    def size(self, name: str) -> int:
        if super().size(name) == 0:
            self._write(name)
        return super().size(name)

    def _write(self, name: str) -> None:
        number = int(name.partition(".")[0])
        before = number * PASSES
        looks = Summary(
            {"": None}, {"float32": None}, {"cpu": None}, {(None, None): ([2, 4], [2, 4])}
        )
        so_far = SoFar(before, before, 32 * before, 0, before - 1, before, 1, looks=looks)
        heading = replace(self.description.heading(0), shard=number - 1, committed=before)
        ledger = Ledger(heading, {slot: copy(so_far) for slot in self.slots} if number else {})
        parts, tensors = lay_out(
            Call.of(slot, before + at, torch.full((2, 4), float(before + at)))
            for at in range(PASSES)
            for slot in self.slots
        )
        last = number == self.count - 1
        heading = ledger.next(parts, Commit(before + PASSES, ended="" if last else None))
        (self.path / name).unlink()
        with (self.path / name).open("wb") as file:
            write(_File(file), heading, ledger.layers, parts, tensors)


class _File:
    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write
        self._file = file

    def write_at_start(self, data: bytes) -> None:
        self._file.seek(0)
        self._file.write(data)


def measure(*, quick: bool) -> Iterator[Row]:
    sizes = (10, 20) if quick else SIZES
    for count in sizes:
        opening, call, table, memory = printed_by(__name__, f"print_measured({count})")
        what = f"{count:,} shards of {LAYERS} layers"
        target = TARGET if count == sizes[-1] else None
        yield Row.of(
            f"{what}: opening, a call and the table", [opening + call + table], target, "ms"
        )
        yield Row.of(f"{what}: opening", [opening], unit="ms")
        yield Row.of(f"{what}: then a call", [call], unit="ms")
        yield Row.of(f"{what}: then the table", [table], unit="ms")
        yield Row.of(f"{what}: memory", [memory], unit="MB")


def print_measured(count: int) -> None:
    """Print the milliseconds that opening, a call and the table take, and the megabytes that are kept."""
    with tempfile.TemporaryDirectory() as folder:
        rank = Written(Path(folder) / "run/rank-00000", count)
        at = count * PASSES * 2 // 3
        warm = StoredRecording(Disk(Path(folder) / "run"), [Rank(rank)])
        assert warm["layers.1"][at].unique().tolist() == [at]
        repr(warm)
        del warm
        memory, start = anonymous(), process_time()
        acts = load(Path(folder) / "run")
        opened = process_time()
        found = acts["layers.1"][at]
        read = process_time()
        repr(acts)
        shown = process_time()
        kept = anonymous() - memory
        assert found.unique().tolist() == [at]
        assert (acts.complete, acts.num_passes) == (True, count * PASSES)
        times = (opened - start, read - opened, shown - read)
        print(*(1000 * time for time in times), kept / 1e6)
