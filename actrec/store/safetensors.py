"""The container: a safetensors file, written from its tensors' own memory and read by its header alone.

Eight bytes give the length of the header, the header is JSON, and then comes the data of all tensors without a gap. The
``safetensors`` library reads these files like any other. It is not used to write them, because it needs
either ``bytes``, which are a copy, or a mutable pointer, which ends the copy-on-write sharing of a snapshot and so makes a
copy too; nor to read them, because the header's checksum must be compared before anything is mapped.

The metadata has checksums (CRC-32): one for each tensor's data, and one for the header itself,
computed with eight zeros in its own place.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from .format import MAX_DIMS, MAX_HEADER, MAX_SIZE, Defect, need
from .forms import checked
from .new_file import FileBeingWritten

_ALIGNMENT: Final = 64  # where the data begins: a cache line
_LENGTH: Final = 8  # bytes that hold the length of the header
_ZEROS: Final = "00000000"
_CHUNK: Final = 1 << 22  # bytes that are written at a time
#: The size of an element in bytes.
_SIZES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


#: The forms of a header, see ``forms.py``.
_METADATA: Final = {"header_crc32": str, "data_crc32": str, str: str}
_ENTRY: Final = {"dtype": str, "shape": [int], "data_offsets": (int, int)}


#: The owner of some memory, and the memory, which is valid as long as the owner lives.
Piece: TypeAlias = tuple[object, memoryview]


@dataclass(slots=True, eq=False)
class Tensor:
    """A tensor to be written, in pieces that follow each other in memory order."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[Piece]]
    alignment: int  # in bytes; a complex number is two elements here, aligned to the size of both
    index: bool = False  # whether it is an index of other tensors, and comes before them


def write(file: FileBeingWritten, metadata: dict[str, str], tensors: Iterable[Tensor]) -> None:
    """Write a whole container. Tensors with large elements come first, so that all are aligned."""
    ordered = sorted(tensors, key=lambda one: (-one.alignment, not one.index))
    file.write(_header(metadata, ordered, [0] * len(ordered)))
    with ThreadPoolExecutor(1, "actrec-write") as thread:
        out = _Stream(file, thread)
        checksums = [out.write(tensor.pieces()) for tensor in ordered]
        out.flush()
        out.wait()
    file.write_at_start(_header(metadata, ordered, checksums))


