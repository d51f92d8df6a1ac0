"""The sources of rows: a tensor in memory, a file, or a tensor that is made on access.

A source has bytes: rows of every dtype can be selected and joined as bytes, also of those that PyTorch cannot compute with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from actrec._values.memory import words, writable
from actrec.errors import CorruptRecordingError
from actrec.store.disk import Later
from actrec.store.place import Place, Reading

from .between import Between

Shape: TypeAlias = tuple[int, ...]

#: Up to this many bytes between two rows are read rather than skipped.
_GAP: Final = 1 << 14
#: The memory for bytes between rows, which are not used.
_NOTHING: Final = memoryview(bytearray(_GAP))
#: Up to this many rows are read directly to their places: 256 random rows of 3 KiB take 1.2 ms, and through a buffer 3 ms.
_FEW: Final = 16
#: Bytes that are read at once to pick rows from.
_MOST: Final = 1 << 20
#: Files that are open at a time. Rows are read in the order of the files, so earlier files are not needed again soon.
_MOST_OPEN: Final = 64
#: Concurrent requests to an object store.
_THREADS: Final = 16


class Source(Protocol):
    """A sequence of bytes."""

    def read(self, begin: int, out: Tensor, files: Files) -> None:
        """Fill ``out`` with the bytes from number ``begin`` on."""

    def take(self, begins: Tensor, out: Tensor, places: Tensor, files: Files) -> None:
        """Copy the rows that begin at ``begins``, ascending, to ``places`` in ``out``: ``(N,), (M, width), (N,)``."""

    def announce(self, begin: int, nbytes: int, files: Files) -> None:
        """Prefetch a part, which will be read soon."""


# --- In memory ---------------------------------------------------------------------------------------


class Held(Source):
    """A tensor in memory; or a function that makes it on access."""

    def __init__(self, tensor: Tensor | Callable[[], Tensor]) -> None:
        self._tensor = tensor
        self._view: Tensor | None = (
            None  # 64 tensors in memory: 1,000 rows take 8 ms with it, and 11 ms without
        )

    @override
    def read(self, begin: int, out: Tensor, files: Files) -> None:
        out.view(-1).copy_(self._bytes()[begin : begin + out.nbytes])

    @override
    def take(self, begins: Tensor, out: Tensor, places: Tensor, files: Files) -> None:
        width = out.shape[1]
        rows = self._bytes().view(-1, width).index_select(0, begins // width)
        words(out).index_copy_(0, places, words(rows))

    @override
    def announce(self, begin: int, nbytes: int, files: Files) -> None:
        pass

    def _bytes(self) -> Tensor:
        """Return the elements in order, as bytes: a view of a contiguous tensor on the CPU, else a copy."""
        if self._view is not None:
            return self._view
        tensor = self._tensor if isinstance(self._tensor, Tensor) else self._tensor()
        if not tensor.numel():
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        # A contiguous tensor may still have other strides in dimensions of size 1.
        found = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
        self._view = found if plain is self._tensor else None
        return found


# --- Files -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stored(Source):
    """A file of a recording. A pickle has only its name."""

    place: Place
    name: str
    head: bytes = field(repr=False)  #: its first bytes when the recording was opened

    @override
    def read(self, begin: int, out: Tensor, files: Files) -> None:
        if out.nbytes:
            files.reading(self).into(begin, writable(out))

    @override
    def take(self, begins: Tensor, out: Tensor, places: Tensor, files: Files) -> None:
        # Read, not mapped: a map makes the system read pages around each row.
        width, memory = out.shape[1], writable(out)
        starts, targets = begins.tolist(), (places * width).tolist()
        parts = list(_parts(starts, width))
        reading = files.reading(self)
        into = reading.into
        reading.gather(
            ((starts[low], starts[high - 1] + width - starts[low]) for low, high in parts),
            files.later,
        )
        for low, high in parts:
            if high - low == 1:
                to = targets[low]
                into(starts[low], memory[to : to + width])
                continue
            here, start = starts[low:high], starts[low]
            if len(here) <= _FEW and len({*here}) == len(here):
                own = [memory[to : to + width] for to in targets[low:high]]
                into(start, *_apart(here, own))
                continue
            found = torch.empty(here[-1] + width - start, dtype=torch.uint8, device="cpu")
            into(start, writable(found))
            rows = found.unfold(0, width, 1).index_select(0, begins[low:high] - start)
            words(out).index_copy_(0, places[low:high], words(rows))

    @override
    def announce(self, begin: int, nbytes: int, files: Files) -> None:
        if nbytes:
            with suppress(CorruptRecordingError):  # raised when it is read
                files.reading(self).announce(begin, nbytes, files.fetching(self))


def _parts(begins: list[int], width: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that are near each other: each range is read with the bytes between the rows."""
    low = 0
    for at, (one, other) in enumerate(pairwise(begins), 1):
        if other - one > width + _GAP or other - begins[low] > _MOST:
            yield low, at
            low = at
    yield low, len(begins)


def _apart(begins: list[int], rows: list[memoryview]) -> Iterator[memoryview]:
    """Yield the memory of the rows that begin there, and of the unused bytes between them."""
    at = begins[0]
    for begin, row in zip(begins, rows, strict=True):
        if begin > at:
            yield _NOTHING[: begin - at]
        yield row
        at = begin + len(row)


class Files(AbstractContextManager["Files"]):
    """The files that are open: each is opened once, and few at a time.

    Args:
        between: through which worker processes that need the same parts fetch them for each other.
    """

    def __init__(self, between: Between | None = None) -> None:
        self.between = between
        self._open: dict[Stored, Reading] = {}  # the least recently used is the first

    @override
    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()
        if "_threads" in vars(self):
            self._threads.shutdown(cancel_futures=True)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, "actrec-fetch")

    def later(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run a function in a thread."""
        return self._threads.submit(work, *args)

    def fetching(self, file: Stored) -> Later:
        """Return a function that makes a thread fetch a part of a file, if no other worker has it."""
        if self.between is None:
            return self.later
        return self.between.fetching(file.place.shown(file.name), self.later)

    def reading(self, file: Stored) -> Reading:
        """Return an open file; raises ``CorruptRecordingError`` if something is wrong with it."""
        found = self._open.pop(file, None)
        if found is None:
            found = file.place.reading(file.name, file.head)
        self._open[file] = found
        if len(self._open) > _MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return found
