"""What is in a recording, as JSON that needs neither actrec nor PyTorch to be read: dtypes, shapes and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from actrec import Opaque
from actrec.store import Fields

__all__ = ["described", "value"]


def described(acts: Any, *, stored: bool) -> dict[str, Any]:
    """Describe a recording; what only a stored one can know is left out of others."""
    about: dict[str, Any] = {
        "names": list(acts),
        "num_passes": acts.num_passes,
        "execution_order": acts.execution_order,
        "failed_passes": list(acts.failed_passes),
        "output": _layers(acts),
    }
    for role in ("inputs", "grads"):
        try:
            about[role] = _layers(getattr(acts, role))
        except AttributeError:
            about[role] = None
    if stored:
        about["complete"] = acts.complete
        about["ranks"] = [[r.number, r.num_passes, r.complete, r.error] for r in acts.ranks]
        about["owners"] = {name: list(layer.ranks) for name, layer in acts.items()}
    return about


def _layers(acts: Any) -> dict[str, Any]:
    return {
        name: {"type": layer.type, "passes": list(layer.passes), "calls": [value(v) for v in layer]}
        for name, layer in acts.items()
    }


def value(found: Any) -> Any:  # noqa: C901, PLR0911  # a table, in effect
    """Describe a value."""
    match found:
        case Tensor():
            data = found.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            content = bytes(data.view(torch.uint8).tolist()).hex() if data.numel() else ""
            return {"tensor": [str(found.dtype), list(found.shape), content]}
        case np.ndarray() | np.generic():
            return {
                type(found).__name__: [str(found.dtype), list(found.shape), found.tobytes().hex()]
            }
        case PackedSequence():
            return {"PackedSequence": [value(item) for item in found]}
        case Opaque():
            return {"opaque": found.type}
        case Fields():
            more = {key: value(v) for key, v in vars(found).items() if key not in {"_type", *found}}
            return {"object": found._type, "items": _pairs(found), "more": more}
        case _ if dataclasses.is_dataclass(found) and not isinstance(found, type):
            name = f"{type(found).__module__}.{type(found).__qualname__}"
            return {"object": name, "items": _pairs(vars(found)), "more": {}}
        case tuple() if hasattr(found, "_fields"):
            names = list(found._fields)
            return {type(found).__name__: names, "items": [value(item) for item in found]}
        case Mapping():
            return {type(found).__name__: _pairs(found)}
        case torch.Size():
            return {"Size": list(found)}
        case tuple() | list():
            return {type(found).__name__: [value(item) for item in found]}
        case _ if type(found).__name__ == "deque":
            return {"deque": [value(item) for item in found], "maxlen": found.maxlen}
        case type():
            return {"opaque": found.__qualname__}
    return {type(found).__name__: repr(found)}


def _pairs(found: Mapping[Any, Any]) -> list[Any]:
    return [[value(key), value(item)] for key, item in found.items()]
