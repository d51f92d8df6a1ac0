"""The recording of one rank: its folder, its description, and its shards, each opened when it is needed.

Only the headers that are needed are read: the last one to know what there is, and some twenty to find one call
among a million shards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from .description import read_description
from .file_names import count_shards, rank_number, shard_name
from .format import Slot
from .ledger import SoFar
from .per_process import PerProcess
from .place import Place
from .shard import Shard

#: How many bytes of headers a recording keeps in memory, and how many shards it keeps open, all ranks together.
_MOST_BYTES: Final = 64 << 20
_MOST_OPEN: Final = 1024
_SHOWN: Final = 8  # ranks in a message


# --- How far the ranks have come ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankInfo:
    """How far one rank of a stored recording has come."""

    number: int
    #: How many passes it has committed.
    num_passes: int
    #: Whether it was closed properly.
    complete: bool
    #: What happened if not, such as "killed or still recording", "left by ValueError" or "wrote nothing".
    error: str | None


def nothing_of(number: int) -> RankInfo:
    """Return the entry of a rank that wrote nothing."""
    return RankInfo(number, 0, complete=False, error="wrote nothing")


def summary(ranks: Iterable[RankInfo]) -> Iterator[str]:
    """Yield what is wrong, with the ranks that it is wrong with.

    >>> ranks = [RankInfo(0, 5, True, None), RankInfo(1, 3, False, "left by ValueError")]
    >>> list(summary([*ranks, nothing_of(2), nothing_of(3)]))
    ['rank 1 left by ValueError', 'ranks 2 and 3 wrote nothing']
    """
    reasons: dict[str, list[int]] = {}
    for info in ranks:
        if info.error is not None:
            reasons.setdefault(info.error, []).append(info.number)
    for reason, numbers in reasons.items():
        yield f"{_named(numbers)} {reason}"


def _named(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > _SHOWN:
        shown = ", ".join(map(str, numbers[:_SHOWN]))
        return f"ranks {shown} and {len(numbers) - _SHOWN} more"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


# --- Reading -----------------------------------------------------------------------------------------


class _Opened:
    """The shards that are open in this process, the least recently used one first, each with its bytes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shards: dict[int, tuple[Shard, int]] = {}
        self.nbytes = 0


class Rank:
    """The recording of one rank.

    Args:
        folder: its folder, such as ``rank-00000``.
        of: how many ranks are opened together: they share one limit of memory.
    """

    def __init__(self, folder: Place, *, of: int = 1) -> None:
        self.folder = folder
        self.number = rank_number(folder)
        self.description = read_description(folder)
        self._limits = max(1, _MOST_BYTES // of), max(1, _MOST_OPEN // of)
        self._opened = PerProcess(_Opened)
        self.count = count_shards(folder)  #: of shards
        #: Of the last shard; before there is one, all shards must be of its recording and rank.
        self.heading = self.description.heading(self.number)
        self.layers: dict[Slot, SoFar] = {}
        if self.count:
            last = self.shard(self.count - 1)
            self.heading = last.heading
            self.layers = {listed.slot: listed.so_far for listed in last.layers.values()}

    @property
    def committed(self) -> int:
        """The number of committed passes."""
        return self.heading.committed

    @property
    def info(self) -> RankInfo:
        """How far the rank has come."""
        ended = self.heading.ended
        if ended is None:
            error: str | None = "killed or still recording"
        else:  # the name of an exception, or a reason in words
            error = f"left by {ended}" if ended.isidentifier() else ended or None
        return RankInfo(self.number, self.committed, error is None, error)

    def shard(self, number: int) -> Shard:
        """Return a shard, opened if it is not."""
        opened = self._opened()
        with opened.lock:
            shard, counted = opened.shards.pop(number, (None, 0))
            if shard is None:
                shard = Shard(self.folder, shard_name(number))
                shard.check_identity(self.heading, number)
            opened.shards[number] = shard, shard.nbytes
            opened.nbytes += shard.nbytes - counted  # it takes more once its parts were read
            most_bytes, most_open = self._limits
            while len(opened.shards) > 1 and (
                opened.nbytes > most_bytes or len(opened.shards) > most_open
            ):
                _, counted = opened.shards.pop(next(iter(opened.shards)))
                opened.nbytes -= counted
            return shard

    def shards(self) -> Iterator[Shard]:
        """Open the shards whose calls count, one after the other."""
        left_out = set(self.heading.uncounted)
        return (self.shard(number) for number in range(self.count) if number not in left_out)
