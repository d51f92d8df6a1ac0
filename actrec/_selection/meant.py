"""What the user may have meant by an invalid query, or by one that no name matches."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from actrec._text import count, listed
from actrec._torch import children_of

from .globs import glob, is_glob
from .model import Model
from .names import type_name
from .nearest import nearest


def nothing(model: Model, query: str | re.Pattern[str]) -> str:
    """Return the message for a name or a pattern that matches nothing."""
    names = [name for name in model.by_short if name]
    if isinstance(query, str):
        given, instead = query, next(_meanings(model, query, names), "")
    else:
        given, instead = query.pattern, _wider(query, names)
    if not instead:
        instead = nearest(given, names)
        if any(isinstance(name.module(), torch.fx.GraphModule) for name in model.names):
            instead += " It is a traced graph: record the original module, or torch.export.unflatten(exported_program)."
    return f"record(): {given!r} matches no layer of this {model.type}. {instead}"


def _wider(pattern: re.Pattern[str], names: Collection[str]) -> str:
    """Return a regular expression that matches the names in which the given one is found, if there are any."""
    inside = sum(1 for name in names if pattern.search(name))
    wider = f"re.compile(r'.*(?:{pattern.pattern}).*')"
    many = count(inside, "layer")
    return f"It has to match the whole name. {wider} matches {many}." * bool(inside)


def _meanings(model: Model, query: str, names: Collection[str]) -> Iterator[str]:
    """Yield what to write instead, the likeliest first; nothing if only close names can help."""
    deeper = f"**.{query}"
    if is_glob(query) and any(map(glob(deeper).fullmatch, names)):
        yield f"A star stays inside one segment. Did you mean {deeper!r}?"
    if kind := _of_type(model, query.removeprefix("torch.").removeprefix("nn.")):
        yield f"That is a type: {kind}"
    front, _, last = query.rpartition(".")
    owner = model.spelled(front)
    if owner and last in _tensors(owner.module()):
        yield (
            f"That is a parameter or buffer of {owner.short!r}. Recording is of what a layer returns: record(model, "
            f"{owner.short!r})."
        )
    if query.lower() in {"all", "any", "every", "everything", "leaves", "none"}:
        yield "record(model) records every leaf module, record(model, '**') every module."
    pieces = [piece for piece in re.split(r"[\s,;|]+", query) if piece]
    if len(pieces) > 1 and all(map(model.spelled, pieces)):
        yield f"Give several layers as a list: record(model, {pieces})."
    if (last_one := _counted_from_the_end(model, query)) is not None:
        yield f"Did you mean {last_one!r}?"
    if many := _as_regex(query, names):
        yield f"As a regular expression it matches {count(many, 'layer')}: record(model, re.compile({query!r}))."


def _of_type(model: Model, name: str) -> str:
    """Return what to write for the modules whose type has that name, if there are any."""
    found = [one for one in model.names if type_name(one.module()).lower() == name.lower()]
    if not found:
        return ""
    kind = type(found[0].module())
    public = getattr(nn, kind.__name__, None) is kind
    own = f"type(model.get_submodule({found[0].full!r}))"
    where = f"torch.nn.{kind.__name__}" if public else own
    many = count(len({id(one.module()) for one in found}), "layer")
    return f"record(model, {where}) records {many}, such as {found[0].short!r}."


def _tensors(module: nn.Module) -> set[str]:
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name for name, _ in named}


def _counted_from_the_end(model: Model, query: str) -> str | None:
    """Return the name in which the ``-1`` of ``"layers.-1"`` is replaced by the last child."""
    name = model.names[0]
    for segment in query.split("."):
        children = [key for key, child in children_of(name.module()).items() if child is not None]
        if re.fullmatch(r"-\d+", segment) and int(segment[1:]) <= len(children):
            segment = children[int(segment)]  # noqa: PLW2901
        found = model.spelled(f"{name.full}.{segment}" if name.full else segment)
        if found is None:
            return None
        name = found
    return name.short


def _as_regex(query: str, names: Collection[str]) -> int:
    """Return how many names match a text that may be meant as a regular expression."""
    try:
        pattern = re.compile(query)
    except re.error:
        return 0
    if not set(query) & set(r"\()[]{}+*|^$"):  # without "." and "?", which other queries have
        return 0
    return sum(1 for name in names if pattern.fullmatch(name))


# --- Queries that are not text -----------------------------------------------------------------------


def shown_query(query: object) -> str:
    """Return a query as text for a message; a tensor as its type and shape."""
    if isinstance(query, Tensor):
        return f"a {type(query).__name__} of shape {tuple(query.shape)}"
    return repr(query)


def no_query(model: Model, query: object) -> str:
    """Return what may be meant by an object that is not a query, as a sentence; ``""`` if unknown."""
    if isinstance(query, int):
        return f"A name is a string. {nearest(str(query), filter(None, model.by_short))} "
    if isinstance(query, Tensor):
        for name, tensor in model.names[0].module().named_parameters():
            if tensor is query:
                return f"It is the parameter {name!r}; recording is of what a layer returns: record(model, {name.rpartition('.')[0]!r}). "
        return "Call the model with it inside the with block. "
    return ""


def layer_for_transform(query: object, own: object) -> str:
    """Return the message for a mapping whose values are layers."""
    shown = repr(query) if isinstance(query, str) else "a query"
    return (
        f"record(): the mapping gives {shown} a {type(own).__name__} of the model for its transform; its values are transforms, "
        "not layers. To record the layers of a dict of modules: record(model, list(modules.values())). To apply a layer "
        "of the model to what another one returns, write a function: lambda value: model.head(value)."
    )


def is_of_torch(query: object) -> bool:
    """Return whether a function is PyTorch's own, such as ``torch.relu``, and so not a query."""
    owner = getattr(query, "__objclass__", query)  # of a method
    home = getattr(owner, "__module__", None) or ""
    return inspect.isroutine(query) and home.partition(".")[0] == "torch"


def layers_of_function(model: Model, function: object) -> str:
    """Return what to write for the layers that may compute a function of PyTorch."""
    name = getattr(function, "__name__", "")
    kinds = sorted({type_name(one.module()) for one in model.names[1:]})
    found = _of_type(model, name.replace("_", "")) or (
        f"Layers are modules, and none of this {model.type} is a {name}; there are {listed(kinds, 20)}."
    )
    return f"{found} To record calls of the function itself, name it after the modules that call it: record(model, '**:{name}')."
