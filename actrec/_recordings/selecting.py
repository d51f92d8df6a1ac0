"""Which layers of a recording a query selects: the queries of ``record()``, answered without the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from actrec._selection.globs import glob, is_glob
from actrec._selection.nearest import nearest
from actrec._text import listed
from actrec.errors import SelectionError

from .instead import no_module


class Known(NamedTuple):
    """The layers of a recording, as queries see them."""

    types: Mapping[str, str]  #: of the layers, by name
    aliases: Mapping[str, str]  #: their further names
    modules: Mapping[nn.Module, str]  #: the names of the modules that still exist

    def named(self) -> dict[str, nn.Module]:
        """Return the modules of the layers, by name."""
        return {name: module for module, name in self.modules.items() if name in self.types}


def chosen(queries: Any, known: Known) -> list[str]:
    """Return the names of the layers that ``queries`` select, in their order, each once.

    Raises:
        SelectionError: one of the queries selects nothing.
    """
    names = list(dict.fromkeys(name for query in _flat(queries) for name in _found(query, known)))
    if not names:
        message = f"acts.select({queries!r}): no query was given. list(acts) has all names."
        raise SelectionError(message)
    return names


def _flat(queries: Any) -> Iterator[Any]:
    if isinstance(queries, Iterable) and not isinstance(queries, (str, Tensor, nn.Module, type)):
        for query in queries:
            yield from _flat(query)
    else:
        yield queries


def _found(query: Any, known: Known) -> list[str]:
    """Return the names that one query selects, at least one."""
    found = _names(query, known)
    if not found:
        is_short = isinstance(query, (str, re.Pattern))
        message = f"acts.select({repr(query) if is_short else '...'}): {_why_nothing(query, known)}"
        raise SelectionError(message)
    return found


def _names(query: Any, known: Known) -> list[str]:
    match query:
        case str():
            return _by_name(query, known)
        case re.Pattern():
            return _matching(query, known)
        case nn.Module():
            return [name for module, name in known.modules.items() if module is query]
        case type():
            return _by_type(query, known)
        case Callable():
            modules = known.named()
            return [name for name in known.types if name in modules and query(name, modules[name])]
    return []


def _why_nothing(query: Any, known: Known) -> str:
    """Return why a query selects nothing, and what does."""
    match query:
        case str() | re.Pattern():
            wanted = query if isinstance(query, str) else ""
            return f"no recorded layer matches. {nearest(wanted, known.types)}"
        case nn.Module():
            return no_module(query)
        case type():
            kinds = listed(sorted({*known.types.values()}), 20)
            return f"no recorded layer is a {query.__name__}; there are {kinds}."
        case Callable() if known.named():
            return "it is true of no recorded layer."
        case Callable():
            return (
                "a function gets modules, and this recording, which was loaded or copied or has outlived its model, has only the "
                "names of its layers. Use a name, a glob, a regular expression or a type."
            )
    return (
        f"{query!r} is not a layer query. Use a name, a glob such as 'layer*.conv1', "
        "re.compile(...), a module type, a module, a function, or several of these."
    )


def _by_name(query: str, known: Known) -> list[str]:
    if query in known.types:
        return [query]
    if known.aliases.get(query) in known.types:
        return [known.aliases[query]]
    return _matching(glob(query), known) if is_glob(query) else []


def _matching(pattern: re.Pattern[str], known: Known) -> list[str]:
    """Return the layers whose names match; if there are none, those that have another name that matches."""
    found = [name for name in known.types if pattern.fullmatch(name)]
    others = (name for alias, name in known.aliases.items() if pattern.fullmatch(alias))
    return found or [name for name in others if name in known.types]


def _by_type(kind: type, known: Known) -> list[str]:
    """Return the layers of a type: by their modules, if those exist, else by the names of types."""
    modules = known.named()
    names = {one.__name__ for one in _kinds(kind)}
    return [
        name
        for name, its_type in known.types.items()
        if (isinstance(modules[name], kind) if name in modules else its_type in names)
    ]


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and its subclasses."""
    yield kind
    for one in type.__subclasses__(kind):
        yield from _kinds(one)
