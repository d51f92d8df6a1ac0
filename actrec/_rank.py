"""Which rank of which run a process is, as far as it can be known without asking the others.

Nothing here communicates: ``torch.distributed`` knows its own rank, and launchers say it in the environment.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from torch import distributed

#: So many ranks may be in a run.
MAX_RANKS: Final = 100_000

#: Stands for the run of ranks that nothing names, and that were told to go on with whatever is there: they are one run.
ANY_RUN: Final = "0" * 32

#: Where launchers besides torchrun name a launch, alike for all its processes: PMIx (Open MPI, PRRTE, Slurm), Open MPI
#: before that, Intel MPI, PMI (MPICH, Slurm), PALS, Flux, and Slurm itself.
_LAUNCHES: Final = (
    ("PMIX_NAMESPACE",),
    ("OMPI_MCA_ess_base_jobid",),
    ("I_MPI_HYDRA_UUID",),
    ("PMI_JOBID",),
    ("PALS_APID",),
    ("FLUX_JOB_ID",),
    ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
)
#: And where they say how many processes it has.
_SIZES: Final = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")  # fmt: skip
_UNNAMED: Final = {"", "none"}  # what torchrun says if it was given no --rdzv-id


class Position(NamedTuple):
    """The position of a process in its run."""

    rank: int = 0
    ranks: int = 1  # how many there are
    #: The same in all processes of a run, and in no other run; of a process that is alone, never the same again;
    #: ``None`` if nothing says which run this is.
    run: str | None = None

    def has(self, at: int) -> bool:
        """Whether item number ``at``, of those that all ranks are given, is this rank's: one of each ``ranks`` in a row.

        Which one, the name of the run decides: what a rank that has died leaves behind is spread over all ranks of the next
        run, and no rank has to know what the others have done.
        """
        if self.ranks == 1:
            return True
        block, place = divmod(at, self.ranks)
        drawn = hashlib.sha256(f"{self.run}/{block}".encode()).digest()
        return (place + int.from_bytes(drawn[:8], "big")) % self.ranks == self.rank


def here(rank: int | None = None, ranks: int | None = None, run: str | None = None) -> Position:
    """Return the position of this process; ``rank``, ``ranks`` and ``run`` are what the user says, who knows best."""
    if rank is None or ranks is None:
        rank, ranks = placed()
    return Position(rank, ranks, _run(ranks, run))


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


def _run(ranks: int, name: str | None) -> str | None:
    if ranks == 1:
        return uuid.uuid4().hex
    facts = ["run", name] if name is not None else _facts(os.environ, ranks)
    if facts is None:
        return None
    return hashlib.sha256("\n".join([*facts, str(ranks)]).encode()).hexdigest()[:32]


def _facts(said: Mapping[str, str], ranks: int) -> list[str] | None:
    """What names this run, of what the launcher says: nothing that another run may have as well."""
    if said.get("TORCHELASTIC_RUN_ID", "") not in _UNNAMED:
        # How often it restarted its processes is not among it. The port is another one for each launch, as a rule.
        named = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        return [said.get(name, "") for name in named]
    if "TORCHELASTIC_RUN_ID" in said and said.get("LOCAL_WORLD_SIZE") == str(ranks):
        return _parent()  # one torchrun has started all processes
    size = next((said[name] for name in _SIZES if name in said), None)
    if size not in {None, str(ranks), said.get("GROUP_WORLD_SIZE")}:
        return None  # it has started a shell, say, in which there may be many runs; not the ranks, nor a torchrun for each node
    for names in _LAUNCHES:
        if names[0] in said:
            return [said.get(name, "") for name in names]
    return None


def _parent() -> list[str]:
    """What tells the parent of this process from all others: where it runs, its number, and since when it has had it."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # no Linux
        machine, began = str(uuid.getnode()), ""
    return [machine, str(os.getppid()), began]
