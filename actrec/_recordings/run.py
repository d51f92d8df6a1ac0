"""The run of a recording: shared with the recordings of its inputs, its gradients and every selection of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import nn

from .pass_numbers import Count, RankPass
from .units import Units

#: Whether the block runs, has ended, or was ended by an exception.
State: TypeAlias = Literal["recording", "recorded", "interrupted"]


@dataclass(eq=False)
class Run:
    """A run that has ended, with all its values. What differs while its block runs, or on disk, is overridden there."""

    model: str  #: the type of the recorded model
    aliases: Mapping[str, str]  #: further names of layers, each with the one that is listed
    order: Iterable[str]  #: names in the order in which the layers ran, as far as it is known
    passes: Count
    units: Units
    where: str = ""  #: the path where it is stored, if that is known
    warned: Sequence[str] = ()  #: the warnings at the end of the block
    #: The names of the recorded modules, as long as these exist.
    modules: Mapping[nn.Module, str] = field(default_factory=dict)

    def state(self) -> State:
        """Return whether the block is running, has ended, or was ended by an exception."""
        return "recorded"

    def deliver(self) -> None:
        """Wait for copies from a device."""
        # They have all arrived.

    def raised(self) -> set[RankPass]:
        """Return the rank (``None`` in memory) and the number of each pass that raised."""
        return {(None, number) for number in list(self.passes.raised)}

    def failed(self) -> list[int]:
        """Return the numbers of the passes that raised."""
        return sorted({number for _, number in self.raised()})

    def warnings(self) -> Sequence[str]:
        """Return the warnings at the end of the block."""
        return self.warned
