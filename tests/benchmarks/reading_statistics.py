"""Statistics and comparison of a stored recording: how fast they read it, and how much memory they take.

The recording is not in the system's cache, as one that is larger than memory is not: before each round the
system is asked to forget the files. What is timed is therefore the time that passes, the disk's included.
"""

from __future__ import annotations

import gc
import os
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actrec import compare, load, record

from .memory import most_during, printed_by
from .timing import Row, ratios, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLOWEST = 2.0  # times the time of reading the same files from start to end
MOST_MEMORY = 100.0  # MB
SIZE = 5_000_000_000
LAYERS = 8


class Pairs(nn.Module):
    """Layers two and two: of every other pair both return the same, of the rest nearly the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> None:
        for number, layer in enumerate(self.layers):
            layer(x * 1.0001 if number % 4 == 3 else x.clone())  # the last of four


def other(name: str) -> str | None:
    """The layer that a layer is compared with: 1 for 0, 3 for 2, and so on; so all are read once."""
    number = int(name.rpartition(".")[2])
    return None if number % 2 else f"layers.{number + 1}"


def measure(*, quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        batch = torch.randn(4 if quick else 64, 64, 56, 28)
        _write(run, batch, passes=2 if quick else SIZE // (LAYERS * batch.nbytes))
        megabytes = sum(file.stat().st_size for file in _files(run)) / 1e6
        what = f"of a stored recording of {megabytes:,.0f} MB"
        variants = {name: partial(_cold, run, work) for name, work in WORK.items()}
        times = take_turns(variants, rounds=1 if quick else 5)
        for name in ("stats", "compare"):
            took = ratios(times, name, "read")
            yield Row.of(f"{name}() {what} / reading its files once", took, SLOWEST)
            memory = [_memory_in_a_process_of_its_own(run, name)]
            yield Row.of(f"{name}() {what}, most memory besides", memory, MOST_MEMORY, "MB")
        rates = [megabytes / seconds for seconds in times["read"]]
        yield Row.of("reading its files once, each second", rates, unit="MB")


def _write(run: Path, batch: Tensor, passes: int) -> None:
    model = Pairs()
    with torch.no_grad(), record(model, "layers.*", into=run):
        for number in range(passes):
            model(batch + number)


def _files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file())


def _read(run: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in _files(run):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _stats(run: Path) -> None:
    load(run).stats()


def _compare(run: Path) -> None:
    acts = load(run)
    compare(acts, acts, other)


WORK: dict[str, Callable[[Path], None]] = {"read": _read, "stats": _stats, "compare": _compare}


def _cold(run: Path, work: Callable[[Path], None]) -> float:
    """The time of some work on files that the system has forgotten."""
    gc.collect()  # a recording that is still open would keep them
    for path in _files(run):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = perf_counter()
    work(run)
    return perf_counter() - start


# --- Memory ------------------------------------------------------------------------------------------


def _memory_in_a_process_of_its_own(run: Path, name: str) -> float:
    """The memory that some work takes where nothing is left over from work before, in MB."""
    (memory,) = printed_by(__name__, f"print_memory({str(run)!r}, {name!r})")
    return memory


def print_memory(run: str, name: str) -> None:
    """Print the most memory, in MB, that the process has during some work beyond what it had before."""
    _, most = most_during(lambda: WORK[name](Path(run)))
    print(most / 1e6)
