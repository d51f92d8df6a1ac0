"""Values that ``dtype=`` cannot hold: finite ones that the cast turns into infinities, NaN or the largest value there is.

They are counted before the cast, if the range of the new type is smaller than that of the tensor's. On the CPU, the minimum
and the maximum (a fraction of the time of the cast) mostly show that there are none. On a device the count is computed
asynchronously, and read when it is needed.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from actrec._values.chunks import blocks, dense
from actrec._values.dtensor import is_distributed
from actrec._values.snapshot import PLAIN

#: So many counts that a device is computing may be waiting to be read.
MOST_WAITING: Final = 256


class Overflows:
    """How many values of one layer do not fit into ``dtype``, by pass.

    Args:
        dtype: what they are cast to.
        number: returns the number of the pass that runs.
    """

    def __init__(self, dtype: torch.dtype, number: Callable[[], int]) -> None:
        self.dtype = dtype
        self.largest = torch.finfo(dtype).max
        #: Whether a cast turns larger values, infinity included, into the largest one.
        self.saturates = bool(torch.tensor(math.inf, device="cpu").to(dtype).float().isfinite())
        self._total = 0  # of all passes, those that were cleared included
        self._number = number
        self._counts: dict[int, int] = {}
        self._waiting: deque[tuple[int, Tensor]] = deque()
        self._lock = threading.Lock()

    def look(self, tensor: Any) -> None:
        """``tensor`` is about to be cast."""
        if torch.finfo(tensor.dtype).max <= self.largest:
            return
        if is_distributed(tensor):
            tensor = tensor.to_local()
        if type(tensor) not in PLAIN and not tensor.is_nested:
            return
        for part in dense(tensor):
            if not _answers_at_once(part):
                self._waiting.append((self._number(), self._too_large(part)))
                if len(self._waiting) >= MOST_WAITING:
                    self._settle()
            elif part.numel() and (many := self._counted(part)):
                self._add(self._number(), many)

    @property
    def total(self) -> int:
        """How many values did not fit, those of passes that were cleared included."""
        self._settle()
        return self._total

    def counts(self) -> dict[int, int]:
        """How many values of each pass did not fit, without passes in which all did."""
        self._settle()
        return dict(self._counts)

    def nonfinite(self) -> dict[int, int]:
        """How many infinities or NaN of each pass the cast has made."""
        return {} if self.saturates else self.counts()

    def clear(self) -> None:
        """Forget the passes."""
        self._settle()
        self._counts.clear()

    def drop(self, number: int) -> None:
        """Forget a pass, a unit that has failed."""
        self._settle()
        with self._lock:
            self._total -= self._counts.pop(number, 0)

    def _counted(self, part: Tensor) -> int:
        # PyTorch cannot compare one-byte floats.
        low, high = (part if part.element_size() > 1 else part.float()).aminmax()
        if low.item() >= -self.largest and high.item() <= self.largest:
            return 0
        return sum(int(self._too_large(block)) for (block,) in blocks(part))

    def _too_large(self, part: Tensor) -> Tensor:
        """The number of finite elements that the cast changes beyond rounding."""
        if part.element_size() < torch.float32.itemsize:
            part = part.float()  # or PyTorch would round `largest` to the dtype of the part
        if self.saturates:
            lost = part.abs() > self.largest
        else:
            lost = part.to(self.dtype).float().isfinite().logical_not_()
        return (lost & part.isfinite()).sum()

    def _add(self, number: int, many: int) -> None:
        with self._lock:
            self._counts[number] = self._counts.get(number, 0) + many
            self._total += many

    def _settle(self) -> None:
        with suppress(IndexError):  # another thread may be doing the same
            while True:
                number, answer = self._waiting.popleft()
                if many := int(answer):
                    self._add(number, many)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.dtype, self.counts(), self.total)


def _copied(dtype: torch.dtype, counts: dict[int, int], total: int) -> Overflows:
    made = Overflows(dtype, int)  # of which nothing is cast any more
    made._counts, made._total = counts, total
    return made


def _answers_at_once(tensor: Tensor) -> bool:
    return tensor.is_cpu
