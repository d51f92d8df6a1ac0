"""Layer queries: answered with *choices*, a module with the key under which it is recorded and all of its names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from actrec._text import listed
from actrec._torch import children_of
from actrec.errors import OptionError, SelectionError

from .diagnosis import check_model, hookable, layer_for_transform, nothing, why_not
from .names import Model, glob, is_called, type_name, upwards

if TYPE_CHECKING:
    from .names import Name

__all__ = ["Choice", "Query", "Selection", "Transform", "select"]

#: One layer query; ``record()`` also takes an iterable of them, or a mapping from them to transforms.
Query: TypeAlias = (
    str | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]
)

#: ``value -> value``. A transform that returns ``None`` skips the call.
Transform: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen layer."""

    key: str  # its name in the recording: without wrapper segments, unless another chosen layer has that name
    module: nn.Module
    names: tuple[str, ...]  # everything else it may be called, with and without wrapper segments
    transform: Transform | None


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen layers, and the modules whose calls lead to theirs: the root first, and all parents."""

    choices: tuple[Choice, ...]
    parents: tuple[nn.Module, ...]


# --- One query -----------------------------------------------------------------------------------------


def _by_pattern(model: Model, query: str, pattern: re.Pattern[str]) -> list[Name]:
    """Names that match without their wrapper segments; or if there are none, as they stand.

    Of a wrapper and what it wraps, which have one name, the wrapper.
    """
    inside_weights = "parametrizations" in pattern.pattern
    names = [n for n in model.names if inside_weights or not n.is_machinery]
    short = [n for n in names if n.short and pattern.fullmatch(n.short)]
    matches = short or [n for n in names if n.full and pattern.fullmatch(n.full)]
    if not matches:
        raise SelectionError(nothing(model, query, is_glob=pattern.pattern != query))
    hookable = [name for name in matches if why_not(model, name) is None]
    if not hookable:
        message = f"record(): {query!r} matches only modules that hooks never run on: {why_not(model, matches[0])}."
        raise SelectionError(message)
    if not short:
        return hookable
    outermost: dict[str, Name] = {}
    for name in hookable:
        outermost.setdefault(name.short, name)
    return [*outermost.values()]


def _by_name(model: Model, query: str) -> list[Name]:
    name = model.spelled(query)
    if name is None and "*" in query:
        return _by_pattern(model, query, glob(query))
    if name is None:
        raise SelectionError(nothing(model, query))
    if reason := why_not(model, name):
        message = f"record() cannot record {query!r}: {reason}."
        raise SelectionError(message)
    return [name]


def _by_test(model: Model, passes: Callable[[Name], object], complaint: str) -> list[Name]:
    """The modules that pass a test, each under its first name."""
    found = [name for name in hookable(model) if passes(name)]
    if not found:
        message = f"record(): {complaint}."
        raise SelectionError(message)
    return found


def _by_type(model: Model, kind: type) -> list[Name]:
    kinds = sorted({type_name(name.module) for name in hookable(model)})
    complaint = f"no layer of this {model.type} is a {kind.__name__}; there are {listed(kinds, 20)}"
    never_run = (why_not(model, n) for n in model.names if isinstance(n.module, kind))
    complaint = next(filter(None, never_run), complaint)
    return _by_test(model, lambda name: isinstance(name.module, kind), complaint)


def _by_module(model: Model, module: nn.Module) -> list[Name]:
    names = model.of.get(id(module))
    if names is None:
        kind = type_name(module)
        message = (
            f"record(): the {kind} given as a layer is not part of this {model.type}. Layers are looked up "
            "by identity: a copy, or the model before it was wrapped or moved into another, does not count."
        )
        raise SelectionError(message)
    if reason := why_not(model, names[0]):
        message = f"record() cannot record this layer: {reason}."
        raise SelectionError(message)
    return [names[0]]


def _leaves(model: Model) -> list[Name]:
    """Every leaf module with a forward; if a traced graph calls only some, the exit says which it did not."""
    leaves = [name for name in model.names if _is_leaf(name) and not name.is_machinery]
    scripted = [name for name in leaves if isinstance(name.module, torch.jit.ScriptModule)]
    if scripted or all(why_not(model, name) for name in leaves):
        reasons = [reason for name in scripted or leaves if (reason := why_not(model, name))]
        message = f"record() cannot record every leaf module of this {model.type}: {next(iter(reasons), 'it has none')}, or choose layers."
        raise SelectionError(message)
    return [name for name in leaves if is_called(name.module)]


def _is_leaf(name: Name) -> bool:
    return not any(
        child is not None and key != "parametrizations"
        for key, child in children_of(name.module).items()
    )


def _answer(model: Model, query: Any) -> list[Name]:
    """Answer one query."""
    match query:
        case None:
            return _leaves(model)
        case str():
            return _by_name(model, query)
        case re.Pattern(pattern=str()):
            return _by_pattern(model, query.pattern, query)
        case nn.Module():
            return _by_module(model, query)
        case type():
            return _by_type(model, query)
        case Callable():
            complaint = f"{query!r} returned true for none of the {len(model.of)} modules of this {model.type}"
            return _by_test(model, lambda name: _asked(query, name), complaint)
    message = (
        f"record(): {query!r} is not a layer query. Use a name, a glob such as 'layer*.conv1', re.compile(...), "
        "a module type, a module of the model, a function of name and module, or several of these."
    )
    raise SelectionError(message)


def _asked(query: Callable[[str, nn.Module], object], name: Name) -> bool:
    """What a query that is a function says about a module."""
    try:
        return bool(query(name.full, name.module))
    except Exception as error:
        error.add_note(
            f"raised while record() asked the layer query {query!r} about {name.full!r}, a {type_name(name.module)}. "
            "It is called with name and module, and returns whether to record it"
        )
        raise


def _flatten(
    queries: Any, transform: Transform | None
) -> Iterator[tuple[Query | None, Transform | None]]:
    """The single queries, each with its transform."""
    if isinstance(queries, Mapping):
        for query, own in queries.items():
            if own is not None and not callable(own):
                message = (
                    f"record(): the transform of {query!r} must be callable or None, not {own!r}."
                )
                raise OptionError(message)
            yield from _flatten(query, transform if own is None else own)
    elif isinstance(queries, Iterable) and not isinstance(
        queries, (str, bytes, Tensor, nn.Module, type)
    ):
        for query in queries:
            yield from _flatten(query, transform)
    else:
        yield queries, transform


# --- All queries ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Claim:
    """A module that a query has selected, and how."""

    name: Name
    text: str  # how messages call it
    spelled_out: bool
    transform: Transform | None


def select(model: nn.Module, queries: Any, transform: Transform | None = None) -> Selection:
    """Answer ``queries``: every chosen layer once, or an error before anything has happened."""
    check_model(model)
    names = Model(model)
    claims: dict[int, _Claim] = {}
    spelled: dict[str, int] = {}
    for query, own in _flatten(queries, transform):
        if own is not transform and id(own) in names.of:
            raise OptionError(layer_for_transform(query, own))
        is_name = isinstance(query, str) and "*" not in query
        spelled_out = is_name or isinstance(query, nn.Module)
        for name in _answer(names, query):
            module = id(name.module)
            text = query if isinstance(query, str) and is_name else name.short
            spelled[text] = module
            known = claims.get(module)
            if known and known.spelled_out and spelled_out and known.transform is not own:
                message = f"record(): {known.text!r} and {text!r} are one module and cannot have two transforms."
                raise SelectionError(message)
            # A layer that is spelled out goes before a pattern; otherwise the first query counts.
            if known is None or (spelled_out and not known.spelled_out):
                claims[module] = _Claim(name, text, spelled_out, own)
    if not claims:
        message = (
            f"record(): no layers were given, {queries!r} is empty. None means every leaf module."
        )
        raise SelectionError(message)
    keys = _keys([claim.name for claim in claims.values()])
    others: dict[int, list[str]] = {
        module: [s for n in names.of[module] for s in (n.full, n.short)] for module in claims
    }
    for text, module in spelled.items():
        others[module].append(text)
    choices = tuple(
        Choice(key, claim.name.module, tuple(dict.fromkeys(others[module])), claim.transform)
        for key, (module, claim) in zip(keys, claims.items(), strict=True)
    )
    return Selection(choices, tuple(_parents(names, choices)))


def _keys(names: list[Name]) -> list[str]:
    """The short name of each; where a wrapper and what it wraps are both there, the wrapper's alone."""
    full = {name.full: name for name in names}
    outermost = sorted(names, key=lambda name: name.full.count("."), reverse=True)
    owners = {name.short: name for name in outermost} | full
    return [name.short if owners[name.short] is name else name.full for name in names]


def _parents(model: Model, choices: Iterable[Choice]) -> Iterator[nn.Module]:
    """The root, and every module above a chosen one that is itself called."""
    root = model.names[0].module
    found = {id(root): root}
    for choice in choices:
        for name in model.of[id(choice.module)]:
            for full in upwards(name.full.rpartition(".")[0]):
                above = model.by_full.get(full)  # none, where a segment has a dot in it
                if above and id(above.module) not in found and why_not(model, above) is None:
                    found[id(above.module)] = above.module
    return iter(found.values())
