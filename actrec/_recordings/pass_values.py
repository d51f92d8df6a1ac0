"""The values of each pass of a recording, by the names of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import override

from actrec._values.join import joined

from .layer import Layer
from .pass_numbers import RankPass, calls_of


class MissingError(KeyError):
    """A layer has no call in a pass."""


class Stored:
    """The calls of each pass, by layer."""

    def __init__(self, recording: Mapping[str, Layer[Any]]) -> None:
        self.recording = recording
        self._calls: dict[str, dict[RankPass, list[int]]] = {}

    def values(self, name: str, rank_pass: RankPass) -> list[Any]:
        """Return the values of a layer's calls in a pass; ``MissingError`` if it has none."""
        layer = self.recording[name]
        if name not in self._calls:
            self._calls[name] = calls_of(layer._rank_passes())
        calls = self._calls[name]
        numbers = calls.get(rank_pass) or calls.get((None, rank_pass[1]))
        if numbers is None:
            raise MissingError(name)
        return [layer[number] for number in numbers]


class PassValues(Mapping[str, Any]):
    """The values of a pass, read on access; those of several calls are joined along dimension 1, the tokens."""

    def __init__(self, stored: Stored, rank_pass: RankPass) -> None:
        self._stored = stored
        self._rank_pass = rank_pass

    @override
    def __getitem__(self, name: str) -> Any:
        values = self._stored.values(name, self._rank_pass)
        return values[0] if len(values) == 1 else joined(values, "cat", 1, f"values[{name!r}]")

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.recording)

    @override
    def __len__(self) -> int:
        return len(self._stored.recording)
