"""Nested values: tensors inside tuples, dicts, dataclasses and what libraries derive from them.

:func:`flatten` takes a value apart into its tensors and a :class:`Spec`, which has all the rest, and
``spec.fill(tensors)`` makes such a value of new tensors:

>>> import torch
>>> tensors, spec = flatten((torch.zeros(2), {"h": torch.ones(3)}))
>>> spec.fill([t + 1 for t in tensors])
(tensor([1., 1.]), {'h': tensor([2., 2., 2.])})
>>> spec.paths
(('[0]', 0), ("[1]['h']", 1))

Every use of a nested value is a case of this: a recorded value is ``spec.fill(map(keep, tensors))``, joined
calls are ``spec.fill(map(cat, zip(*calls)))`` if the specs are equal, a table prints the spec, and the
store writes it.

A spec is a program in postfix order, like that of PyTorch's pytree: the steps of the children come before
the step of their container. So no depth of nesting can exhaust Python's stack, and specs are equal if their
steps are. PyTorch's pytree itself would lose what matters here: the types of dict and list subclasses, attributes
besides the items (``ModelOutput``), unregistered dataclasses, tensors that occur twice, and
containers that contain themselves. Classes that are registered there are taken apart by their registered functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Final, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from . import containers, nodes
from .constants import CONSTANTS, Constant, is_array
from .containers import Container, Value
from .stand_ins import opaque

T = TypeVar("T")


# --- The structure -------------------------------------------------------------------------------------


class Again(NamedTuple):
    """A step that gives the result of step number ``step`` again."""

    step: int


#: The ``int`` ``k`` is the step that gives tensor number ``k``; a container is made of the results of the last open steps.
Step: TypeAlias = int | Constant | Again | Container


class _ATensor:
    @override
    def __repr__(self) -> str:
        return "a tensor"


_A_TENSOR: Final = _ATensor()


@dataclass(frozen=True)
class Spec:
    """A value without its tensors. Equal specs make values of the same types and constants."""

    steps: tuple[Step, ...] = field(repr=False)
    count: int  #: of the tensors

    @override
    def __hash__(self) -> int:
        return hash((len(self.steps), self.count))

    def fill(self, tensors: Iterable[Value]) -> Value:
        """Return the value with these tensors in the places of the original ones.

        Containers are new, and of the same types; a tensor or a container that occurred several times does so again.
        """
        new = tensors if type(tensors) is list else list(tensors)
        return self.fold(new.__getitem__, attrgetter("value"), lambda one, parts: one.make(parts))

    def fold(
        self,
        tensor: Callable[[int], T],
        constant: Callable[[Constant], T],
        container: Callable[[Container, list[T]], T],
    ) -> T:
        """Return the result of the functions, applied to the tensors (by number), the constants, and each container with its children."""
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
    def paths(self) -> tuple[tuple[str, int], ...]:
        """The places of tensors, in order: the index as one writes it after the value, and the number of the tensor.

        A field of a ``ModelOutput`` is both an item and an attribute, and counts as an item.
        """
        Paths: TypeAlias = tuple[tuple[str, int], ...]

        def behind(container: Container, children: list[Paths]) -> Paths:
            items, attributes = children[: container.items], children[container.items :]
            children = items + [() if child in items else child for child in attributes]
            # A child without a path is not a tensor of the value, such as the data of a stored array.
            steps = zip(container.paths, children, strict=False)
            return tuple((step + path, number) for step, child in steps for path, number in child)

        return self.fold(lambda number: (("", number),), lambda _: (), behind)

    @property
    def kind(self) -> str:
        """A description for messages and tables: ``""`` for a tensor, else ``"tuple of 2"``, ``"dict of 3"``, ``"int"``."""
        last = self.steps[-1]
        return last.kind if isinstance(last, (Constant, Container)) else ""

    @override
    def __str__(self) -> str:
        return repr(self.fill([_A_TENSOR] * self.count))


#: The spec of a value that is a single tensor.
TENSOR: Final = Spec((0,), 1)


# --- Taking apart --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Close:
    """Waits until the children of a container were taken apart."""

    container: Container
    value: Value


def flatten(
    value: Value, unknown: Callable[[object], object] = opaque, *, stand_ins: bool = True
) -> tuple[list[Tensor], Spec]:
    """Take ``value`` apart into its tensors, each once and in order, and a spec.

    >>> import torch
    >>> tensors, spec = flatten([torch.zeros(2), None, {"h": torch.zeros(3)}])
    >>> [t.shape for t in tensors], spec.count
    ([torch.Size([2]), torch.Size([3])], 2)

    Args:
        value: a tensor, or containers of tensors and constants, nested to any depth.
        unknown: returns a replacement for an object that is neither, such as an open file; by default an
            :class:`Opaque`. It is never called for tensors, containers, constants and NumPy arrays.
        stand_ins: whether a ``Mapping`` that only its own class could make becomes a :class:`Fields`. Otherwise
            it is unknown.

    Returns:
        The tensors themselves, not copies, and the spec. NumPy arrays are copied into it.
    """
    if type(value) is Tensor:
        return [value], TENSOR
    found: list[Tensor] = []
    numbers: dict[int, int] = {}  # of tensors, by id
    steps: list[Step] = []
    met: dict[int, int | None] = {}  # the steps of containers, by id; None while one is taken apart
    kept: list[Value] = []  # keeps containers alive, so that no id is reused
    pending: list[Value] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, _Close):
            met[id(item.value)] = len(steps)
            steps.append(item.container)
        elif isinstance(item, Tensor):
            number = numbers.setdefault(id(item), len(found))
            if number == len(found):
                found.append(item)
            steps.append(number)
        elif isinstance(item, CONSTANTS):
            steps.append(Constant(item))
        elif id(item) in met:
            at = met[id(item)]
            steps.append(Constant(opaque(item)) if at is None else Again(at))
        elif taken := containers.parts(item) or nodes.parts(item, stand_ins=stand_ins):
            met[id(item)] = None
            kept.append(item)
            container, children = taken
            pending.append(_Close(container, item))
            pending += children[::-1]
        else:
            steps.append(Constant(copy.copy(item) if is_array(item) else unknown(item)))
    return found, Spec(tuple(steps), len(found))


# --- Ways to use it ------------------------------------------------------------------------------------


def tensors(value: Value) -> list[Tensor]:
    """Return the tensors of a value, each once, in order."""
    return [value] if type(value) is Tensor else flatten(value)[0]


def leaves(value: Value) -> list[tuple[str, Tensor]]:
    """Return the tensors of a value, each with its path: the index as one writes it after the value.

    >>> import torch
    >>> [path for path, _ in leaves((torch.zeros(2), {"h": torch.zeros(3)}))]
    ['[0]', "[1]['h']"]

    A tensor that occurs several times is listed each time.
    """
    found, spec = flatten(value)
    return [(path, found[number]) for path, number in spec.paths]


def same(one: Value, other: Value) -> bool:
    """Whether two values have the same structure, with equal tensors and constants.

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
    except RuntimeError:  # PyTorch cannot compare such tensors
        return False


def itself(value: T) -> T:
    """Return ``value``. As ``unknown=``, it keeps unknown objects as they are."""
    return value


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
    if isinstance(value, CONSTANTS):
        return value
    found, spec = flatten(value, unknown, stand_ins=stand_ins)
    return spec.fill([change(tensor) for tensor in found])
