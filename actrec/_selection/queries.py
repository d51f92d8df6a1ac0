"""Layer queries -> modules, and the errors that help when a query selects nothing.

A model is a tree of names over a graph of modules: one module may have several names, and wrappers such
as ``DistributedDataParallel`` or ``torch.compile`` add segments that nobody wants to type. So a query is
answered with *choices*: a module, the key under which it is recorded, and all of its names.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from actrec._text import listed, nearest
from actrec.errors import OptionError, SelectionError, UnsupportedModelError

if TYPE_CHECKING:
    from actrec._calls.capture import Transform

__all__ = ["WRAPPERS", "Choice", "Query", "Selection", "is_called", "select", "type_name"]

#: One layer query; ``record()`` also takes an iterable of them, or a mapping from them to transforms.
Query: TypeAlias = (
    str | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]
)

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
    """The type of a module as its author named it: ``fully_shard`` makes a ``FSDPLinear`` of a ``Linear``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards a model has imported it
    kind: type = getattr(fsdp, "FSDPModule", type(None))
    if not isinstance(module, kind):
        return type(module).__name__
    return next(one.__name__ for one in type(module).__mro__ if not issubclass(one, kind))


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


# --- The names of a model --------------------------------------------------------------------------


class _Name(NamedTuple):
    """One path to a module: as ``named_modules()`` spells it, and without the segments of wrappers."""

    full: str
    short: str
    module: nn.Module

    @property
    def is_machinery(self) -> bool:
        """Whether no pattern should find it: what computes a parametrized weight, or checks an exported input."""
        guards = type(self.module).__module__ == "torch.export._unlift"
        return guards or "parametrizations" in self.full.split(".")


#: So many names of a module lead to the modules inside it; those are found under further names only by spelling one out.
_MOST_NAMES = 256


def _walk(root: nn.Module) -> list[_Name]:
    """The paths to every module, in the order of ``named_modules()``, without going in circles.

    Where modules are registered in several others, and those in several others, a model has exponentially many paths.
    """
    names: list[_Name] = []
    _visit(_Name("", "", root), names, Counter(), set())
    return names


def _visit(name: _Name, names: list[_Name], met: Counter[int], above: set[int]) -> None:
    names.append(name)
    children, identity = name.module._modules, id(name.module)
    if children and met[identity] < _MOST_NAMES:
        met[identity] += 1
        above.add(identity)
        for segment, child in children.items():
            if child is not None and id(child) not in above:
                _visit(_child(name, segment, child), names, met, above)
        above.discard(identity)


def _child(name: _Name, segment: str, child: nn.Module) -> _Name:
    full, short, _ = name
    is_wrapped = segment in _SEGMENTS and _is_wrapped(name, segment, child)
    spelled = f"{short}.{segment}" if short else segment
    return _Name(f"{full}.{segment}" if full else segment, short if is_wrapped else spelled, child)


def _is_wrapped(name: _Name, segment: str, child: nn.Module) -> bool:
    """Whether a wrapper at ``name`` has added ``segment`` to the names of what it wraps."""
    children = name.module._modules
    outer, inner = _PEFT
    if segment == outer:
        return len(children) == 1 and [*child._modules] == [inner]
    if segment == inner and len(children) == 1:
        return _last(name.full) == outer != _last(name.short)
    return segment in WRAPPERS and children.keys() <= WRAPPERS


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def is_called(module: nn.Module) -> bool:
    """Whether there is a forward: ``ModuleList`` and its like have none, so hooks on them never run."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _inlined(names: list[_Name]) -> Iterator[str]:
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
                    and called.isdisjoint(_upwards(name.full))
                ):
                    yield name.full


def _upwards(full: str) -> Iterator[str]:
    """A name, and those of the modules around it."""
    while full:
        yield full
        full = full.rpartition(".")[0]


class _Model:
    """A model as queries see it."""

    def __init__(self, model: nn.Module) -> None:
        self.type = type_name(model)
        self.names = _walk(model)
        self.by_full = {name.full: name for name in self.names}
        self.of: dict[int, list[_Name]] = {}
        for name in self.names:
            self.of.setdefault(id(name.module), []).append(name)
        self.inlined = frozenset(_inlined(self.names))

    @cached_property
    def by_short(self) -> dict[str, list[_Name]]:
        """The names without the segments of wrappers."""
        found: dict[str, list[_Name]] = {}
        for name in self.names:
            found.setdefault(name.short, []).append(name)
        return found

    def why_not(self, name: _Name) -> str | None:
        """Why hooks on this module would never run, and what to write instead; ``None`` if they do."""
        kind = type_name(name.module)
        spelled = name.short or name.full
        if name.full in self.inlined:
            return (
                f"the graph that holds {spelled!r} does not call it: tracing has merged its operations into "
                "the graph. Record the original module, or torch.export.unflatten(exported_program)"
            )
        if isinstance(name.module, torch.jit.ScriptModule):
            return f"{spelled!r} is a {kind}: TorchScript runs no Python hooks. Record the original module"
        if is_called(name.module):
            return None
        reason = f"{spelled!r} is a {kind}, a container that is never called itself"
        instead = f"{spelled}.*" if spelled else "*"
        children = len(name.module._modules)
        return f"{reason}. Write {instead!r} for its {children} children" if children else reason

    def hookable(self) -> Iterator[_Name]:
        """The names that hooks can run on, less PyTorch's machinery."""
        return (n for n in self.names if not n.is_machinery and self.why_not(n) is None)

    def spelled(self, query: str) -> _Name | None:
        """The module of that name, where wrapper segments may be left out."""
        if query in self.by_full:
            return self.by_full[query]
        candidates: list[_Name] = self.by_short.get(query, [])
        for name in candidates + self.by_short.get(_stripped(query), []):
            if query == name.short or _leaves_out_wrappers(query, name.full):
                return name
        return self._at(query)

    def _at(self, full: str) -> _Name | None:
        """The module at a path that was not walked."""
        name = self.names[0]
        for segment in full.split("."):
            child = name.module._modules.get(segment)
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