def _header(metadata: dict[str, str], tensors: Sequence[Tensor], checksums: Iterable[int]) -> bytes:
    table: dict[str, Any] = {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        table[tensor.name] = {
            "dtype": tensor.code,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    data = " ".join(f"{checksum:08x}" for checksum in checksums)
    about = {"header_crc32": _ZEROS, "data_crc32": data, **metadata}
    content = json.dumps({"__metadata__": about, **table}, separators=(",", ":")).encode()
    content += b" " * (-(_LENGTH + len(content)) % _ALIGNMENT)
    if len(content) > MAX_HEADER:
        message = f"the header would take {len(content)} bytes, and {MAX_HEADER} is the limit of the format"
        raise ValueError(message)
    checksum = f"{zlib.crc32(content):08x}"
    content = content.replace(_mark(_ZEROS), _mark(checksum), 1)
    return len(content).to_bytes(_LENGTH, "little") + content


def _mark(checksum: str) -> bytes:
    return f'"header_crc32":"{checksum}"'.encode()


class _Stream:
    """Writes pieces in chunks.

    A thread writes one chunk while the checksum of the next is computed: the two take about equally long. Giving it each piece
    alone takes up to twice as long.
    """

    def __init__(self, file: FileBeingWritten, thread: Executor) -> None:
        self._file = file
        self._thread = thread
        self._chunk: list[Piece] = []
        self._size = 0
        self._writing: Future[None] | None = None

    def write(self, pieces: Iterable[Piece]) -> int:
        """Write the pieces of one tensor, and return their checksum."""
        checksum = 0
        for owner, data in pieces:
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                self._add(owner, part)
                checksum = zlib.crc32(part, checksum)
        return checksum

    def _add(self, owner: object, part: memoryview) -> None:
        self._chunk.append((owner, part))
        self._size += len(part)
        if self._size >= _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Let the thread write the current chunk, after the one before."""
        self.wait()
        self._writing = self._thread.submit(self._write, self._chunk)
        self._chunk, self._size = [], 0

    def wait(self) -> None:
        """Wait for the thread, and raise its error."""
        if self._writing is not None:
            self._writing.result()

    def _write(self, chunk: list[Piece]) -> None:
        for _, part in chunk:
            self._file.write(part)


# --- Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor is in its file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Container:
    """The checked header of a container."""

    metadata: dict[str, str]
    tensors: dict[str, Extent] = field(repr=False)
    size: int
    header: int


def parse(size: int, read: Callable[[int], bytes]) -> Container:
    """Read and check the header of a file of ``size`` bytes; ``read(n)`` gives the first ``n`` of them.

    Raises ``Defect``. Nothing larger than the file is read or allocated.
    """
    need(size >= _LENGTH, f"it has {size} bytes, too few for a header")
    length = int.from_bytes(read(_LENGTH), "little")
    need(
        length <= min(size - _LENGTH, MAX_HEADER),
        f"it claims a header of {length} bytes, and has {size - _LENGTH} bytes after its first {_LENGTH}",
    )
    content = read(_LENGTH + length)[_LENGTH:]
    need(len(content) == length, "it became shorter while it was read")
    try:
        table = checked(json.loads(content), {"__metadata__": _METADATA}, "the header")
    except (ValueError, RecursionError) as error:
        message = f"the header is not JSON ({error})"
        raise Defect(message) from error
    metadata = table.pop("__metadata__")
    _check_header(content, metadata["header_crc32"])
    extents = _extents(table, metadata["data_crc32"], _LENGTH + length, size)
    return Container(metadata, extents, size, length)


def _check_header(content: bytes, checksum: str) -> None:
    mark = _mark(checksum)
    need(content.count(mark) == 1, "the header's checksum is not where it should be")
    found = zlib.crc32(content.replace(mark, _mark(_ZEROS)))
    need(
        f"{found:08x}" == checksum,
        f"the header's checksum is {found:08x}, and should be {checksum[:8]}",
    )


def _extents(table: dict[str, Any], checksums: str, start: int, size: int) -> dict[str, Extent]:
    words = checksums.split(" ") if checksums else []
    need(len(words) == len(table), f"there are {len(words)} checksums for {len(table)} tensors")
    extents: dict[str, Extent] = {}
    position = start
    for (name, entry), word in zip(table.items(), words, strict=True):
        extents[name] = extent = _extent(name[:60], entry, word, start)
        need(
            extent.begin == position,
            f"the data of tensor {name[:60]!r} begins at byte {extent.begin}, and the tensor before it ends at {position}",
        )
        position = extent.end
    need(position == size, f"its tensors end at byte {position}, and the file at {size}")
    return extents


def _extent(name: str, entry: Any, checksum: str, start: int) -> Extent:
    what = f"tensor {name!r}"
    entry = checked(entry, _ENTRY, what)
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    need(code in _SIZES, f"{what} is of the unknown dtype {code[:60]!r}")
    need(len(shape) <= MAX_DIMS, f"{what} has {len(shape)} dimensions")
    nbytes = math.prod(shape) * _SIZES[code]
    need(nbytes <= MAX_SIZE, f"{what} has the impossible shape {list(shape)}"[:200])
    spanned = f"takes {nbytes} bytes, and its offsets span {end - begin}"
    need(end - begin == nbytes, f"{what} of shape {list(shape)}"[:200] + f" {spanned}")
    try:
        return Extent(code, shape, start + begin, start + end, int(checksum, 16))
    except ValueError as error:
        message = f"the checksum of {what} is not a number"
        raise Defect(message) from error
