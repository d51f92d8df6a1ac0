"""Never silent: the warning about layers of which nothing was recorded, with the likely cause."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from .errors import UnusedLayerWarning, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._select import Choice
    from ._track import Track

__all__ = ["warn_unused"]

_NEVER_CALLED = (
    "it was never called. Usual causes: its .forward() or its weights are used directly (hooks run only when "
    "the module itself is called), the branch with it was not taken, or code of another kind ran in its place "
    "(a fused or exported version)"
)


def warn_unused(
    model: nn.Module, tracks: Mapping[str, tuple[Choice, Track]], *, stacklevel: int
) -> None:
    """Warn once about all layers of which nothing was recorded."""
    unused: dict[str, list[str]] = {}
    for key, (choice, track) in tracks.items():
        if not track.kept:
            unused.setdefault(_cause(model, choice, track), []).append(key)
    if not unused:
        return
    ran = any(track.session.passes.count for _, track in tracks.values())
    if ran:
        lines = [f"  {listed(keys)}: {cause}." for cause, keys in unused.items()]
        what = f"{sum(map(len, unused.values()))} of {len(tracks)} layers"
        message = "\n".join(
            [f"record(): nothing was recorded of {what} of this {type(model).__name__}.", *lines]
        )
    else:
        message = (
            f"record(): nothing was recorded, this {type(model).__name__} was not called inside the with block."
            " Was a copy called, or a model made from it (compiled elsewhere, exported, scripted)?"
        )
    warnings.warn(message, UnusedLayerWarning, stacklevel=stacklevel + 1)


def _cause(model: nn.Module, choice: Choice, track: Track) -> str:
    module = choice.module
    if track.called:
        return (
            f"the transform returned None for all of its {track.called} calls, which skips a call"
        )
    if track.recomputed:
        return (
            f"all of its {track.recomputed} calls ran inside backward(), where activation checkpointing recomputes "
            "what was recorded before"
        )
    if not any(_find(model, name) is module for name in choice.names):
        return "another module was put in its place inside the with block; the one that was hooked was not called"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weights without calling it. Record the attention module instead"
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return f"{_NEVER_CALLED}; fused attention (scaled_dot_product_attention) does its dropout itself"
    return _NEVER_CALLED


def _find(model: nn.Module, name: str) -> nn.Module | None:
    for segment in filter(None, name.split(".")):
        found = model._modules.get(segment)
        if found is None:
            return None
        model = found
    return model
