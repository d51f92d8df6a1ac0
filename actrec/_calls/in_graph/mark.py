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
from functools import update_wrapper
from typing import Any, Final, TypeAlias

from torch import nn
from typing_extensions import override

from actrec._calls.forwards import State, own_of_marks, placing, take_off
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
        self._placed: list[tuple[nn.Module, types.MethodType]] = []

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
                module, forward = self._placed[-1]
                take_off(module, forward, own_of_marks[forward.__func__])
                for name in _METHODS:
                    State.release(module, name)
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
        forward = types.MethodType(copies[original], module)
        own_of_marks[copies[original]] = own
        self._placed.append((module, forward))
        for name in _METHODS:
            State.hold(module, name)
        attributes["forward"] = forward


#: The methods that make a copy, a pickle or a replica of a module.
_METHODS: Final = ("__getstate__", REPLICATE)


def _copied(function: Any) -> types.FunctionType:
    """Return a copy of a function, with a code object of its own."""
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        argdefs=function.__defaults__,
        closure=function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    return copy


def _standing_for(original: Any, own: Any) -> Callable[..., Any]:
    """Return a method that calls a forward that is not a plain function of the class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if own is not None else original(self, *args, **kwargs)

    forward.__wrapped__ = original  # type: ignore[attr-defined]  # whose parameters it has
    return forward
