"""Whether recording arrives from compiled code on this PyTorch: a small model is compiled and recorded before the first one.

It takes half a second, once in a process. Where it fails, nothing is recorded silently wrong: ``compiled=True`` is refused.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from actrec._calls.hooks import Event
from actrec._calls.passes import Passes
from actrec._calls.placing import Hooks
from actrec._torch import count_graphs, not_compiled_alone
from actrec.errors import OptionError

from .hook import HookInGraph
from .mark import Marks
from .room import Room

__all__ = ["prepare"]

_testing: Final = threading.Lock()
#: What went wrong; ``None`` if nothing did.
_results: list[str | None] = []


def prepare() -> None:
    """Raise ``OptionError`` unless recording works in what this PyTorch compiles."""
    with _testing:
        if not _results:
            try:
                not_compiled_alone(HookInGraph.__call__)
                _results.append(_failure())
            except Exception as error:  # noqa: BLE001  # whatever this PyTorch does not have
                _results.append(f"{type(error).__name__}: {error}")
    if _results[0] is not None:
        message = (
            f"record(compiled=True): recording in compiled code does not work on torch {torch.__version__}, as a test of it "
            f"has shown ({_results[0].splitlines()[0]}). It was made for torch 2.13. Without compiled=True the model runs eagerly in the block, "
            "and is recorded on every version."
        )
        raise OptionError(message)


class _Target:
    """What the hooks of the test report to."""

    def __init__(self) -> None:
        self.passes = Passes()
        self.told: list[tuple[Event, list[float]]] = []

    def runs_uncompiled(self) -> bool:
        return False

    def take(self, hook: HookInGraph[_Target], *call: object) -> None:
        value = call[-1]
        self.told.append((hook.event, value.tolist() if isinstance(value, Tensor) else []))


class _Double(nn.Module):
    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def _failure() -> str | None:
    """What goes wrong with a model whose layers are written in place behind their hooks."""
    with torch.inference_mode(mode=False), torch.no_grad():
        return _tested(nn.Sequential(_Double(), _Double()), torch.ones(2, device="cpu"))


def _tested(model: nn.Sequential, x: Tensor) -> str | None:
    def run(x: Tensor) -> Any:
        return model[1](model[0](x).add_(1)).mul_(0)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    compiled(x)
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
            return f"{target.told} was recorded in the place of {expected}"
        compiled(x)
        if count_graphs() != before + 1:
            return (
                f"{count_graphs() - before} graphs were compiled {'again' if again else ''}, not 1"
            )
    return None
