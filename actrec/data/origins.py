"""Where rows come from: the unit, the sample in its batch, the position in the sample. Arithmetic alone, no data."""

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
    """Where a row comes from, or rows."""

    unit: Any
    sample: Any
    position: Any


#: The names of columns that say where a row comes from; of several recordings, the number of its own as well.
ORIGINS: Final = (*Where._fields, "recording")


@dataclass(frozen=True)
class Origins:
    """Where the rows come from, a line for rows whose origins go on evenly."""

    #: (lines, 6): how many rows, and of the first one: its pass, its sample, its position, how many rows its sample has here,
    #: and how many its pass has here.
    lines: Tensor
    units: Sequence[Any] | Tensor  #: of each pass, what is its name
    samples: Tensor  #: (passes,): how many samples each has

    def ordered(self, order: Tensor) -> Origins:
        """Return the same, for rows whose lines come in another order."""
        return replace(self, lines=self.lines[order])

    def coalesced(self) -> Origins:
        """Join lines where a pass follows that is cut in the same way."""
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
        """Return the units of passes: a tensor, where their keys are integers, else a list."""
        if isinstance(self.units, Tensor):
            return self.units[passes]
        return [self.units[number] for number in passes.tolist()]

    @cached_property
    def _ends(self) -> Tensor:
        return self.lines[:, 0].cumsum(0)


class Origin(Column):
    """Where rows come from, as a column beside those of layers."""

    def __init__(self, name: str, origins: Origins, recording: int = 0) -> None:
        self.name = repr(name)
        self.dtype = torch.int64
        self.shape = ()
        self.width = self.dtype.itemsize
        self._which = name
        self._origins = origins
        self._recording = recording
        self._ends = origins._ends
        #: What the numbers of passes stand for, where keys are strings, and the first of this recording there.
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
    """Return the same column of several recordings, with one list of names between them, if any of them needs one."""
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
