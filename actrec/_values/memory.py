"""The memory of a tensor: where it lies, how many bytes it holds, what is in it, and how unused memory goes back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, UntypedStorage

from actrec._torch import data_address, sparse_parts

# --- Where it lies, and how many bytes -------------------------------------------------------------


def held(tensor: Tensor) -> Iterator[tuple[object, int]]:
    """Yield the memory that a tensor holds: where it is, and how many bytes. Equal places are shared memory."""
    if tensor.layout is torch.sparse_coo:
        parts = sparse_parts(tensor)
    elif tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in {torch.sparse_csc, torch.sparse_bsc}:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        yield address(tensor), 0 if tensor.is_meta else _size(tensor)
        return
    for part in parts:
        yield from held(part)


def held_by_all(tensors: Sequence[Tensor]) -> Iterable[tuple[object, int]]:
    """Return what :func:`held` yields of many plain tensors on the CPU, in loops that Python does not interpret.

    Raises:
        RuntimeError: while iterating, at one that has no storage: it is sparse, for example.
    """
    sizes = map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
    return zip(map(data_address or id, tensors), sizes, strict=True)


def address(tensor: Tensor) -> object:
    """Return what is equal for tensors in the same memory."""
    # data_ptr() would end the sharing that it is asked about.
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested
    if not plain or data_address is None:
        return id(tensor)
    return data_address(tensor) if tensor.is_cpu else (tensor.device, data_address(tensor))


def _size(tensor: Tensor) -> int:
    is_strided = tensor.layout is torch.strided and type(tensor) is Tensor
    return tensor.untyped_storage().nbytes() if is_strided else tensor.nbytes


# --- Reading memory --------------------------------------------------------------------------------

_READ_ONLY = 0x100  # PyBUF_READ
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.restype = ctypes.py_object
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


def memory(tensor: Tensor) -> tuple[Tensor, memoryview]:
    """Return the memory of a contiguous tensor on the CPU, to be read as long as the tensor that comes with it lives.

    A pointer that could be written through, as ``data_ptr()`` gives, would end the sharing with the
    model, by a copy. Reading a shared tensor is safe while the model writes to its side: the model's side
    moves to fresh memory, and ours stays where it is.
    """
    if tensor.nbytes == 0:
        return tensor, memoryview(b"")
    if data_address is None:
        tensor = tensor.clone()
        return tensor, _memory_at(tensor.data_ptr(), tensor.nbytes, _READ_ONLY)
    start = data_address(tensor) + tensor.storage_offset() * tensor.element_size()
    return tensor, _memory_at(start, tensor.nbytes, _READ_ONLY)


_WRITABLE = 0x200  # PyBUF_WRITE


def writable(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, to be written to as long as the tensor lives."""
    view: memoryview = _memory_at(tensor.data_ptr(), tensor.nbytes, _WRITABLE)
    return view.cast("B")


def words(rows: Tensor) -> Tensor:
    """Return rows of bytes, ``(N, width)``, as rows of integers of eight bytes, or as many as fit: they are copied as much faster."""
    kinds = (torch.int64, torch.int32, torch.int16)
    fitting = (kind for kind in kinds if rows.shape[1] % kind.itemsize == 0)
    return rows.view(next(fitting, torch.uint8))


# --- Giving back -----------------------------------------------------------------------------------

# The allocator of glibc often cannot use again what was freed between two tensors that are kept: a hole of the size of
# a tensor is too small for another one, which has to be aligned. Where values wait for the disk, the holes between them
# came to as much as the values. What is in a hole can be given back to the system all the same.

WORTH_IT: Final = 1 << 25  # bytes: it takes the time of writing a few megabytes


def _found() -> Callable[[int], int]:
    """``malloc_trim`` where the C library has it, which is glibc alone."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another system
        return lambda _: 0
    return trim


_trim = _found()


def give_back(kept: int) -> None:
    """Give the unused memory between values of ``kept`` bytes back to the system, if it is worth the time."""
    if kept >= WORTH_IT:
        _trim(0)
