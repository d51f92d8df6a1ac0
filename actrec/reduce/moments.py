"""Mean, variance and covariance of the rows of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from .reduction import Reduction, Rows, State


@dataclass(eq=False, kw_only=True, repr=False)
class Moments(Reduction):
    """The mean and the variance of each channel, and the covariance of all channels.

    >>> import torch
    >>> from functools import partial
    >>> from actrec import record, reduce
    >>> model = torch.nn.Linear(4, 3)
    >>> with torch.no_grad(), record(model, "", into=partial(reduce.Moments, covariance=True)) as acts:
    ...     for batch in torch.randn(2, 5, 4):
    ...         output = model(batch)
    >>> found = acts[""].compute()
    >>> found["count"], found["mean"].shape, found["var"].shape, found["cov"].shape
    (tensor(10), torch.Size([3]), torch.Size([3]), torch.Size([3, 3]))

    They are computed in float64, around the mean of each block, and merged as in Chan, Golub and LeVeque (1979).

    Args:
        dim: the dimension of the channels; each index of the others is a row. ``None``: every element is a row.
        mask: the name of a mask that is added in each pass or unit, ``acts.add("mask", batch["attention_mask"])``.
        covariance: whether to compute the covariance of the channels, ``(C, C)``, too.
    """

    covariance: bool = False
    #: The mean of each channel, ``(C,)``.
    mean: Tensor | None = field(init=False, default=None)
    _squares: Tensor | None = field(init=False, default=None)  # around the mean: (C,) or (C, C)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the result.

        Returns:
            ``count``, the number of rows; ``mean``, ``var`` and ``std``, ``(C,)``; and ``cov``, ``(C, C)``. Variances are with
            Bessel's correction, as in ``torch.var``, so those of one row are NaN. Without rows there is only ``count``.
        """
        found = {"count": self.rows.clone()}
        if self.mean is None or self._squares is None:
            return found
        degrees = self.rows.to(self.mean.device) - 1
        spread = self._squares / degrees if degrees else torch.full_like(self._squares, torch.nan)
        var = spread.diagonal().clone() if self.covariance else spread
        found |= {"mean": self.mean.clone(), "var": var, "std": var.sqrt()}
        return found | {"cov": spread} if self.covariance else found

    @override
    def _states(self, rows: Rows, number: int, start: int) -> Iterator[tuple[int, State]]:
        for block in rows.blocks():
            mean = block.mean(0)
            away = block - mean
            squares = away.T @ away if self.covariance else away.square().sum(0)
            yield len(block), (mean, squares)

    @override
    def _merged(self, mine: State, theirs: State, before: int, many: int) -> State:
        (mean, squares), (their_mean, their_squares) = mine, theirs
        share = many / (before + many)
        delta = their_mean - mean
        between = delta.outer(delta) if self.covariance else delta.square()
        squares += their_squares + between * (before * share)
        mean += delta * share
        return mean, squares

    @override
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"mean": (None,), "_squares": (None, None) if self.covariance else (None,)}
