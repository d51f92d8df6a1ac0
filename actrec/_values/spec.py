"""Nested values: tensors inside tuples, dicts, dataclasses and what libraries derive from them.

:func:`flatten` takes a value apart into its tensors and a :class:`Spec`, which is all the rest, and
``spec.fill(tensors)`` makes such a value again, of new tensors:

>>> import torch
>>> tensors, spec = flatten((torch.zeros(2), {"h": torch.ones(3)}))
>>> spec.fill([t + 1 for t in tensors])
(tensor([1., 1.]), {'h': tensor([2., 2., 2.])})
>>> spec.paths
('[0]', "[1]['h']")

Every use of a nested value is a case of this: a recorded value is ``spec.fill(map(keep, tensors))``, joined
calls are ``spec.fill(map(cat, zip(*calls)))`` where the specs are equal, a table prints the spec, and the
store writes it.

A spec is a program in postfix order, as PyTorch's pytree writes one: the steps of the children stand before
that of their container. So no depth of nesting can exhaust Python's stack, and two specs are equal where their
steps are. PyTorch's pytree itself would lose what matters here: the types of dict and list subclasses, attributes
beside the items (``ModelOutput``), dataclasses that nobody registered, a tensor that stands in two places, and
containers that contain themselves. What is registered there is taken apart as it says.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from .containers import CONSTANTS, Opaque, Value, is_array, opaque, parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "TENSOR",
    "Again",
    "Constant",
    "Container",
    "Spec",
    "flatten",
    "leaves",
    "rebuild",
    "same",
    "tensors",
]

T = TypeVar("T")


# --- Steps -------------------------------------------------------------------------------------------


class Constant(NamedTuple):
    """A step that makes no tensor and no container. Equal constants have one type and one content."""

    value: Any

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or _content(self.value) == _content(other.value)

    @override
    def __ne__(self, other: object) -> bool:
        return not self == other

    @override
    def __hash__(self) -> int:
        return hash(type(self.value))


def _content(value: Any) -> object:
    """What tells constants of one type apart; NaN is equal to itself here."""
    return (value.shape, value.dtype, value.tobytes()) if is_array(value) else repr(value)


class Again(NamedTuple):
    """A step that gives once more what the step number ``step`` made."""

    step: int


@dataclass(slots=True)
class Container:
    """A step that makes a container of what the last open steps made, as many as it has keys."""

    type: type
    keys: Sequence[Any]
    items: int  #: so many are keys of items, the others are names of attributes
    make: Callable[[list[Value]], Value] = field(compare=False, repr=False)
    maxlen: int | None = None  #: of a deque

    @property
    def paths(self) -> list[str]:
        """What one writes behind the container to reach each child."""
        items = (f"[{key!r}]" for key in self.keys[: self.items])
        return [*items, *(f".{name}" for name in self.keys[self.items :])]


#: A step that gives tensor number ``k`` is the ``int`` itself.
Step: TypeAlias = int | Constant | Again | Container


# --- Taking apart and making again ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Close:
    """Waits until the children of a container were taken apart."""

    container: Container
    value: Value


def flatten(
    value: Value, unknown: Callable[[object], object] = opaque, *, stand_ins: bool = True
) -> tuple[list[Tensor], Spec]:
    """Take ``value`` apart into its tensors, each once and in order, and the rest.

    >>> import torch
    >>> tensors, spec = flatten([torch.zeros(2), None, {"h": torch.zeros(3)}])
    >>> [t.shape for t in tensors], spec.count
    ([torch.Size([2]), torch.Size([3])], 2)

    Args:
        value: a tensor, or containers of tensors and constants, nested to any depth.
        unknown: what stands for an object that is neither, such as an open file; by default an
            :class:`Opaque`. It is never asked about tensors, containers, constants and NumPy arrays.
        stand_ins: whether :class:`Fields` stand for a ``Mapping`` that only its own class could make. Otherwise
            it is unknown.

    Returns:
        The tensors themselves, not copies, and the spec. NumPy arrays are copied into it.
    """
    if type(value) is Tensor:
        return [value], TENSOR
    found: list[Tensor] = []
    steps: list[Step] = []
    # By id: the number of a tensor, the step of a container, or None while it is being taken apart.
    met: dict[int, int | None] = {}
    kept: list[Value] = []  # so that no id is used twice while this runs
    pending: list[Value] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, _Close):
            met[id(item.value)] = len(steps)
            steps.append(item.container)
        elif isinstance(item, Tensor):
            number = met.setdefault(id(item), len(found))
            if number == len(found):
                found.append(item)
            steps.append(number)  # type: ignore[arg-type]  # a tensor always has a number
        elif isinstance(item, CONSTANTS):
            steps.append(Constant(item))
        elif id(item) in met:
            at = met[id(item)]
            steps.append(Constant(opaque(item)) if at is None else Again(at))
        elif (taken := parts(item)) is None or not (taken.is_own or stand_ins):
            steps.append(Constant(copy.copy(item) if is_array(item) else unknown(item)))
        else:
            met[id(item)] = None
            kept.append(item)
            facts = taken.keys, taken.items, taken.make, taken.maxlen
            container = Container(type(item), *facts)
            pending.append(_Close(container, item))
            pending += taken.children[::-1]
    return found, Spec(tuple(steps), len(found))


@dataclass(frozen=True)
class Spec:
    """What a value is besides its tensors. Equal specs make values of the same types and constants."""

    steps: tuple[Step, ...] = field(repr=False)
    count: int  #: of the tensors

    @override
    def __hash__(self) -> int:
        return hash((len(self.steps), self.count))

    def fill(self, tensors: Iterable[Value]) -> Value:
        """Return a value of these tensors, in the places of those that it was made from.

        Containers are new, and of the types that they were; a tensor or a container that stood in several
        places does so again.
        """
        new = tensors if type(tensors) is list else list(tensors)
        return self.fold(new.__getitem__, _value_of, _made)

    def fold(
        self,
        tensor: Callable[[int], T],
        constant: Callable[[Constant], T],
        container: Callable[[Container, list[T]], T],
    ) -> T:
        """Return what the functions make of the tensors by number, of the constants, and of containers and their children."""
        made: list[T] = []
        open_steps: list[T] = []
        for step in self.steps:
            if isinstance(step, int):
                new = tensor(step)
            elif isinstance(step, Constant):
                new = constant(step)
            elif isinstance(step, Again):
                new = made[step.step]
            else:
                at = len(open_steps) - len(step.keys)
                new = container(step, open_steps[at:])
                del open_steps[at:]
            made.append(new)
            open_steps.append(new)
        return made[-1]

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """For each tensor, what one writes behind the value to reach it where it stands first: ``"[1]['h']"``."""
        first = {number: path for path, number in reversed(self.places)}
        return tuple(first[number] for number in sorted(first))

    @cached_property
    def places(self) -> tuple[tuple[str, int], ...]:
        """All places of tensors, in order: the path, and the number of the tensor.

        A field of a ``ModelOutput`` is an item and an attribute at the same time, and counts as the item.
        """
        Places: TypeAlias = tuple[tuple[str, int], ...]

        def joined(container: Container, children: list[Places]) -> Places:
            items = children[: container.items]
            return tuple(
                (step + path, number)
                # What has no step is no tensor of the value, such as the data of an array that was stored.
                for at, (step, child) in enumerate(zip(container.paths, children, strict=False))
                if at < len(items) or child not in items
                for path, number in child
            )

        return self.fold(lambda number: (("", number),), lambda _: (), joined)

    @property
    def kind(self) -> str:
        """What the value is, for people: ``""`` for a tensor, else ``"tuple of 2"``, ``"dict of 3"``, ``"int"``."""
        last = self.steps[-1]
        if isinstance(last, Container):
            many = len(last.keys) if issubclass(last.type, tuple) else last.items
            counts = many or issubclass(last.type, (tuple, list, dict))
            return f"{last.type.__name__} of {many}" if counts else last.type.__name__
        if type(last) is not Constant:
            return ""
        value = last.value
        return value.type.rpartition(".")[2] if isinstance(value, Opaque) else type(value).__name__

    @override
    def __str__(self) -> str:
        return repr(self.fill([_A_TENSOR] * self.count))


def _value_of(constant: Constant) -> Value:
    return constant.value


def _made(container: Container, children: list[Value]) -> Value:
    return container.make(children)


class _ATensor:
    @override
    def __repr__(self) -> str:
        return "a tensor"


_A_TENSOR: Final = _ATensor()

#: The spec of a value that is a tensor and nothing else.
TENSOR: Final = Spec((0,), 1)


def tensors(value: Value) -> list[Tensor]:
    """Return the tensors of a value, each once, in order."""
    return [value] if type(value) is Tensor else flatten(value)[0]


def leaves(value: Value) -> list[tuple[str, Tensor]]:
    """Return the tensors of a value, each with what one writes behind the value to reach it.

    >>> import torch
    >>> [path for path, _ in leaves((torch.zeros(2), {"h": torch.zeros(3)}))]
    ['[0]', "[1]['h']"]

    A tensor that stands in several places is there for each of them.
    """
    if type(value) is Tensor:
        return [("", value)]
    found, spec = flatten(value)
    return [(path, found[number]) for path, number in spec.places]


def same(one: Value, other: Value) -> bool:
    """Whether two values have one structure, and equal tensors and constants in it.

    >>> import torch
    >>> same((torch.ones(2), "a"), (torch.ones(2), "a")), same([torch.ones(2)], (torch.ones(2),))
    (True, False)
    """
    (mine, spec), (theirs, other_spec) = flatten(one), flatten(other)
    return spec == other_spec and all(map(_equal, mine, theirs))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    except RuntimeError:  # tensors of kinds that cannot be compared
        return False


def rebuild(
    value: Value,
    change: Callable[[Tensor], Value],
    unknown: Callable[[object], object] = opaque,
    *,
    stand_ins: bool = True,
) -> Value:
    """Return a value like ``value``, with ``change(t)`` in the place of every tensor ``t``. See :func:`flatten`."""
    if type(value) is Tensor:
        return change(value)
    found, spec = flatten(value, unknown, stand_ins=stand_ins)
    return spec.fill([change(tensor) for tensor in found])
