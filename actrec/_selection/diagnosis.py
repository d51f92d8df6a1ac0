"""Why a module cannot be recorded, and what to write instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from actrec._text import listed
from actrec._torch import children_of
from actrec.errors import UnsupportedModelError

from .model import Model
from .names import Name, is_called, type_name


def why_not(model: Model, name: Name) -> str | None:
    """Return why hooks on this module would never run, and what to write instead; ``None`` if they do."""
    kind = type_name(name.module())
    spelled = name.short or name.full
    if name.full in model.inlined:
        return (
            f"the graph that holds {spelled!r} does not call it: tracing has merged its operations into "
            "the graph. Record the original module, or torch.export.unflatten(exported_program)"
        )
    if isinstance(name.module(), torch.jit.ScriptModule):
        return (
            f"{spelled!r} is a {kind}: TorchScript runs no Python hooks. Record the original module"
        )
    if is_called(name.module()):
        return None
    reason = f"{spelled!r} is a {kind}, a container that is never called itself"
    instead = f"{spelled}.*" if spelled else "*"
    children = len(children_of(name.module()))
    return f"{reason}. Write {instead!r} for its {children} children" if children else reason


def hookable(model: Model) -> Iterator[Name]:
    """Yield the names that hooks can run on, without PyTorch's machinery."""
    return (n for n in model.names if not n.is_machinery and why_not(model, n) is None)


def check_model(model: object, queries: object = None) -> None:
    """Check that hooks run in a model: it is a Python module.

    Args:
        model: the object to record.
        queries: the layers; the user may have swapped the two.

    Raises:
        UnsupportedModelError: it is not a module, or is a module without Python code.
    """
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        message = f"record() cannot record a {kind}: TorchScript runs no Python hooks. Record the original module."
        raise UnsupportedModelError(message)
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        message = f"record() records a module, not the class {model.__name__}: create one first."
    else:
        message = f"record() records a torch.nn.Module, not {kind}.{_instead_of(model, queries)}"
    raise UnsupportedModelError(message)


def _instead_of(model: object, queries: object) -> str:
    """Return what to write in place of something that is not a module."""
    if isinstance(queries, nn.Module):
        given = repr(model) if isinstance(model, str) else "layers"
        return f" The model comes first: record(model, {given})."
    if isinstance(model, torch.export.ExportedProgram):
        return " torch.export.unflatten(program) makes a module whose layers are called."
    if isinstance(model, torch.Tensor):
        return " Give the model itself, and call it inside the with block."
    if isinstance(model, Collection) and _modules(dict(enumerate(model))):
        return (
            " A recording is of one model: with record(generator) as g, record(discriminator) as d:"
            " opens two at once. Or record a module that has both inside and calls them."
        )
    if isinstance(getattr(model, "__self__", None), nn.Module):
        return " Give the module itself, not one of its methods."
    inside = _modules(getattr(model, "__dict__", {}))
    return f" It has modules inside: {listed(inside)}." if inside else ""


def _modules(values: Mapping[Any, object]) -> list[str]:
    return [str(name) for name, value in values.items() if isinstance(value, nn.Module)]
