"""Recordings of given values, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actrec import Layer, Recording
from actrec._recordings.in_memory import ListLayer
from actrec._recordings.pass_numbers import Count
from actrec._recordings.run import Run
from actrec._recordings.units import Units

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def made(**layers: Iterable[Any]) -> Recording[Any]:
    """Return a recording of the values of layers, each in a pass of its own."""
    return made_of(layers)


def made_of(
    layers: Mapping[str, Iterable[Any]], kind: str = "Linear", model: str = "Net"
) -> Recording[Any]:
    """Return a recording of layers, or of their values, each in a pass of its own."""
    made = {
        name: values if isinstance(values, Layer) else ListLayer(name, values, kind)
        for name, values in layers.items()
    }
    last = max((number for layer in made.values() for number in layer.passes), default=-1)
    return Recording(Run(model, {}, (), Count(last + 1), Units()), made)
