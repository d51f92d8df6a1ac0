"""What the tests of ranks share: ranks that record in this process, one after the other."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from actrec import record
from actrec._values.modes import UNCONCERNED
from actrec.store import Folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from actrec import Recorder


class Same(nn.Module):
    """Returns what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, *values: Any) -> Any:
        for value in values:
            last = self.layer(value)
        return last


def write(
    path: Path, rank: int, ranks: int, passes: Iterable[Any], *, model: nn.Module | None = None,
    layers: Any = "layer", resume: bool = False, folder: Any = None, **options: Any,
) -> Recorder:  # fmt: skip
    """Record as one rank of a run: for each pass the values of its calls, a tuple if there are several."""
    into = Folder(path, rank=rank, world_size=ranks, **({"run": "of the test"} | (folder or {})))
    model = Same() if model is None else model
    with record(model, layers, into=into, resume=resume, **options) as acts:
        for values in passes:
            model(*(values if isinstance(values, tuple) else (values,)))
    return acts


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """This process is a rank of a group that does not communicate."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with patch.dict(os.environ, TORCHELASTIC_RUN_ID="of the test"):
            yield
    finally:
        dist.destroy_process_group()


def on_every_rank(ranks: int, work: Callable[[int], object]) -> None:
    """Do the work of all ranks, one after the other."""
    for rank in range(ranks):
        with as_rank(rank, ranks):
            work(rank)


class Communication(TorchDispatchMode):
    """Counts what would be said to other ranks while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does for that comes here again
        if "c10d" in func.namespace and "wait" not in func.name():
            self.heard.append(func.name())
        return func(*args, **(kwargs or {}))


UNCONCERNED.add(Communication)  # or else it would hear nothing of what actrec does


PLACEMENTS = {"replicate": Replicate, "shard": Shard, "partial": Partial}


def parts_of(
    whole: Tensor, mesh: Sequence[int], placements: Sequence[tuple[Any, ...]]
) -> list[Tensor]:
    """The parts of a tensor, in the order of the ranks: what ``torch.chunk`` makes of it, dimension by dimension."""
    if not mesh:
        return [whole]
    kind, *how = placements[0]
    if kind == "replicate":
        pieces = [whole] * mesh[0]
    elif kind == "shard":
        pieces = list(whole.chunk(mesh[0], *how))
        pieces += [whole.narrow(how[0], 0, 0)] * (mesh[0] - len(pieces))
    else:
        pieces = SPLIT[how[0]](whole, mesh[0])
    return [part for piece in pieces for part in parts_of(piece, mesh[1:], placements[1:])]


def _added(whole: Tensor, many: int) -> list[Tensor]:
    some = [torch.randint_like(whole, -9, 9) for _ in range(many - 1)]
    return [*some, whole - sum(some)]


SPLIT: dict[str, Callable[[Tensor, int], list[Tensor]]] = {
    "sum": _added,
    "avg": lambda whole, many: _added(whole * many, many),
    "max": lambda whole, many: [whole, *(whole - torch.randint_like(whole, 9) for _ in range(many - 1))],
    "min": lambda whole, many: [*(whole + torch.randint_like(whole, 9) for _ in range(many - 1)), whole],
    "product": lambda whole, many: [*[-torch.ones_like(whole)] * (many - 1), whole * (-1) ** (many - 1)],
}  # fmt: skip


def distributed(
    part: Tensor, whole: Tensor, mesh: DeviceMesh, placements: Sequence[tuple[Any, ...]]
) -> DTensor:
    """The DTensor that has this part here."""
    placed = [PLACEMENTS[kind](*how) for kind, *how in placements]
    return DTensor.from_local(
        part, mesh, placed, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def mesh_of(shape: Sequence[int], names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)
