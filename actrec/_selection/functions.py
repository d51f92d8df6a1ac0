"""Functions inside modules: ``"layer1.*:relu"`` selects the calls of ``relu`` by the forwards of those modules themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeGuard

from torch import nn

from actrec.errors import SelectionError

from .diagnosis import why_not
from .globs import glob, is_glob
from .model import Model
from .names import Name
from .queries import answer
from .treatment import Treatment, What

#: Operators that are also spelled with an ``r`` or an ``i`` in front: ``__radd__``, ``iadd``.
_OPERATORS: Final = frozenset(
    {"add", "sub", "mul", "matmul", "truediv", "div", "floordiv", "mod", "pow"}
    | {"and", "or", "xor", "lshift", "rshift"}
)
#: PyTorch's names of operators that Python calls differently.
_SPELLED: Final = {
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
    "pos": "positive",
}


def canonical(name: str) -> str:
    """Return the one name of a function, however it is spelled.

    >>> [canonical(name) for name in ("add", "__add__", "__radd__", "iadd", "add_", "__rtruediv__", "rand")]
    ['add', 'add', 'add', 'add', 'add', 'div', 'rand']
    """
    is_special = name.startswith("__") and name.endswith("__")
    name = name[2:-2] if is_special else name
    is_operator = name[1:] in _OPERATORS
    if is_operator and name[0] in ("ri" if is_special else "i"):
        name = name[1:]
    elif name[:1] != "_":
        name = name.removesuffix("_")
    return _SPELLED.get(name, name)


@dataclass(frozen=True, slots=True)
class Owner:
    """A module whose functions are to be recorded."""

    key: str  #: the part before the colon in the names of its functions
    module: nn.Module
    names: tuple[str, ...]  #: all parts before the colon by which its functions may be asked for


@dataclass(frozen=True, slots=True)
class FunctionQuery:
    """The functions that one query chooses, and which of their values to record."""

    query: str  #: as it was written
    owners: tuple[Owner, ...]
    function: str  #: a canonical name, or a glob
    treatment: Treatment
    what: What
    is_spelled_out: bool  #: without globs: a function of one name, called by one module

    def asks_for(self, name: str) -> bool:
        """Return whether the query chooses functions of a (canonical) name."""
        if is_glob(self.function):
            return glob(self.function).fullmatch(name) is not None
        return name == self.function


def is_function_query(query: object, model: Model) -> TypeGuard[str]:
    """Return whether a query chooses functions: it has a colon, and no module has that name."""
    return isinstance(query, str) and ":" in query and model.spelled(query) is None


def ask(model: Model, query: str, treatment: Treatment, what: What) -> FunctionQuery:
    """Answer a function query.

    Raises:
        SelectionError: no module is named before the colon, or no function after it.
    """
    module, _, function = query.rpartition(":")
    if not function:
        message = (
            f"record(): {query!r} names no function after the colon. Write {module + ':*'!r} for all that "
            "are called there."
        )
        raise SelectionError(message)
    try:
        names = [*dict.fromkeys(_innermost(model, name) for name in _modules(model, module))]
    except SelectionError as error:
        message = f"{error} It is the part before the colon of {query!r}, which names the module that calls a function."
        raise SelectionError(message) from None
    owners = {id(name.module()): _owner(model, name, module) for name in names}
    is_spelled_out = not (is_glob(function) or is_glob(module))
    function = function if is_glob(function) else canonical(function)
    return FunctionQuery(query, tuple(owners.values()), function, treatment, what, is_spelled_out)


def _modules(model: Model, query: str) -> Iterator[Name]:
    if query == "**" and why_not(model, model.names[0]) is None:
        yield model.names[0]
        with suppress(SelectionError):  # it may have no modules that are called
            yield from answer(model, query)
        return
    yield from answer(model, query)


def _innermost(model: Model, name: Name) -> Name:
    """Return the module inside wrappers: its forward calls the functions."""
    same = [one for one in model.by_short.get(name.short, ()) if why_not(model, one) is None]
    return max([name, *same], key=lambda one: len(one.full))


def _owner(model: Model, name: Name, spelling: str) -> Owner:
    names = [s for one in model.of[id(name.module())] for s in (one.full, one.short)]
    wrappers = [one.full for one in model.by_short.get(name.short, ())]
    spelled = [] if is_glob(spelling) else [spelling]
    return Owner(name.short, name.module(), tuple(dict.fromkeys(names + wrappers + spelled)))
