"""The folder of a rank: its name, whether it has a description, and what is in it."""

from __future__ import annotations

import re
from typing import Final

from .description import read_description
from .format import DESCRIPTION, corrupt
from .index import Index, shard_names
from .place import Place
from .rank_info import RankInfo

_RANK: Final = re.compile(r"rank-[0-9]{5}")


def rank_folder(rank: int) -> str:
    """Return the name of the folder of a rank."""
    return f"rank-{rank:05d}"


def rank_folders(disk: Place) -> list[Place]:
    """Return the folders of all ranks, in order."""
    return [disk / name for name in sorted(filter(_RANK.fullmatch, disk.names()))]


def rank_number(folder: str) -> int:
    """Return the rank of a folder."""
    return int(folder.partition("-")[2])


def is_described(folder: Place) -> bool:
    """Whether a rank has begun to record there; a folder with shards and no description is damaged."""
    if _has_description(folder):
        return True
    if not shard_names(folder):
        return False
    if not _has_description(folder):  # now: it may have begun after the first look
        raise corrupt(folder.shown(DESCRIPTION), "it is missing")
    return True


def _has_description(folder: Place) -> bool:
    try:
        return folder.size(DESCRIPTION) >= 0
    except FileNotFoundError:
        return False


class Rank:
    """The recording of one rank, in a folder such as ``rank-00000``, one of ``of`` that are opened together."""

    def __init__(self, disk: Place, *, of: int = 1) -> None:
        self.number = rank_number(disk.name)
        self.description = read_description(disk)
        self.index = Index(disk, self.description.heading(self.number), of=of)

    @property
    def committed(self) -> int:
        """The number of committed passes."""
        return self.index.heading.committed

    @property
    def info(self) -> RankInfo:
        """How far the rank has come."""
        ended = self.index.heading.ended
        if ended is None:
            error: str | None = "killed or still recording"
        else:  # the name of an exception, or a reason in words
            error = f"left by {ended}" if ended.isidentifier() else ended or None
        return RankInfo(self.number, self.committed, error is None, error)
