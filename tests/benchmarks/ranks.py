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

from actrec import record
from actrec.store import Folder

from .storing import LAYERS, Ready, ready
from .timing import Row, ratios, take_turns

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
