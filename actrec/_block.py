"""The ``with`` block of ``record()``: places the hooks, returns the recorder, removes the hooks, and warns."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, NoReturn

from torch import nn
from typing_extensions import override

from actrec._calls.caller import Caller
from actrec._calls.capture import Capture
from actrec._calls.compiled import refuse_compiling
from actrec._calls.destination import Destination, Memory
from actrec._calls.forwards import Forward
from actrec._calls.function_mode import stop_key
from actrec._calls.functions import Functions, Missing
from actrec._calls.hooks import Event, Hook
from actrec._calls.options import Options
from actrec._calls.placing import Hooks
from actrec._calls.recorder import Recorder
from actrec._calls.self_test import offload_for
from actrec._calls.session import Session
from actrec._calls.stop_early import EarlyStop
from actrec._calls.track import Track
from actrec._calls.tracks import Tracks
from actrec._calls.warnings import warned_of
from actrec._selection.names import type_name
from actrec._selection.selection import Choice, Selection
from actrec._torch import is_of_compiler
from actrec._values.fsdp import frees_weights

from .errors import ActrecError, ResumeWarning


class Block(AbstractContextManager[Recorder[Any]]):
    """The context manager that ``record()`` returns. It can be entered once."""

    def __init__(self, model: nn.Module, selection: Selection, options: Options) -> None:
        self._model = model
        self._selection = selection
        self._options = options
        self._capture = Capture.asked_for(options, share=not frees_weights(model))
        stop = EarlyStop() if options.stop_early else None
        self._session = Session(stop=stop)
        if options.compiled:
            from ._calls.in_graph.room import Room  # noqa: PLC0415

            self._session.stance = Room()
        self._session.offload = offload_for(self._capture, self._session.passes)
        self._warned_of_resuming = False
        self._yielded: Recorder | None = None  # kept here too: the user may not keep it

    @override
    def __enter__(self) -> Recorder[Any]:
        refuse_compiling()
        if self._yielded is not None:
            message = "record(): this block was entered before. Call record() again for another recording."
            raise ActrecError(message)
        hooks = Hooks()
        with ExitStack() as stack:
            self._destination = self._opened()
            self._tracks = tracks = Tracks(self._session, self._capture, self._destination)
            stack.callback(self._destination.close)
            self._warn_of_resuming(stacklevel=2)
            stack.callback(self._session.close)
            for choice in self._selection.choices:
                tracks.add(choice)
            recorder = Recorder[Any](type_name(self._model), self._selection, tracks)
            self._functions = Functions(
                self._selection.functions, self._session, tracks.add_function
            )
            stack.callback(self._functions.end)
            stack.enter_context(self._session.stance)
            for forward in self._forwards():
                stack.callback(forward.remove)
                forward.place()
            stack.callback(hooks.remove)
            plan = [*self._plan()]
            hooks.place(plan)
            stack.enter_context(self._session.stance.marks(self._model, plan))
            stack.callback(tracks.end)
            # Runs also when the block is garbage-collected before it exited, as in a generator.
            self._clean_up = weakref.finalize(recorder, stack.pop_all().close)
            self._clean_up.atexit = False
        self._session.begin()
        self._yielded = recorder
        return recorder

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        choices = self._tracks.choices
        recorder = self._yielded
        assert recorder is not None  # noqa: S101  # it was entered
        missing = self._end(recorder, error)
        failure = self._failure()
        if error is None and failure is not None:
            raise failure
        if error is None:
            self._warn(recorder, choices, missing)
        else:
            for note in self._notes(error, failure):
                error.add_note(note)

    def _end(self, recorder: Recorder[Any], error: BaseException | None) -> Missing:
        """Record nothing from now on, drop the units that are open, remove the hooks, and close the destination.

        Return the functions of which nothing was recorded.
        """
        units = recorder._unit_recorder
        self._session.end(interrupted=error is not None)
        self._tracks.choices = {}
        units.drop_open()
        self._destination.error = None if error is None else type(error).__name__
        missing = self._functions.missing()
        self._clean_up()
        units.forget_from(recorder.num_passes)
        return missing

    def _failure(self) -> Exception | None:
        """Return an error that nobody has seen, because it happened after the last call, or because the model caught it."""
        session = self._session
        failure = session.unseen or self._destination.failure()
        failure = failure or self._tracks.unmasked(session.passes.raised)
        return failure or (None if session.surfaced else session.error)

    def _notes(self, error: BaseException, failure: Exception | None) -> Iterator[str]:
        """Yield what actrec knows about an exception of the block."""
        if failure is not None and failure is not error:
            yield str(failure)
        if self._session.stop is not None and "NoneType" in str(error):
            yield _STOPPED
        if self._session.stance.in_graph and is_of_compiler(error):
            yield _COMPILED

    def _warn(
        self, recorder: Recorder[Any], choices: Mapping[str, Choice], missing: Missing
    ) -> None:
        """Warn of what was chosen and not recorded, or not as the layer returned it."""
        tracks = self._tracks.of
        is_idle = recorder._unit_recorder.nothing_left
        if not is_idle or any(track.called for track in tracks.values()):
            chosen = {key: (choices[key], track) for key, track in tracks.items()}
            found = [*warned_of(self._model, chosen, self._session, missing)]
            recorder._run.warned = [message for message, _ in found]
            self._destination.warned(recorder._run.warned)
            for message, category in found:
                warnings.warn(message, category, stacklevel=3)
        self._warn_of_resuming(stacklevel=3)

    def _warn_of_resuming(self, stacklevel: int) -> None:
        doubt = None if self._warned_of_resuming else self._destination.doubt()
        if doubt is not None:
            self._warned_of_resuming = True
            warnings.warn(doubt, ResumeWarning, stacklevel=stacklevel + 1)

    def __getitem__(self, name: str) -> NoReturn:
        raise ActrecError(self._misused())

    def __call__(self, *_: object, **__: object) -> NoReturn:
        message = f"{self._misused()} and call the model inside the block: model(x)."
        raise ActrecError(message)

    def __iter__(self) -> NoReturn:
        raise ActrecError(self._misused())

    def _misused(self) -> str:
        if self._yielded is None:
            return "record() was not entered. Did you forget the with? Write: with record(model, ...) as acts:"
        return (
            "this is the block, not the recording. Use acts, of: with record(model, ...) as acts:"
        )

    @override
    def __repr__(self) -> str:
        is_entered = self._yielded is not None
        return f"<record() of {type_name(self._model)}, {'entered' if is_entered else 'not entered: with record(model, ...) as acts:'}>"

    def __getattr__(self, name: str) -> NoReturn:
        is_private = name.startswith("_")
        raise AttributeError(f"record() has no {name!r}" if is_private else self._misused())

    def _opened(self) -> Destination:
        """Open the destination of the values, before anything happens to the model."""
        if self._options.path is None:
            return Memory(self._options, self._session.passes.undecided)
        from .store.description import Description  # noqa: PLC0415
        from .store.folder import Folder  # noqa: PLC0415
        from .store.stream import Stream  # noqa: PLC0415

        return Stream(
            Folder.of(self._options.path),
            Description.of(type_name(self._model), self._selection, self._options.dtype),
            self._session.passes,
            self._session.order,
            resume=self._options.resume,
        )

    def _forwards(self) -> Iterator[Forward]:
        """Yield the replacements of the forwards of the model, the innermost first."""
        yield from self._functions.forwards()
        if self._session.stop is not None:
            layers = [choice.key for choice in self._selection.choices]
            layers += map(stop_key, self._functions.owners)
            self._session.stop.layers = frozenset(layers)
            yield Forward(self._model, self._session.stop)

    def _plan(self) -> Iterator[tuple[nn.Module, Hook[Any]]]:
        """Yield the hooks in the order in which they are placed.

        Those that begin and end a pass enclose those that report a layer, and early stops come last.
        """
        hook, tracks = self._session.stance.hook, self._tracks.of
        hooks: dict[nn.Module, list[Hook[Track]]] = {}
        for choice in self._selection.choices:
            track = tracks[choice.key]
            hooks[choice.module] = [hook(Event.RETURN, track, Track.returns)]
            if track.inputs is not None:
                hooks[choice.module].insert(0, hook(Event.RECEIVE, track, Track.receives))
        session, parents = self._session, self._selection.parents
        for module in parents:
            caller = Caller(module, hooks, is_root=module is self._model)
            yield module, hook(Event.ENTER, session, caller.enters)
        for module in self._functions.replicated(self._model):
            yield module, hook(Event.ENTER, session, Session.look_for_replicas)
        for module, its_hooks in hooks.items():
            yield from ((module, one) for one in its_hooks)
        for module in parents:
            yield module, hook(Event.LEAVE, session, Session.leave)
        if session.stop is not None:
            owners = [owner.module for owner in self._functions.owners]
            for module in dict.fromkeys([*hooks, *owners]):
                yield module, hook(Event.STOP, session, Session.may_stop)


_STOPPED = (
    "record(stop_early=True): the call of the model returns None, because the forward ends as soon as the chosen layers have "
    "run. Use what was recorded, or record without stop_early"
)
_COMPILED = (
    "record(compiled=True): this was compiled with the recording in it. Record without compiled=True, and the model runs "
    "eagerly in the block"
)
