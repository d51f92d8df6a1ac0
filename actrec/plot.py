"""Pictures of recordings, with matplotlib: feature maps, distributions, drift, similarity.

>>> import torch
>>> from actrec import plot, record
>>> model = torch.nn.Conv2d(1, 8, 3)
>>> with record(model, "") as acts:
...     output = model(torch.randn(4, 1, 16, 16))
>>> axes = plot.feature_maps(acts[""][0])

Install it with ``pip install actrec[plot]``. Every function returns the ``Axes`` that it has drawn on (or
an array of them) and never shows a figure: a notebook does that, elsewhere call ``plt.show()`` or
``axes.figure.savefig(...)``. Recordings are only read, at most a few calls at a time. Where there is more
than a picture can show a sample is drawn, always the same one, and the random stream of PyTorch is left
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from actrec._recordings.layer import Layer
from actrec._recordings.recording import Recording
from actrec._text import count, shown
from actrec._values.chunks import dense
from actrec._values.moments import Moments
from actrec._values.spec import leaves
from actrec._values.summary import shape_of

from .errors import OptionError

try:
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
except ImportError as error:
    message = f"actrec.plot needs matplotlib ({error}). Install it with: pip install actrec[plot]"
    raise ImportError(message) from error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

    from actrec._values.containers import Value

__all__ = ["distributions", "drift", "feature_maps", "similarity"]

#: A recording, or some layers of one: ``{name: acts[name] for name in chosen}``.
Layers: TypeAlias = Mapping[str, Layer[Any]]
Array: TypeAlias = "np.ndarray[Any, Any]"

MOST_CALLS = 256
MOST_ELEMENTS = 50_000
GRAM_BLOCK = 1 << 22  # 32 MB of float64
LONGEST_NAME = 40


# --- Feature maps ------------------------------------------------------------------------------------


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
            without the first one or two dimensions; the first tensor of a nested value; a ``Layer``, of
            which the first call is taken.
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
    if most < 1:
        message = f"feature_maps(most={most}): expected 1 or more."
        raise OptionError(message)
    maps = _maps(value, item)
    channels = _spread(len(maps), most)
    rows, columns = _grid(len(channels), maps.shape[1], maps.shape[2])
    chosen = maps[channels]
    low, high = (0.0, 1.0) if each else _robust(chosen)
    mosaic = _mosaic(_rescaled(chosen) if each else chosen, rows, columns)
    diverging = not each and low < 0 < high
    if diverging:
        high = max(-low, high)
        low = -high
    if ax is None:
        width = 7.0
        height = width * mosaic.shape[0] / mosaic.shape[1]
        _, ax = plt.subplots(
            figsize=(width, min(max(height, 1.6), 12.0) + 0.6), layout="constrained"
        )
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
        below, above = (mosaic < low).any(), (mosaic > high).any()  # which is neither for NaN
        beyond = "both" if below and above else "min" if below else "max" if above else "neither"
        ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, extend=beyond)
    return ax


def _maps(value: Value, item: int) -> Array:
    """The maps of one image: channel, height, width."""
    if isinstance(value, Layer):
        if not len(value):
            message = f"feature_maps(): nothing was recorded of layer {value.name!r}."
            raise OptionError(message)
        value = value[0]
    tensor = next((tensor for _, tensor in leaves(value)), None)
    bad = (
        tensor is None
        or tensor.is_meta
        or tensor.is_nested
        or tensor.layout is not torch.strided
        or tensor.dim() not in {2, 3, 4}
        or not tensor.numel()
    )
    if tensor is None or bad:
        what = "no tensor" if tensor is None else f"a tensor of shape {shape_of(tensor)}"
        what += " without data" if tensor is not None and tensor.is_meta else ""
        message = (
            f"feature_maps(): expected (batch, channel, height, width), or less, found {what}. "
            "Give it a tensor with two to four dimensions, such as acts[name][0]."
        )
        raise OptionError(message)
    if tensor.dim() == 4:  # noqa: PLR2004  # batch, channel, height, width
        if not -len(tensor) <= item < len(tensor):
            message = f"feature_maps(item={item}): the batch has {count(len(tensor), 'image')}."
            raise OptionError(message)
        tensor = tensor[item]
    return _numbers(tensor.reshape(-1, *tensor.shape[-2:]))


def _numbers(tensor: Tensor) -> Array:
    (plain,) = dense(tensor)
    plain = plain.abs() if plain.is_complex() else plain
    array: Array = plain.cpu().double().numpy()
    return array


def _robust(array: Array) -> tuple[float, float]:
    finite = array[np.isfinite(array)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, [1, 99])
    if low == high:
        low, high = finite.min(), finite.max()
    return (float(low), float(high)) if low < high else (float(low) - 0.5, float(low) + 0.5)


def _rescaled(maps: Array) -> Array:
    """Every map from 0 to 1."""
    bounds = np.array([_robust(one) for one in maps])[..., None, None]
    scaled: Array = (maps - bounds[:, 0]) / (bounds[:, 1] - bounds[:, 0])
    return scaled


def _grid(number: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns, so that the picture is about 1.4 times as wide as high, with few empty places."""
    ideal = min(max((1.4 * number * height / width) ** 0.5, 1.0), number)
    near = range(max(int(ideal * 0.75), 1), min(int(ideal * 1.5), number) + 1)
    columns = min(near, key=lambda columns: (-number % columns, abs(columns - ideal)))
    return -(-number // columns), columns


def _mosaic(maps: Array, rows: int, columns: int) -> Array:
    """All maps in one picture, with a line of nothing between them."""
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
    ax.set_xticks(
        [column * (size[1] + line) + size[1] / 2 - 0.5 for column in range(columns)]
        if even
        else [],
        [f"+{column}" for column in range(columns)] if even else [],
    )
    ax.tick_params(length=0, labelsize=7)
    ax.set_ylabel("channel", fontsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)


# --- Distributions -----------------------------------------------------------------------------------


def distributions(acts: Layers, *, ax: Axes | None = None) -> Axes:
    """Draw where the values of each layer lie, in execution order from top to bottom.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> with record(model) as acts:
    ...     output = model(torch.randn(100, 8))
    >>> axes = distributions(acts)
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['0', '1']

    The thin line spans the first to the 99th percentile, the thick one the middle half, and the dot is
    the median; what lies beyond does not stretch the picture. Where the layers differ by orders of
    magnitude, the axis is linear around zero and logarithmic beyond. The percentiles are those of up to
    50,000 finite elements of a layer, spread over its calls. Layers without any are left out.

    Args:
        acts: a recording, or some layers of one in a dict.
        ax: where to draw; by default on a new figure.

    Raises:
        OptionError: no layer has a finite element.
    """
    names, found = [], []
    for name in _ordered("distributions", acts):
        sample = _sample(acts[name])
        if sample.size:
            names.append(name)
            found.append(np.percentile(sample, [1, 25, 50, 75, 99]))
    if not names:
        message = "distributions(): there is nothing to draw, no layer has a finite element."
        raise OptionError(message)
    low, lower, median, upper, high = np.array(found).T
    places = np.arange(len(names))
    ax = _tall(len(names)) if ax is None else ax
    thickness = 6.0 if len(names) <= FEW else 3.0
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.hlines(places, low, high, color="C0", linewidth=1, alpha=0.7)
    ax.hlines(places, lower, upper, color="C0", linewidth=thickness)
    ax.plot(median, places, "o", color="white", markeredgecolor="C0", markersize=thickness * 0.75)
    extents = np.maximum(np.abs(low), np.abs(high))
    typical = float(np.median(extents))
    if typical > 0 and extents.max() > 30 * typical:  # lines of a pixel say nothing
        ax.set_xscale("symlog", linthresh=typical)
    _name_rows(ax, names)
    ax.set_xlabel("value: 1st to 99th percentile, middle half, median")
    return ax


def _sample(layer: Layer[Any]) -> Array:
    """Some finite elements of a layer, spread over its calls."""
    calls = _spread(len(layer), MOST_CALLS)
    generator = torch.Generator("cpu").manual_seed(0)
    samples = [np.empty(0)]
    for index in calls:
        parts = [part for _, tensor in leaves(layer[index]) for part in dense(tensor)]
        total = sum(part.numel() for part in parts)
        for part in parts:
            quota = -(-MOST_ELEMENTS * part.numel() // (len(calls) * max(total, 1)))
            samples.append(_some(part, quota, generator))
    sample = np.concatenate(samples)
    finite: Array = sample[np.isfinite(sample)]
    return finite


def _some(tensor: Tensor, most: int, generator: torch.Generator) -> Array:
    if tensor.numel() > most:
        index = torch.randint(tensor.numel(), (most,), generator=generator, device="cpu")
        tensor = tensor.take(index.to(tensor.device))
    return _numbers(tensor.reshape(-1))


# --- Drift -------------------------------------------------------------------------------------------


def drift(acts: Layers) -> Array:
    """Draw the mean, the standard deviation and the share of zeros of each layer, over the passes.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> with record(model) as acts:
    ...     for batch in torch.randn(20, 4, 8):
    ...         output = model(batch)
    >>> [axes.get_ylabel() for axes in drift(acts)]
    ['mean', 'std', 'zeros']

    Each point is one call; of more than 256 calls of a layer, as many are drawn, evenly spread. The
    numbers are exact, as in :meth:`actrec.Recording.stats`.

    Args:
        acts: a recording, or some layers of one in a dict.

    Returns:
        An array of three ``Axes``, one below the other.

    Raises:
        OptionError: no layer was called.
    """
    names = _ordered("drift", acts)
    if not names:
        message = "drift(): there is nothing to draw, no layer was called."
        raise OptionError(message)
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 6.5), layout="constrained")
    colours = _colours(len(names))
    for name, colour in zip(names, colours, strict=True):
        numbers, points = _course(acts[name])
        marker = "o" if len(numbers) <= FEW else ""
        for ax, values in zip(axes, points.T, strict=True):
            ax.plot(
                numbers, values, marker=marker, markersize=3, linewidth=1.2, color=colour,
                label=_short(name),
            )  # fmt: skip
    for ax, label in zip(axes, ("mean", "std", "zeros"), strict=True):
        ax.set_ylabel(label)
        ax.grid(alpha=0.25)
    axes[2].set_ylim(-0.03, 1.03)
    axes[2].yaxis.set_major_formatter("{x:.0%}")
    axes[2].set_xlabel("pass")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    if len(names) <= MOST_IN_LEGEND:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    else:
        scale = ScalarMappable(Normalize(0, len(names) - 1), "viridis")
        bar = figure.colorbar(scale, ax=axes, pad=0.01, aspect=40)
        ends = [0, len(names) // 2, len(names) - 1]
        bar.set_ticks(ends, labels=[_short(names[end]) for end in ends])
        bar.ax.tick_params(labelsize=7)
        bar.set_label("layer, in execution order", fontsize=8)
    result: Array = axes
    return result


def _course(layer: Layer[Any]) -> tuple[list[int], Array]:
    """The passes of some calls, and their means, standard deviations and shares of zeros."""
    passes, calls = layer.passes, _spread(len(layer), MOST_CALLS)
    points = []
    for call in calls:
        moments = Moments()
        for _, tensor in leaves(layer[call]):
            moments.add(tensor)
        points.append((moments.mean, moments.std, moments.zero_share))
    return [passes[call] for call in calls], np.array(points)


# --- Similarity --------------------------------------------------------------------------------------


def similarity(acts: Layers, *, most: int = 256, ax: Axes | None = None) -> Axes:
    """Draw how similar the layers represent the same samples: linear CKA, from 0 to 1.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> with record(model) as acts:
    ...     output = model(torch.randn(100, 8))
    >>> axes = similarity(acts)
    >>> axes.images[0].get_array().shape
    (2, 2)

    The first dimension of the values counts the samples; everything behind it is one feature vector. The
    measure is that of Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations
    Revisited" (2019). It does not see rotations and scales of the features. Of fewer samples than
    features it comes out too large, so take many, or pool the values with a ``transform``.

    It is computed from ``most`` by ``most`` matrices, one for each layer, which are summed up over blocks
    of features: a layer is never in memory as one matrix.

    Args:
        acts: a recording, or some layers of one in a dict.
        most: how many samples to take at most, chosen at random, always the same.
        ax: where to draw; by default on a new figure.

    Returns:
        The ``Axes``. Layers that do not have the same samples as most layers, or whose calls differ in
        more than the number of samples, cannot be compared; the picture says how many were left out. A
        layer that returns the same for all samples has no similarity, and stays white.

    Raises:
        OptionError: no two samples are left.
    """
    tables = {
        name: table
        for name in _ordered("similarity", acts)
        if (table := _table(acts[name])) is not None
    }
    samples = Counter(table.samples for table in tables.values()).most_common(1)
    if not samples or samples[0][0] < 2 or most < 2:  # noqa: PLR2004  # one alone
        message = (
            "similarity(): there is nothing to compare. It needs two samples or more, in the first dimension of "
            "values that agree in all others; pool them with record(model, layers, transform=...)."
        )
        raise OptionError(message)
    total = samples[0][0]
    names = [name for name, table in tables.items() if table.samples == total]
    chosen = _some_rows(total, most)
    grams = [_gram(acts[name], tables[name], chosen) for name in names]
    matrix = np.array([[_cka(one, two) for two in grams] for one in grams])
    if ax is None:
        side = min(max(3.5 + 0.16 * len(names), 4.5), 14.0)
        _, ax = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    image = ax.imshow(matrix, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    places = list(range(0, len(names), -(-len(names) // MOST_LABELS)))
    labels = [_short(names[place]) for place in places]
    size = 8 if len(names) <= FEW else 6
    ax.set_yticks(places, labels, fontsize=size)
    ax.set_xticks(places, labels, fontsize=size, rotation=90)
    left_out = len(acts) - len(names)
    ax.set_title(
        f"linear CKA of {count(len(chosen), 'sample')}"
        + (f"; {count(left_out, 'layer')} left out" if left_out else ""),
        fontsize=10,
    )
    ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    return ax


class _Table(NamedTuple):
    """A layer as a matrix: how many rows, and how many columns."""

    samples: int
    features: int


def _table(layer: Layer[Any]) -> _Table | None:
    first = [next((tensor for _, tensor in leaves(value)), None) for value in layer]
    shapes = [() if tensor is None or tensor.is_meta else shape_of(tensor) for tensor in first]
    rest = {shape[1:] for shape in shapes}
    sizes = [size for shape in shapes for size in shape]
    if len(rest) != 1 or not all(shapes) or not all(isinstance(size, int) for size in sizes):
        return None
    features = 1
    for size in rest.pop():
        features *= int(size)
    return _Table(sum(int(shape[0]) for shape in shapes), features) if features else None


def _some_rows(total: int, most: int) -> list[int]:
    if total <= most:
        return list(range(total))
    generator = torch.Generator("cpu").manual_seed(0)
    rows: list[int] = (
        torch.randperm(total, generator=generator, device="cpu")[:most].sort().values.tolist()
    )
    return rows


def _gram(layer: Layer[Any], table: _Table, chosen: list[int]) -> Tensor:
    """The products of all pairs of samples, the mean of every feature taken off."""
    gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64, device="cpu")
    step = max(1, GRAM_BLOCK // len(chosen))
    for start in range(0, table.features, step):
        block = torch.cat(list(_columns(layer, chosen, slice(start, start + step))))
        block -= block.mean(0)
        gram.addmm_(block, block.T)
    return gram


def _columns(layer: Layer[Any], chosen: list[int], features: slice) -> Iterator[Tensor]:
    """Some features of the chosen samples, call by call."""
    begin, wanted = 0, torch.tensor(chosen, device="cpu")
    for value in layer:
        tensor = next(part for _, tensor in leaves(value) for part in dense(tensor))
        end = begin + len(tensor)
        rows = wanted[(wanted >= begin) & (wanted < end)] - begin
        begin = end
        part = tensor.reshape(len(tensor), -1)[:, features]
        part = part.index_select(0, rows.to(part.device)).cpu()
        yield (part.abs() if part.is_complex() else part).double()


def _cka(one: Tensor, two: Tensor) -> float:
    lengths = float(one.norm() * two.norm())
    return float((one * two).sum()) / lengths if lengths else np.nan


# --- What the pictures share -------------------------------------------------------------------------

FEW = 30
MOST_IN_LEGEND = 10
MOST_LABELS = 50


def _ordered(call: str, acts: Layers) -> list[str]:
    """The names of the layers that were called, in execution order if it is known."""
    if isinstance(acts, Recording):
        return acts.execution_order
    given: object = acts
    if not isinstance(given, Mapping):
        message = (
            f"{call}(): expected a recording, or some layers of one in a dict such as {{name: acts[name]}}, got "
            f"{type(given).__name__}."
        )
        raise OptionError(message)
    return [name for name, layer in acts.items() if len(layer)]


def _spread(number: int, most: int) -> list[int]:
    """Up to ``most`` of ``number`` places, evenly spread, the first and the last among them."""
    if number <= most:
        return list(range(number))
    if most == 1:
        return [0]
    return [round(index * (number - 1) / (most - 1)) for index in range(most)]


def _short(name: str) -> str:
    """A name as a label; what is long loses its middle, and matplotlib's own signs their meaning."""
    name = shown(name)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2 - 2]}...{name[-LONGEST_NAME // 2 + 1 :]}"
    return name.replace("$", r"\$")


def _colours(number: int) -> Sequence[Any]:
    if number <= MOST_IN_LEGEND:
        return [f"C{index}" for index in range(number)]
    return [plt.get_cmap("viridis")(index / (number - 1)) for index in range(number)]


def _tall(rows: int) -> Axes:
    height = 1.2 + rows * (0.3 if rows <= FEW else 0.17)
    _, ax = plt.subplots(figsize=(8, height), layout="constrained")
    return ax


def _name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), [_short(name) for name in names])
    ax.tick_params(axis="y", labelsize=8 if len(names) <= FEW else 6, length=0)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
