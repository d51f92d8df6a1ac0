"""Where recorded values go: into memory, or to a path (:class:`actrec.store.stream.Stream`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from actrec._recordings.in_memory import ListLayer
from actrec._recordings.layer import FUNCTION, Layer, Role
from actrec._recordings.units import Key, Units
from actrec._selection.treatment import Make, is_reduction

from .options import Options
from .reduced import ReducedLayer
from .sink import SinkLayer


class Destination(Protocol):
    """What makes the layers of a recorder, and is told when the block ends."""

    order: list[str]  #: the layers that have calls of earlier runs, by the first of them
    rank: int | None  #: of this process; ``None`` in memory
    where: str  #: the path, if it is one

    def layer(
        self, role: Role, number: int, name: str, kind: str, make: Make | None = None
    ) -> Layer[Any]:
        """Return the layer for values of a chosen module: of its ``number``, name and type; ``make`` makes what reduces them."""

    def function(self, role: Role, name: str, make: Make | None = None) -> Layer[Any]:
        """Return the layer for values of a function, which is first called while the block runs."""

    def added(self, name: str) -> Layer[Any]:
        """Return the layer for values that the user adds by a name."""

    def added_before(self) -> Mapping[str, Layer[Any]]:
        """Return the layers of names that were added in earlier runs."""

    def units(self) -> Units:
        """Return the units of earlier runs, of this rank."""

    def done_before(self) -> Iterable[Key]:
        """Return the keys of the units of earlier runs, of all ranks."""

    def doubt(self) -> str | None:
        """Return why to go on by the number of passes may be wrong, if there are no units and it seems so."""

    def keep_unit(self, number: int, key: Key) -> None:
        """The unit of pass ``number`` has ended, and is kept."""

    def drop_unit(self, number: int) -> None:
        """The unit of pass ``number`` has failed."""

    def left_by(self, error: BaseException | None) -> None:
        """The block ends; ``error`` is what it was left by."""

    def warned(self, messages: Sequence[str]) -> None:
        """The end of the block warns of this."""

    def close(self) -> None:
        """Nothing more is going to be kept. May be called again."""

    def failure(self) -> Exception | None:
        """Return what went wrong and no call has raised."""


class Memory:
    """Keeps values in lists, or in containers of the user's."""

    def __init__(self, options: Options, held: Collection[int] = ()) -> None:
        """``held`` are the passes whose calls no container of the user's gets yet; it changes."""
        self.order: list[str] = []
        self.rank: int | None = None
        self.where = ""
        self._options = options
        self._held = held

    def layer(
        self,
        role: Role,  # noqa: ARG002  # see Destination
        number: int,  # noqa: ARG002
        name: str,
        kind: str,
        make: Make | None = None,
    ) -> Layer[Any]:
        """Return a new layer."""
        if make is not None:
            return ReducedLayer(name, make, kind, self._held)
        if self._options.into is not list:
            container = self._options.container()
            if is_reduction(container):
                return ReducedLayer(name, self._options.container, kind, self._held)
            if type(container) is not list:
                return SinkLayer(name, container, self._options.container, kind, self._held)
        return ListLayer(name, (), kind)

    def function(self, role: Role, name: str, make: Make | None = None) -> Layer[Any]:
        """Return a new layer."""
        return self.layer(role, 0, name, FUNCTION, make)

    def added(self, name: str) -> Layer[Any]:
        """Return a new layer, a list."""
        return ListLayer(name, (), "added")

    def added_before(self) -> Mapping[str, Layer[Any]]:
        """Nothing was recorded before."""
        return {}

    def units(self) -> Units:
        """Nothing was recorded before."""
        return Units()

    def done_before(self) -> Iterable[Key]:
        """Nothing was recorded before."""
        return ()

    def doubt(self) -> None:
        """Nothing is gone on with."""

    def keep_unit(self, number: int, key: Key) -> None:
        """The recorder has the key."""

    def drop_unit(self, number: int) -> None:
        """The layers forget it."""

    def left_by(self, error: BaseException | None) -> None:
        """Memory keeps what there is, however the block ends."""

    def warned(self, messages: Sequence[str]) -> None:
        """The recorder has them."""

    def close(self) -> None:
        """There is nothing to close."""

    def failure(self) -> None:
        """Nothing goes wrong later."""
