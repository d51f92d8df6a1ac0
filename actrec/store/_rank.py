"""Which rank of which run a process is, as far as it can be known without asking the others.

Nothing here communicates: ``torch.distributed`` knows its own rank, and launchers say it in the environment.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from typing import Final, NamedTuple

from torch import distributed

from ._format import MAX_RANKS

__all__ = ["Position", "here", "placed"]

#: What the launcher sets alike for all processes of a run. How often it restarted them is not among it.
_RUN: Final = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


class Position(NamedTuple):
    """The position of a process in its run."""

    rank: int
    ranks: int  # how many there are
    run: str  # the same in all processes of a run; of a process that is alone, never the same again


def here(rank: int | None = None, ranks: int | None = None) -> Position:
    """Return the position of this process; ``rank`` and ``ranks`` are what the user says, who knows best."""
    if rank is None or ranks is None:
        rank, ranks = placed()
    return Position(rank, ranks, _run(ranks))


def placed() -> tuple[int, int]:
    """The rank of this process, and how many ranks there are."""
    return _initialized() or _launched() or (0, 1)


def _initialized() -> tuple[int, int] | None:
    """What ``torch.distributed`` says."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return None


def _launched() -> tuple[int, int] | None:
    """What ``torchrun`` says, also before the process group is there."""
    try:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (rank, ranks) if 0 <= rank < ranks <= MAX_RANKS else None


def _run(ranks: int) -> str:
    if ranks == 1:
        return uuid.uuid4().hex
    facts = [*(os.environ.get(name, "") for name in _RUN), str(ranks)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
