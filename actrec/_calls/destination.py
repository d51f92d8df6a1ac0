"""Where recorded values go: into memory, or to a path (:class:`actrec.store.stream.Stream`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from typing_extensions import override

from actrec._rank import Position, here
from actrec._recordings.in_memory import ListLayer
from actrec._recordings.layer import Layer, Role
from actrec._recordings.units import Key, Units
from actrec._selection.treatment import is_reduction

from .options import Options
from .reduced import ReducedLayer, States
from .sink import SinkLayer


class Destination(Protocol):
    """Makes the layers of a recorder, and is closed when the block ends.

    The methods here are right where nothing was recorded before and nothing can go wrong later.
    """

    rank: int | None = None  #: of this process; ``None`` in memory
    where: str = ""  #: the path, if it is one
    error: str | None = None  #: the type of the exception that ended the block, if one did

    def layer(self, role: Role, name: str, kind: str) -> Layer[Any]:
        """Return the layer for values of this role."""

    def states(self, role: Role, name: str, kind: str) -> States | None:  # noqa: ARG002
        """Return where the states of a reduction of these values are written to; ``None`` in memory."""
        return None

    def position(self) -> Position:
        """Return the position of this process among those that record."""
        return here()

    # --- Earlier runs --------------------------------------------------------------------------------------

    def added_before(self) -> Mapping[str, Layer[Any]]:
        """Return the layers of values that the user added in earlier runs, by name."""
        return {}

    def units(self) -> Units:
        """Return the units of this rank."""
        return Units()

    def done_before(self) -> Iterable[Key]:
        """Return the keys of the units of all ranks."""
        return ()

    def doubt(self) -> str | None:
        """Return why it may be wrong to resume by the number of passes, if there are no units and it seems so."""
        return None

    # --- What happens --------------------------------------------------------------------------------------

    def keep_unit(self, number: int, key: Key) -> None:  # noqa: ARG002
        """The unit of pass ``number`` has ended, and is kept."""
        return

    def drop_unit(self, number: int) -> None:  # noqa: ARG002
        """The unit of pass ``number`` has failed."""
        return

    def warned(self, messages: Sequence[str]) -> None:  # noqa: ARG002
        """The end of the block gives these warnings."""
        return

    def close(self) -> None:
        """No more values will be kept. May be called again."""
        return

    def failure(self) -> Exception | None:
        """Return an error that no call has raised yet, if there is one."""
        return None


class Memory(Destination):
    """Keeps values in lists, or in the user's containers."""

    def __init__(self, options: Options, held: Collection[int] = ()) -> None:
        """``held`` are the passes whose calls the user's containers do not get yet; it changes."""
        self._options = options
        self._held = held

    @override
    def layer(self, role: Role, name: str, kind: str) -> Layer[Any]:
        if self._options.into is not list and role != "added":
            make = partial(self._options.container, name)
            container = make()
            if is_reduction(container):
                return ReducedLayer(name, make, kind, self._held)
            if type(container) is not list:
                return SinkLayer(name, container, make, kind, self._held)
        return ListLayer(name, (), kind)
