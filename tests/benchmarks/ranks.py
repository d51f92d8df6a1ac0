"""Four ranks that record into one path, against one process that records as much.

The processes are there, and so are the values; the clock runs from when the first one begins to record until the last
one has left its block, when the disk has everything. Where four processes share two cores, that is part of it.

It writes to the folder for temporary files; ``TMPDIR`` chooses another one.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import tempfile
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from actrec import load, record
from actrec.data import rows
from actrec.store import Folder
from tests.stored import Shards

from .storing import LAYERS, Ready, ready
from .timing import Row, ratios, seconds, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.pool import Pool
    from multiprocessing.synchronize import Barrier

RANKS = 4
TARGET = 1.25  # at least 0.8 of the bandwidth of one process
SHAPE = (256, 1024)  # a mebibyte


def measure(*, quick: bool) -> Iterator[Row]:
    passes = 4 if quick else 3 * 1024 // LAYERS
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(RANKS)
    with (
        tempfile.TemporaryDirectory() as folder,
        spawn.Pool(RANKS, _begin, (together,)) as pool,
    ):
        work = {
            name: partial(_written, pool, Path(folder, name), ranks, passes)
            for name, ranks in (("four ranks", RANKS), ("one process", 1))
        }
        times = take_turns(work, rounds=1 if quick else 5)
    size = passes * LAYERS * math.prod(SHAPE) * 4 / 2**30
    yield Row.of(
        f"writing {size:.2g} GiB: {RANKS} ranks / one process",
        ratios(times, "four ranks", "one process"),
        TARGET,
    )
    yield from _read(calls=200 if quick else 100_000)


def _read(calls: int) -> Iterator[Row]:
    """Calls of a few bytes: what has to be done for each of them shows."""
    with tempfile.TemporaryDirectory() as folder:
        for name, ranks in (("four ranks", RANKS), ("one process", 1)):
            for rank in range(ranks):
                _shards(Path(folder, name), rank, ranks, calls // ranks)
        four, one = (load(Path(folder, name)) for name in ("four ranks", "one process"))
        work = {
            "joined, four ranks": four["a"].cat,
            "joined, one process": one["a"].cat,
            "rows of two layers, four ranks": lambda: rows(four, "a", "b"),
            "rows of two layers, one process": lambda: rows(one, "a", "b"),
        }
        times = take_turns({name: partial(seconds, do) for name, do in work.items()}, rounds=5)
        for what in ("joined", "rows of two layers"):
            name = f"{calls:,} small calls {what}: {RANKS} ranks / one process"
            yield Row.of(name, ratios(times, f"{what}, four ranks", f"{what}, one process"))
            each = [1e6 * time / calls for time in times[f"{what}, four ranks"]]
            yield Row.of(f"small calls {what}, of {RANKS} ranks: each", each, unit="us")
        loop = [1e6 * seconds(lambda: torch.cat([*four["a"][: calls // 20]])) / (calls // 20)]
        yield Row.of(f"small calls of {RANKS} ranks read one by one: each", loop, unit="us")


def _shards(path: Path, rank: int, ranks: int, calls: int) -> None:
    shards = Shards(path, ["a", "b"], rank=rank, ranks=ranks)
    for begin in range(0, calls, 1000):
        numbers = range(begin, min(begin + 1000, calls))
        some = [(at, number, torch.ones(1, 16)) for number in numbers for at in range(2)]
        shards.write(some, numbers.stop, ended="" if numbers.stop == calls else None)


def _written(pool: Pool, path: Path, ranks: int, passes: int) -> float:
    shutil.rmtree(path, ignore_errors=True)
    jobs = [(path, rank, ranks, passes // ranks) for rank in range(ranks)]
    spans = pool.starmap(_record, jobs, chunksize=1)
    written = sum(file.stat().st_size for file in path.rglob("*"))
    assert written >= passes * LAYERS * math.prod(SHAPE) * 4
    shutil.rmtree(path)
    return max(end for _, end in spans) - min(start for start, _ in spans)


# --- In the processes --------------------------------------------------------------------------------

_shared: dict[str, Any] = {}


def _begin(together: Barrier) -> None:
    torch.set_num_threads(1)
    _shared["together"] = together


def _record(path: Path, rank: int, ranks: int, passes: int) -> tuple[float, float]:
    batches = ready(passes, SHAPE)
    model = Ready()
    if ranks > 1:
        _shared["together"].wait()
    start = monotonic()
    into = Folder(path, rank=rank, world_size=ranks, run="a")
    with torch.no_grad(), record(model, "layers.*", into=into):
        for batch in batches:
            model(batch)
    return start, monotonic()
