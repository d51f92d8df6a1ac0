"""How similar layers represent the same samples: linear CKA.

It is computed from a samples-by-samples matrix for each layer, summed over blocks of features: a layer is never in
memory as one matrix, and a call without a chosen sample is not read again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from actrec._progress import Each
from actrec._values.chunks import dense
from actrec._values.dtensor import is_distributed
from actrec._values.shapes import shape_of
from actrec._values.spec import leaves

from .layer import Layer

#: With fewer samples, unrelated layers look alike.
FEWEST: Final = 8
_GRAM_BLOCK: Final = 1 << 22  # elements: 32 MB of float64


class Similarity(NamedTuple):
    """How similar layers are: from 0 to 1, NaN for a layer that returns the same for all samples."""

    names: list[str]  #: of the layers that have the most common number of samples
    samples: int
    matrix: list[list[float]]  #: empty if there are too few samples


def similarity(
    acts: Mapping[str, Layer[Any]], names: Sequence[str], most: int, each: Each
) -> Similarity:
    """Return how similar some layers of a recording are, in up to ``most`` of their samples, always the same ones.

    ``each`` counts every layer twice.
    """
    tables = {name: table for name in each(names) if (table := _table(acts[name])) is not None}
    totals = Counter(sum(table.samples) for table in tables.values()).most_common(1)
    total = totals[0][0] if totals else 0
    alike = [name for name, table in tables.items() if sum(table.samples) == total]
    chosen = _some_rows(total, most)
    if len(chosen) < FEWEST:
        return Similarity(alike, len(chosen), [])
    grams = [_gram(acts[name], tables[name], chosen) for name in each(alike)]
    matrix = [[_cka(one, two) for two in grams] for one in grams]
    return Similarity(alike, len(chosen), matrix)


class _Table(NamedTuple):
    """A layer as a matrix: how many rows each call has, and how many columns there are."""

    samples: list[int]
    features: int


def _table(layer: Layer[Any]) -> _Table | None:
    """Return the sizes of a layer as a matrix; ``None`` if its calls do not have rows of one shape."""
    shapes = [*map(_shape, layer)]
    rest = {shape[1:] for shape in shapes}
    sizes = [size for shape in shapes for size in shape]
    if len(rest) != 1 or not all(shapes) or not all(isinstance(size, int) for size in sizes):
        return None
    features = math.prod(map(int, rest.pop()))
    return _Table([int(shape[0]) for shape in shapes], features) if features else None


def _shape(value: Any) -> tuple[int | str, ...]:
    first = next((tensor for _, tensor in leaves(value)), None)
    if first is None or first.is_meta or is_distributed(first):
        return ()
    return shape_of(first)


def _some_rows(total: int, most: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(total, generator=generator, device="cpu")[:most].sort().values


def _gram(layer: Layer[Any], table: _Table, chosen: Tensor) -> Tensor:
    """Return the products of all pairs of samples, after subtracting the mean of every feature."""
    gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64, device="cpu")
    step = max(1, _GRAM_BLOCK // len(chosen))
    for start in range(0, table.features, step):
        columns = _columns(layer, table, chosen, slice(start, start + step))
        block = torch.cat(list(columns))
        block -= block.mean(0)
        gram.addmm_(block, block.T)
    return gram


def _columns(layer: Layer[Any], table: _Table, chosen: Tensor, features: slice) -> Iterator[Tensor]:
    """Yield some features of the chosen samples, call by call."""
    for call, (begin, end) in enumerate(pairwise(accumulate(table.samples, initial=0))):
        rows = chosen[(chosen >= begin) & (chosen < end)] - begin
        if not len(rows):
            continue
        tensor = next(part for _, tensor in leaves(layer[call]) for part in dense(tensor))
        part = tensor.reshape(len(tensor), -1)[:, features]
        part = part.index_select(0, rows.to(part.device)).cpu()
        yield (part.abs() if part.is_complex() else part).double()


def _cka(one: Tensor, two: Tensor) -> float:
    lengths = float(one.norm() * two.norm())
    return float((one * two).sum()) / lengths if lengths else math.nan
