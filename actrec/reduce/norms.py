"""The norm of each channel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from actrec.errors import OptionError

from .reduction import Reduction, Rows, State


@dataclass(eq=False, kw_only=True, repr=False)
class Norms(Reduction):
    """The norm of each channel over all rows, as Wanda and AWQ use them.

    >>> import torch
    >>> from actrec import record, reduce
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> with torch.no_grad(), record(model, (), inputs=torch.nn.Linear, into=reduce.Norms) as acts:
    ...     for batch in torch.ones(2, 5, 4):
    ...         output = model(batch)
    >>> acts.inputs["0"].compute()
    tensor([3.1623, 3.1623, 3.1623, 3.1623], dtype=torch.float64)

    Powers are summed in float64.

    Args:
        dim: the dimension of the channels; each index of the others is a row. ``None``: every element is a row.
        mask: the name of a mask that is added in each pass or unit, ``acts.add("mask", batch["attention_mask"])``.
        ord: 2 for the Euclidean norm, 1 for the sum of absolute values, ``math.inf`` for the largest of them, or any other
            number above 0.
    """

    ord: float = 2.0
    _total: Tensor | None = field(init=False, default=None)  # of the powers, or the largest

    @override
    def __post_init__(self) -> None:
        """Check the order."""
        super().__post_init__()
        order: object = self.ord
        if isinstance(order, bool) or not isinstance(order, (int, float)) or not order > 0:
            message = f"Norms(ord={order!r}): expected a number above 0, such as 1, 2 or math.inf."
            raise OptionError(message)
        self.ord = float(order)

    @override
    def compute(self) -> Tensor:
        """Return the result.

        Returns:
            The norm of each channel, ``(C,)``, float64; ``(0,)`` without rows. With ``ord=1``, divided by ``rows`` it is the mean
            absolute value.
        """
        if self._total is None:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return self._total.clone() if math.isinf(self.ord) else self._total ** (1 / self.ord)

    @override
    def _states(self, rows: Rows, number: int, start: int) -> Iterator[tuple[int, State]]:
        for block in rows.blocks():
            size = block.abs()
            if math.isinf(self.ord):
                yield len(block), [size.amax(0)]
            else:
                yield len(block), [(size if self.ord == 1 else size**self.ord).sum(0)]

    @override
    def _merged(self, mine: State, theirs: State, before: int, many: int) -> State:
        return [(torch.maximum if math.isinf(self.ord) else torch.add)(mine[0], theirs[0])]

    @override
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"_total": (None,)}
