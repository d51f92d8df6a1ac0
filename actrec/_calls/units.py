"""Units while the block runs: a pass that the user opens and names, kept or dropped as a whole.

The calls of a unit are kept at once, like those of any pass, where they can be dropped again: from lists, and before they
are written to disk. Nothing can be removed from the user's containers, so they get the calls when the unit has ended.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from actrec._rank import Position
from actrec._recordings.pass_numbers import RankPass
from actrec._recordings.units import Key, Units, checked_key
from actrec._text import count
from actrec.errors import ActrecError, OptionError

from .open_units import Unit
from .tracks import Tracks

T = TypeVar("T")


class UnitRecorder:
    """The units of one block.

    Args:
        tracks: the tracks that keep the calls.
        units: the units of the recording; this adds to them.
    """

    def __init__(self, tracks: Tracks, units: Units) -> None:
        self._tracks = tracks
        self._session = tracks.session
        self._passes = tracks.session.passes
        self._destination = tracks.destination
        self._units = units
        self._lock = threading.RLock()  # held while a unit begins or ends
        self._done: dict[Key, None] | None = None
        self._pid = os.getpid()
        self.nothing_left = False  # whether remaining() has left no pair to this rank

    # --- What is done --------------------------------------------------------------------------------------

    @property
    def done(self) -> AbstractSet[Key]:
        """The keys that are done: in this block and, if a run is resumed, before it, by any rank."""
        return self._all_done().keys()

    def _all_done(self) -> dict[Key, None]:
        with self._lock:
            if self._done is None:
                self._done = dict.fromkeys(self._destination.done_before())
            return self._done

    def remaining(self, pairs: Iterable[tuple[Key, T]], *, divide: bool) -> Iterator[tuple[Key, T]]:
        """Check the arguments now; the pairs are consumed lazily."""
        call = f"acts.remaining(pairs, divide={divide!r})"
        try:
            iterator = iter(pairs)
        except TypeError:
            message = f"{call}: expected pairs of key and item, such as enumerate(batches), got {type(pairs).__name__!r}."
            raise OptionError(message) from None
        given: object = divide
        if not isinstance(given, bool):
            message = f"{call}: divide is True or False."
            raise OptionError(message)
        position = self._destination.position() if divide else Position()
        return self._remaining(call, iterator, position)

    def _remaining(
        self, call: str, pairs: Iterator[Any], position: Position
    ) -> Iterator[tuple[Key, Any]]:
        met: set[Key] = set()
        left = 0
        for at, pair in enumerate(pairs):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):  # noqa: PLR2004  # a pair
                message = (
                    f"{call}: item {at} is a {type(pair).__name__}, not a (key, item) pair. Number the items: "
                    "acts.remaining(enumerate(batches)); of a dict, pass its items()."
                )
                raise OptionError(message)
            key = checked_key(call, pair[0])
            if key in met:
                message = f"{call}: the key {key!r} occurs twice, again at item {at}. Keys are unique in a recording."
                raise OptionError(message)
            met.add(key)
            if position.has(at) and key not in self._all_done():
                left += 1
                yield key, pair[1]
        self.nothing_left = self.nothing_left or (bool(met) and not left)

    # --- A unit --------------------------------------------------------------------------------------------

    @contextmanager
    def unit(self, key: Key) -> Iterator[None]:
        """Make everything inside this block one pass."""
        call = f"acts.unit({key!r})"
        key = checked_key(call, key)
        if not self._session.active:
            message = (
                f"{call}: the recording has ended. Open units inside the with block of record()."
            )
            raise ActrecError(message)
        if not self._session.recording:
            yield  # paused: nothing is recorded
            return
        unit = self._opened(call, key)
        try:
            yield
            self._keep(call, unit)
        except BaseException:
            self._drop(unit)
            raise

    def _opened(self, call: str, key: Key) -> Unit:
        done = self._all_done()
        with self._lock:
            if key in done:
                message = (
                    f"{call}: the recording has a unit with that key already. A key is used once; "
                    "acts.remaining(pairs) skips the keys that are done."
                )
                raise ActrecError(message)
            if any(unit.key == key for unit in self._passes.units.open()):
                message = f"{call}: another thread or task is inside a unit with that key now. A key is used once."
                raise ActrecError(message)
            unit = self._passes.open_unit(key)
            if unit is not None:
                self._units.open[self._rank_pass(unit)] = key
        if unit is None:
            message = (
                f"{call}: units do not nest, and a unit cannot begin inside a forward of the recorded model. Everything inside "
                "the outermost one is one pass already."
            )
            raise ActrecError(message)
        return unit

    def _keep(self, call: str, unit: Unit) -> None:
        """The ``with`` block of a unit has ended."""
        if self._pid != os.getpid():
            return
        self._session.deliver()  # wait for values from a device
        inside = self._passes.leave_unit(unit)
        if inside:
            message = (
                f"{call}: it ended while {count(inside, 'other thread')} were in a forward that belongs to it, so it was "
                "dropped. Wait for them inside the unit."
            )
            raise ActrecError(message)
        with self._lock:
            if not unit.is_open:
                message = f"{call}: the with block of record() ended before the unit did, so it was dropped."
                raise ActrecError(message)
            self._tracks.settle(unit.number)
            self._destination.keep_unit(unit.number, unit.key)
            self._units.keys[self._rank_pass(unit)] = unit.key
            del self._units.open[self._rank_pass(unit)]
            self._all_done()[unit.key] = None
            self._passes.close_unit(unit)

    def _rank_pass(self, unit: Unit) -> RankPass:
        return self._destination.rank, unit.number

    def _drop(self, unit: Unit) -> None:
        """A unit has failed: forget everything of it."""
        if self._pid != os.getpid():
            return  # in a forked process, where locks may be held by threads that do not exist
        if self._session.offload is not None:
            self._session.offload.finish()  # or values in flight would be appended later
        with self._lock:
            if unit.is_open:
                self._passes.leave_unit(unit)
                self._all_done().pop(unit.key, None)
                for keys in (self._units.keys, self._units.open):
                    keys.pop(self._rank_pass(unit), None)
                forget = partial(self._forget, unit.number)
                forget()
                self._passes.close_unit(unit, forget)

    def drop_open(self) -> None:
        """Drop the units that have not ended."""
        for unit in self._passes.units.open():
            self._drop(unit)

    def _forget(self, number: int) -> None:
        self._tracks.drop(number)
        self._destination.drop_unit(number)

    def forget_from(self, committed: int) -> None:
        """The block has ended: forget the units from pass ``committed`` on, which are not in the recording."""
        for rank_pass, key in [*self._units.keys.items()]:
            if rank_pass[1] >= committed:
                del self._units.keys[rank_pass]
                self._all_done().pop(key, None)

    def clear(self) -> None:
        """Forget all units."""
        self._units.keys.clear()
        self._done = {}
