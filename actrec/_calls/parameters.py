"""The arguments of a call of a PyTorch function, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import get_testing_overrides

from actrec._torch import schemas_of


def named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``function`` as a dict from parameter name to argument.

    >>> import torch
    >>> x = torch.ones(2, 3)
    >>> [*named(torch.Tensor.add, (x, 2), {"alpha": 3})]
    ['input', 'other', 'alpha']
    >>> named(torch.Tensor.permute, (x, 1, 0), {})["dims"]
    (1, 0)

    The first parameter of a method is called ``input``, like that of a function. The last one takes all arguments that are left.
    """
    names, gathers = _parameters(function, tuple(map(type, args)), frozenset(kwargs))
    given = dict(zip(names, args, strict=False))
    if gathers or len(args) > len(names):
        given[names[-1] if names else "args"] = args[max(len(names) - 1, 0) :]
    given.update(kwargs)
    return given


_BY_POSITION = {
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
}


@lru_cache(maxsize=4096)
def _parameters(
    function: Any, types: tuple[type, ...], keywords: frozenset[str]
) -> tuple[tuple[str, ...], bool]:
    """Return the names of the parameters for arguments of these types, and whether the last one takes several of them."""
    for is_exact in (True, False):
        for schema in schemas_of(function):
            positional = [one for one in schema.arguments if not one.kwarg_only]
            known = {_name(one.name) for one in schema.arguments} | {"out"}
            if keywords <= known and _fits(positional, types, keywords, is_exact=is_exact):
                return tuple(_name(one.name) for one in positional), len(types) > len(positional)
    signature = _signature(function)
    if signature is None:
        return (), bool(types)
    parameters = [*signature.parameters.values()]
    names = [_name(one.name) for one in parameters if one.kind in _BY_POSITION]
    gathers = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
    return tuple(names), gathers and len(types) >= len(names)


def _name(name: str) -> str:
    return "input" if name == "self" else name


def _fits(
    positional: list[Any], types: tuple[type, ...], keywords: Collection[str], *, is_exact: bool
) -> bool:
    """Whether an operator can take arguments of these types; unless ``is_exact``, also numbers in place of tensors."""
    kinds = [str(one.type) for one in positional]
    if len(types) > len(positional) and not (kinds and "List[int]" in kinds[-1]):
        return False
    for one, kind, given in zip(positional, kinds, types, strict=False):
        wants, has = "Tensor" in kind and "List" not in kind, issubclass(given, Tensor)
        if issubclass(given, torch.dtype) and one.name != "dtype":
            return False
        if (has and not wants) or (is_exact and wants and not (has or given is type(None))):
            return False
    missing = [one for one in positional[len(types) :] if not one.has_default_value()]
    return all(_name(one.name) in keywords for one in missing)


def _signature(function: Any) -> inspect.Signature | None:
    """Return the signature of a Python function, or of its stand-in in ``get_testing_overrides()``."""
    ways = [function, get_testing_overrides().get(function)]
    for described in ways if inspect.isfunction(function) else ways[::-1]:
        try:
            return inspect.signature(described)
        except (TypeError, ValueError):
            continue
    return None
