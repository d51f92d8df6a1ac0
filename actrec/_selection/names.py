"""The names of modules, with and without the segments that wrappers add.

One module may have several names, and wrappers such as ``DistributedDataParallel`` or ``torch.compile`` add segments that
users should not have to type.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from actrec._torch import children_of, if_imported, is_export_guard

#: Segments that wrappers add to the names of the modules that they wrap. A wrapper has no other children.
WRAPPERS = frozenset(
    {
        "module",  # DataParallel and its like
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning Fabric, which names the module twice
        "_original_module",
        "_module",  # Opacus
    }
)

#: The segments that PEFT adds: two nested wrappers. Each segment alone may be the name of any module.
_PEFT = ("base_model", "model")
_SEGMENTS = WRAPPERS.union(_PEFT)


def type_name(module: nn.Module) -> str:
    """Return the type of a module as its author named it: ``fully_shard`` makes a ``FSDPLinear`` of a ``Linear``."""
    kind = if_imported("torch.distributed.fsdp", "FSDPModule")
    if kind is None or not isinstance(module, kind):
        return type(module).__name__
    return next(one.__name__ for one in type(module).__mro__ if not issubclass(one, kind))


class Name:
    """One path to a module: as ``named_modules()`` spells it, and without the segments of wrappers.

    It refers weakly to the module: names are cached, and must not keep modules alive.
    """

    __slots__ = ("full", "is_machinery", "module", "parent", "short")

    def __init__(
        self,
        module: nn.Module,
        full: str = "",
        short: str = "",
        parent: Name | None = None,
        *,
        is_machinery: bool = False,
    ) -> None:
        self.full = full
        self.short = short
        self.parent = parent
        #: Whether patterns skip it: a module that computes a parametrized weight, or checks an exported input.
        self.is_machinery = is_machinery
        #: Returns the module, as long as the model exists.
        self.module = cast("Callable[[], nn.Module]", weakref.ref(module))


def child_of(name: Name, segment: str, child: nn.Module) -> Name:
    """Return the name of the child ``segment`` of the module at ``name``."""
    full, short = name.full, name.short
    is_wrapped = segment in _SEGMENTS and _is_wrapped(name, segment, child)
    spelled = f"{short}.{segment}" if short else segment
    return Name(
        child,
        f"{full}.{segment}" if full else segment,
        short if is_wrapped else spelled,
        name,
        is_machinery=name.is_machinery or segment == "parametrizations" or is_export_guard(child),
    )


def _is_wrapped(name: Name, segment: str, child: nn.Module) -> bool:
    """Whether the module at ``name`` is a wrapper, which has added ``segment`` to the names of the module inside."""
    children = children_of(name.module())
    outer, inner = _PEFT
    if segment == outer:
        return len(children) == 1 and [*children_of(child)] == [inner]
    if segment == inner and len(children) == 1:
        return _last(name.full) == outer != _last(name.short)
    return wrapped(name.module()) is not None and segment in WRAPPERS


def wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module to which ``module`` passes its arguments, if it is a wrapper."""
    children = children_of(module)
    return next(iter(children.values()), None) if children.keys() <= WRAPPERS else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def is_called(module: nn.Module) -> bool:
    """Return whether there is a forward: ``ModuleList`` and similar ones have none, so hooks on them never run."""
    if isinstance(module, torch.jit.ScriptModule):  # its class has none
        return True
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def stripped(query: str) -> str:
    """Return a name without the segments that wrappers may have added."""
    peft = ".".join((*_PEFT, ""))
    segments = query.replace(peft, "", 1).split(".")
    return ".".join(segment for segment in segments if segment not in WRAPPERS)
