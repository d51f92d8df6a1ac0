"""Training on a recording: ``shuffled``, against rows that are fetched at random, and against reading the files in order.

All read the same files: rows of 768 numbers, as a transformer's tokens have them, recorded by actrec in shards of its own size.

The recording must not come out of memory. So before each measurement the system is made to forget the files, and is
asked whether it has (``mincore``). Those that read all rows once start with nothing then, and each byte
comes from the disk. Who fetches rows at random would fill the memory as it goes, on a machine that has enough of it,
and read from there what another row brought along. A recording that is larger than memory is imitated: as soon as the
system holds a quarter of it, it is made to forget all of it. (Mapped pages stay, so the map is told to let go of its
pages, too.)

``np.memmap`` is measured as one uses it, and with ``MADV_RANDOM``. Without, Linux reads for each row as much around it as
the disk's ``read_ahead_kb`` says.

It writes to the folder for temporary files; ``TMPDIR`` chooses another one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter, sleep, thread_time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from actrec import load, record
from actrec.data import shuffled

from .timing import Row, ratios, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

WIDTH = 768
CALL = (8, 128, WIDTH)
BATCH = 1024
SECONDS = 6.0  # that random access is looked at; it would take hours to read all
IN_ORDER = "reading in order"
AHEAD = 16 * 2**20  # bytes that are announced to the system before they are read, as shuffled does
SHARE = 0.25  # of the recording that may be in memory
FASTER = 1 / 5  # at least five times the rows per second of random access
MICROSECONDS = 100.0  # at most, to take a batch
STEP = 0.03  # seconds of training between two batches
AS_FAST = 1 / 0.7  # and at least 0.7 of those that reading in order brings


def measure(*, quick: bool) -> Iterator[Row]:
    gib = 0.01 if quick else 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        _record(path, int(gib * 2**30))
        files = sorted(path.glob("rank-00000/*.safetensors"))
        ways: dict[str, Callable[[], float]] = {
            IN_ORDER: lambda: _cold(files, lambda: _in_order(files, ahead=0)),
            f"{IN_ORDER}, announced": lambda: _cold(files, lambda: _in_order(files, ahead=AHEAD)),
        }
        for workers in (0, 2):
            name = f"{workers} workers"
            ways[name] = lambda workers=workers: _cold(files, lambda: _shuffled(path, workers))
            for what, advice in (("", None), (" and MADV_RANDOM", mmap.MADV_RANDOM)):
                ways[f"np.memmap{what}, {name}"] = lambda workers=workers, advice=advice: _cold(
                    files, lambda: _at_random(path, files, workers, advice, quick=quick)
                )
        times = take_turns(ways, 1 if quick else 3)
        takes = {workers: _takes(path, workers, 4 if quick else 200) for workers in (0, 2)}
    yield from _rows(f"loading {gib:g} GiB in rows of 3 KiB", times)
    for workers, (cpu, wall) in takes.items():
        what = f"taking a batch of 3 MiB, {workers} workers"
        target = None if workers else MICROSECONDS
        yield Row.of(f"{what}: of the training thread", cpu, target, "us")
        yield Row.of(f"{what}: until it is there", wall, target, "us")


def _rows(what: str, times: dict[str, list[float]]) -> Iterator[Row]:
    for workers in ("0 workers", "2 workers"):
        for other in times:
            if other.startswith(IN_ORDER) or (other.endswith(workers) and other != workers):
                target = AS_FAST if other.startswith(IN_ORDER) else FASTER
                yield Row.of(
                    f"{what}: shuffled, {workers} / {other}", ratios(times, workers, other), target
                )
    for name, seconds in times.items():
        rates = [1 / each for each in seconds]
        shown = f"shuffled, {name}" if name[0].isdigit() else name
        yield Row.of(f"{what}: {shown}", rates, unit="rows/s")


# --- The ways: seconds for a row -------------------------------------------------------------------


def _in_order(files: list[Path], ahead: int) -> float:
    buffer = bytearray(2**20)
    start = perf_counter()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        place = 0
        while many := os.readv(fd, [buffer]):
            if ahead and place % (ahead // 2) == 0:
                os.posix_fadvise(fd, place, ahead, os.POSIX_FADV_WILLNEED)
            place += many
        os.close(fd)
    return (perf_counter() - start) / (_size(files) / (4 * WIDTH))


def _shuffled(path: Path, workers: int) -> float:
    start = perf_counter()
    dataset = shuffled(load(path), "", batch_size=BATCH, flatten=True)
    return _rate(DataLoader(dataset, batch_size=None, num_workers=workers), start)


def _takes(path: Path, workers: int, many: int) -> tuple[list[float], list[float]]:
    """Microseconds, of the thread and until it is there, that each batch takes where a step of training takes longer to make one.

    The buffer is small, so that there are windows to go from and to.
    """
    dataset = shuffled(load(path), "", batch_size=BATCH, flatten=True, buffer=64 * 2**20)
    batches = iter(
        DataLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset
    )
    next(batches)
    cpu, wall = [], []
    for _ in range(min(many, len(dataset) - 1)):
        sleep(STEP)
        start, began = thread_time(), perf_counter()
        batch = next(batches)
        wall.append(1e6 * (perf_counter() - began))
        cpu.append(1e6 * (thread_time() - start))
        del batch  # not while one measures
    return cpu, wall


def _at_random(
    path: Path, files: list[Path], workers: int, advice: int | None, *, quick: bool
) -> float:
    loader = DataLoader(
        Mapped(path, advice), batch_size=BATCH // 4, shuffle=True, num_workers=workers
    )
    with _forgetful(files):
        return _rate(loader, perf_counter(), 0.1 if quick else SECONDS)


def _rate(batches: Iterable[torch.Tensor], start: float, limit: float = float("inf")) -> float:
    rows = 0
    for batch in batches:
        rows += len(batch)
        if perf_counter() - start > limit:
            break
    return (perf_counter() - start) / rows


class Mapped(Dataset):
    """The rows of the same files, by ``np.memmap``."""

    def __init__(self, path: Path, advice: int | None) -> None:
        self.places = []
        for shard, part in load(path)[""]._read():
            leaf = part.groups[0].leaves[0]
            self.places.append((shard.path, *leaf.extent(0, len(part))))
        self.advice = advice
        rows = [nbytes // (4 * WIDTH) for _, _, nbytes in self.places]
        self.ends = np.cumsum(rows)
        self.maps: list[np.memmap] = []
        self.fetched = 0

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        if not self.maps:
            self._open()
        self.fetched += 1
        if self.fetched % 64 == 0:
            self._let_go()
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return np.array(self.maps[shard][index - self.ends[shard]])

    def _open(self) -> None:
        for file, begin, nbytes in self.places:
            shape = (nbytes // (4 * WIDTH), WIDTH)
            self.maps.append(np.memmap(file, np.float32, "r", begin, shape))
            if self.advice is not None:
                self.maps[-1]._mmap.madvise(self.advice)

    def _let_go(self) -> None:
        for mapped in self.maps:
            mapped._mmap.madvise(mmap.MADV_DONTNEED)


# --- What the system holds ---------------------------------------------------------------------------


def _cold(files: list[Path], work: Callable[[], float]) -> float:
    _forget(files)
    held = sum(map(_resident, files)) / _size(files)
    if held > 0.01:
        message = (
            f"{held:.0%} of the files are still in memory; is their file system one in memory?"
        )
        raise RuntimeError(message)
    return work()


def _forget(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _forgetful(files: list[Path]) -> Iterator[None]:
    """Let the system hold only a share of the files, as if there were no more memory."""
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.2):
            if sum(map(_resident, files)) > SHARE * _size(files):
                _forget(files)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _resident(file: Path) -> int:
    """How many bytes of a file are in memory."""
    with file.open("rb") as opened:
        mapped = np.memmap(opened, np.uint8, "r")
        pages = np.zeros(-(-mapped.nbytes // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        size, start = ctypes.c_size_t(mapped.nbytes), ctypes.c_void_p(mapped.ctypes.data)
        if libc.mincore(start, size, pages.ctypes.data_as(ctypes.c_void_p)):
            raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum()) * mmap.PAGESIZE


def _record(path: Path, nbytes: int) -> None:
    model, base = nn.Identity(), torch.randn(CALL)
    with torch.no_grad(), record(model, "", into=path):
        for call in range(max(1, nbytes // base.nbytes)):
            model(base + call)
    for file in path.rglob("*.safetensors"):
        with suppress(AttributeError), file.open("rb") as opened:
            os.fsync(opened.fileno())
