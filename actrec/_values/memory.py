"""The memory of a tensor: its address and size, access to its bytes, and returning unused memory to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, UntypedStorage

from actrec._torch import data_address, sparse_parts

# --- Where it lies, and how many bytes -------------------------------------------------------------


def held(tensor: Tensor) -> Iterator[tuple[object, int]]:
    """Yield the memory of a tensor: address and number of bytes. Equal addresses are shared memory."""
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
    """Return what :func:`held` yields for many plain tensors on the CPU, in loops that run in C.

    Raises:
        RuntimeError: while iterating, at a tensor without a storage, such as a sparse one.
    """
    sizes = map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
    return zip(map(data_address or id, tensors), sizes, strict=True)


def address(tensor: Tensor) -> object:
    """Return an object that is equal for tensors in the same memory."""
    # data_ptr() would end copy-on-write sharing.
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
    """Return a tensor, and its memory, which may be read as long as that tensor lives. It is contiguous and on the CPU.

    ``data_ptr()`` returns a pointer for writing, which would end copy-on-write sharing by a copy. Reading a shared
    tensor is safe while the model writes: the model's side moves to new memory, and this one stays where it is.
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
    """Return rows of bytes, ``(N, width)``, as rows of the largest integers that fit, which are copied faster."""
    kinds = (torch.int64, torch.int32, torch.int16)
    fitting = (kind for kind in kinds if rows.shape[1] % kind.itemsize == 0)
    return rows.view(next(fitting, torch.uint8))


# --- Returning memory to the system ----------------------------------------------------------------
# The allocator of glibc often cannot reuse memory that was freed between two tensors that are kept: a hole of the size of
# a tensor is too small for another one, which has to be aligned. While values waited for the disk, the holes between them
# were as large as the values. The memory in a hole can be returned to the system all the same.

WORTH_IT: Final = 1 << 25  # bytes: it takes the time of writing a few megabytes


def _found() -> Callable[[int], int]:
    """Return ``malloc_trim`` if the C library has it: only glibc does."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another system
        return lambda _: 0
    return trim


_trim = _found()


def give_back(kept: int) -> None:
    """Return the unused memory between values of ``kept`` bytes to the system, if it is worth the time."""
    if kept >= WORTH_IT:
        _trim(0)
