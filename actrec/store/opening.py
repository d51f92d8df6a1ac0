"""Begins recording into a path: checks what is there, and makes sure that no other run records there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from actrec._rank import ANY_RUN, here
from actrec.errors import OptionError, RecordingExistsError, WriteError

from .description import Description, read_description
from .file_names import is_described, rank_folder, rank_folders, shard_name
from .folder import Folder
from .format import DESCRIPTION
from .ledger import Commit, Ledger
from .new_file import FileBeingWritten
from .new_shard import write
from .place import place
from .rank import Rank


class Opening:
    """The folder of a rank, locked by this process while it records there.

    Args:
        call: the calling function, for messages.
        folder: the path and its settings.
        new: the description of the new recording.
        resume: whether a recording that is there may be resumed.
        alone: whether this process is the only one, even if a launcher started several.

    Raises:
        RecordingExistsError: there is something at the path that does not belong to this run; it was not changed.
        ResumeError: the recording there has other layers or options.
    """

    def __init__(
        self,
        call: str,
        folder: Folder,
        new: Description,
        *,
        resume: bool = False,
        alone: bool = False,
    ) -> None:
        self.disk = place(folder)
        self._call = call.format(path=str(self.disk))
        self.position = position = (
            here(0, 1) if alone else here(folder.rank, folder.world_size, folder.run)
        )
        self.own = self.disk / rank_folder(position.rank)
        self._check_path()
        if not resume:
            self._check_new()
        self.own.make()
        try:
            self.lock = self.own.lock()
        except BlockingIOError:
            raise self._taken(_NOW) from None
        try:
            self.rank, self.ledger = self._begun(new, resume=resume)
            self.own.sweep()
        except BaseException:
            self.lock.close()
            raise

    # --- What is there ---------------------------------------------------------------------------------

    def _check_new(self) -> None:
        """Check that the run has a name, and that only other ranks of it have recorded there."""
        rank, ranks, run = self.position
        if run is None:
            message = (
                f"{self._call}: this process is rank {rank} of {ranks}, and it is unknown of which run, because the launcher gave "
                "the run no name. Ranks of different runs could end up in one recording. Give all ranks of this run a name that "
                "no other run has: record(..., into=Folder(path, run='2026-11-28-a')), or torchrun --rdzv-id=NAME."
            )
            raise OptionError(message)
        if is_described(self.own):
            raise self._taken(_DONE, _GO_ON)
        self._check_others(run)

    def _check_path(self) -> None:
        """Check that there is a recording, or nothing."""
        if self.disk.is_file():
            why = "that is a file"
            raise self._taken(why)
        names = self.disk.names()
        if names and not rank_folders(self.disk):
            why = f"that folder has other things in it ({min(names)[:60]!r})"
            raise self._taken(why)

    def _check_others(self, run: str | None) -> None:
        """Check that all other ranks that have recorded there are of the same run."""
        for other in self._others():
            if other.recording != run:
                many = "a single process" if other.ranks == 1 else f"a run of {other.ranks} ranks"
                why = f"{many} records there, or has recorded, and this is another run"
                raise self._taken(why, _GO_ON)

    def _others(self) -> Iterator[Description]:
        """Yield the descriptions of the other ranks there."""
        for folder in rank_folders(self.disk):
            if folder.name != self.own.name and is_described(folder):
                # Of two runs that begin at the same time, one removes its description again.
                with suppress(FileNotFoundError):
                    yield read_description(folder)

    # --- Beginning -------------------------------------------------------------------------------------

    def _begun(self, new: Description, *, resume: bool) -> tuple[Rank, Ledger]:
        """Write the description, unless the rank is resumed. Return the rank, and the state before the next shard."""
        if resume and is_described(self.own):
            rank = Rank(self.own)
            rank.description.check_same(self.disk, new)
            return rank, self._resumed(rank)
        run = self.position.run or ANY_RUN
        other = next(self._others(), None) if resume else None
        recording = run if other is None else other.recording
        self._describe(replace(new, recording=recording, ranks=self.position.ranks))
        rank = Rank(self.own)
        return rank, Ledger(rank.heading)

    def _describe(self, new: Description) -> None:
        self._commit(DESCRIPTION, lambda file: file.write(new.content()), _BEGUN)
        try:  # of two runs that began at the same moment, the later one sees the other
            self._check_others(new.recording)
        except BaseException:
            self.own.remove(DESCRIPTION)
            raise

    def _resumed(self, rank: Rank) -> Ledger:
        """Resume after the last shard: write a new one, without calls, that voids what was not completed.

        From then on, an earlier run that is still alive cannot write, even where there are no locks: the name is taken.
        """
        ledger = Ledger(rank.heading, rank.layers).resumed(self.position.ranks, time.time_ns())
        heading = ledger.next((), Commit(ledger.heading.committed))
        first = partial(write, heading=heading, layers=ledger.layers)
        self._commit(shard_name(heading.shard), first, _NOW)
        return ledger

    def _commit(self, name: str, write: Callable[[FileBeingWritten], object], taken: str) -> None:
        try:
            self.own.commit(name, write)
        except FileExistsError:
            raise self._taken(taken) from None
        except OSError as error:
            message = f"{self._call}: {self.own.shown(name)} could not be written: {error}."
            raise WriteError(message) from error

    def _taken(self, why: str, what_to_do: str = "Choose another path.") -> RecordingExistsError:
        return RecordingExistsError(f"{self._call}: {why}. {what_to_do}")


_DONE = "there is a recording already"
_BEGUN = "another run has just begun there"
_NOW = "another run is recording there now"
_GO_ON = "Continue it: record(..., resume=True); or delete it, or choose another path."
