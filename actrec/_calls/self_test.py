"""A GPU has to pass a test before values are copied from it asynchronously.

The test takes some milliseconds and some ten megabytes, once for each GPU and process, before the first value. If a
GPU fails, for whatever reason, it is not tested again: the model waits while its values are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from actrec._values.modes import normal_mode_unseen

from .capture import Capture
from .device import CUDA, Cuda
from .passes import Passes
from .transfer import Offload

_MEMORY: Final = torch.device("cpu")


def offload_for(capture: Capture, passes: Passes) -> Offload | None:
    """Return the :class:`Offload` for ``capture``, or ``None`` if no values will have to be moved."""
    moves = capture.detach and capture.device == _MEMORY and CUDA.is_used()
    return Offload(passes, CUDA, is_trusted) if moves else None


def is_trusted(where: torch.device) -> bool:
    """Return whether a GPU has passed the test. The first call runs it."""
    if where not in CUDA.tested:
        CUDA.tested[where] = passes_self_test(CUDA, where)
    return CUDA.tested[where]


_DTYPES: Final = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
)
_LAYOUTS: Final[tuple[Callable[[Tensor], Tensor], ...]] = (
    lambda t: t,
    lambda t: t.t(),
    lambda t: t[1:, ::2],
    lambda t: t[:, :1].expand(-1, 3),
    lambda t: t[:0],
)


def passes_self_test(device: Cuda, where: torch.device) -> bool:
    """Return whether tensors that are overwritten right after :meth:`Offload.start` arrive unchanged, bit for bit."""
    try:
        with normal_mode_unseen():
            pairs = _moved_and_expected(Offload(Passes(), device), where)
    except Exception:  # noqa: BLE001  # no memory, no driver, ...
        return False
    return all(
        arrived.dtype == expected.dtype and torch.equal(_bits(arrived), _bits(expected))
        for arrived, expected in pairs
    )


def _moved_and_expected(offload: Offload, where: torch.device) -> list[tuple[Tensor, Tensor]]:
    busy = torch.ones(1 << 23, device=where)
    for _ in range(20):  # so that a copy that did not wait for this stream would come too early
        busy.neg_()
    pattern = torch.arange(1 << 16, dtype=torch.float32, device="cpu").sin_().view(256, 256) * 255
    pairs = []
    for dtype in _DTYPES:
        original = pattern.abs().to(dtype)
        for layout in _LAYOUTS:
            there = original.to(where, copy=True)
            pairs.append((offload.start(layout(there)), layout(original)))
            there.zero_()
    there = pattern.to(where, copy=True)
    pairs.append((offload.start(there, torch.float16), pattern.to(torch.float16)))
    there.zero_()
    offload.deliver()
    return pairs


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
