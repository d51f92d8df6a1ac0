"""The answer to all queries: the chosen layers, each once, with its key, what is recorded of it, and its transforms."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from actrec.errors import OptionError, SelectionError

from .diagnosis import check_model, why_not
from .functions import FunctionQuery, ask, is_function_query
from .globs import is_glob
from .meant import layer_for_transform
from .model import Model, remembered
from .names import Name
from .queries import Query, Transform, answer
from .treatment import Treatment, What

#: The arguments of ``record()`` that take queries for more than outputs.
_OPTIONS: Mapping[What, str] = {"input": "inputs", "gradient": "grads"}


@dataclass(eq=False, slots=True)
class Choice:
    """One chosen layer: a module, or a function that a module calls."""

    key: str  # its name in the recording: without wrapper segments, unless another chosen layer has that name
    module: nn.Module
    names: tuple[str, ...]  # its other names, with and without wrapper segments
    treatments: Mapping[What, Treatment]  # for each thing that is recorded of it
    by_default: bool = (
        False  # whether it is one of all leaf modules, and no other query asks for it
    )
    is_function: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen layers and functions, and the modules on the way to them: the root, and all parents."""

    choices: tuple[Choice, ...]
    parents: tuple[nn.Module, ...]
    _order: Mapping[What, Mapping[int, object]]  # for each kind, the ids of its modules
    functions: tuple[FunctionQuery, ...] = ()

    def of(self, what: What) -> tuple[Choice, ...]:
        """Return the layers whose ``what`` is recorded, in the order of its queries."""
        order = self._order[what]
        choices = {id(choice.module): choice for choice in self.choices} if order else {}
        return tuple(choices[module] for module in order)

    @property
    def aliases(self) -> dict[str, str]:
        """All names of layers, each with the layer's key; for functions, the part up to the colon."""
        names = {name: choice.key for choice in self.choices for name in choice.names}
        owners = [owner for query in self.functions for owner in query.owners]
        return names | {f"{name}:": f"{owner.key}:" for owner in owners for name in owner.names}


def select(
    model: nn.Module,
    queries: Any,
    transform: Transform | None = None,
    *,
    inputs: Any = False,
    grads: Any = False,
) -> Selection:
    """Return the layers that ``queries`` choose, in order, each once; then those that only ``inputs`` and ``grads`` choose.

    Args:
        model: the model to record.
        queries: the layer queries, in the form of ``record()``.
        transform: for outputs and gradients for which the queries give none.
        inputs: the queries for inputs. ``True`` chooses the same layers, without their transforms.
        grads: the queries for gradients. ``True`` chooses the same layers, with their transforms.

    Raises:
        UnsupportedModelError: hooks do not run in the model.
        SelectionError: a query chooses nothing, or a layer has two transforms.
        OptionError: a value of a mapping is not a transform or a reduction.
    """
    check_model(model, queries)
    names = remembered(model)
    outputs = _claimed(names, queries, transform, "output")
    claimed: dict[What, _Claims] = {
        "output": outputs,
        "input": _claimed_besides(names, "input", inputs, None, outputs),
        "gradient": _claimed_besides(names, "gradient", grads, transform, outputs),
    }
    if not any(claimed.values()):
        message = (
            f"record(): no layers were given, {queries!r} is empty. None means every leaf module; to record only "
            "inputs or gradients of layers, name these: inputs='conv1', grads='conv1'."
        )
        raise SelectionError(message)
    claims: dict[int, dict[What, _Claim]] = {}
    for what, found in claimed.items():
        for module, claim in found.modules.items():
            claims.setdefault(module, {})[what] = claim
    firsts = [next(iter(of_one.values())) for of_one in claims.values()]
    keys = _keys([claim.name for claim in firsts])
    choices = tuple(
        Choice(
            key,
            first.name.module(),
            _names(names, of_one.values()),
            {what: claim.treatment for what, claim in of_one.items()},
            by_default=all(claim.by_default for claim in of_one.values()),
        )
        for key, first, of_one in zip(keys, firsts, claims.values(), strict=True)
    )
    order = {what: found.modules for what, found in claimed.items()}
    functions = tuple(query for found in claimed.values() for query in found.functions)
    callers = [owner.module for query in functions for owner in query.owners]
    parents = _parents(names, [choice.module for choice in choices], callers)
    return Selection(choices, tuple(parents), order, functions)


def _claimed(names: Model, queries: Any, transform: Transform | None, what: What) -> _Claims:
    """Return what some queries choose."""
    claims = _Claims()
    for query, own in _flatten(queries, Treatment.by_default(transform)):
        if own.transform is not transform and id(own.transform) in names.of:
            raise OptionError(layer_for_transform(query, own.transform))
        if is_function_query(query, names):
            claims.functions.append(ask(names, query, own, what))
            continue
        for claim in _claims(names, query, own):
            known = claims.modules.setdefault(id(claim.name.module()), claim)
            if known is not claim:
                known.merge(claim)
    return claims


