"""The distributions of layers, by percentiles of a sample."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from actrec._recordings.course import MOST_CALLS, spread
from actrec._recordings.layer import Layer
from actrec._text import count
from actrec._values.chunks import dense
from actrec._values.spec import leaves
from actrec.errors import OptionError

from .shared import FEW, Array, Layers, numbers, of_layers, ordered, short

_MOST_ELEMENTS: Final = 50_000


@of_layers
def distributions(acts: Layers, *, ax: Axes | None = None) -> Axes:
    """Draw the distribution of the values of each layer, in execution order from top to bottom.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> with record(model) as acts:
    ...     output = model(torch.randn(100, 8))
    >>> axes = distributions(acts)
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['0', '1']

    The thin line spans the first to the 99th percentile, the thick one the middle half, and the dot is
    the median; values beyond do not stretch the picture. If the layers differ by orders of
    magnitude, the axis is linear around zero and logarithmic beyond. The percentiles are those of up to
    50,000 finite elements of a layer, spread over its calls. Layers without any are left out,
    and the title says how many.

    Args:
        acts: a recording, or some layers of one in a dict.
        ax: where to draw; by default on a new figure.

    Returns:
        The ``Axes``, with a row for each layer.

    Raises:
        OptionError: no layer has a finite element.
    """
    names, found = [], []
    for name in ordered(acts):
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
    if typical > 0 and extents.max() > 30 * typical:  # else most lines would be a pixel wide
        ax.set_xscale("symlog", linthresh=typical)
    _name_rows(ax, names)
    if left_out := len(acts) - len(names):
        ax.set_title(f"{count(left_out, 'layer')} left out, without a finite element", fontsize=10)
    ax.set_xlabel("value: 1st to 99th percentile, middle half, median")
    return ax


def _sample(layer: Layer[Any]) -> Array:
    """Return some finite elements of a layer, spread over its calls."""
    calls = spread(len(layer), MOST_CALLS)
    generator = torch.Generator("cpu").manual_seed(0)
    samples = [np.empty(0)]
    for index in calls:
        parts = [part for _, tensor in leaves(layer[index]) for part in dense(tensor)]
        total = sum(part.numel() for part in parts)
        for part in parts:
            quota = -(-_MOST_ELEMENTS * part.numel() // (len(calls) * max(total, 1)))
            samples.append(_some(part, quota, generator))
    sample = np.concatenate(samples)
    finite: Array = sample[np.isfinite(sample)]
    return finite


def _some(tensor: Tensor, most: int, generator: torch.Generator) -> Array:
    if tensor.numel() > most:
        index = torch.randint(tensor.numel(), (most,), generator=generator, device="cpu")
        tensor = tensor.take(index.to(tensor.device))
    return numbers(tensor.reshape(-1))


def _tall(rows: int) -> Axes:
    height = 1.2 + rows * (0.3 if rows <= FEW else 0.17)
    _, ax = plt.subplots(figsize=(8, height), layout="constrained")
    return ax


def _name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), [short(name) for name in names])
    ax.tick_params(axis="y", labelsize=8 if len(names) <= FEW else 6, length=0)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
