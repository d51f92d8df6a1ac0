"""Invalidates compiled code that calls a recorded module while a block is open, and makes it valid again afterwards.

Compiled code ignores hooks that are added to a module later. But it is valid only as long as the module has no ``forward``
attribute. So while a block is open, each module with a hook has one: a copy of its class's ``forward``. All code that calls
such a module is then compiled once more, with the hooks. The previously compiled code is kept, and used again when the copy
is removed.

The compiler identifies a forward by its code object. So each selection has its own, and reuses it when it is recorded again.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from torch import nn
from typing_extensions import override

from actrec._calls.forwards import Forward, State, placing, without_any, without_ended
from actrec._torch import REPLICATE, is_compiled_wrapper

#: The copies of forwards that one selection has, by what they are copies of.
_Copies: TypeAlias = dict[Any, types.FunctionType]

#: The compiled code of so many selections of a model is kept, the latest ones.
_MOST: Final = 4

#: By model, and by what is recorded of it.
_copies: MutableMapping[nn.Module, OrderedDict[Hashable, _Copies]] = weakref.WeakKeyDictionary()


class Marks(AbstractContextManager[None]):
    """The marks of one block, on all modules that have a hook of it."""

    def __init__(self, model: nn.Module, hooks: Sequence[tuple[nn.Module, Hashable]]) -> None:
        """``hooks`` are the modules, once for each hook, with what kind of hook it is."""
        self._model = model
        self._hooks = hooks
        self._placed: list[_Mark] = []

    @override
    def __enter__(self) -> None:
        modules = {id(module): module for module, _ in self._hooks}
        with placing:
            copies = self._copies()
            for module in modules.values():
                if not is_compiled_wrapper(module):  # itself not compiled
                    self._place(module, copies)

    @override
    def __exit__(self, *_: object) -> None:
        with placing:
            while self._placed:
                self._placed[-1].remove()
                self._placed.pop()

    def _copies(self) -> _Copies:
        """Return the copies that the selection had before, if it is one of the latest; else none."""
        of_model = _copies.setdefault(self._model, OrderedDict())
        selection = tuple((id(module), kind) for module, kind in self._hooks)
        found = of_model.pop(selection, {})
        of_model[selection] = found
        while len(of_model) > _MOST:
            of_model.popitem(last=False)
        return found

    def _place(self, module: nn.Module, copies: _Copies) -> None:
        attributes = vars(module)
        own = attributes.get("forward")
        original = type(module).forward if own is None else own
        if original not in copies:
            is_plain = own is None and isinstance(original, types.FunctionType)
            copies[original] = _copied(original if is_plain else _standing_for(original, own))
        mark = _Mark(module, types.MethodType(copies[original], module), own)
        self._placed.append(mark)
        mark.place()


@dataclass(eq=False, slots=True)
class _Mark:
    """The ``forward`` attribute that one module has while a block is open."""

    module: nn.Module
    forward: types.MethodType
    own: Any  # what was set on the module itself, normally nothing

    def place(self) -> None:
        attributes = vars(self.module)
        for name in _METHODS:
            if isinstance(attributes.get(name), (State, type(None))):
                attributes[name] = _Inert(self, name)
        _marks.setdefault(self.module, []).append(self)
        attributes["forward"] = self.forward

    def remove(self) -> None:
        """Remove this forward again, unless other code has replaced it meanwhile."""
        others = [mark for mark in _marks.get(self.module, ()) if mark is not self]
        _marks[self.module] = others
        attributes = vars(self.module)
        own = without_ended(self.own)
        for name in _METHODS:
            method = attributes.get(name)
            if isinstance(method, _Inert) and method._mark is self:
                del attributes[name]
                if others:
                    attributes[name] = _Inert(others[0], name)
                elif name == _STATE and _is_replaced(attributes.get("forward"), self.forward, own):
                    attributes[name] = State(self.module)
        if attributes.get("forward") is self.forward:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own
            return
        # A block that was entered later ends later: from now on, its forward replaces what this one replaced.
        above = _standing(attributes.get("forward"), others)
        while above is not None:
            if above.own is self.forward:
                above.own = own
            above = _standing(above.own, others)


def _is_replaced(forward: Any, marked: Any, own: Any) -> bool:
    """Whether a block that ends early has replaced the forward of a module, besides the one that ``marked`` is of."""
    return isinstance(own if forward is marked else forward, Forward)


def _standing(forward: Any, marks: list[_Mark]) -> _Mark | Forward | None:
    """Return the mark that has set ``forward`` on the module, or ``forward`` if it is a :class:`Forward`."""
    if isinstance(forward, Forward):
        return forward
    return next((mark for mark in marks if mark.forward is forward), None)


#: The methods that make a copy, a pickle or a replica of a module.
_STATE: Final = "__getstate__"
_METHODS: Final = (_STATE, REPLICATE)
#: The marks of all open blocks.
_marks: MutableMapping[nn.Module, list[_Mark]] = weakref.WeakKeyDictionary()


def _copied(function: Any) -> types.FunctionType:
    """Return a copy of a function, with a code object of its own."""
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(vars(function))
    copy.__doc__, copy.__annotations__ = function.__doc__, function.__annotations__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return copy


def _standing_for(original: Any, own: Any) -> Callable[..., Any]:
    """Return a method that calls a forward that is not a plain function of the class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if own is not None else original(self, *args, **kwargs)

    forward.__wrapped__ = original  # type: ignore[attr-defined]  # whose parameters it has
    return forward


class _Inert:
    """Replaces a method of a module that has a mark, and returns what the method would return without the mark."""

    def __init__(self, mark: _Mark, name: str) -> None:
        self._mark = mark
        self._name = name

    def __call__(self) -> Any:
        module = self._mark.module
        found = getattr(type(module), self._name)(module)
        state = vars(found) if isinstance(found, type(module)) else found
        if not isinstance(state, dict):  # the class has its own kind of state
            return found
        own = without_any(self._mark.own)
        kept = {name: value for name, value in state.items() if not isinstance(value, _Inert)}
        kept.pop("forward", None)
        if own is not None:
            kept["forward"] = own
        if state is found:
            return kept
        state.clear()
        state.update(kept)
        return found