# --- Queries ---------------------------------------------------------------------------------------


def _glob(pattern: str) -> re.Pattern[str]:
    """``*`` stays inside one segment; ``**`` crosses dots, and as a whole segment may also be nothing."""
    *front, last = pattern.split(".")
    parts = [r"(?:[^.]+\.)*" if segment == "**" else _segment(segment) + r"\." for segment in front]
    return re.compile("".join(parts) + (".+" if last == "**" else _segment(last)))


def _segment(text: str) -> str:
    return ".*".join(r"[^.]*".join(map(re.escape, part.split("*"))) for part in text.split("**"))


def _by_pattern(model: _Model, query: str, pattern: re.Pattern[str]) -> list[_Name]:
    """Names that match without their wrapper segments; or if there are none, as they stand.

    Of a wrapper and what it wraps, which have one name, the wrapper.
    """
    inside_weights = "parametrizations" in pattern.pattern
    names = [n for n in model.names if inside_weights or not n.is_machinery]
    short = [n for n in names if n.short and pattern.fullmatch(n.short)]
    matches = short or [n for n in names if n.full and pattern.fullmatch(n.full)]
    if not matches:
        raise SelectionError(_nothing(model, query, is_glob=pattern.pattern != query))
    hookable = [name for name in matches if model.why_not(name) is None]
    if not hookable:
        message = f"record(): {query!r} matches only modules that hooks never run on: {model.why_not(matches[0])}."
        raise SelectionError(message)
    if not short:
        return hookable
    outermost: dict[str, _Name] = {}
    for name in hookable:
        outermost.setdefault(name.short, name)
    return [*outermost.values()]


def _by_name(model: _Model, query: str) -> list[_Name]:
    name = model.spelled(query)
    if name is None and "*" in query:
        return _by_pattern(model, query, _glob(query))
    if name is None:
        raise SelectionError(_nothing(model, query))
    if why_not := model.why_not(name):
        message = f"record() cannot record {query!r}: {why_not}."
        raise SelectionError(message)
    return [name]


def _by_test(model: _Model, passes: Callable[[_Name], object], complaint: str) -> list[_Name]:
    """The modules that pass a test, each under its first name."""
    found = [name for name in model.hookable() if passes(name)]
    if not found:
        message = f"record(): {complaint}."
        raise SelectionError(message)
    return found


def _by_type(model: _Model, kind: type) -> list[_Name]:
    kinds = sorted({type_name(name.module) for name in model.hookable()})
    complaint = f"no layer of this {model.type} is a {kind.__name__}; there are {listed(kinds, 20)}"
    never_run = (model.why_not(n) for n in model.names if isinstance(n.module, kind))
    complaint = next(filter(None, never_run), complaint)
    return _by_test(model, lambda name: isinstance(name.module, kind), complaint)


def _by_module(model: _Model, module: nn.Module) -> list[_Name]:
    names = model.of.get(id(module))
    if names is None:
        kind = type_name(module)
        message = (
            f"record(): the {kind} given as a layer is not part of this {model.type}. Layers are looked up "
            "by identity: a copy, or the model before it was wrapped or moved into another, does not count."
        )
        raise SelectionError(message)
    if why_not := model.why_not(names[0]):
        message = f"record() cannot record this layer: {why_not}."
        raise SelectionError(message)
    return [names[0]]


