"""What rows lie in: a tensor in memory, a part of a file, or a tensor that is made when it is asked for.

A source is bytes. Every dtype can be selected from and joined as bytes, also those that PyTorch cannot compute with.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from actrec._values.memory import writable

if TYPE_CHECKING:
    from collections.abc import Callable

    from .files import File, Files

__all__ = ["Held", "Made", "Shape", "Source", "Stored"]

Shape: TypeAlias = tuple[int, ...]

_GAP: Final = 1 << 14  # bytes between two rows, at most, that are read rather than skipped
_MOST: Final = 1 << 20  # bytes that are read in one go to pick rows from


class Source(Protocol):
    """Bytes that lie behind each other."""

    def read(self, begin: int, out: Tensor, files: Files) -> None:
        """Copy bytes from number ``begin`` on into ``out``, as many as it has place for."""

    def take(self, begins: Tensor, out: Tensor, places: Tensor, files: Files) -> None:
        """Copy the rows that begin there, in ascending order, to these places in ``out``: ``(N,), (M, width), (N,)``."""

    def announce(self, begin: int, nbytes: int, files: Files) -> None:
        """Say that a part will be read soon."""


class _InMemory(Source):
    """Bytes of a tensor."""

    @abstractmethod
    def bytes(self) -> Tensor:
        """Return all of them; not to be written to."""

    @override
    def read(self, begin: int, out: Tensor, files: Files) -> None:
        out.view(-1).copy_(self.bytes()[begin : begin + out.nbytes])

    @override
    def take(self, begins: Tensor, out: Tensor, places: Tensor, files: Files) -> None:
        width = out.shape[1]
        rows = self.bytes().view(-1, width).index_select(0, begins // width)
        out.index_copy_(0, places, rows)

    @override
    def announce(self, begin: int, nbytes: int, files: Files) -> None:
        pass


class Held(_InMemory):
    """A tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        # A view costs nothing, and is ready. A copy would cost memory as long as this lives.
        is_view = tensor.device.type == "cpu" and tensor.is_contiguous()
        self._tensor = _bytes(tensor) if is_view else tensor
        self._ready = is_view

    @override
    def bytes(self) -> Tensor:
        return self._tensor if self._ready else _bytes(self._tensor)


class Made(_InMemory):
    """A tensor that lies nowhere as it is: it is made when it is asked for."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    @override
    def bytes(self) -> Tensor:
        return _bytes(self._make())


def _bytes(tensor: Tensor) -> Tensor:
    """The elements of a tensor in order, as bytes: a view of a contiguous one on the CPU, else a copy."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # What is contiguous may still have other strides, where there is a single element.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


class Stored(Source):
    """The bytes of a file from one on."""

    def __init__(self, file: File, begin: int) -> None:
        self._file = file
        self._begin = begin

    @override
    def read(self, begin: int, out: Tensor, files: Files) -> None:
        if out.nbytes:
            with files.opened(self._file) as reading:
                reading.into(self._begin + begin, writable(out))

    @override
    def take(self, begins: Tensor, out: Tensor, places: Tensor, files: Files) -> None:
        width, memory = out.shape[1], writable(out)
        # Rows that are near each other come with what is between them, up to a mebibyte.
        apart = (begins.diff() > width + _GAP) | ((begins // _MOST).diff() > 0)
        bounds = [0, *(apart.nonzero()[:, 0] + 1).tolist(), len(begins)]
        starts, targets = begins.tolist(), places.tolist()
        with files.opened(self._file) as reading:
            for low, high in pairwise(bounds):
                start, to = starts[low], targets[low] * width
                if high - low == 1:
                    reading.into(self._begin + start, memory[to : to + width])
                    continue
                found = torch.empty(
                    starts[high - 1] + width - start, dtype=torch.uint8, device="cpu"
                )
                reading.into(self._begin + start, writable(found))
                rows = found.unfold(0, width, 1).index_select(0, begins[low:high] - start)
                out.index_copy_(0, places[low:high], rows)

    @override
    def announce(self, begin: int, nbytes: int, files: Files) -> None:
        files.announce(self._file, self._begin + begin, nbytes)
