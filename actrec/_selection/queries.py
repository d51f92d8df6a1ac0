"""Answers one layer query with the names of the modules that it selects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from actrec._text import listed
from actrec.errors import SelectionError

from .diagnosis import hookable, why_not
from .globs import glob, is_glob
from .meant import is_of_torch, layers_of_function, no_query, nothing, shown_query
from .model import Model
from .names import Name, is_called, type_name

#: One layer query; ``record()`` also takes an iterable of them, or a mapping from them to transforms.
Query: TypeAlias = (
    str | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]
)

#: ``value -> value``. A transform that returns ``None`` skips the call.
Transform: TypeAlias = Callable[[Any], Any]


def answer(model: Model, query: Any) -> list[Name]:
    """Return the names of the modules that one query selects; perhaps several names of one module.

    Raises:
        SelectionError: there are none, or hooks never run on them; the message says what to write instead.
    """
    match query:
        case None:
            return _leaves(model)
        case str():
            return _by_name(model, query)
        case re.Pattern(pattern=str()):
            return _by_pattern(model, query, query)
        case nn.Module():
            return _by_module(model, query)
        case type():
            return _by_type(model, query)
        case Callable():
            return _by_function(model, query)
    message = (
        f"record(): {shown_query(query)} is not a layer query. {no_query(model, query)}Use a name, a glob such as 'layer*.conv1', "
        "re.compile(...), a module type, a module of the model, a function of name and module, or several of these."
    )
    raise SelectionError(message)


def _by_name(model: Model, query: str) -> list[Name]:
    name = model.spelled(query)
    if name is None and is_glob(query):
        return _by_pattern(model, query, glob(query))
    if name is None:
        raise SelectionError(nothing(model, query))
    if reason := why_not(model, name):
        message = f"record() cannot record {query!r}: {reason}."
        raise SelectionError(message)
    return [name]


def _by_pattern(model: Model, query: str | re.Pattern[str], pattern: re.Pattern[str]) -> list[Name]:
    """Return the names that match without their wrapper segments; if there are none, those that match in full.

    If a wrapper and the module inside have the same name, only the wrapper's.
    """
    matches, is_short = model.matching(pattern)
    if not matches:
        raise SelectionError(nothing(model, query))
    hookable = [name for name in matches if why_not(model, name) is None]
    if not hookable:
        given = getattr(query, "pattern", query)
        message = f"record(): {given!r} matches only modules that hooks never run on: {why_not(model, matches[0])}."
        raise SelectionError(message)
    if not is_short:
        return hookable
    outermost: dict[str, Name] = {}
    for name in hookable:
        outermost.setdefault(name.short, name)
    return [*outermost.values()]


def _by_type(model: Model, kind: type) -> list[Name]:
    found = [name for name in hookable(model) if isinstance(name.module(), kind)]
    if not found:
        reasons = (why_not(model, n) for n in model.names if isinstance(n.module(), kind))
        kinds = sorted({type_name(name.module()) for name in hookable(model)})
        none = f"no layer of this {model.type} is a {kind.__name__}; there are {listed(kinds, 20)}"
        message = f"record(): {next(filter(None, reasons), none)}."
        raise SelectionError(message)
    return found


def _by_function(model: Model, query: Callable[[str, nn.Module], object]) -> list[Name]:
    if is_of_torch(query):
        message = (
            f"record(): {query!r} is a function of PyTorch. {layers_of_function(model, query)}"
        )
        raise SelectionError(message)
    found = [name for name in hookable(model) if _asked(query, name)]
    if not found:
        many = len(model.of)
        message = f"record(): {query!r} returned true for none of the {many} modules of this {model.type}."
        raise SelectionError(message)
    return found


def _asked(query: Callable[[str, nn.Module], object], name: Name) -> bool:
    """Return the answer of a query that is a function, for one module."""
    try:
        return bool(query(name.full, name.module()))
    except Exception as error:
        error.add_note(
            f"raised while record() asked the layer query {query!r} about {name.full!r}, a {type_name(name.module())}. "
            "It is called with name and module, and returns whether to record it"
        )
        raise


def _by_module(model: Model, module: nn.Module) -> list[Name]:
    names = model.of.get(id(module))
    if names is None:
        kind = type_name(module)
        message = (
            f"record(): the {kind} given as a layer is not part of this {model.type}. Layers are looked up "
            "by identity: a copy, or the model before it was wrapped or moved into another, does not count."
        )
        children = list(module.children())
        if children and all(id(child) in model.of for child in children):
            message += f" Its {len(children)} children are: a slice is a new {kind}. Write list(...) around it."
        raise SelectionError(message)
    if reason := why_not(model, names[0]):
        message = f"record() cannot record this layer: {reason}."
        raise SelectionError(message)
    return [names[0]]


def _leaves(model: Model) -> list[Name]:
    """Return every leaf module with a forward. If a traced graph does not call some, the end of the block warns.

    The projection of ``nn.MultiheadAttention`` is never called: the attention module is returned in its place.
    """
    leaves = [leaf for leaf, _ in model.leaves]
    scripted = [name for name in leaves if isinstance(name.module(), torch.jit.ScriptModule)]
    if scripted or all(why_not(model, name) for name in leaves):
        reasons = [reason for name in scripted or leaves if (reason := why_not(model, name))]
        message = f"record() cannot record every leaf module of this {model.type}: {next(iter(reasons), 'it has none')}, or choose layers."
        raise SelectionError(message)
    return [called for leaf, called in model.leaves if is_called(leaf.module())]
