"""Where rows lie: in a tensor in memory, or in a file.

Rows are bytes here, one line of a ``(rows, width)`` tensor of ``uint8`` for each, so that every dtype can
be selected from and joined, also those that PyTorch cannot compute with.
"""

from __future__ import annotations

import ctypes
import math
import os
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from actrec.store.disk import ANOTHER, Disk
from actrec.store.format import corrupt

if TYPE_CHECKING:
    from collections.abc import Callable

    from actrec.store.index import Leaf, Shard
    from actrec.store.place import Mapped

__all__ = ["File", "Held", "Made", "Source", "Stored", "as_bytes"]

Shape = tuple[int, ...]


class Source(Protocol):
    """Rows behind each other."""

    def rows(self) -> Tensor:
        """All rows. To be read from, at places; not to be written to."""

    def read(self, first: int, out: Tensor) -> None:
        """Copy rows from number ``first`` on into ``out``, as many as it has place for."""

    def announce(self, first: int, many: int) -> None:
        """Say that these rows will be read soon."""


def as_bytes(tensor: Tensor, shape: Shape) -> Tensor:
    """A tensor as rows of this shape: a view of a contiguous one on the CPU, else a copy."""
    width = math.prod(shape)
    nbytes = width * tensor.dtype.itemsize
    rows = math.prod(tensor.shape[: tensor.dim() - len(shape)])
    if not rows * nbytes:
        return torch.empty(rows, nbytes, dtype=torch.uint8, device="cpu")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # What is contiguous may still have other strides, where there is a single element.
    return plain.as_strided((rows, width), (width, 1)).view(torch.uint8)


class Held:
    """A tensor in memory, as rows of a shape."""

    def __init__(self, tensor: Tensor, shape: Shape) -> None:
        # A view costs nothing, and is ready. A copy would cost memory as long as this lives.
        is_view = tensor.device.type == "cpu" and tensor.is_contiguous()
        self._tensor = as_bytes(tensor, shape) if is_view else tensor
        self._shape = shape if not is_view else None

    def rows(self) -> Tensor:
        return self._tensor if self._shape is None else as_bytes(self._tensor, self._shape)

    def read(self, first: int, out: Tensor) -> None:
        out.copy_(self.rows()[first : first + len(out)])

    def announce(self, first: int, many: int) -> None:
        pass


class Stored:
    """What a shard has of a tensor, as rows of ``width`` bytes."""

    def __init__(self, file: File, leaf: Leaf, width: int) -> None:
        self._file = file
        self._begin = leaf.begin
        self._nbytes = leaf.nbytes
        self._width = width

    def rows(self) -> Tensor:
        view = torch.empty(0, dtype=torch.uint8, device="cpu")
        begin, end = self._begin, self._begin + self._nbytes
        shape = torch.Size((self._nbytes // self._width, self._width))
        return view.set_(self._file.storage().view(begin, end), 0, shape)  # type: ignore[call-overload,no-any-return]

    def read(self, first: int, out: Tensor) -> None:
        self._file.read(self._begin + first * self._width, out)

    def announce(self, first: int, many: int) -> None:
        self._file.announce(self._begin + first * self._width, many * self._width)


class Made:
    """A call that does not lie anywhere as it is: it is made when it is asked for."""

    def __init__(self, make: Callable[[], Tensor], shape: Shape) -> None:
        self._make = make
        self._shape = shape

    def rows(self) -> Tensor:
        return as_bytes(self._make(), self._shape)

    def read(self, first: int, out: Tensor) -> None:
        out.copy_(self.rows()[first : first + len(out)])

    def announce(self, first: int, many: int) -> None:
        pass


# --- Files -------------------------------------------------------------------------------------------

_WRITABLE: Final = 0x200  # PyBUF_WRITE
_memory_at: Final = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.restype = ctypes.py_object
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)

_preadv: Any = getattr(os, "preadv", None)  # not on Windows
_announce: Any = getattr(os, "posix_fadvise", None)  # nor on macOS


class File:
    """A file of a recording. It is sent to another process as its name alone."""

    def __init__(self, shard: Shard) -> None:
        self.path = shard.path
        self._disk = shard._disk
        self._name = shard.name
        self._size = shard.size
        self._head = shard.head
        self._storage: Mapped | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_storage": None}

    def storage(self) -> Mapped:
        """The memory of the file."""
        if self._storage is None:
            self._storage = self._disk.map(self._name, self._size, self._head)
        return self._storage

    def read(self, offset: int, out: Tensor) -> None:
        """Fill a contiguous tensor of bytes with what the file has from ``offset`` on.

        What is read once, in large portions, is read faster than mapped, and takes no more memory than it
        fills.
        """
        if _preadv is None or type(self._disk) is not Disk:
            part = self.storage().view(offset, offset + out.nbytes)
            view = torch.empty(0, dtype=torch.uint8, device="cpu")
            out.view(-1).copy_(view.set_(part, 0, torch.Size((out.nbytes,))))  # type: ignore[call-overload]
        elif out.nbytes:
            self._read(offset, _memory_at(out.data_ptr(), out.nbytes, _WRITABLE))

    def _read(self, offset: int, view: memoryview) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise corrupt(self.path, "it was there when it was opened, and is gone") from None
        try:
            if os.read(fd, len(self._head)) != self._head:
                raise corrupt(self.path, ANOTHER)
            while view:
                many = _preadv(fd, [view], offset)
                if not many:
                    now = os.lseek(fd, 0, os.SEEK_END)
                    defect = f"it had {self._size} bytes when it was opened, and has {now} now"
                    raise corrupt(self.path, defect)
                view, offset = view[many:], offset + many
        finally:
            os.close(fd)

    def announce(self, offset: int, nbytes: int) -> None:
        """Let the system fetch a part of the file while we do something else."""
        if _announce is None or type(self._disk) is not Disk:
            return
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError:
            return  # reading it says what is wrong
        try:
            _announce(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
