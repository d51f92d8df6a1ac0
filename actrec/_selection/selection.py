"""All queries: which layers they choose, each once, under which key, what of it is recorded and with which transform."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn

from actrec.errors import OptionError, SelectionError

from .diagnosis import check_model, layer_for_transform, why_not
from .globs import is_glob
from .names import Model, upwards
from .queries import answer

if TYPE_CHECKING:
    from .names import Name
    from .queries import Query, Transform

__all__ = ["Choice", "Selection", "What", "select"]

#: What of a layer is recorded.
What: TypeAlias = Literal["output", "input", "gradient"]

#: The arguments of ``record()`` that take queries for more than outputs.
_OPTIONS: Mapping[What, str] = {"input": "inputs", "gradient": "grads"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen layer."""

    key: str  # its name in the recording: without wrapper segments, unless another chosen layer has that name
    module: nn.Module
    names: tuple[str, ...]  # everything else it may be called, with and without wrapper segments
    transforms: Mapping[What, Transform | None]  # of what is recorded of it
    by_default: bool = (
        False  # whether it is one of all leaf modules, and no other query asks for it
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen layers, and the modules whose calls lead to theirs: the root first, and all parents."""

    choices: tuple[Choice, ...]
    parents: tuple[nn.Module, ...]
    _order: Mapping[What, Mapping[int, object]]  # for each kind, the ids of its modules

    def of(self, what: What) -> tuple[Choice, ...]:
        """Return the layers of which this is recorded, in the order of its queries."""
        choices = {id(choice.module): choice for choice in self.choices}
        return tuple(choices[module] for module in self._order[what])


def select(
    model: nn.Module,
    queries: Any,
    transform: Transform | None = None,
    *,
    inputs: Any = False,
    grads: Any = False,
) -> Selection:
    """Return the layers that ``queries`` choose, in order, each once; then those that ``inputs`` and ``grads`` choose besides.

    Args:
        model: what is recorded.
        queries: as ``record()`` takes them.
        transform: of outputs and gradients for which the queries give none.
        inputs: the queries for inputs. ``True`` chooses the same layers, without their transforms.
        grads: the queries for gradients. ``True`` chooses the same layers, with their transforms.

    Raises:
        UnsupportedModelError: hooks do not run in the model.
        SelectionError: a query chooses nothing, or a layer was given two transforms.
        OptionError: a mapping gives something else for a transform.
    """
    check_model(model, queries)
    names = Model(model)
    outputs = _claimed(names, queries, transform)
    claimed: dict[What, dict[int, _Claim]] = {
        "output": outputs,
        "input": _claimed_besides(names, "input", inputs, None, outputs),
        "gradient": _claimed_besides(names, "gradient", grads, transform, outputs),
    }
    if not any(claimed.values()):
        message = (
            f"record(): no layers were given, {queries!r} is empty. None means every leaf module; to record nothing but "
            "what layers receive, or their gradients, name those: inputs='conv1', grads='conv1'."
        )
        raise SelectionError(message)
    claims: dict[int, dict[What, _Claim]] = {}
    for what, found in claimed.items():
        for module, claim in found.items():
            claims.setdefault(module, {})[what] = claim
    firsts = [next(iter(of_one.values())) for of_one in claims.values()]
    keys = _keys([claim.name for claim in firsts])
    choices = tuple(
        Choice(
            key,
            first.name.module,
            tuple(dict.fromkeys(n for claim in of_one.values() for n in claim.names(names))),
            {what: claim.transform for what, claim in of_one.items()},
            by_default=all(claim.by_default for claim in of_one.values()),
        )
        for key, first, of_one in zip(keys, firsts, claims.values(), strict=True)
    )
    return Selection(choices, tuple(_parents(names, choices)), claimed)


def _claimed(names: Model, queries: Any, transform: Transform | None) -> dict[int, _Claim]:
    """The modules (ids) that some queries choose."""
    claims: dict[int, _Claim] = {}
    for query, own in _flatten(queries, transform):
        if own is not transform and id(own) in names.of:
            raise OptionError(layer_for_transform(query, own))
        for claim in _claims(names, query, own):
            known = claims.setdefault(id(claim.name.module), claim)
            if known is not claim:
                known.merge(claim)
    return claims


def _claimed_besides(
    names: Model,
    what: What,
    given: Any,
    transform: Transform | None,
    outputs: Mapping[int, _Claim],
) -> dict[int, _Claim]:
    """The modules (ids) of which ``inputs=`` or ``grads=`` asks for what they say."""
    if given is False:
        return {}
    option = f"{_OPTIONS[what]}={given!r}"
    if given is None:
        message = f"record({option}): False means none, True the layers that are recorded, and a query others."
        raise OptionError(message)
    if given is True and not outputs:
        message = (
            f"record({option}): True means the layers that are recorded, and none are. "
            f"Name them: {_OPTIONS[what]}='conv1'."
        )
        raise SelectionError(message)
    if given is True:
        keeps = what == "gradient"
        return {
            module: replace(claim, transform=claim.transform if keeps else None)
            for module, claim in outputs.items()
        }
    claims = _claimed(names, given, transform)
    if not claims:
        message = f"record({option}): no layers were given. False means none, True the layers that are recorded."
        raise SelectionError(message)
    return claims


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
    by_default: bool  # whether it was asked for only as one of all leaf modules

    def merge(self, other: _Claim) -> None:
        """Another query has selected the module, too.

        One that spells it out goes before a pattern; otherwise the first query counts.
        """
        self.by_default = self.by_default and other.by_default
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
        yield _Claim(name, [spelling], is_spelled_out, transform, by_default=query is None)


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
