"""The tracks that keep the calls of a block, one for each chosen layer, and the layers for values that the user adds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Final, Protocol

from actrec._recordings.layer import FUNCTION, Layer
from actrec._recordings.overflow import Overflows
from actrec._selection.names import type_name
from actrec._selection.selection import Choice
from actrec._selection.treatment import WHATS, Make, What
from actrec._text import function_name
from actrec._values.containers import Value
from actrec.errors import ActrecError

from .capture import Capture
from .destination import Destination
from .gradients import Gradients
from .inputs import Inputs
from .reduced import ReducedLayer
from .session import Session
from .track import Track

#: What is captured, in messages: before the number of the call.
_OF: Final[dict[What, str]] = {
    "output": "call",
    "input": "what it received in call",
    "gradient": "the gradient of call",
}


class Shown(Protocol):
    """The recording that shows the layers."""

    def _show(self, name: str, layers: Mapping[What, Layer[Any]]) -> None:
        """Show these layers under a name, and no others."""


class Tracks:
    """The tracks of a block, by the names of their layers, and the layers of values that the user adds."""

    def __init__(self, session: Session, capture: Capture, destination: Destination) -> None:
        self.of: dict[str, Track] = {}
        #: The choices of the tracks; emptied at the end of the block, because the recording must not keep modules alive.
        self.choices: dict[str, Choice] = {}
        self.session = session
        self.destination = destination
        self.added = {**destination.added_before()}
        self._adding = threading.Lock()
        self._capture = capture
        self._reduced: list[ReducedLayer] = []
        self._recording: Callable[[], Shown | None] = lambda: None

    def show_in(self, recording: Shown) -> None:
        """Show layers that are made from now on in ``recording``, which is referred to weakly."""
        self._recording = weakref.ref(recording)

    def add(self, choice: Choice) -> None:
        """Make the track of a chosen module."""
        self._enter(choice, self._track(choice))

    def add_function(self, choice: Choice) -> tuple[Track, Callable[[], None]]:
        """Make the track of a function. Return it, and a function that makes its layers part of the recording."""
        track = self._track(choice)
        return track, partial(self._publish, choice, track)

    def _publish(self, choice: Choice, track: Track) -> None:
        with self._adding:
            if choice.key in self.added:
                message = f"acts.add({choice.key!r}): that is the name of a recorded function, which is called now. Add the value under another name."
                raise ActrecError(message)
            self._enter(choice, track)
            self._show(choice.key, track.layers)

    def _enter(self, choice: Choice, track: Track) -> None:
        self.of[choice.key], self.choices[choice.key] = track, choice
        self._reduced += [one for one in track.layers.values() if type(one) is ReducedLayer]

    def _show(self, name: str, layers: Mapping[What, Layer[Any]]) -> None:
        recording = self._recording()
        if recording is not None:
            recording._show(name, layers)

    # --- All calls -------------------------------------------------------------------------------------------

    def keep(self, name: str, value: Value, number: int) -> None:
        """Keep a value that the user adds to pass ``number``."""
        kept = self._capture.added(value)
        with self._adding:  # several threads may be the first to add by this name
            if name not in self.added:
                self.added[name] = layer = self.destination.layer("added", name, "added")
                self.session.order.setdefault(name)
                self._show(name, {"output": layer})
            self.added[name]._keep(kept, number)
            for reduced in self._reduced:
                reduced.add(name, kept, number)

    def settle(self, number: int) -> None:
        """Keep all values of pass ``number``, a unit that has ended."""
        for track in self._all():
            track.settle(number)
        with self._adding:
            for layer in self.added.values():
                layer._settle(number)

    def drop(self, number: int) -> None:
        """Forget all values of pass ``number``, a unit that has failed, and names under which nothing else was added."""
        for track in self._all():
            track.drop(number)
        with self._adding:
            for name, layer in [*self.added.items()]:
                known = len(layer)
                layer._drop(number)
                if known and not len(layer):
                    del self.added[name]
                    self._show(name, {})

    def clear(self) -> None:
        """Forget all calls and added values."""
        for track in self._all():
            track.clear()
        with self._adding:
            for layer in self.added.values():
                layer.clear()

    def unmasked(self, raised: Collection[int]) -> ActrecError | None:
        """Return an error if calls were not reduced because a mask is missing, other than those of passes that raised."""
        return next(filter(None, (layer.unmasked(raised) for layer in self._reduced)), None)

    def end(self) -> None:
        """The block ends: remove the gradient hooks from leaves, which may be part of the model."""
        for track in self._all():
            if track.grads is not None:
                track.grads.arrivals.end()

    def _all(self) -> list[Track]:
        return [*self.of.values()]  # other threads may publish functions

    # --- A track ---------------------------------------------------------------------------------------------

    def _track(self, choice: Choice) -> Track:
        kind = FUNCTION if choice.is_function else type_name(choice.module)
        layers = {
            role: self._layer(role, choice.key, kind, treatment.make)
            for role, treatment in choice.treatments.items()
        }
        outputs, inputs, grads = map(layers.get, WHATS)
        capture = self._capture_of("output", choice, outputs)
        track = Track(self.session, capture, layers)
        if inputs is not None:
            received = self._capture_of("input", choice, inputs)
            track.inputs = Inputs.of(choice.module, inputs, received)
        if grads is not None:
            gradient = self._capture_of("gradient", choice, grads)
            undecided = self.session.passes.undecided
            alike = outputs is not None and gradient.transform is capture.transform
            track.grads = Gradients(gradient, grads, track.lock, alike, undecided)
        track.earlier = len(next(iter(layers.values())))  # in a run that is resumed
        return track

    def _layer(self, role: What, name: str, kind: str, make: Make | None) -> Layer[Any]:
        if make is None:
            return self.destination.layer(role, name, kind)
        states = self.destination.states(role, name, kind)
        return ReducedLayer(name, make, kind, self.session.passes.undecided, states)

    def _capture_of(self, role: What, choice: Choice, layer: Layer[Any] | None) -> Capture:
        """Return the capture for the values of ``layer``, if there is one."""
        treatment = choice.treatments.get(role)
        transform = None if treatment is None else treatment.transform
        # No hook reports the end of a backward, to deliver gradients at: they are moved at once.
        offload = None if role == "gradient" else self.session.offload
        capture = self._capture.of(choice.key, transform, _OF[role], offload)
        if layer is not None:
            capture.is_twin = capture.direct and transform is None
            layer._transform = function_name(transform)
            if capture.dtype is not None:
                number = self.session.passes.current_or_last
                capture.overflows = layer._overflows = Overflows(capture.dtype, number)
        return capture
