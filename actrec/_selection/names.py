"""The names of a model: every module, and each name that it may be called by.

A model is a tree of names over a graph of modules: one module may have several names, and wrappers such as
``DistributedDataParallel`` or ``torch.compile`` add segments that nobody wants to type.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from actrec._torch import children_of, is_export_guard

#: Segments that wrappers add to the names of what they wrap. They have no other children.
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

#: What PEFT adds: two wrappers, one in the other, whose segments alone are names as others have them.
_PEFT = ("base_model", "model")
_SEGMENTS = WRAPPERS.union(_PEFT)


def type_name(module: nn.Module) -> str:
    """Return the type of a module as its author named it: ``fully_shard`` makes a ``FSDPLinear`` of a ``Linear``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards a model has imported it
    kind: type = getattr(fsdp, "FSDPModule", type(None))
    if not isinstance(module, kind):
        return type(module).__name__
    return next(one.__name__ for one in type(module).__mro__ if not issubclass(one, kind))


class Name(NamedTuple):
    """One path to a module: as ``named_modules()`` spells it, and without the segments of wrappers."""

    full: str
    short: str
    module: nn.Module

    @property
    def is_machinery(self) -> bool:
        """Whether no pattern should find it: what computes a parametrized weight, or checks an exported input."""
        return is_export_guard(self.module) or "parametrizations" in self.full.split(".")


#: So many names of a module lead to the modules inside it; those are found under further names only by spelling one out.
_MOST_NAMES = 256


def _walk(name: Name, met: Counter[int], above: set[int]) -> Iterator[Name]:
    """The paths to every module, in the order of ``named_modules()``, without going in circles.

    Where modules are registered in several others, and those in several others, a model has exponentially many paths.
    """
    yield name
    children, identity = children_of(name.module), id(name.module)
    if children and met[identity] < _MOST_NAMES:
        met[identity] += 1
        above.add(identity)
        for segment, child in children.items():
            if child is not None and id(child) not in above:
                yield from _walk(_child(name, segment, child), met, above)
        above.discard(identity)


def _child(name: Name, segment: str, child: nn.Module) -> Name:
    full, short, _ = name
    is_wrapped = segment in _SEGMENTS and _is_wrapped(name, segment, child)
    spelled = f"{short}.{segment}" if short else segment
    return Name(f"{full}.{segment}" if full else segment, short if is_wrapped else spelled, child)


def _is_wrapped(name: Name, segment: str, child: nn.Module) -> bool:
    """Whether a wrapper at ``name`` has added ``segment`` to the names of what it wraps."""
    children = children_of(name.module)
    outer, inner = _PEFT
    if segment == outer:
        return len(children) == 1 and [*children_of(child)] == [inner]
    if segment == inner and len(children) == 1:
        return _last(name.full) == outer != _last(name.short)
    return wrapped(name.module) is not None and segment in WRAPPERS


def wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module that ``module`` hands its arguments on to, if it is a wrapper."""
    children = children_of(module)
    return next(iter(children.values()), None) if children.keys() <= WRAPPERS else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def is_called(module: nn.Module) -> bool:
    """Return whether there is a forward: ``ModuleList`` and its like have none, so hooks on them never run."""
    if isinstance(module, torch.jit.ScriptModule):  # whose class has one for objects alone
        return True
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _inlined(names: list[Name]) -> Iterator[str]:
    """The names of the modules below a traced or exported graph that the graph does not call."""
    for graph in names:
        if isinstance(graph.module, torch.fx.GraphModule):
            prefix = f"{graph.full}." if graph.full else ""
            calls = (node.target for node in graph.module.graph.nodes if node.op == "call_module")
            called = {f"{prefix}{target}" for target in calls}
            for name in names:
                if (
                    name is not graph
                    and name.full.startswith(prefix)
                    and called.isdisjoint(upwards(name.full))
                ):
                    yield name.full


def upwards(full: str) -> Iterator[str]:
    """A name, and those of the modules around it."""
    while full:
        yield full
        full = full.rpartition(".")[0]


class Model:
    """A model as queries see it."""

    def __init__(self, model: nn.Module) -> None:
        self.type = type_name(model)
        self.names = list(_walk(Name("", "", model), Counter(), set()))
        self.by_full = {name.full: name for name in self.names}
        self.of: dict[int, list[Name]] = {}
        for name in self.names:
            self.of.setdefault(id(name.module), []).append(name)
        self.inlined = frozenset(_inlined(self.names))

    @cached_property
    def by_short(self) -> dict[str, list[Name]]:
        """The names without the segments of wrappers."""
        found: dict[str, list[Name]] = {}
        for name in self.names:
            found.setdefault(name.short, []).append(name)
        return found

    def spelled(self, query: str) -> Name | None:
        """The module of that name, where wrapper segments may be left out."""
        if query in self.by_full:
            return self.by_full[query]
        for short in (query, _stripped(query)):
            for name in self.by_short.get(short, []):
                if _leaves_out_wrappers(query, name.full):
                    return name
        return self._at(query)

    def _at(self, full: str) -> Name | None:
        """The module at a path that was not walked."""
        name = self.names[0]
        for segment in full.split("."):
            child = children_of(name.module).get(segment)
            if child is None:
                return None
            name = _child(name, segment, child)
        return name


def _stripped(query: str) -> str:
    """A name without the segments that wrappers may have added."""
    peft = ".".join((*_PEFT, ""))
    segments = query.replace(peft, "", 1).split(".")
    return ".".join(segment for segment in segments if segment not in WRAPPERS)


def _leaves_out_wrappers(query: str, full: str) -> bool:
    """Whether ``query`` is ``full`` less some of its segments (which the caller knows to be wrappers)."""
    segments = iter(full.split("."))
    return all(segment in segments for segment in query.split("."))
