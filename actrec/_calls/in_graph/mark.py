"""What makes compiled code that calls a recorded module miss while a block is open, and match again behind it.

Hooks that are added to a module after it was compiled are ignored. But what the compiler has compiled holds only as long as
a module has no ``forward`` of its own. So while a block is open, each module with a hook has one: a copy of its class's. Then
all code with such a module is compiled once more, as its user compiles it, now with the hooks; and what was compiled before
stays as it is, and is used again when the copy is gone.

The compiler knows a forward by its code. So each selection has code of its own, and the same one when it is recorded again.
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

from actrec._calls.forwards import Forward, placing, without_ended
from actrec._torch import REPLICATE, is_compiled_wrapper

#: The copies of forwards that one selection has, by what they are copies of.
_Copies: TypeAlias = dict[Any, types.FunctionType]

#: Of so many selections of a model, the latest, what was compiled is kept.
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
                if not is_compiled_wrapper(module):  # which calls what is compiled, and is not
                    self._place(module, copies)

    @override
    def __exit__(self, *_: object) -> None:
        with placing:
            while self._placed:
                self._placed[-1].remove()
                self._placed.pop()

    def _copies(self) -> _Copies:
        """Those of the selection, if it is one of the latest."""
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
    """One forward that a module has of its own while a block is open."""

    module: nn.Module
    forward: types.MethodType
    own: Any  # what was set on the module itself, normally nothing

    def place(self) -> None:
        attributes = vars(self.module)
        for name in _METHODS:
            attributes.setdefault(name, _Inert(self, name))
        _marks.setdefault(self.module, []).append(self)
        attributes["forward"] = self.forward

    def remove(self) -> None:
        """Take it off again, unless somebody has put another forward in its place meanwhile."""
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
        if attributes.get("forward") is self.forward:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own
            return
        # A block that was entered later ends later: from now on it stands for what this one stood for.
        above = _standing(attributes.get("forward"), others)
        while above is not None:
            if above.own is self.forward:
                above.own = own
            above = _standing(above.own, others)


def _standing(forward: Any, marks: list[_Mark]) -> _Mark | Forward | None:
    """What has set ``forward`` on the module while its block is open: one of its marks, or a forward that stands in."""
    if isinstance(forward, Forward):
        return forward
    return next((mark for mark in marks if mark.forward is forward), None)


#: What makes a copy, a pickle or a replica of a module.
_METHODS: Final = ("__getstate__", REPLICATE)

#: All that are there.
_marks: MutableMapping[nn.Module, list[_Mark]] = weakref.WeakKeyDictionary()


def _copied(function: Any) -> types.FunctionType:
    """A copy of a function, with code that equals no other."""
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
    """A method that calls a forward that is no function of the class's."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if own is not None else original(self, *args, **kwargs)

    forward.__wrapped__ = original  # type: ignore[attr-defined]  # whose parameters it has
    return forward


class _Inert:
    """Stands in for a method of a module with a mark, and returns what that returns without the mark."""

    def __init__(self, mark: _Mark, name: str) -> None:
        self._mark = mark
        self._name = name

    def __call__(self) -> Any:
        module = self._mark.module
        found = getattr(type(module), self._name)(module)
        state = vars(found) if isinstance(found, type(module)) else found
        if not isinstance(state, dict):  # of a class that has other ideas of it
            return found
        own = without_ended(self._mark.own)
        kept = {name: value for name, value in state.items() if not isinstance(value, _Inert)}
        kept.pop("forward", None)
        if own is not None:
            kept["forward"] = own
        if state is found:
            return kept
        state.clear()
        state.update(kept)
        return found
