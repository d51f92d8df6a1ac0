"""The run of a recording: shared with the recordings of its inputs, its gradients and every selection of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeAlias

from torch import nn

from .pass_numbers import Count, RankPass
from .units import Units

#: Whether the block runs, has ended, or was ended by an exception.
State: TypeAlias = Literal["recording", "recorded", "interrupted"]


class Run:
    """A run that has ended, with all its values.

    Args:
        model: the type of the recorded model.
        aliases: further names of layers, each with the one that is listed.
        order: names in the order in which the layers ran, as far as it is known.
        passes: how many passes there were, and which of them raised.
        units: which of the passes are units.
    """

    #: The path where it is stored, if that is known.
    where: str = ""
    #: The warnings at the end of the block.
    warned: Sequence[str] = ()
    #: The names of the recorded modules, as long as these exist.
    modules: Mapping[nn.Module, str] = MappingProxyType({})

    def __init__(
        self,
        model: str,
        aliases: Mapping[str, str],
        order: Iterable[str],
        passes: Count,
        units: Units,
    ) -> None:
        self.model = model
        self.aliases = aliases
        self.order = order
        self.passes = passes
        self.units = units

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
