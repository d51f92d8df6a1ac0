"""What keeps the calls of a block: for each chosen layer a track, and the layers of the recording that it leads to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from actrec._recordings.layer import Layer
from actrec._selection.functions import What
from actrec._selection.selection import Choice
from actrec._text import function_name

from .capture import Capture
from .destination import Destination
from .gradients import Gradients
from .inputs import Inputs
from .layer import Track
from .overflow import Overflows
from .recorder import Recorder
from .session import Session

ROLES: Final[tuple[What, ...]] = ("output", "input", "gradient")
#: What is captured, for messages: before the number of the call.
_OF: Final[dict[What, str]] = {
    "output": "call",
    "input": "what it received in call",
    "gradient": "the gradient of call",
}


class Tracks:
    """The tracks of a block, by the names of their layers."""

    def __init__(self, session: Session, capture: Capture, destination: Destination) -> None:
        self.of: dict[str, tuple[Choice, Track]] = {}
        self._session = session
        self._capture = capture
        self._destination = destination
        self._recorder: Callable[[], Recorder | None] = lambda: None

    def lead_to(self, recorder: Recorder) -> None:
        """Put layers that are made from now on into ``recorder``, which is not kept."""
        self._recorder = weakref.ref(recorder)

    def add(self, choice: Choice, layers: Mapping[What, Layer[Any]]) -> None:
        """Make the track of a chosen module, which leads to these layers."""
        self.of[choice.key] = choice, self._track(choice, layers)

    def add_function(self, choice: Choice) -> tuple[Track, Callable[[], None]]:
        """Make the track of a function, and what makes it and its layers part of the recording."""
        layers = {
            role: self._destination.function(role, choice.key, treatment.make)
            for role, treatment in choice.treatments.items()
        }
        track = self._track(choice, layers)
        return track, partial(self._publish, choice, track, layers)

    def _publish(self, choice: Choice, track: Track, layers: Mapping[What, Layer[Any]]) -> None:
        recorder = self._recorder()
        if recorder is not None:  # or nobody will ever look
            recorder._add_layer(choice.key, layers, track)
        self.of[choice.key] = choice, track

    def end(self) -> None:
        """The block ends: leave nothing on a leaf, which may be part of the model."""
        for _, track in self.of.values():
            if track.grads is not None:
                track.grads.end()

    def _track(self, choice: Choice, layers: Mapping[What, Layer[Any]]) -> Track:
        outputs, inputs, grads = (layers.get(role) for role in ROLES)
        capture = self._capture_of("output", choice, outputs)
        track = Track(self._session, capture, outputs)
        if inputs is not None:
            received = self._capture_of("input", choice, inputs)
            track.inputs = Inputs.of(choice.module, inputs, received)
        if grads is not None:
            gradient = self._capture_of("gradient", choice, grads)
            undecided = self._session.passes.undecided
            alike = outputs is not None and gradient.transform is capture.transform
            track.grads = Gradients(gradient, grads, track.lock, alike, undecided)
        of_it = (layer for layer in (outputs, inputs, grads) if layer is not None)
        track.earlier = len(next(of_it))  # in a run that is resumed
        return track

    def _capture_of(self, role: What, choice: Choice, layer: Layer[Any] | None) -> Capture:
        """What makes the values that ``layer`` keeps, if there is one."""
        treatment = choice.treatments.get(role)
        transform = None if treatment is None else treatment.transform
        # A backward has no end at which it could be delivered: a gradient is moved at once.
        offload = None if role == "gradient" else self._session.offload
        capture = self._capture.of(choice.key, transform, _OF[role], offload)
        if layer is not None:
            layer._transform = function_name(transform)
            if capture.dtype is not None:
                capture.overflows = layer.overflows = Overflows(capture.dtype, self._session.passes)
        return capture
