"""The origins of rows: the unit, the sample in its batch, the position in the sample. Only arithmetic, no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor
from typing_extensions import override

from .columns import Column
from .numbering import integers
from .runs import Runs
from .sources import Files, Held, Source

_BYTES: Final = torch.int64.itemsize


class Where(NamedTuple):
    """The origin of one row, or of several."""

    unit: Any
    sample: Any
    position: Any


#: The names of columns of origins; ``"recording"`` is the number of the recording, if there are several.
ORIGINS: Final = (*Where._fields, "recording")


@dataclass(frozen=True, eq=False)
class Origins(Runs):
    """The origins of rows, with a line for each run of rows whose origins are regular.

    A line has how many rows, and of the first one: its pass, its sample, its position, how many rows its sample has here, and
    how many its pass has here.
    """

    units: Tensor | list[Any]  #: for each pass, the key of its unit, or its number
    samples: Tensor  #: (passes,): how many samples each has
    positions: tuple[int, ...] | None  #: of a sample, if all have the same

    def joined(self) -> Origins:
        """Join the runs of successive passes that are cut in the same way."""
        many, number, *same, whole = self.lines.unbind(1)
        goes_on = (number.diff() == 1) & (many[:-1] == whole[:-1]) & (whole.diff() == 0)
        for column in same:
            goes_on &= column.diff() == 0
        return self.coalesced(goes_on)

    def picked(self, rows: Tensor) -> Origins:
        """Return where some of the rows come from."""
        ones = torch.ones_like(rows)
        return replace(self, lines=torch.stack([ones, *self.numbers(rows), ones, ones], 1))

    def numbers(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pass, the sample and the position of rows."""
        lines, within = self.of(rows)
        _, number, sample, position, per_sample, whole = lines.unbind(1)
        in_pass = within % whole
        return (
            number + within // whole,
            sample + in_pass // per_sample,
            position + in_pass % per_sample,
        )

    def column(self, name: str, recording: int) -> Column:
        """Return the column of origins with a name, of the recording with that number."""
        many = len(self)
        source: Source = _Computed(self, ORIGINS.index(name))
        line, keys = [many, 0, 0, 1], self.units if name == "unit" else None
        if name == "recording":
            source, line = Held(integers([recording])), [many, 0, 0, max(1, many)]
        return Column(integers([line]), repr(name), (), torch.int64, [source], keys)


@dataclass(frozen=True, eq=False)
class _Computed(Source):
    """The pass, the sample or the position of each row, as if it was stored."""

    origins: Origins
    field: int
    first: int = 0  #: the number of the first pass

    @override
    def read(self, begin: int, out: Tensor, files: Files) -> None:
        rows = torch.arange(len(out), device="cpu")
        self.take(rows * _BYTES + begin, out, rows, files)

    @override
    def take(self, begins: Tensor, out: Tensor, places: Tensor, files: Files) -> None:
        numbers = self.origins.numbers(begins // _BYTES)[self.field] + self.first
        out[places] = numbers[:, None].view(torch.uint8)

    @override
    def announce(self, begin: int, nbytes: int, files: Files) -> None:
        pass


def together(columns: Sequence[Column]) -> list[Column]:
    """Return the same column of several recordings. Columns of units share the keys of all of them."""
    every = [column.keys for column in columns if column.keys is not None]
    if not every:
        return [*columns]
    firsts = accumulate(map(len, every), initial=0)
    sources = [
        replace(cast("_Computed", column.sources[0]), first=first)
        for column, first in zip(columns, firsts, strict=False)
    ]
    tensors = [keys for keys in every if isinstance(keys, Tensor)]
    keys = (
        torch.cat(tensors)
        if len(tensors) == len(every)
        else [*chain.from_iterable(map(_listed, every))]
    )
    return [
        replace(column, keys=keys, sources=[source])
        for column, source in zip(columns, sources, strict=True)
    ]


def _listed(keys: Tensor | list[Any]) -> list[Any]:
    return keys.tolist() if isinstance(keys, Tensor) else keys
