"""How many elements are in each bin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from actrec.errors import OptionError

from .reduction import Reduction, Rows, State


@dataclass(eq=False, kw_only=True, repr=False)
class Histogram(Reduction):
    """The number of elements in each bin, of all channels together or of each.

    >>> import torch
    >>> from functools import partial
    >>> from actrec import record, reduce
    >>> bins = partial(reduce.Histogram, edges=[0.0, 1.0, 2.0])
    >>> model = torch.nn.Sequential(torch.nn.ReLU())
    >>> with record(model, "0", into=bins) as acts:
    ...     output = model(torch.tensor([[-1.0, 0.5, 1.0], [1.5, 2.0, 9.0]]))
    >>> acts["0"].compute(), acts["0"].above
    (tensor([2, 3]), tensor(1))

    Counts are exact.

    Args:
        edges: the edges of the bins, ascending. A value on the edge of two bins is in the upper one, and the last bin
            includes its upper edge, as in ``torch.histogram``.
        dim: the dimension of the channels, for a histogram of each; ``None`` for one of all elements.
        mask: the name of a mask that is added in each pass or unit, ``acts.add("mask", batch["attention_mask"])``.
    """

    edges: Sequence[float] | Tensor
    dim: int | None = None
    _channels: ClassVar[int] = 0
    #: (C, bins + 3): below, bins, above, NaN.
    _counts: Tensor | None = field(init=False, default=None)

    @override
    def __post_init__(self) -> None:
        """Check the edges."""
        super().__post_init__()
        edges = torch.as_tensor(self.edges, dtype=torch.float64, device="cpu").flatten()
        if len(edges) < 2 or not bool((edges.diff() > 0).all()):  # noqa: PLR2004
            message = f"Histogram(edges={self.edges!r}): expected two numbers or more, ascending."
            raise OptionError(message)
        self.edges = edges.tolist()

    @override
    def compute(self) -> Tensor:
        """Return the result.

        Returns:
            The number of elements in each bin, ``(bins,)``, or of each channel, ``(C, bins)``; int64. See also ``below``,
            ``above`` and ``nan``.
        """
        return self._shown(slice(1, -2))

    @property
    def below(self) -> Tensor:
        """How many elements are below the first edge."""
        return self._shown(0)

    @property
    def above(self) -> Tensor:
        """How many elements are above the last edge."""
        return self._shown(-2)

    @property
    def nan(self) -> Tensor:
        """How many elements are NaN."""
        return self._shown(-1)

    def _shown(self, part: slice | int) -> Tensor:
        counts = self._counts
        if counts is None:
            counts = torch.zeros(
                int(self.dim is None), len(self.edges) + 2, dtype=torch.int64, device="cpu"
            )
        return (counts[0] if self.dim is None else counts)[..., part].clone()

    @override
    def _states(self, rows: Rows, number: int, start: int) -> Iterator[tuple[int, State]]:
        width = rows.table.shape[1]
        edges = torch.tensor(self.edges, dtype=torch.float64, device=rows.table.device)
        kinds = len(edges) + 2
        for block in rows.blocks():
            bins = torch.bucketize(block, edges, right=True)
            bins -= (block == edges[-1]).long()
            bins = bins.where(~block.isnan(), kinds - 1)
            bins += kinds * torch.arange(width, device=bins.device)
            counts = torch.bincount(bins.flatten(), minlength=width * kinds).view(width, kinds)
            yield len(block), [counts]

    @override
    def _merged(self, mine: State, theirs: State, before: int, many: int) -> State:
        return [mine[0] + theirs[0]]

    @override
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"_counts": (None, len(self.edges) + 2)}
