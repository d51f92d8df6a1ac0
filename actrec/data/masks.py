"""A mask that the user computes from what is stored of each pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from actrec._values.join import joined
from actrec.errors import OptionError

from .calls import Calls, Look
from .selecting import is_plain, kind
from .sources import Held

if TYPE_CHECKING:
    from collections.abc import Iterator

    from actrec._recordings.passes import Moment
    from actrec._recordings.recording import Recording

__all__ = ["Function", "computed"]

#: Makes a mask of the values of a pass, by their names.
Function: TypeAlias = Callable[[Mapping[str, Any]], Tensor]


def computed(call: str, recording: Recording[Any], function: Function, beside: Calls) -> Calls:
    """Return what a function makes of each pass that a layer has calls in: answers, as a layer.

    A pass without a value that the function asks for has no call.

    Raises:
        OptionError: The function returns no tensor.
    """
    stored = _Stored(recording)
    units = beside.units or [None] * len(beside.moments)
    firsts = {moment: number for number, moment in reversed([*enumerate(beside.moments)])}
    kept: list[int] = []
    found: list[Tensor] = []
    for moment, number in sorted(firsts.items(), key=lambda pair: pair[1]):
        try:
            answers = function(_Pass(stored, moment))
        except _MissingError:
            continue
        if not is_plain(answers):
            message = (
                f"{call}(mask={function!r}): of pass {moment[1]} it has returned {kind(answers)}. Return a tensor with one number "
                "for each position, (batch, tokens)."
            )
            raise OptionError(message)
        kept.append(number)
        found.append((answers.detach() != 0).cpu())
    looks: dict[Look, int] = {}
    which = [looks.setdefault(Look(tuple(one.shape), one.dtype), len(looks)) for one in found]
    begins = accumulate((one.numel() for one in found), initial=0)
    places = [(look, 0, begin) for look, begin in zip(which, begins, strict=False)]
    flat = torch.cat([torch.empty(0, dtype=torch.bool), *(one.reshape(-1) for one in found)])
    return Calls(
        "the mask",
        [beside.moments[number] for number in kept],
        None if beside.units is None else [units[number] for number in kept],
        range(len(kept)),
        torch.tensor(places, dtype=torch.int64, device="cpu").view(-1, 3),
        [*looks],
        [Held(flat)],
    )


class _MissingError(KeyError):
    """A layer has no call in a pass."""


class _Stored:
    """The calls of each pass of a recording, by layer."""

    def __init__(self, recording: Recording[Any]) -> None:
        self.recording = recording
        self._calls: dict[str, dict[Moment, list[int]]] = {}

    def value(self, name: str, moment: Moment) -> Any:
        """The value of a layer in a pass; of several calls, joined along the tokens."""
        layer = self.recording[name]
        if name not in self._calls:
            calls = self._calls[name] = {}
            for number, own in enumerate(layer._moments()):
                calls.setdefault(own, []).append(number)
        calls = self._calls[name]
        numbers = calls.get(moment) or calls.get((None, moment[1]))
        if numbers is None:
            raise _MissingError(name)
        values = [layer[number] for number in numbers]
        return values[0] if len(values) == 1 else joined(values, "cat", 1, f"values[{name!r}]")


class _Pass(Mapping[str, Any]):
    """What is stored of a pass, by the names of layers and added values; read when it is asked for."""

    def __init__(self, stored: _Stored, moment: Moment) -> None:
        self._stored = stored
        self._moment = moment

    @override
    def __getitem__(self, name: str) -> Any:
        return self._stored.value(name, self._moment)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.recording)

    @override
    def __len__(self) -> int:
        return len(self._stored.recording)
