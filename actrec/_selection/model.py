"""A model as queries see it: every module, and each name that it may be called by.

It is a tree of names over a graph of modules. It is cached as long as the graph is the same, so that a block in every step
of a training loop walks the model once. The cache keeps no module alive.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, MutableMapping
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import Any, Final

import torch
from torch import nn

from actrec._torch import children_of

from .globs import matching
from .names import Name, child_of, stripped, type_name
from .nearest import leaves_out

#: Only so many names of a module are continued to the modules inside it; by other names, these are only found if spelled out.
_MOST_NAMES: Final = 256
#: So many patterns are cached with a model.
_MOST_PATTERNS: Final = 32


class Model:
    """A model as queries see it."""

    def __init__(self, model: nn.Module) -> None:
        self.type = type_name(model)
        self.names: list[Name] = []
        _walk(Name(model), model, self.names, Counter(), set())
        self.by_full = {name.full: name for name in self.names}
        self.of: dict[int, list[Name]] = {}
        for name in self.names:
            self.of.setdefault(id(name.module()), []).append(name)
        self.inlined = frozenset(_inlined(self.names))
        #: Returns the names that a pattern matches.
        self.matching = lru_cache(_MOST_PATTERNS)(partial(matching, self.names))

    @cached_property
    def by_short(self) -> dict[str, list[Name]]:
        """The names without the segments of wrappers."""
        found: dict[str, list[Name]] = {}
        for name in self.names:
            found.setdefault(name.short, []).append(name)
        return found

    @cached_property
    def leaves(self) -> list[tuple[Name, Name]]:
        """The names of modules without others inside, less PyTorch's machinery, each with that of what is called for it."""
        leaves = [n for n in self.names if not n.is_machinery and _is_leaf(n.module())]
        return [(name, _called(name)) for name in leaves]

    def spelled(self, query: str) -> Name | None:
        """Return the module with that name, in which wrapper segments may be left out."""
        if query in self.by_full:
            return self.by_full[query]
        for short in (query, stripped(query)):
            for name in self.by_short.get(short, []):
                if leaves_out(query, name.full):  # the others are those of wrappers
                    return name
        return self._at(query)

    def _at(self, full: str) -> Name | None:
        """Return the module at a path that was not walked."""
        name = self.names[0]
        for segment in full.split("."):
            child = children_of(name.module()).get(segment)
            if child is None:
                return None
            name = child_of(name, segment, child)
        return name


def _walk(
    name: Name, module: nn.Module, names: list[Name], met: Counter[int], above: set[int]
) -> None:
    """Add the paths to every module, in the order of ``named_modules()``, without cycles.

    If modules are registered in several others, and those in several others, a model has exponentially many paths.
    """
    names.append(name)
    children, identity = children_of(module), id(module)
    if children and met[identity] < _MOST_NAMES:
        met[identity] += 1
        above.add(identity)
        for segment, child in children.items():
            if child is not None and id(child) not in above:
                _walk(child_of(name, segment, child), child, names, met, above)
        above.discard(identity)


def _is_leaf(module: nn.Module) -> bool:
    return not any(
        child is not None and segment != "parametrizations"
        for segment, child in children_of(module).items()
    )


def _called(leaf: Name) -> Name:
    """A leaf, or in its place the module around it that uses its weights without calling it."""
    parent = leaf.parent
    inside = isinstance(leaf.module(), nn.modules.linear.NonDynamicallyQuantizableLinear)
    is_attention = inside and parent and isinstance(parent.module(), nn.MultiheadAttention)
    return parent if parent and is_attention else leaf


def _inlined(names: list[Name]) -> Iterator[str]:
    """Yield the names of the modules below a traced or exported graph that the graph does not call."""
    for graph in names:
        module = graph.module()
        if isinstance(module, torch.fx.GraphModule):
            prefix = f"{graph.full}." if graph.full else ""
            calls = (node.target for node in module.graph.nodes if node.op == "call_module")
            called = {f"{prefix}{target}" for target in calls}
            for name in names:
                if (
                    name is not graph
                    and name.full.startswith(prefix)
                    and called.isdisjoint(_upwards(name.full))
                ):
                    yield name.full


def _upwards(full: str) -> Iterator[str]:
    """Yield a name, and those of the modules around it."""
    while full:
        yield full
        full = full.rpartition(".")[0]


# --- The cache -----------------------------------------------------------------------------------------

_models: MutableMapping[nn.Module, tuple[Model, _Graph]] = weakref.WeakKeyDictionary()


def remembered(model: nn.Module) -> Model:
    """Return the cached :class:`Model` if its graph is still the same; else a new one."""
    known, graph = _models.get(model, (None, None))
    if known is not None and graph is not None and graph.is_that_of(model):
        return known
    known = Model(model)
    _models[model] = known, _Graph(known)
    return known


class _Graph:
    """The modules of a model, and the children of each: everything that determines its names."""

    def __init__(self, model: Model) -> None:
        modules = [names[0].module() for names in model.of.values()]
        self._modules = [weakref.ref(module) for module in modules]
        self._types = [*map(type, modules)]
        self._inside = _inside(modules)
        # The calls of a traced graph may change while its modules stay the same.
        self._is_traced = any(issubclass(kind, torch.fx.GraphModule) for kind in {*self._types})

    def is_that_of(self, model: nn.Module) -> bool:
        """Whether it is still the graph of the model."""
        modules: list[Any] = [module() for module in self._modules]  # None for one that is gone
        return (
            modules[0] is model
            and not self._is_traced
            and [*map(type, modules)] == self._types
            and _inside(modules) == self._inside
        )


def _inside(modules: list[nn.Module]) -> tuple[list[int], list[str], list[int]]:
    """Return the numbers of children, and the segments and ids of all children. Ids of modules that exist are unique."""
    tables = [*map(children_of, modules)]
    tables_of_some = [table for table in tables if table]  # most have none
    segments = chain.from_iterable(table.keys() for table in tables_of_some)
    children = chain.from_iterable(table.values() for table in tables_of_some)
    return [*map(len, tables)], [*segments], [*map(id, children)]
