"""The functions that a block records, the modules that call them, and why some were never recorded."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import nn

from actrec._selection.functions import FunctionQuery, Owner
from actrec._selection.globs import is_glob
from actrec._selection.names import is_called
from actrec._selection.nearest import nearest
from actrec._text import listed
from actrec._torch import children_of

from .forwards import Forward
from .function_mode import Aside, Function, Make, Watcher
from .own_calls import Unrecorded
from .session import Session


class Missing(NamedTuple):
    """The queries for which nothing was recorded, each with the likely cause, and whether an owner was called at all."""

    causes: dict[str, str]
    is_called: bool


class Functions:
    """The functions that a block records, and the modules that call them."""

    def __init__(self, queries: tuple[FunctionQuery, ...], session: Session, make: Make) -> None:
        self._queries = queries
        self._aside = Aside(session, make)
        asking: dict[int, list[FunctionQuery]] = {}
        owners: dict[int, Owner] = {}
        for query in queries:
            for owner in query.owners:
                owners.setdefault(id(owner.module), owner)
                asking.setdefault(id(owner.module), []).append(query)
        self._watchers = {
            module: Watcher(self._aside, owner, asking[module]) for module, owner in owners.items()
        }
        self._make_named()

    @property
    def owners(self) -> list[Owner]:
        """The modules whose functions are asked for."""
        return [watcher.owner for watcher in self._watchers.values()]

    def _make_named(self) -> None:
        """Make the tracks of named functions. Those of a named module appear in the recording before they are called."""
        for watcher in self._watchers.values():
            for query in watcher.queries:
                if not is_glob(query.function):
                    function = watcher.named(query.function)
                    if query.is_spelled_out:
                        watcher.publish(function)

    def forwards(self) -> Iterator[Forward]:
        """Make the replacements of the forwards of the owners, and of all modules below them."""
        for watcher in self._watchers.values():
            yield Forward(watcher.owner.module, watcher)
        below = {
            id(module): module
            for watcher in self._watchers.values()
            for module in watcher.owner.module.modules()
        }
        for module in below.values():
            is_script = isinstance(module, torch.jit.ScriptModule)
            if id(module) not in self._watchers and not is_script and is_called(module):
                yield Forward(module, self._aside)

    def end(self) -> None:
        """The block has ended: drop everything that refers to the recording."""
        self._watchers.clear()
        del self._aside

    def replicated(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the modules that ``DataParallel`` may make replicas of."""
        if self._watchers:
            yield model
            yield from (m.module for m in model.modules() if isinstance(m, nn.DataParallel))

    # --- Never silent ---------------------------------------------------------------------------------------

    def missing(self) -> Missing:
        """Return the queries for which nothing was recorded."""
        causes: dict[str, str] = {}
        for query in self._queries:
            cause = self._cause(query)
            causes |= self._transformed(query) if cause is None else {query.query: cause}
        return Missing(causes, any(watcher.ran for watcher in self._watchers.values()))

    def _asked(self, query: FunctionQuery) -> list[tuple[str, str, Function]]:
        """Return the functions that a query matches, each with its module and name, of those known so far."""
        return [
            (watcher.owner.key, name, function)
            for watcher in (self._watchers[id(owner.module)] for owner in query.owners)
            for name, function in watcher.by_name.items()
            if query.asks_for(name)
        ]

    def _transformed(self, query: FunctionQuery) -> dict[str, str]:
        """Return the functions that a glob matches, besides recorded ones, and that could not be recorded when called."""
        where = Unrecorded.TRANSFORMED
        return {
            f"{key}:{name}": f"it was called {where.value}"
            for key, name, function in self._asked(query)
            if function.track and not function.track.called and function.track.unrecorded[where]
        }

    def _cause(self, query: FunctionQuery) -> str | None:
        watchers = [self._watchers[id(owner.module)] for owner in query.owners]
        asked = self._asked(query)
        tracks = [function.track for *_, function in asked if function.track is not None]
        if any(track.called or track.kept or track.error for track in tracks):
            return None
        one = len(watchers) == 1
        who = repr(watchers[0].owner.key) if one else f"the {len(watchers)} modules that it names"
        if not any(watcher.ran for watcher in watchers):
            return f"{who} {'was' if one else 'were'} never called, so no function was called there"
        if all(watcher.fused == watcher.ran for watcher in watchers):
            return f"{who} {'runs' if one else 'run'} fused in evaluation, and recording inside would turn that off. Record the module"
        elsewhere: Counter[Unrecorded] = Counter()
        for counted in [*(w.unrecorded for w in watchers), *(t.unrecorded for t in tracks)]:
            elsewhere.update(counted)
        for where in Unrecorded:
            if elsewhere[where]:
                return f"{who} {'was' if one else 'were'} called {where.value}"
        silent = sorted({name for _, name, function in asked if function.calls})
        if silent:
            return f"{listed(silent)} was called there, and returned no tensor"
        return self._instead(query, watchers, who)

    def _instead(self, query: FunctionQuery, watchers: list[Watcher], who: str) -> str:
        """Say what was called there, and which name may have been meant."""
        if all(map(_runs_later, watchers)):
            return f"the forward of {who} is a generator or a coroutine: what it calls when it is resumed is not seen"
        called = sorted(
            {n for w in watchers for n, function in w.by_name.items() if function.calls}
        )
        hint = nearest(query.function, called) if called else ""
        there = f"Called there: {listed(called) if called else 'nothing'}."
        said = there if hint.startswith("There") else f"{there} {hint}".rstrip()
        if any(children_of(watcher.owner.module) for watcher in watchers):
            inside = f"{watchers[0].owner.key}.**".lstrip(".")
            said += f" Functions that modules inside call are recorded by the names of those, such as {f'{inside}:{query.function}'!r}."
        return f"{who} did not call it. {said} {_UNSEEN}"


_UNSEEN: Final = (
    "Not seen: functions that PyTorch's own functions call (multi_head_attention_forward, say), torch.autograd.Function.apply, "
    "and code in C++ or TorchScript"
)


def _runs_later(watcher: Watcher) -> bool:
    """Whether the forward of a module returns before it has run."""
    forward = type(watcher.owner.module).forward
    kinds = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
    return any(is_kind(forward) for is_kind in kinds)
