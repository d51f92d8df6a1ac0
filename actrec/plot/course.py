"""How the statistics of layers change over the passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from actrec._recordings.course import MOST_CALLS, course
from actrec._recordings.layer import Layer
from actrec._text import count
from actrec.errors import OptionError

from .shared import FEW, Array, Layers, of_layers, ordered, short

_MOST_IN_LEGEND: Final = 10


@of_layers
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

    Each point is one call. If a layer has more than 256 calls, 256 of them are drawn, evenly spread, and the
    title says so. The numbers are exact, as in :meth:`actrec.Recording.stats`.

    Args:
        acts: a recording, or some layers of one in a dict.

    Returns:
        An array of three ``Axes``, one below the other.

    Raises:
        OptionError: no layer has calls in two passes.
    """
    names = ordered(acts)
    if not names:
        message = "drift(): there is nothing to draw, no layer was called."
        raise OptionError(message)
    if all(len({*acts[name].passes}) < 2 for name in names):  # noqa: PLR2004  # one is no course
        message = (
            "drift(): no layer has calls in two passes, so there is no drift to draw. Record several batches, or draw "
            "distributions(acts)."
        )
        raise OptionError(message)
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 6.5), layout="constrained")
    colours = _colours(len(names))
    for name, colour in zip(names, colours, strict=True):
        numbers, points = _course(acts[name])
        marker = "o" if len(numbers) <= FEW else ""
        for ax, values in zip(axes, points.T, strict=True):
            ax.plot(
                numbers, values, marker=marker, markersize=3, linewidth=1.2, color=colour,
                label=short(name),
            )  # fmt: skip
    for ax, label in zip(axes, ("mean", "std", "zeros"), strict=True):
        ax.set_ylabel(label)
        ax.grid(alpha=0.25)
    axes[0].set_title(_left_out(acts, names), fontsize=10)
    axes[2].set_ylim(-0.03, 1.03)
    axes[2].yaxis.set_major_formatter("{x:.0%}")
    axes[2].set_xlabel("pass")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    if len(names) <= _MOST_IN_LEGEND:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    else:
        scale = ScalarMappable(Normalize(0, len(names) - 1), "viridis")
        bar = figure.colorbar(scale, ax=axes, pad=0.01, aspect=40)
        ends = [0, len(names) // 2, len(names) - 1]
        bar.set_ticks(ends, labels=[short(names[end]) for end in ends])
        bar.ax.tick_params(labelsize=7)
        bar.set_label("layer, in execution order", fontsize=8)
    result: Array = axes
    return result


def _left_out(acts: Layers, names: list[str]) -> str:
    """Return what the picture does not show, if there is anything."""
    most = max(len(acts[name]) for name in names)
    facts = [f"{MOST_CALLS} of up to {most:,} calls of each layer"] * (most > MOST_CALLS)
    never = len(acts) - len(names)
    facts += [f"{count(never, 'layer')} left out, never called"] * (never > 0)
    return "; ".join(facts)


def _course(layer: Layer[Any]) -> tuple[list[int], Array]:
    """Return the passes of some calls, and their means, standard deviations and shares of zeros."""
    points = course(layer, iter)
    return [point.number for point in points], np.array(points)[:, 1:]


def _colours(number: int) -> Sequence[Any]:
    if number <= _MOST_IN_LEGEND:
        return [f"C{index}" for index in range(number)]
    return [plt.get_cmap("viridis")(index / (number - 1)) for index in range(number)]