def _leaves(model: _Model) -> list[_Name]:
    """Every leaf module with a forward; if a traced graph calls only some, the exit says which it did not."""
    leaves = [name for name in model.names if _is_leaf(name) and not name.is_machinery]
    scripted = [name for name in leaves if isinstance(name.module, torch.jit.ScriptModule)]
    if scripted or all(map(model.why_not, leaves)):
        reasons = [reason for name in scripted or leaves if (reason := model.why_not(name))]
        message = f"record() cannot record every leaf module of this {model.type}: {next(iter(reasons), 'it has none')}, or choose layers."
        raise SelectionError(message)
    return [name for name in leaves if is_called(name.module)]


def _is_leaf(name: _Name) -> bool:
    return not any(
        child is not None and key != "parametrizations"
        for key, child in name.module._modules.items()
    )


def _answer(model: _Model, query: Any) -> list[_Name]:
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


def _asked(query: Callable[[str, nn.Module], object], name: _Name) -> bool:
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


@dataclass(slots=True)
class _Claim:
    """A module that a query has selected, and how."""

    name: _Name
    text: str  # how messages call it
    spelled_out: bool
    transform: Transform | None


def select(model: nn.Module, queries: Any, transform: Transform | None = None) -> Selection:
    """Answer ``queries``: every chosen layer once, or an error before anything has happened."""
    _check_model(model)
    names = _Model(model)
    claims: dict[int, _Claim] = {}
    spelled: dict[str, int] = {}
    for query, own in _flatten(queries, transform):
        if own is not transform and id(own) in names.of:
            raise OptionError(_layer_for_transform(query, own))
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


def _keys(names: list[_Name]) -> list[str]:
    """The short name of each; where a wrapper and what it wraps are both there, the wrapper's alone."""
    full = {name.full: name for name in names}
    outermost = sorted(names, key=lambda name: name.full.count("."), reverse=True)
    owners = {name.short: name for name in outermost} | full
    return [name.short if owners[name.short] is name else name.full for name in names]


def _parents(model: _Model, choices: Iterable[Choice]) -> Iterator[nn.Module]:
    """The root, and every module above a chosen one that is itself called."""
    root = model.names[0].module
    found = {id(root): root}
    for choice in choices:
        for name in model.of[id(choice.module)]:
            for full in _upwards(name.full.rpartition(".")[0]):
                above = model.by_full.get(full)  # none, where a segment has a dot in it
                if above and id(above.module) not in found and model.why_not(above) is None:
                    found[id(above.module)] = above.module
    return iter(found.values())


# --- The errors that help --------------------------------------------------------------------------


def _nothing(model: _Model, query: str, *, is_glob: bool = False) -> str:
    names = dict.fromkeys(name.short for name in model.names if name.short)
    deeper = f"**.{query}"
    if is_glob and any(map(_glob(deeper).fullmatch, names)):
        return (
            f"record(): {query!r} matches no layer of this {model.type}. A star stays inside one segment. "
            f"Did you mean {deeper!r}?"
        )
    hint = ""
    if any(isinstance(name.module, torch.fx.GraphModule) for name in model.names):
        hint = " It is a traced graph: record the original module, or torch.export.unflatten(exported_program)."
    return (
        f"record(): {query!r} matches no layer of this {model.type}. {nearest(query, names)}{hint}"
    )


def _layer_for_transform(query: object, own: object) -> str:
    shown = repr(query) if isinstance(query, str) else "a query"
    return (
        f"record(): the mapping gives {shown} a {type(own).__name__} of the model for its transform; its values are transforms, "
        "not layers. To record the layers of a dict of modules: record(model, list(modules.values())). To apply a layer "
        "of the model to what another one returns, write a function: lambda value: model.head(value)."
    )


def _check_model(model: object) -> None:
    """Only a Python module runs hooks."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        message = f"record() cannot record a {kind}: TorchScript runs no Python hooks. Record the original module."
        raise UnsupportedModelError(message)
    if isinstance(model, nn.Module):
        return
    message = f"record() records a torch.nn.Module, not {kind}."
    if isinstance(model, torch.export.ExportedProgram):
        message += " torch.export.unflatten(program) makes a module whose layers are called."
    elif isinstance(model, type) and issubclass(model, nn.Module):
        message = f"record() records a module, not the class {model.__name__}: create one first."
    else:
        inside = [
            name
            for name, value in getattr(model, "__dict__", {}).items()
            if isinstance(value, nn.Module)
        ]
        if inside:
            message += f" It has modules inside: {listed(inside)}."
    raise UnsupportedModelError(message)
