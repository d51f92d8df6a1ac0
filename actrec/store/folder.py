"""A path to record into, with settings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index
from typing import Any, Final

from typing_extensions import override

from actrec._rank import MAX_RANKS
from actrec.errors import OptionError

MEBI: Final = 1 << 20
_PASSWORD: Final = re.compile(r"[^/]*://[^/@:]*:[^/@]*@")


@dataclass(frozen=True)
class Folder(os.PathLike[str]):
    """A path to record into, with settings: ``record(model, into=Folder("run", budget=2**28))``.

    >>> Folder("runs/minilm", shard_bytes=64 * 2**20)
    Folder(path='runs/minilm', shard_bytes=67108864, budget=1073741824, seconds=60.0, rank=None, world_size=None, run=None, spool=None)

    A ``Folder`` can be used wherever actrec expects a path. The path may be the URL of an object store,
    ``"s3://bucket/run"``; ``~`` is the home directory.
    """

    path: str | os.PathLike[str]
    #: About how many bytes are written to one file, and committed together.
    shard_bytes: int = 256 * MEBI
    #: How many bytes may wait to be written or be in the middle of it. The model waits at a call that does not fit.
    budget: int = 1024 * MEBI
    #: Complete passes are committed after so many seconds, however few bytes they have, and even if no call follows.
    seconds: float = 60.0
    #: Which rank this process is, for launchers other than ``torchrun`` when ``torch.distributed`` is not initialised.
    rank: int | None = field(default=None, kw_only=True)
    #: How many ranks there are. Give both or neither.
    world_size: int | None = field(default=None, kw_only=True)
    #: The name of the run, the same on all its ranks and different from other runs. Needed if the launcher does not give one.
    run: str | None = field(default=None, kw_only=True)
    #: The folder of the files for a URL until they are uploaded; by default the system's temporary folder.
    spool: str | os.PathLike[str] | None = field(default=None, kw_only=True)
    #: Options that ``fsspec`` passes to the file system of a URL, such as credentials. They are never shown or stored.
    storage_options: Mapping[str, Any] | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        path: object = self.path
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        if not isinstance(text, str) or not text:  # an empty one would be the current folder
            message = f"{path!r} is not a path. Give a string, such as 'runs/a' or 's3://bucket/run', or a pathlib.Path."
            raise OptionError(message)
        if _PASSWORD.match(text):
            message = (
                "there is a password in that URL, which would be shown wherever the URL is. Pass it in "
                "storage_options, or put it into the configuration of fsspec."
            )
            raise OptionError(message)
        for name in ("shard_bytes", "budget", "seconds"):
            value = getattr(self, name)
            if (
                not isinstance(value, (int, float))
                or not value >= 0  # "not >=": also for NaN
                or (value == 0 and name != "seconds")
            ):
                message = f"Folder({name}={value!r}): expected a number greater than 0."
                raise OptionError(message)
        given_rank("Folder", self.rank, self.world_size)
        run: object = self.run
        if run is not None and not (isinstance(run, str) and run):
            message = f"Folder(run={run!r}): expected text, such as run='2026-11-28-a'."
            raise OptionError(message)

    @override
    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Folder:
        """Return ``path`` as a ``Folder``."""
        return path if isinstance(path, Folder) else cls(path)


def given_rank(call: str, rank: Any, ranks: Any) -> tuple[int, int] | None:
    """Return the rank that the user gave and the number of ranks, as plain integers; ``None`` if they gave neither.

    Raises:
        OptionError: there is no such rank.
    """
    if rank is None and ranks is None:
        return None
    given = (one for one in (rank, ranks) if hasattr(one, "__index__") and one is not True)
    match [index(one) for one in given]:
        case [at, many] if 0 <= at < many <= MAX_RANKS:
            return at, many
    message = (
        f"{call}(rank={rank!r}, world_size={ranks!r}): expected two integers, such as rank=3, world_size=8, or neither. Ranks "
        f"are numbered from 0 to world_size - 1, and there are at most {MAX_RANKS:,}."
    )
    raise OptionError(message)
