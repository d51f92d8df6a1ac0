"""A small model, compiled and recorded, whose values are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from actrec._calls.hooks import Event
from actrec._calls.passes import Passes
from actrec._calls.placing import Hooks
from actrec._torch import count_graphs, not_compiled_alone

from .hook import HookInGraph
from .mark import Marks
from .room import Room


class _Target:
    """The target of the test's hooks."""

    met_by_compiler = staticmethod(bool)  # never
    outputs = capture = inputs = None  # of a layer: none are kept

    def __init__(self) -> None:
        self.passes = Passes()
        self.told: list[tuple[Event, list[float]]] = []

    def take(self, hook: HookInGraph[_Target], *call: object) -> None:
        value = call[-1]
        self.told.append((hook.event, value.tolist() if isinstance(value, Tensor) else []))


class _Double(nn.Module):
    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def failure() -> str | None:
    """Return what goes wrong with a model whose outputs are overwritten after their hooks; ``None`` if nothing does."""
    not_compiled_alone(HookInGraph.__call__)
    with torch.inference_mode(mode=False), torch.no_grad():
        return _tested(nn.Sequential(_Double(), _Double()), torch.ones(2, device="cpu"))


def _tested(model: nn.Sequential, x: Tensor) -> str | None:
    def run(x: Tensor) -> Any:
        return model[1](model[0](x).add_(1)).mul_(2)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    if not torch.equal(run(x), compiled(x)):
        return "compiled code computes something else"
    before = count_graphs()
    for again in (False, True):
        target, hooks = _Target(), Hooks()
        plan = [
            (module, HookInGraph(event, target, _Target.take))
            for module in model
            for event in (Event.ENTER, Event.RETURN, Event.LEAVE)
        ]
        with Room():
            hooks.place(plan)
            try:
                with Marks(model, [(module, hook.kind) for module, hook in plan]):
                    compiled(x)
            finally:
                hooks.remove()
        expected = [
            (event, value if event is Event.RETURN else [])
            for value in ([2.0, 2.0], [6.0, 6.0])
            for event in (Event.ENTER, Event.RETURN, Event.LEAVE)
        ]
        if target.told != expected:
            return f"{target.told} was recorded instead of {expected}"
        compiled(x)
        if count_graphs() != before + 1:
            return (
                f"{count_graphs() - before} graphs were compiled {'again' if again else ''}, not 1"
            )
    return None
