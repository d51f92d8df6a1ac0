"""A layer as a notebook shows it: for each shape of its calls the range, a histogram, and, if they are images, pictures.

Only the first calls are read, up to a number of elements; the title says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from torch import Tensor

from actrec._tables.drawn import Drawn, pictures
from actrec._tables.table import Column, Table
from actrec._text import count, shown
from actrec._values.chunks import dense
from actrec._values.dtensor import is_distributed
from actrec._values.shapes import Summary, dtype_name
from actrec._values.spec import leaves

from .tally import Tally, drawn

#: About so many elements are read.
MOST: Final = 1 << 22
#: So many channels of an image are shown, none larger than so many pixels.
_CHANNELS: Final = 3
_PIXELS: Final = 32
_SMALLEST: Final = 6  # pixels of an image
_IMAGES: Final = 4  # dimensions: batch, channel, height, width

_COLUMNS: Final = (
    Column("value"),
    Column("shape"),
    Column("dtype", usual=("float32",)),
    Column("calls", is_number=True),
    Column("values, 0.5-99.5 %"),
    *(Column(name, is_number=True) for name in ("min", "mean", "max")),
    Column("first call", usual=("",)),
)


def layer_table(title: str, total: int, calls: Iterable[Any]) -> Table:
    """Return the table of a layer: a row for each of its tensors and each of their shapes.

    Args:
        title: the title of the table.
        total: how many calls there are.
        calls: the calls; only the first are read.
    """
    found: dict[tuple[str, str, str], _Seen] = {}
    elements = 0
    for read, value in enumerate(calls, 1):
        for path, tensor in leaves(value):
            look = Summary()
            look.add(tensor)
            key = path, look.shape, dtype_name(tensor.dtype)
            found.setdefault(key, _Seen(tensor)).add(tensor)
            elements += 0 if tensor.is_nested else tensor.numel()
        if elements >= MOST and read < total:
            title += f"; the first {count(read, 'call')}"
            break
    rows = [
        (shown(path) if path else "call", shape, dtype, f"{seen.calls:,}", *seen.cells())
        for (path, shape, dtype), seen in found.items()
    ]
    return Table(title, _COLUMNS, rows)


class _Seen:
    """Statistics of one tensor of a layer, in one shape."""

    def __init__(self, first: Tensor) -> None:
        self.calls = 0
        self._tally = Tally()
        self._picture = _picture(first)

    def add(self, tensor: Tensor) -> None:
        self.calls += 1
        self._tally.add(tensor)

    def cells(self) -> tuple[str, ...]:
        """The histogram, the range, and the picture."""
        statistics = self._tally.statistics
        histogram = self._tally.bins.histogram()
        numbers = (statistics.min, statistics.mean, statistics.max)
        return (
            drawn(histogram, statistics.min, statistics.max, statistics.count, below=True),
            *("" if not histogram.counts else f"{number:.4g}" for number in numbers),
            self._picture,
        )


def _picture(tensor: Tensor) -> str | Drawn:
    """Return some channels of the first image, if the tensor is a batch of images."""
    if (
        is_distributed(tensor)
        or tensor.is_nested
        or tensor.dim() != _IMAGES
        or min(tensor.shape[2:]) < _SMALLEST
    ):
        return ""
    if tensor.is_meta or not tensor.numel() or tensor.is_complex():
        return ""
    # Only the first image is read: the tensor may be large.
    (image,) = dense(tensor[0])
    step = -(-max(image.shape[1:]) // _PIXELS)
    maps = image[:: -(-len(image) // _CHANNELS), ::step, ::step].cpu().double()
    finite = maps[maps.isfinite()]
    if not finite.numel():
        return ""
    low, high = finite.min().item(), finite.max().item()
    scaled = (maps - low) / ((high - low) or 1.0) * 255
    pixels = scaled.nan_to_num(nan=0.0, posinf=255.0, neginf=0.0).clamp(0, 255).byte().tolist()
    return pictures(pixels, f"{len(pixels)} of {count(len(image), 'channel')}")
