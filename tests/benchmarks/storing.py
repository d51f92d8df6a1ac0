"""Recording to the disk and reading from it, against the other ways to put tensors there.

What is recorded is ready: a model whose layers return tensors that are there already, so that recording alone is
measured. Everybody writes the same values, and everybody has them on the disk in the end: ``fsync`` is included.
Nobody who reads finds the file in memory. The time is that which passes, for disks are waited for.

It writes to the folder for temporary files; ``TMPDIR`` chooses another one.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from time import perf_counter, process_time, thread_time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from actrec import load, record
from actrec._values.memory import memory

from .timing import Row, ratios, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TARGET = 1.25  # at least 0.8 of the speed of os.write; not for small values, of which Python's time is most
SMALL = 64  # KiB
#: Microseconds of the processor for a small value.
CPU = {"the model's thread": 9, "all threads": 15}
LAYERS = 12
SHARD = 2**28  # bytes in one file, for os.write as for actrec
RANDOM = 500  # calls that are read in random order

Batch = list[torch.Tensor]


@dataclass(frozen=True)
class Way:
    """A way to store batches, and to read them again."""

    write: Callable[[Path, list[Batch]], None]
    read: Callable[[Path, tuple[int, ...]], Callable[[int, int], torch.Tensor]]


def measure(*, quick: bool) -> Iterator[Row]:
    gib = 0.001 if quick else 3
    for kib, share in ((4096, 1), (256, 1 / 4), (8, 1 / 32)):
        yield from _measured(max(1, int(gib * share * 2**20 / kib / LAYERS)), kib, quick=quick)


def _measured(many: int, kib: int, *, quick: bool) -> Iterator[Row]:
    shape = (kib, 256)
    batches = ready(many, shape)
    ways = _ways()
    rounds = 1 if quick else 3
    assert batches[0][0].nbytes == kib * 2**10
    size = f"{many * LAYERS * kib / 2**20:.2g} GiB in values of {kib:,} KiB"
    if missing := [name for name in ("h5py", "zarr") if name not in ways]:
        size += f" (without {' and '.join(missing)}, not installed)"
    with tempfile.TemporaryDirectory() as folder:
        here = {name: Path(folder, name) for name in ways}
        work = {name: partial(_write, way, here[name], batches) for name, way in ways.items()}
        times = take_turns(work, rounds)
        yield from _rows(f"writing {size}", times, TARGET if kib > SMALL else None)
        megabytes = many * LAYERS * kib * 2**10 / 1e6
        rates = [megabytes / seconds for seconds in times["actrec"]]
        yield Row.of(f"writing {size}: actrec, each second", rates, unit="MB")
        if kib <= SMALL:
            yield from _processor(here["actrec"], batches, rounds)
        for what, calls in _orders(many).items():
            work = {
                name: partial(_read, way, here[name], shape, calls) for name, way in ways.items()
            }
            yield from _rows(f"reading {what} of {size}", take_turns(work, rounds))


def ready(many: int, shape: tuple[int, ...]) -> list[Batch]:
    """So many batches, each with a value for each layer.

    Each value has memory of its own: of one that repeats an element, or that was there before, actrec would write
    the element, or nothing. None is zero, for zarr does not write zeros.
    """
    numbers = torch.arange(1.0, many * LAYERS + 1).split(LAYERS)
    return [[number.repeat(math.prod(shape)).reshape(shape) for number in row] for row in numbers]


def _processor(path: Path, batches: list[Batch], rounds: int) -> Iterator[Row]:
    """What recording adds for each value, in time of the processor: to the thread of the model, and to all."""
    times: dict[str, list[float]] = {"the model's thread": [], "all threads": []}
    values = LAYERS * len(batches)
    for _ in range(rounds):
        model = Ready()
        shutil.rmtree(path, ignore_errors=True)
        start = thread_time()
        for batch in batches:
            model(batch)
        without = thread_time() - start
        with torch.no_grad(), record(model, "layers.*", into=path):
            start, start_of_all = thread_time(), process_time()
            for batch in batches:
                model(batch)
            took = thread_time() - start
        for name, seconds in zip(times, (took, process_time() - start_of_all), strict=True):
            times[name].append((seconds - without) / values * 1e6)
    for name, each in times.items():
        size = f"a value of {batches[0][0].nbytes // 2**10} KiB"
        yield Row.of(f"recording {size} to disk adds, {name}", each, CPU[name], unit="us")


def _rows(what: str, times: dict[str, list[float]], target: float | None = None) -> Iterator[Row]:
    for name in list(times)[1:]:
        yield Row.of(
            f"{what}: actrec / {name}",
            ratios(times, "actrec", name),
            target if name == "os.write" else None,
        )


def _orders(many: int) -> dict[str, list[tuple[int, int]]]:
    """Every layer from its first call to its last; and calls here and there."""
    every = [(layer, call) for layer in range(LAYERS) for call in range(many)]
    some = Random(0).sample(every, min(RANDOM, len(every)))  # noqa: S311  # not for secrets
    return {"all": every, f"{len(some)} calls": some}


def _write(way: Way, path: Path, batches: list[Batch]) -> float:
    shutil.rmtree(path, ignore_errors=True)
    start = perf_counter()
    way.write(path, batches)
    took = perf_counter() - start
    written = sum(file.stat().st_size for file in _files(path))
    assert written >= sum(value.nbytes for batch in batches for value in batch), path.name
    return took


def _read(way: Way, path: Path, shape: tuple[int, ...], calls: list[tuple[int, int]]) -> float:
    _out_of_memory(path)
    start = perf_counter()
    value = way.read(path, shape)
    for layer, call in calls:
        value(layer, call).sum()
    return perf_counter() - start


def _out_of_memory(path: Path) -> None:
    """Let the system forget what it holds of these files, once nobody has them mapped any more."""
    gc.collect()
    with suppress(AttributeError):  # not everywhere
        for file in _files(path):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _sync(files: list[Path]) -> None:
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.frombuffer(memory(tensor)[1], np.float32).reshape(tensor.shape)


# --- The ways ----------------------------------------------------------------------------------------


class Ready(nn.Module):
    """Its layers return what is there already."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(LAYERS))

    def forward(self, batch: Batch) -> None:
        for layer, value in zip(self.layers, batch, strict=True):
            layer(value)


