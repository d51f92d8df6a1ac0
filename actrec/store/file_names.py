"""The names of files: of the folder of each rank, and of the shards in it."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Final

from .format import DESCRIPTION, corrupt
from .place import Place

#: How the name of a shard's file ends.
_SHARD: Final = ".safetensors"
_RANK: Final = re.compile(r"rank-[0-9]{5}")


def rank_folder(rank: int) -> str:
    """Return the name of the folder of a rank."""
    return f"rank-{rank:05d}"


def rank_folders(disk: Place) -> list[Place]:
    """Return the folders of all ranks, in order."""
    return [disk / name for name in sorted(filter(_RANK.fullmatch, disk.names()))]


def rank_number(folder: Place) -> int:
    """Return the rank of a folder."""
    return int(folder.name.partition("-")[2])


def shard_name(number: int) -> str:
    """Return the name of the file of a shard."""
    return f"{number:06d}{_SHARD}"


def is_described(folder: Place) -> bool:
    """Whether a rank has begun to record there; a folder with shards and no description is damaged."""
    for _ in range(2):  # it may begin between a look at the description and one at the shards
        with suppress(FileNotFoundError):
            return folder.size(DESCRIPTION) >= 0
        if not shard_names(folder):
            return False
    raise corrupt(folder.shown(DESCRIPTION), "it is missing")


def shard_names(folder: Place) -> list[str]:
    """Return the names of all shards that exist, in order."""
    there = (name for name in folder.names() if name.endswith(_SHARD))
    numbers = sorted(int(stem) for name in there if (stem := name[: -len(_SHARD)]).isdecimal())
    return [shard_name(number) for number in numbers]


def count_shards(folder: Place) -> int:
    """Return how many shards there are; a gap in their numbers is an error."""
    there = [name for name in folder.names() if name.endswith(_SHARD)]
    longest = max(map(len, there), default=0)
    last = max((name for name in there if len(name) == longest), default="")
    if last == shard_name(len(there) - 1):
        return len(there)  # without parsing the names: there may be a million
    names = shard_names(folder)
    for number, name in enumerate(names):
        if name != shard_name(number):
            raise corrupt(folder.shown(shard_name(number)), "it is missing")
    return len(names)