def _claimed_besides(
    names: Model, what: What, given: Any, transform: Transform | None, outputs: _Claims
) -> _Claims:
    """Return what ``inputs=`` or ``grads=`` chooses."""
    if given is False:
        return _Claims()
    option = f"{_OPTIONS[what]}={given!r}"
    if given is None:
        message = f"record({option}): expected False for none, True for the layers that are recorded, or layer queries."
        raise OptionError(message)
    if given is True and not outputs:
        message = (
            f"record({option}): True means the layers whose outputs are recorded, and there are none. "
            f"Name them: {_OPTIONS[what]}='conv1'."
        )
        raise SelectionError(message)
    if given is True:
        return _Claims(
            {
                module: replace(claim, treatment=_besides(claim.treatment, what))
                for module, claim in outputs.modules.items()
            },
            [
                replace(query, treatment=_besides(query.treatment, what), what=what)
                for query in outputs.functions
            ],
        )
    claims = _claimed(names, given, transform, what)
    if not claims:
        message = f"record({option}): no layers were given. False means none, True the layers that are recorded."
        raise SelectionError(message)
    return claims


def _besides(treatment: Treatment, what: What) -> Treatment:
    """Return the treatment of the inputs or gradients of a layer, given that of its outputs."""
    return treatment if what == "gradient" else Treatment(None, treatment.make)


def _flatten(queries: Any, treatment: Treatment) -> Iterator[tuple[Query | None, Treatment]]:
    """Yield the single queries, each with the treatment of the values."""
    if isinstance(queries, Mapping):
        for query, own in queries.items():
            yield from _flatten(query, Treatment.of(query, own, treatment))
    elif isinstance(queries, Iterable) and not isinstance(
        queries, (str, bytes, Tensor, nn.Module, type)
    ):
        for query in queries:
            yield from _flatten(query, treatment)
    else:
        yield queries, treatment


# --- Layers that several queries may choose ------------------------------------------------------------


@dataclass(slots=True)
class _Claim:
    """A module that a query has selected, and how."""

    name: Name
    spellings: list[str]  # how it was called, for messages and as further names
    is_spelled_out: bool
    treatment: Treatment
    by_default: bool  # whether it was selected only as one of all leaf modules

    def merge(self, other: _Claim) -> None:
        """Merge with the claim of another query on the same module.

        A query that spells the module out takes precedence over a pattern; otherwise the first query does.
        """
        self.by_default = self.by_default and other.by_default
        both = self.is_spelled_out and other.is_spelled_out
        if both and not self.treatment.is_same(other.treatment):
            message = (
                f"record(): {self.spellings[0]!r} and {other.spellings[0]!r} are the same module and cannot have two "
                "transforms."
            )
            raise SelectionError(message)
        if other.is_spelled_out and not self.is_spelled_out:
            self.name, self.treatment, self.is_spelled_out = other.name, other.treatment, True
            self.spellings = other.spellings + self.spellings
        else:
            self.spellings += other.spellings


@dataclass(slots=True)
class _Claims:
    """The modules, by their ids, and functions that queries have selected."""

    modules: dict[int, _Claim] = field(default_factory=dict)
    functions: list[FunctionQuery] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.modules or self.functions)


def _claims(model: Model, query: Query | None, treatment: Treatment) -> Iterator[_Claim]:
    spelled = query if isinstance(query, str) and not is_glob(query) else None
    is_spelled_out = spelled is not None or isinstance(query, nn.Module)
    for name in answer(model, query):
        spelling = name.short if spelled is None else spelled
        yield _Claim(name, [spelling], is_spelled_out, treatment, by_default=query is None)


# --- Keys and parents ----------------------------------------------------------------------------------


def _names(model: Model, claims: Collection[_Claim]) -> tuple[str, ...]:
    """All that a module may be called, some of it several times."""
    module = next(iter(claims)).name.module()
    names = [s for name in model.of[id(module)] for s in (name.full, name.short)]
    for claim in claims:
        names += claim.spellings
    return tuple(dict.fromkeys(names))


def _keys(names: list[Name]) -> list[str]:
    """Return the short name of each; if a wrapper and the module inside are both chosen, only the wrapper has it."""
    owners: dict[str, Name] = {}
    for name in names:
        other = owners.get(name.short)
        if other is None or name.full.count(".") <= other.full.count("."):
            owners[name.short] = name
    owners |= {name.full: name for name in names}
    return [name.short if owners[name.short] is name else name.full for name in names]


def _parents(
    model: Model, chosen: list[nn.Module], callers: list[nn.Module]
) -> Iterator[nn.Module]:
    """Return the root, and every called module above chosen ones, or above modules whose functions are chosen (``callers``).

    Callers begin passes themselves: they are included only if they are above a chosen module.
    """
    alone = {*map(id, callers)} - {*map(id, chosen)}
    found = {id(model.names[0].module()): model.names[0].module(), **_above(model, chosen)}
    more = {id(module): module for module in callers} | _above(model, callers)
    return iter((found | {key: more[key] for key in more if key not in alone}).values())


def _above(model: Model, modules: list[nn.Module]) -> dict[int, nn.Module]:
    """Return the called modules above some modules, by their ids."""
    found: dict[int, nn.Module] = {}
    met: set[Name] = set()
    for one in modules:
        for name in model.of[id(one)]:
            above = name.parent
            while above is not None and above not in met:
                met.add(above)
                module = above.module()
                if id(module) not in found and why_not(model, above) is None:
                    found[id(module)] = module
                above = above.parent
    return found
