"""The rows in which each channel is largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from actrec._values.shapes import dtype_name
from actrec.errors import CaptureError, OptionError

from .reduction import Reduction, Rows, State


@dataclass(eq=False, kw_only=True, repr=False)
class TopK(Reduction):
    """The ``k`` largest values of each channel, and where they were.

    >>> import torch
    >>> from functools import partial
    >>> from actrec import record, reduce
    >>> model = torch.nn.Sequential(torch.nn.ReLU())
    >>> with record(model, "0", into=partial(reduce.TopK, k=2)) as acts:
    ...     for batch in torch.arange(12.0).view(2, 1, 3, 2):  # of one sample, three positions, two channels
    ...         output = model(batch)
    >>> top = acts["0"].compute()
    >>> top["values"]
    tensor([[10., 11.],
            [ 8.,  9.]])
    >>> top["pass"][0], top["sample"][0], top["position"][0]
    (tensor([1, 1]), tensor([0, 0]), tensor([2, 2]))

    Values keep their dtype. Among equal values, any may be chosen.

    Args:
        k: how many values to keep for each channel.
        dim: the dimension of the channels; each index of the others is a row. ``None``: every element is a row.
        mask: the name of a mask that is added in each pass or unit, ``acts.add("mask", batch["attention_mask"])``.
    """

    k: int = 10
    _largest: Tensor | None = field(init=False, default=None)  # (k, C)
    #: (4, k, C): pass, sample, position, rank.
    _where: Tensor | None = field(init=False, default=None)

    @override
    def __post_init__(self) -> None:
        """Check ``k``."""
        super().__post_init__()
        if type(self.k) is not int or self.k < 1:
            message = f"TopK(k={self.k!r}): expected a whole number above 0."
            raise OptionError(message)

    @override
    def compute(self) -> dict[str, Any]:
        """Return the result.

        Returns:
            ``values``, the largest first, ``(k, C)``, and of each of them ``unit``, ``sample`` and ``position``, ``(k, C)``: the key of
            the unit (a list of ``k`` lists, where not all are integers: ``None`` is for a pass outside of the units; in a
            recording without units the number of the pass), the index in its
            batch, and that among the other dimensions of the sample, those of earlier calls of the unit included; and the
            ``pass`` with the ``rank`` that counted it. With fewer than ``k`` rows there are as many as rows; without rows nothing.
        """
        if self._largest is None or self._where is None:
            return {}
        number, sample, position, rank = self._where.clone()
        return {
            "values": self._largest.clone(),
            "unit": number.clone(),
            "sample": sample,
            "position": position,
            "pass": number,
            "rank": rank,
        }

    def name_units(
        self, found: dict[str, Any], keys: Callable[[Tensor, Tensor], list[Any]]
    ) -> dict[str, Any]:
        """Return a result with the keys of units; ``keys(ranks, passes)`` are those of some passes."""
        if found:
            units = keys(found["rank"].flatten(), found["pass"].flatten())
            width = found["pass"].shape[1]
            found["unit"] = (
                torch.tensor(units, device=found["pass"].device).view(-1, width)
                if all(type(unit) is int for unit in units)
                else [units[at : at + width] for at in range(0, len(units), width)]
            )
        return found

    @override
    def _states(self, rows: Rows, number: int, start: int) -> Iterator[tuple[int, State]]:
        try:
            values, at = rows.table.topk(min(self.k, len(rows.table)), dim=0)
        except RuntimeError as error:  # of float8 and bool
            dtype = dtype_name(rows.table.dtype)
            message = (
                f"TopK cannot order values of {dtype}; let a transform cast them, with float() say"
            )
            raise CaptureError(message) from error
        sample, position = rows.index(at)
        where = (torch.full_like(at, number), sample, position + start, torch.zeros_like(at))
        yield len(rows.table), (values, torch.stack(where))

    @override
    def _merged(self, mine: State, theirs: State, before: int, many: int) -> State:
        values, where = torch.cat([mine[0], theirs[0]]), torch.cat([mine[1], theirs[1]], dim=1)
        order = values.argsort(dim=0, descending=True, stable=True)[: self.k]
        return values.gather(0, order), where.gather(1, order.expand(len(where), *order.shape))

    @override
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"_largest": (None, None), "_where": (4, None, None)}

    @override
    def of_rank(self, rank: int) -> None:
        if self._where is not None:
            self._where[3] = rank

    @override
    def renumber(self, number: Callable[[int, int], int]) -> None:
        if self._where is not None:
            passes, ranks = self._where[0], self._where[3]
            pairs = zip(ranks.flatten().tolist(), passes.flatten().tolist(), strict=True)
            passes.copy_(
                torch.tensor([number(*pair) for pair in pairs], device="cpu").view_as(passes)
            )
            ranks.zero_()
