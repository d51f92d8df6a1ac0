"""The channels of an image, as a grid of maps."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from actrec._recordings.course import spread
from actrec._recordings.layer import Layer
from actrec._text import count
from actrec._values.containers import Value
from actrec._values.dtensor import is_distributed
from actrec._values.shapes import shape_of
from actrec._values.spec import leaves
from actrec.errors import OptionError

from .shared import Array, at_least_one, numbers


def feature_maps(
    value: Value,
    *,
    item: int = 0,
    most: int = 64,
    each: bool = False,
    cmap: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the channels of one image as a grid of maps.

    >>> import torch
    >>> axes = feature_maps(torch.randn(2, 12, 7, 7))
    >>> axes.get_title()
    '12 channels of 7 x 7'

    Args:
        value: a tensor of shape ``(batch, channel, height, width)``, such as ``acts["conv1"][0]``, or
            without the first one or two dimensions; a nested value, whose first tensor is drawn; or a
            ``Layer``, whose first call is drawn.
        item: which image of the batch.
        most: draw so many channels at most, evenly spread over all of them.
        each: scale every map by itself. By default they share one scale, from the first to the 99th
            percentile of what is drawn, so that brightness can be compared between maps.
        cmap: a matplotlib colour map. By default one with white at zero if there are negative numbers.
        ax: where to draw; by default on a new figure.

    Returns:
        The ``Axes``. The ticks count the channels.

    Raises:
        OptionError: the value has no tensor of two to four dimensions, or is empty.
    """
    at_least_one("feature_maps", most)
    maps = _maps(value, item)
    channels = spread(len(maps), most)
    rows, columns = _grid(len(channels), maps.shape[1], maps.shape[2])
    chosen = maps[channels]
    low, high = (0.0, 1.0) if each else _robust(chosen)
    mosaic = _mosaic(_rescaled(chosen) if each else chosen, rows, columns)
    diverging = not each and low < 0 < high
    if diverging:
        high = max(-low, high)
        low = -high
    ax = _figure(mosaic) if ax is None else ax
    image = ax.imshow(
        mosaic,
        cmap=cmap or ("RdBu_r" if diverging else "viridis"),
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    _label_grid(ax, channels, rows, columns, maps.shape[1:])
    part = f"{len(channels)} of " if len(channels) < len(maps) else ""
    ax.set_title(
        f"{part}{count(len(maps), 'channel')} of {maps.shape[1]} x {maps.shape[2]}", fontsize=10
    )
    if not each:
        below, above = (mosaic < low).any(), (mosaic > high).any()  # NaN is neither
        beyond = "both" if below and above else "min" if below else "max" if above else "neither"
        ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, extend=beyond)
    return ax


def _figure(mosaic: Array) -> Axes:
    width = 7.0
    height = width * mosaic.shape[0] / mosaic.shape[1]
    size = width, min(max(height, 1.6), 12.0) + 0.6
    _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax


def _maps(value: Value, item: int) -> Array:
    """Return the maps of one image: channel, height, width."""
    if isinstance(value, Layer):
        if not len(value):
            message = f"feature_maps(): nothing was recorded of layer {value.name!r}."
            raise OptionError(message)
        value = value[0]
    tensor = next((tensor for _, tensor in leaves(value)), None)
    if tensor is None or not _has_maps(tensor):
        message = (
            f"feature_maps(): expected (batch, channel, height, width), or less, found {_found(tensor)}. "
            "Give it a tensor with two to four dimensions, such as acts[name][0]."
        )
        raise OptionError(message)
    if tensor.dim() == 4:  # noqa: PLR2004  # batch, channel, height, width
        if not hasattr(item, "__index__") or not -len(tensor) <= item < len(tensor):
            message = f"feature_maps(item={item!r}): the batch has {count(len(tensor), 'image')}, numbered from 0."
            raise OptionError(message)
        tensor = tensor[item]
    return numbers(tensor.reshape(-1, *tensor.shape[-2:]))


def _has_maps(tensor: Tensor) -> bool:
    special = tensor.is_meta or tensor.is_nested or is_distributed(tensor)
    if special or tensor.layout is not torch.strided:
        return False
    return tensor.dim() in {2, 3, 4} and tensor.numel() > 0


def _found(tensor: Tensor | None) -> str:
    if tensor is None:
        return "no tensor"
    kind = "DTensor" if is_distributed(tensor) else "tensor"
    return f"a {kind} of shape {shape_of(tensor)}" + " without data" * tensor.is_meta


def _robust(array: Array) -> tuple[float, float]:
    finite = array[np.isfinite(array)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, [1, 99])
    if low == high:
        low, high = finite.min(), finite.max()
    return (float(low), float(high)) if low < high else (float(low) - 0.5, float(low) + 0.5)


def _rescaled(maps: Array) -> Array:
    """Return every map scaled to the range from 0 to 1."""
    bounds = np.array([_robust(one) for one in maps])[..., None, None]
    scaled: Array = (maps - bounds[:, 0]) / (bounds[:, 1] - bounds[:, 0])
    return scaled


def _grid(number: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns, so that the picture is about 1.4 times as wide as high, with few empty places."""
    ideal = min(max((1.4 * number * height / width) ** 0.5, 1.0), number)
    near = range(max(int(ideal * 0.75), 1), min(int(ideal * 1.5), number) + 1)
    columns = min(near, key=lambda columns: (-number % columns, abs(columns - ideal)))
    return -(-number // columns), columns


def _mosaic(maps: Array, rows: int, columns: int) -> Array:
    """Return all maps in one picture, with empty lines between them."""
    number, height, width = maps.shape
    line = max(1, round(min(height, width) / 16))
    picture: Array = np.full(
        (rows * (height + line) - line, columns * (width + line) - line), np.nan
    )
    for index in range(number):
        top, left = (index // columns) * (height + line), (index % columns) * (width + line)
        picture[top : top + height, left : left + width] = maps[index]
    return picture


def _label_grid(
    ax: Axes, channels: list[int], rows: int, columns: int, size: tuple[int, ...]
) -> None:
    line = max(1, round(min(size) / 16))
    ax.set_yticks(
        [row * (size[0] + line) + size[0] / 2 - 0.5 for row in range(rows)],
        [str(channels[row * columns]) for row in range(rows)],
    )
    even = len(channels) == channels[-1] - channels[0] + 1
    named = range(columns if even else 0)
    ax.set_xticks(
        [column * (size[1] + line) + size[1] / 2 - 0.5 for column in named],
        [f"+{column}" for column in named],
    )
    ax.tick_params(length=0, labelsize=7)
    ax.set_ylabel("channel", fontsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)
