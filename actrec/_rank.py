"""The rank and the run of this process, as far as they can be determined without communication.

``torch.distributed`` has its own rank, and launchers set it in the environment.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from operator import index
from pathlib import Path
from typing import Final, NamedTuple

from torch import distributed

#: The largest number of ranks in a run.
MAX_RANKS: Final = 100_000

#: The name of the run of ranks whose run has no name, and that resume whatever is there: they count as one run.
ANY_RUN: Final = "0" * 32

#: The variables in which launchers other than torchrun name a launch, equal in all its processes: PMIx (Open MPI, PRRTE,
#: Slurm), earlier Open MPI, Intel MPI, PMI (MPICH, Slurm), PALS, Flux, and Slurm itself.
_LAUNCHES: Final = (
    ("PMIX_NAMESPACE",),
    ("OMPI_MCA_ess_base_jobid",),
    ("I_MPI_HYDRA_UUID",),
    ("PMI_JOBID",),
    ("PALS_APID",),
    ("FLUX_JOB_ID",),
    ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
)
#: The variables in which they set the number of processes.
_SIZES: Final = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")  # fmt: skip
_UNNAMED: Final = {"", "none"}  # the name that torchrun sets without --rdzv-id


class Position(NamedTuple):
    """The position of a process in its run."""

    rank: int = 0
    ranks: int = 1  # how many there are
    #: The name of the run: equal in all its processes, and different from other runs; unique for a single process;
    #: ``None`` if it is unknown.
    run: str | None = None

    def has(self, at: int) -> bool:
        """Whether item number ``at`` of the items that all ranks get is this rank's: one of every ``ranks`` successive items.

        Which one depends on the name of the run: the items that a dead rank has left are spread over all ranks of the next
        run, without communication.
        """
        if self.ranks == 1:
            return True
        block, place = divmod(at, self.ranks)
        drawn = hashlib.sha256(f"{self.run}/{block}".encode()).digest()
        return (place + int.from_bytes(drawn[:8], "big")) % self.ranks == self.rank


def here(rank: int | None = None, ranks: int | None = None, run: str | None = None) -> Position:
    """Return the position of this process; ``rank``, ``ranks`` and ``run`` are given by the user, and take precedence."""
    if rank is None or ranks is None:
        rank, ranks = placed()
    return Position(index(rank), index(ranks), _run(index(ranks), run))  # plain integers


def placed() -> tuple[int, int]:
    """Return the rank of this process, and how many ranks there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    try:  # torchrun has set them before the process group is initialized
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, ranks) if 0 <= rank < ranks <= MAX_RANKS else (0, 1)


def _run(ranks: int, name: str | None) -> str | None:
    if ranks == 1:
        return uuid.uuid4().hex
    facts = ["run", name] if name is not None else _facts(os.environ, ranks)
    if facts is None:
        return None
    return hashlib.sha256("\n".join([*facts, str(ranks)]).encode()).hexdigest()[:32]


def _facts(said: Mapping[str, str], ranks: int) -> list[str] | None:
    """Return values of the launcher's environment that together identify this run; ``None`` if another run may have the same."""
    if said.get("TORCHELASTIC_RUN_ID", "") not in _UNNAMED:
        # Without the number of restarts, which belong to the run. The port usually differs between launches.
        named = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        return [said.get(name, "") for name in named]
    if "TORCHELASTIC_RUN_ID" in said and said.get("LOCAL_WORLD_SIZE") == str(ranks):
        return _parent()  # one torchrun has started all processes
    size = next((said[name] for name in _SIZES if name in said), None)
    if size not in {None, str(ranks), said.get("GROUP_WORLD_SIZE")}:
        return None  # the launcher has started something else, such as a shell, in which there may be many runs
    for names in _LAUNCHES:
        if names[0] in said:
            return [said.get(name, "") for name in names]
    return None


def _parent() -> list[str]:
    """Return values that identify the parent process: its machine, its process id, and its start time."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        machine, began = str(uuid.getnode()), ""
    return [machine, str(os.getppid()), began]
