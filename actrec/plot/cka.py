"""How similar layers represent the same samples: linear CKA."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from actrec._recordings import similarity as cka
from actrec._text import count
from actrec.errors import OptionError

from .shared import FEW, Array, Layers, at_least_one, of_layers, ordered, short

_MOST_LABELS: Final = 50


@of_layers
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

    The first dimension of the values counts the samples; the other dimensions together are one feature vector. The
    measure is that of Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations
    Revisited" (2019). It is invariant to rotations and scales of the features. With fewer samples than
    features it is too large, so take many samples, or pool the values with a ``transform``.

    It is computed from ``most`` by ``most`` matrices, one for each layer, which are summed over blocks
    of features: a layer is never in memory as one matrix.

    Args:
        acts: a recording, or some layers of one in a dict.
        most: how many samples to take at most, chosen at random, always the same.
        ax: where to draw; by default on a new figure.

    Returns:
        The ``Axes``. Layers that do not have the same samples as most layers, or whose calls differ in
        more than the number of samples, cannot be compared; the title says how many were left out. The
        similarity of a layer that returns the same for all samples is undefined, and left white.

    Raises:
        OptionError: there are fewer than 8 samples, for which the measure is misleading.
    """
    at_least_one("similarity", most)
    names = ordered(acts)
    found = cka.similarity(acts, names, most, iter)
    if not found.matrix:
        message = (
            f"similarity(): {count(found.samples, 'sample')} to compare. It needs {cka.FEWEST} or more: with fewer the measure is "
            "large for any layers. Samples are the first dimension of values that agree in all others; pool them with "
            "record(model, layers, transform=...)."
        )
        raise OptionError(message)
    left_out = len(acts) - len(found.names)
    title = f"linear CKA of {count(found.samples, 'sample')}"
    title += f"; {count(left_out, 'layer')} left out" if left_out else ""
    return _drawn(np.array(found.matrix), found.names, title, ax)


def _drawn(matrix: Array, names: list[str], title: str, ax: Axes | None) -> Axes:
    if ax is None:
        side = min(max(3.5 + 0.16 * len(names), 4.5), 14.0)
        _, ax = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    image = ax.imshow(matrix, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    places = list(range(0, len(names), -(-len(names) // _MOST_LABELS)))
    labels = [short(names[place]) for place in places]
    size = 8 if len(names) <= FEW else 6
    ax.set_yticks(places, labels, fontsize=size)
    ax.set_xticks(places, labels, fontsize=size, rotation=90)
    ax.set_title(title, fontsize=10)
    ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    return ax
