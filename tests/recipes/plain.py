"""What a recipe is compared with: hooks that clone, on layers whose names match, and nothing else."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn


class Plain(dict[str, list["Tensor"]]):
    """What ``record()`` hands out, as far as recipes use it."""

    def __init__(self) -> None:
        super().__init__()
        self.grads: dict[str, list[Tensor | None]] = defaultdict(list)
        self.paused = 0
        self.num_passes = 0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    @contextlib.contextmanager
    def unit(self, _key: object) -> Iterator[None]:
        yield

    def add(self, name: str, value: Tensor) -> None:
        if not self.paused:
            self.setdefault(name, []).append(value.detach().clone())


@contextlib.contextmanager
def plain(
    model: nn.Module,
    queries: str | list[str],
    *,
    transform: Any = lambda value: value,
    grads: bool = False,
    **_: Any,
) -> Iterator[Plain]:
    """Record with hooks of one's own."""
    queries = [queries] if isinstance(queries, str) else queries
    acts = Plain()

    def keep(name: str, output: Tensor) -> None:
        if acts.paused:
            return
        assert model.training, "an evaluation was recorded"
        with torch.no_grad():
            acts.setdefault(name, []).append(transform(output).detach().clone())
        if grads:
            calls, number = acts.grads[name], len(acts.grads[name])
            calls.append(None)
            output.register_hook(lambda grad: calls.__setitem__(number, transform(grad).clone()))

    with contextlib.ExitStack() as hooks:
        for full, layer in model.named_modules():
            name = full.removeprefix("module.")
            if any(matches(name, query) for query in queries):
                handle = layer.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
                hooks.callback(handle.remove)
        yield acts


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[Plain]:
    """Record nothing, with nothing on the model."""
    acts = Plain()
    acts.paused = 1
    yield acts


def matches(name: str, query: str) -> bool:
    return name.count(".") == query.count(".") and fnmatchcase(name, query)


def differing(recorded: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The names of which two recordings do not have the very same values."""
    return [
        name
        for name in {**recorded, **expected}
        if len(recorded.get(name, ())) != len(expected.get(name, ()))
        or not all(map(torch.equal, recorded[name], expected[name]))
    ]
