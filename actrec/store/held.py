"""The calls that wait to be written, by pass: a pass is held until it is complete.

It is complete when no call can be added to it any more: when it and all passes before it have ended, and a later one has
begun. A pass for which there is no room is written in parts, which count once the shard that commits the pass is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from .call import Call, Look
from .format import MAX_HEADER
from .ledger import Commit


class Batch(NamedTuple):
    """The calls of one shard."""

    calls: list[Call]
    size: int  # the bytes that they count against the budget
    commit: Commit


class Held:
    """Calls that wait to be written, by pass."""

    def __init__(self, committed: int, limit: int, raised: Collection[int]) -> None:
        self.size = 0
        self.committed = committed  # how many passes the batches so far commit
        self._limit = limit  # about how many bytes make a shard
        self._raised = raised  # the passes that raised; it grows
        #: A pass of which parts were handed out stays in it until it is committed.
        self._passes: defaultdict[int, list[Call]] = defaultdict(list)
        self._dropped: set[int] = set()  # passes that no commit has reached yet
        self._looks: set[Look] = set()  # of the calls; their groups are in `_groups`
        self._groups: set[object] = set()
        self._header = 0  # the bytes of the groups in the header of a shard

    def add(self, call: Call) -> bool:
        """Take a call, and return whether there are enough for a shard."""
        look = call.look
        self._passes[call.number].append(call)
        self.size += look.size
        if look not in self._looks:
            self._looks.add(look)
            group = call.slot, look.group
            if group not in self._groups:
                self._groups.add(group)
                # A group has entries in the header of a shard, however many calls there are in it.
                self._header += look.header
        return self.size >= self._limit or self._header >= MAX_HEADER // 4

    def whole(self, complete: int) -> Iterator[Batch]:
        """Hand out the passes before ``complete``, if there is anything to commit."""
        complete = max(complete, self.committed)
        if any(number < complete for number in self._passes):
            yield self._commit(complete)

    def everything(self, complete: int) -> Iterator[Batch]:
        """Hand out the passes before ``complete``, and, unless that makes enough room, parts of the others."""
        many = 0
        for batch in self.whole(complete):
            many = self._limit
            yield batch
        if self.size >= many:
            for number in sorted(number for number, calls in self._passes.items() if calls):
                calls, size = self._take([number])
                self._passes[number] = []
                yield Batch(calls, size, Commit(self.committed, number))

    def close(self, passes: int, ended: str) -> Batch:
        """Hand out the passes before ``passes``, for the last shard, and forget the others."""
        batch = self._commit(max(passes, self.committed), ended)
        self.clear()
        return batch

    def drop(self, number: int) -> None:
        """Forget the calls of a pass, including those that were handed out."""
        self._take([number])
        self._dropped.add(number)

    def clear(self) -> None:
        """Forget all calls."""
        self._take(list(self._passes))

    def _commit(self, complete: int, ended: str | None = None) -> Batch:
        raised = sorted(one for one in list(self._raised) if self.committed <= one < complete)
        self.committed = complete
        dropped = tuple(sorted(number for number in self._dropped if number < complete))
        self._dropped -= {*dropped}
        taken = self._take([number for number in self._passes if number < complete])
        return Batch(*taken, Commit(complete, None, tuple(raised), dropped, ended))

    def _take(self, numbers: Iterable[int]) -> tuple[list[Call], int]:
        calls = [call for number in numbers for call in self._passes.pop(number, ())]
        size = sum(call.look.size for call in calls)
        self.size -= size
        self._looks.clear()
        self._groups.clear()
        self._header = 0
        return calls, size
