"""All queries: which layers they choose, each once, under which key and with which transform."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from actrec.errors import OptionError, SelectionError

from .diagnosis import check_model, layer_for_transform, why_not
from .globs import is_glob
from .names import Model, upwards
from .queries import answer

if TYPE_CHECKING:
    from .names import Name
    from .queries import Query, Transform

__all__ = ["Choice", "Selection", "select"]


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


def select(model: nn.Module, queries: Any, transform: Transform | None = None) -> Selection:
    """Return the layers that ``queries`` choose, in order, each once.

    Args:
        model: what is recorded.
        queries: as ``record()`` takes them.
        transform: of the layers for which the queries give none.

    Raises:
        UnsupportedModelError: hooks do not run in the model.
        SelectionError: a query chooses nothing, or a layer was given two transforms.
        OptionError: a mapping gives something else for a transform.
    """
    check_model(model, queries)
    names = Model(model)
    claims: dict[int, _Claim] = {}
    for query, own in _flatten(queries, transform):
        if own is not transform and id(own) in names.of:
            raise OptionError(layer_for_transform(query, own))
        for claim in _claims(names, query, own):
            known = claims.setdefault(id(claim.name.module), claim)
            if known is not claim:
                known.merge(claim)
    if not claims:
        message = (
            f"record(): no layers were given, {queries!r} is empty. None means every leaf module."
        )
        raise SelectionError(message)
    keys = _keys([claim.name for claim in claims.values()])
    choices = tuple(
        Choice(key, claim.name.module, claim.names(names), claim.transform)
        for key, claim in zip(keys, claims.values(), strict=True)
    )
    return Selection(choices, tuple(_parents(names, choices)))


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


# --- One layer, which several queries may choose -------------------------------------------------------


@dataclass(slots=True)
class _Claim:
    """A module that a query has selected, and how."""

    name: Name
    spellings: list[str]  # how it was called, for messages and as further names
    is_spelled_out: bool
    transform: Transform | None

    def merge(self, other: _Claim) -> None:
        """Another query has selected the module, too.

        One that spells it out goes before a pattern; otherwise the first query counts.
        """
        both = self.is_spelled_out and other.is_spelled_out
        if both and self.transform is not other.transform:
            message = (
                f"record(): {self.spellings[0]!r} and {other.spellings[0]!r} are one module and cannot have two "
                "transforms."
            )
            raise SelectionError(message)
        if other.is_spelled_out and not self.is_spelled_out:
            self.name, self.transform, self.is_spelled_out = other.name, other.transform, True
            self.spellings = other.spellings + self.spellings
        else:
            self.spellings += other.spellings

    def names(self, model: Model) -> tuple[str, ...]:
        """All that the module may be called."""
        names = [s for name in model.of[id(self.name.module)] for s in (name.full, name.short)]
        return tuple(dict.fromkeys(names + self.spellings))


def _claims(model: Model, query: Query | None, transform: Transform | None) -> Iterator[_Claim]:
    spelled = query if isinstance(query, str) and not is_glob(query) else None
    is_spelled_out = spelled is not None or isinstance(query, nn.Module)
    for name in answer(model, query):
        spelling = name.short if spelled is None else spelled
        yield _Claim(name, [spelling], is_spelled_out, transform)


# --- Keys and parents ----------------------------------------------------------------------------------


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
