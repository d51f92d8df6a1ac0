"""How similar layers represent the same samples: linear CKA."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt

from actrec._text import count
from actrec._values.chunks import dense
from actrec._values.spec import leaves
from actrec._values.summary import shape_of
from actrec.errors import OptionError

from .shared import FEW, ordered, short

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from torch import Tensor

    from actrec._recordings.layer import Layer

    from .shared import Array, Layers

__all__ = ["similarity"]

_GRAM_BLOCK = 1 << 22  # elements: 32 MB of float64
_MOST_LABELS: Final = 50
#: Of fewer samples, layers that have nothing in common look alike.
_FEWEST: Final = 8


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
        OptionError: fewer than 8 samples are left, of which the measure would mislead.
    """
    tables = {
        name: table
        for name in ordered("similarity", acts)
        if (table := _table(acts[name])) is not None
    }
    samples = Counter(table.samples for table in tables.values()).most_common(1)
    if not samples or min(samples[0][0], most) < _FEWEST:
        there = min(samples[0][0], most) if samples else 0
        message = (
            f"similarity(): {count(there, 'sample')} to compare. It needs {_FEWEST} or more, of fewer the measure is "
            "large whatever the layers do. Samples are the first dimension of values that agree in all others; pool them with "
            "record(model, layers, transform=...)."
        )
        raise OptionError(message)
    total = samples[0][0]
    names = [name for name, table in tables.items() if table.samples == total]
    chosen = _some_rows(total, most)
    grams = [_gram(acts[name], tables[name], chosen) for name in names]
    matrix = np.array([[_cka(one, two) for two in grams] for one in grams])
    left_out = len(acts) - len(names)
    title = f"linear CKA of {count(len(chosen), 'sample')}"
    title += f"; {count(left_out, 'layer')} left out" if left_out else ""
    return _drawn(matrix, names, title, ax)


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
    features = math.prod(map(int, rest.pop()))
    return _Table(sum(int(shape[0]) for shape in shapes), features) if features else None


def _some_rows(total: int, most: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(total, generator=generator, device="cpu")[:most].sort().values


def _gram(layer: Layer[Any], table: _Table, chosen: Tensor) -> Tensor:
    """The products of all pairs of samples, the mean of every feature taken off."""
    gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64, device="cpu")
    step = max(1, _GRAM_BLOCK // len(chosen))
    for start in range(0, table.features, step):
        block = torch.cat(list(_columns(layer, chosen, slice(start, start + step))))
        block -= block.mean(0)
        gram.addmm_(block, block.T)
    return gram


def _columns(layer: Layer[Any], chosen: Tensor, features: slice) -> Iterator[Tensor]:
    """Some features of the chosen samples, call by call."""
    begin = 0
    for value in layer:
        tensor = next(part for _, tensor in leaves(value) for part in dense(tensor))
        end = begin + len(tensor)
        rows = chosen[(chosen >= begin) & (chosen < end)] - begin
        begin = end
        part = tensor.reshape(len(tensor), -1)[:, features]
        part = part.index_select(0, rows.to(part.device)).cpu()
        yield (part.abs() if part.is_complex() else part).double()


def _cka(one: Tensor, two: Tensor) -> float:
    lengths = float(one.norm() * two.norm())
    return float((one * two).sum()) / lengths if lengths else np.nan
