"""The origins of rows: the unit, the sample in its batch, the position in the sample. Only arithmetic, no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from .columns import Column, coalesced
from .sources import Files


class Where(NamedTuple):
    """The origin of one row, or of several."""

    unit: Any
    sample: Any
    position: Any


#: The names of columns of origins; ``"recording"`` is the number of the recording, if there are several.
ORIGINS: Final = (*Where._fields, "recording")


@dataclass(frozen=True)
class Origins:
    """The origins of rows, with a line for each run of rows whose origins are regular."""

    #: (lines, 6): how many rows, and of the first one: its pass, its sample, its position, how many rows its sample has here,
    #: and how many its pass has here.
    lines: Tensor
    units: Sequence[Any] | Tensor  #: for each pass, the key of its unit, or its number
    samples: Tensor  #: (passes,): how many samples each has

    def ordered(self, order: Tensor) -> Origins:
        """Return the origins of the rows with their lines in another order."""
        return replace(self, lines=self.lines[order])

    def coalesced(self) -> Origins:
        """Join the lines of successive passes that are cut in the same way."""
        many, number, *same, whole = self.lines.unbind(1)
        goes_on = (number.diff() == 1) & (many[:-1] == whole[:-1]) & (whole.diff() == 0)
        for column in same:
            goes_on &= column.diff() == 0
        return replace(self, lines=coalesced(self.lines, goes_on))

    def picked(self, rows: Tensor) -> Origins:
        """Return where some of the rows come from."""
        found = self.of(rows)
        ones = torch.ones_like(rows)
        return replace(self, lines=torch.stack([ones, *found, ones, ones], 1))

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pass, the sample and the position of rows."""
        ends = self._ends
        line = torch.searchsorted(ends, rows, right=True)
        many, number, sample, position, per_sample, whole = self.lines[line].unbind(1)
        within = rows - (ends[line] - many)
        in_pass = within % whole
        return (
            number + within // whole,
            sample + in_pass // per_sample,
            position + in_pass % per_sample,
        )

    def names(self, passes: Tensor) -> Any:
        """Return the units of passes: a tensor if their keys are integers, else a list."""
        if isinstance(self.units, Tensor):
            return self.units[passes]
        return [self.units[number] for number in passes.tolist()]

    @cached_property
    def _ends(self) -> Tensor:
        return self.lines[:, 0].cumsum(0)


class Origin(Column):
    """The origins of rows, as a column like those of layers."""

    def __init__(self, name: str, origins: Origins, recording: int = 0) -> None:
        self.name = repr(name)
        self.dtype = torch.int64
        self.shape = ()
        self.width = self.dtype.itemsize
        self._which = name
        self._origins = origins
        self._recording = recording
        self._ends = origins._ends
        #: The keys of passes by their numbers, if keys are strings; and the index of this recording's first key there.
        self._names = None if isinstance(origins.units, Tensor) else origins.units
        self._first_name = 0

    @property
    @override
    def look(self) -> str:
        return "key" if self._which == "unit" and self._names is not None else super().look

    @override
    def dressed(self, rows: Tensor) -> Any:
        found = super().dressed(rows)
        if self._which != "unit" or self._names is None:
            return found
        return [self._names[number] for number in found.tolist()]

    @override
    def read(self, first: int, out: Tensor, files: Files) -> None:
        out.copy_(self.take(torch.arange(first, first + len(out), device="cpu"), files))

    @override
    def announce(self, first: int, many: int, files: Files) -> None:
        pass

    @override
    def take(self, indices: Tensor, files: Files) -> Tensor:
        if self._which == "recording":
            found = torch.full_like(indices, self._recording)
        else:
            found = self._origins.of(indices)[ORIGINS.index(self._which)]
        units = self._origins.units
        if self._which == "unit":
            found = found + self._first_name if self._names is not None else units[found]  # type: ignore[call-overload]
        return found[:, None].view(torch.uint8)


def together(columns: Sequence[Column]) -> Sequence[Column]:
    """Return the same column of several recordings; they share one list of keys, if any of them has string keys."""
    origins = [column for column in columns if isinstance(column, Origin)]
    names: list[Any] = []
    if any(column._names is not None for column in origins):
        for column in origins:
            column._first_name = len(names)
            units = column._origins.units
            names += units.tolist() if isinstance(units, Tensor) else units
        for column in origins:
            column._names = names
    return columns
