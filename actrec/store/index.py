"""The shards of one rank: which exist, and which of them has a given call.

Only the headers that are needed are read: the last one to know what there is, and some twenty to find one call
among a million shards.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from typing import Any, Final, NamedTuple

from typing_extensions import override

from actrec._recordings.layer import Role

from .format import ANOTHER, SHARD, Slot, corrupt, shard_name
from .ledger import Heading, SoFar
from .part import Group, Part
from .place import Place
from .shard import Shard

#: How many bytes of headers a recording keeps in memory, and how many shards it keeps open, all ranks together.
_MOST_BYTES: Final = 64 << 20
_MOST_OPEN: Final = 1024


def shard_names(disk: Place) -> list[str]:
    """Return the names of all shards that exist, in order."""
    there = (name for name in disk.names() if name.endswith(SHARD))
    numbers = sorted(int(stem) for name in there if (stem := name[: -len(SHARD)]).isdecimal())
    return [shard_name(number) for number in numbers]


def _count(disk: Place) -> int:
    """Return how many shards there are; a gap in their numbers is an error."""
    there = [name for name in disk.names() if name.endswith(SHARD)]
    longest = max(map(len, there), default=0)
    last = max((name for name in there if len(name) == longest), default="")
    if last == shard_name(len(there) - 1):
        return len(there)  # without parsing the names: there may be a million
    names = shard_names(disk)
    for number, name in enumerate(names):
        if name != shard_name(number):
            raise corrupt(disk.shown(shard_name(number)), "it is missing")
    return len(names)


class Found(NamedTuple):
    """Where a call is."""

    shard: Shard
    group: Group
    call: int  #: its number in the group


class Index:
    """The shards of one rank.

    Args:
        disk: the folder of the rank.
        nothing: the heading before the first shard; all shards must be of its recording and rank.
        of: how many ranks are opened together: they share one limit of memory.
    """

    def __init__(self, disk: Place, nothing: Heading, *, of: int = 1) -> None:
        self.disk = disk
        self._limits = max(1, _MOST_BYTES // of), max(1, _MOST_OPEN // of)
        self._begin()
        self.count = _count(disk)
        self.heading = nothing
        self.layers: dict[Slot, SoFar] = {}
        if self.count:
            last = self.shard(self.count - 1)
            self.heading = last.heading
            self.layers = {listed.slot: listed.so_far for listed in last.layers.values()}

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # Each with its bytes. The least recently used shard is the first.
        self._open: dict[int, tuple[Shard, int]] = {}
        self._held = 0
        self._latest: dict[tuple[Role, str], int] = {}  # the shard in which the last call was found
        self._skips = cache(self._find_skips)

    @override
    def __getstate__(self) -> dict[str, Any]:
        hidden = {"_lock", "_open", "_held", "_latest", "_skips"}
        return {name: value for name, value in vars(self).items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def shard(self, number: int) -> Shard:
        """Return a shard, opened if it is not."""
        if self._pid != os.getpid():
            self._begin()  # in a forked process the lock may be held by a thread that does not exist
        with self._lock:
            shard, counted = self._open.pop(number, (None, 0))
            if shard is None:
                shard = Shard(self.disk, shard_name(number))
                shard.check_identity(self.heading, number)
            self._open[number] = shard, shard.nbytes
            self._held += shard.nbytes - counted  # it takes more memory once its parts were read
            self._shrink()
            return shard

    def _shrink(self) -> None:
        most_bytes, most_open = self._limits
        while len(self._open) > 1 and (self._held > most_bytes or len(self._open) > most_open):
            _, counted = self._open.pop(next(iter(self._open)))
            self._held -= counted

    # --- Calls -----------------------------------------------------------------------------------------

    def shards(self) -> Iterator[Shard]:
        """Open the shards whose calls count, one after the other."""
        left_out = set(self.heading.uncounted)
        return (self.shard(number) for number in range(self.count) if number not in left_out)

    def parts(self, role: Role, name: str) -> Iterator[tuple[Shard, Part]]:
        """Yield the part of a layer in each shard, in order, without shards that do not count."""
        for shard in self.shards():
            part = shard.part(role, name)
            if part is not None:
                yield shard, part

    def find(self, role: Role, name: str, call: int) -> Found:
        """Find call number ``call`` of a layer."""
        for begin, many in self._skips(role, name):
            if call >= begin:
                call += many
        at = self._latest.get((role, name), 0)
        if call not in self._span(at, role, name):
            numbers = range(self.count)
            after = bisect_right(numbers, call, key=lambda n: self._span(n, role, name).start)
            at = max(0, after - 1)
            if call not in self._span(at, role, name):
                raise corrupt(self.shard(at).path, ANOTHER)
            self._latest[role, name] = at
        shard = self.shard(at)
        part = shard.part(role, name)
        assert part is not None  # noqa: S101  # it has calls
        return Found(shard, *part.place(call - shard.span(role, name).start))

    def _span(self, number: int, role: Role, name: str) -> range:
        return self.shard(number).span(role, name)

    def _find_skips(self, role: Role, name: str) -> list[tuple[int, int]]:
        """Return the runs of calls that do not count: how many calls are before each, and how many it has."""
        spans = (self._span(number, role, name) for number in self.heading.uncounted)
        return [(span.start, len(span)) for span in spans if span]