def _record(path: Path, batches: list[Batch]) -> None:
    model = Ready()
    with torch.no_grad(), record(model, "layers.*", into=path):
        for batch in batches:
            model(batch)


def _load(path: Path, _shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
    layers = list(load(path).values())
    return lambda layer, call: layers[layer][call]


def _os_write(path: Path, batches: list[Batch]) -> None:
    path.mkdir()
    for number, shard in enumerate(_shards(batches)):
        fd = os.open(path / f"{number:06d}", os.O_WRONLY | os.O_CREAT)
        for value in shard:
            view = memory(value)[1]
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.close(fd)


def _shards(batches: list[Batch]) -> Iterator[Batch]:
    values = [value for batch in batches for value in batch]
    many = SHARD // values[0].nbytes
    return (values[start : start + many] for start in range(0, len(values), many))


def _os_read(path: Path, shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
    fds = [os.open(file, os.O_RDONLY) for file in _files(path)]
    nbytes = 4 * math.prod(shape)

    def value(layer: int, call: int) -> torch.Tensor:
        shard, at = divmod(call * LAYERS + layer, SHARD // nbytes)
        buffer = bytearray(nbytes)
        os.preadv(fds[shard], [buffer], at * nbytes)
        return torch.frombuffer(buffer, dtype=torch.float32).view(shape)

    return value


def _torch_save(path: Path, batches: list[Batch]) -> None:
    path.mkdir()
    for number, batch in enumerate(batches):
        torch.save(batch, path / f"{number:06d}.pt")
    _sync(_files(path))


def _torch_load(path: Path, _shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
    files = _files(path)
    return lambda layer, call: torch.load(files[call], mmap=True)[layer]


def _memmap_write(path: Path, batches: list[Batch]) -> None:
    path.mkdir()
    shape = (len(batches), *batches[0][0].shape)
    files = [
        np.memmap(path / f"{layer:02d}", np.float32, "w+", 0, shape) for layer in range(LAYERS)
    ]
    for call, batch in enumerate(batches):
        for file, value in zip(files, batch, strict=True):
            file[call] = _array(value)
    for file in files:
        file.flush()


def _memmap_read(path: Path, shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
    files = [np.memmap(file, np.float32, "c").reshape(-1, *shape) for file in _files(path)]
    return lambda layer, call: torch.from_numpy(files[layer][call])


def _h5py_write(path: Path, batches: list[Batch]) -> None:
    import h5py

    path.mkdir()
    one = tuple(batches[0][0].shape)
    with h5py.File(path / "all.h5", "w") as file:
        sets = [
            file.create_dataset(f"{layer:02d}", (len(batches), *one), "f4", chunks=(1, *one))
            for layer in range(LAYERS)
        ]
        for call, batch in enumerate(batches):
            for dataset, value in zip(sets, batch, strict=True):
                dataset[call] = _array(value)
    _sync(_files(path))


def _h5py_read(path: Path, _shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
    import h5py

    file = h5py.File(path / "all.h5", "r")
    sets = [file[f"{layer:02d}"] for layer in range(LAYERS)]
    return lambda layer, call: torch.from_numpy(sets[layer][call])


def _zarr_write(path: Path, batches: list[Batch]) -> None:
    import zarr

    one = tuple(batches[0][0].shape)
    group = zarr.create_group(path)
    arrays = [
        group.create_array(
            f"{layer:02d}",
            shape=(len(batches), *one),
            chunks=(1, *one),
            dtype="f4",
            compressors=None,
        )
        for layer in range(LAYERS)
    ]
    for call, batch in enumerate(batches):
        for array, value in zip(arrays, batch, strict=True):
            array[call] = _array(value)
    _sync(_files(path))


def _zarr_read(path: Path, _shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
    import zarr

    group = zarr.open_group(path, mode="r")
    arrays = [group[f"{layer:02d}"] for layer in range(LAYERS)]
    return lambda layer, call: torch.from_numpy(arrays[layer][call])


def _ways() -> dict[str, Way]:
    ways = {
        "actrec": Way(_record, _load),
        "os.write": Way(_os_write, _os_read),
        "torch.save": Way(_torch_save, _torch_load),
        "np.memmap": Way(_memmap_write, _memmap_read),
    }
    libraries = {"h5py": Way(_h5py_write, _h5py_read), "zarr": Way(_zarr_write, _zarr_read)}
    return ways | {name: way for name, way in libraries.items() if find_spec(name)}
