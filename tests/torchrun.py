"""What ``torchrun`` starts in the tests: ``torchrun ... -m tests.torchrun NAME FOLDER``."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from actrec import OptionError, record
from actrec.store import Folder

BATCHES = 6  # for each rank


def network() -> nn.Sequential:
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    )


def batch(step: int, rank: int, ranks: int) -> Tensor:
    """The batches are dealt out to the ranks as a DistributedSampler does: by turns."""
    generator = torch.Generator().manual_seed(step * ranks + rank)
    return torch.randn(4, 6, generator=generator)


# --- Two ranks ---------------------------------------------------------------------------------------


def two(folder: Path) -> None:
    """FSDP2, tensor parallelism, and recording without communicating."""
    dist.init_process_group("gloo")
    fully_sharded(folder / "fsdp")
    tensor_parallel(folder / "tensor_parallel")
    silent(folder / "silent")
    dist.destroy_process_group()


def fully_sharded(path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    with record(model, into=path) as acts:
        for step in range(BATCHES):
            model(batch(step, dist.get_rank(), dist.get_world_size())).sum().backward()
            acts.add("rank", dist.get_rank())


class Layers(nn.Module):
    """Attention-like: columns in, rows out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 7)  # 7 columns are no even number
        self.down = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.down(self.up(x).relu()))


def parallel(model: Layers, mesh: Any) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(use_local_output=False),
        "norm": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate(), use_local_output=True),
    }  # fmt: skip
    assert Shard
    return parallelize_module(model, mesh, plan)


def tensor_parallel(path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallel(Layers(), mesh)
    with torch.no_grad(), record(model, ["up", "down", "norm"], into=path, inputs=True):
        for step in range(BATCHES):
            model(batch(step, 0, 1))


SAID = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier",
    "all_to_all_single", "all_gather_object", "broadcast_object_list", "gather", "scatter", "reduce", "send", "recv",
    "monitored_barrier",
)  # fmt: skip


def silent(path: Path) -> None:
    """While it is recorded, the model has nothing to say to other ranks; so nobody does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    from tests.ranked import Communication

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("somebody communicates")

    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    there = {name: getattr(dist, name) for name in SAID}
    model = nn.Identity()
    for name in SAID:
        setattr(dist, name, refuse)
    try:
        with Communication() as heard, record(model, "", into=path, inputs=True):
            for placement in (Shard(0), Partial()):
                model(DTensor.from_local(torch.full((2, 2), float(rank)), mesh, [placement], run_check=False))  # fmt: skip
            if rank == 0:
                model(torch.ones(1))  # and a rank on its own is in nobody's way
    finally:
        for name, function in there.items():
            setattr(dist, name, function)
    assert heard.heard == [], heard.heard


# --- Four ranks --------------------------------------------------------------------------------------


def four(folder: Path) -> None:
    """Data in parallel, a grid of ranks, and ranks that have nothing in common."""
    no_two_at_once(folder / "begin")
    dist.init_process_group("gloo")
    data_parallel(folder / "ddp")
    grid(folder / "grid")
    pipeline(folder / "pipeline")
    dist.destroy_process_group()


def no_two_at_once(folder: Path) -> None:
    """All begin at the same moment, many times, before there is a process group."""
    rank = int(os.environ["RANK"])
    model = nn.Identity()
    for turn in range(25):
        with record(model, "", into=folder / str(turn)):
            model(torch.tensor([[rank]]))


def data_parallel(path: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network())
    with record(model, into=path) as acts:
        for step in range(BATCHES):
            x = batch(step, dist.get_rank(), dist.get_world_size())
            with torch.no_grad():
                model(x)
            acts.add("x", x)


def grid(path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallel(Layers(), meshes["tp"])
    fully_shard(model, mesh=meshes["dp"])
    with record(model, ["up", "down"], into=path):
        for step in range(BATCHES):
            model(batch(step, meshes["dp"].get_local_rank(), 2)).sum().backward()


def pipeline(path: Path) -> None:
    """Each rank is another stage, and has other layers, and another number of passes."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    stage = nn.Sequential()
    stage.add_module(f"stage{rank}", nn.Linear(6, 6))
    with torch.no_grad(), record(stage, f"stage{rank}", into=path):
        for step in range(rank + 1):
            stage(batch(step, rank, 4))


# --- Without a name ----------------------------------------------------------------------------------


def one_machine(folder: Path) -> None:
    """Each rank records, and the launcher has given the run no name."""
    assert os.environ["TORCHELASTIC_RUN_ID"] == "none"
    model = nn.Identity()
    with record(model, "", into=folder / "run"):
        model(torch.tensor([[int(os.environ["RANK"])]]))


def two_machines(folder: Path) -> None:
    """The same on two machines, where nothing names the run but the user."""
    with contextlib.suppress(OptionError):
        one_machine(folder)
        raise AssertionError("somebody has guessed")
    model = nn.Identity()
    with record(model, "", into=Folder(folder / "run", run="mine")):
        model(torch.tensor([[int(os.environ["RANK"])]]))


# --- Killed ------------------------------------------------------------------------------------------


def killed(folder: Path) -> None:
    """Rank 2 is killed at first, in the middle; then torchrun starts all of them again, and what was there is copied."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if not first and rank == 0:
        shutil.copytree(folder / "run", folder / "copying")
        (folder / "copying").rename(folder / "left")
    while not (first or (folder / "left").exists()):
        time.sleep(0.01)
    model = network()
    into = Folder(folder / "run", seconds=0)
    with torch.no_grad(), record(model, into=into, resume=True) as acts:
        for step in range(acts.num_passes, BATCHES):
            model(batch(step, rank, ranks))
            if first and step == 2 + rank:  # the others may be a little ahead or behind
                if rank == 2:
                    wait_for(folder / "run", ranks)
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)


def wait_for(run: Path, ranks: int) -> None:
    """Let every writer commit what it can, so that there is something to lose."""
    while not all(list(run.glob(f"rank-0000{rank}/*.safetensors")) for rank in range(ranks)):
        time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    works = {"two": two, "four": four, "killed": killed}
    works |= {"one_machine": one_machine, "two_machines": two_machines}
    works[sys.argv[1]](Path(sys.argv[2]))
