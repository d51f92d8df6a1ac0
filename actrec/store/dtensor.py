"""Tensors that are distributed over ranks: how a ``DTensor`` is taken apart, and assembled from its parts.

A rank writes its local part and how the tensor is spread over the ranks. The reader, which has all parts, assembles them:
nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final, TypeAlias, TypeVar

import torch
from torch import Tensor

from actrec._rank import MAX_RANKS
from actrec.errors import CaptureError

from .format import MAX_DIMS, MAX_SIZE, Defect, need
from .forms import Maybe, checked

#: For one dimension of the mesh: ``("replicate",)``, ``("shard", dim)`` or ``("partial", how to reduce)``.
Placement: TypeAlias = tuple[Any, ...]

_T = TypeVar("_T")

_REDUCE: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum, "product": torch.mul,
}  # fmt: skip


_FORM: Final = {
    "shape": [int],
    "placements": list,
    "mesh": [int],
    "names": Maybe([str]),
    "ranks": [int],
}


@dataclass(frozen=True, slots=True)
class Spread:
    """How a tensor is spread over ranks."""

    shape: tuple[int, ...]  # of the whole
    placements: tuple[Placement, ...]  # one for each dimension of the mesh
    mesh: tuple[int, ...]  # its shape
    names: tuple[str, ...] | None  # of its dimensions
    ranks: tuple[int, ...]  # in it, in row-major order

    def node(self) -> dict[str, Any]:
        """Return it as it is in a structure."""
        return {key: getattr(self, key) for key in _FORM}

    @classmethod
    def parsed(cls, node: Any) -> Spread:
        """Return it from a structure; ``Defect`` if it is invalid."""
        node = checked(node, _FORM, "a tensor in parts")
        shape, mesh, ranks = (tuple(node[key]) for key in ("shape", "mesh", "ranks"))
        placements = tuple(_placement(one, len(shape)) for one in node["placements"])
        names = None if node["names"] is None else tuple(node["names"])
        need(names is None or len(names) == len(mesh), "a mesh needs as many names as dimensions")
        need(len(mesh) <= MAX_DIMS, f"a mesh has {len(mesh)} dimensions")
        need(len(placements) == len(mesh), "a mesh needs as many placements as dimensions")
        fit = math.prod(mesh) == len(set(ranks)) == len(ranks)
        need(fit, "a mesh does not have as many different ranks as its shape says")
        need(max(ranks, default=0) <= MAX_RANKS, f"a mesh has a rank {max(ranks, default=0)}")
        most = math.prod(max(1, size) for size in shape) * torch.complex128.itemsize
        need(most <= MAX_SIZE, "a tensor in parts has an impossible shape")
        return cls(shape, placements, mesh, names, ranks)

    def enough(self, there: Collection[int]) -> bool:
        """Whether the parts of these ranks make the whole tensor: one of several replicas is enough."""
        return self._folded(lambda rank: rank in there or None, lambda *_: True) is not None

    def whole(self, there: Collection[int], part: Callable[[int], Tensor]) -> Tensor:
        """Make one tensor of the parts of these ranks, which are enough; ``part(rank)`` reads one."""
        try:
            made = self._folded(lambda rank: part(rank) if rank in there else None, _joined)
        except RuntimeError as error:
            message = f"the parts of a tensor do not fit together ({str(error)[:200]})"
            raise Defect(message) from None
        need(
            made is not None and tuple(made.shape) == self.shape,
            f"the parts of a tensor of shape {list(self.shape)} make another one"[:300],
        )
        return made  # type: ignore[return-value]

    def _folded(
        self, one: Callable[[int], _T | None], join: Callable[[Placement, list[_T]], _T]
    ) -> _T | None:
        """Return the parts, joined over the dimensions of the mesh, the last one first; ``None`` if some are missing."""

        def fold(dim: int, first: int) -> _T | None:
            if dim == len(self.mesh):
                return one(self.ranks[first])
            step = math.prod(self.mesh[dim + 1 :])
            found = (fold(dim + 1, first + at * step) for at in range(self.mesh[dim]))
            if self.placements[dim] == ("replicate",):
                return next((part for part in found if part is not None), None)
            parts = [part for part in found if part is not None]
            return join(self.placements[dim], parts) if len(parts) == self.mesh[dim] else None

        return fold(0, 0)


def _joined(placement: Placement, parts: list[Tensor]) -> Tensor:
    need(len({part.dtype for part in parts}) == 1, "the parts of a tensor are of different dtypes")
    kind, how = placement
    if kind == "shard":
        return torch.cat(parts, how)
    whole = reduce(_REDUCE[how], parts)
    return (whole / len(parts)).to(whole.dtype) if how == "avg" else whole


def _placement(placement: Any, dims: int) -> Placement:
    match placement:
        case ["replicate"]:
            return ("replicate",)
        case ["shard", dim] if type(dim) is int and 0 <= dim < dims:
            return ("shard", dim)
        case ["partial", how] if type(how) is str and how in _REDUCE:
            return ("partial", how)
    message = f"a tensor in parts has the unknown placement {str(placement)[:60]}"
    raise Defect(message)


# --- Taking a DTensor apart --------------------------------------------------------------------------


def local(tensor: Any) -> Tensor:
    """Return the part of this rank, a plain tensor. Waits for communication that is in progress."""
    with torch.no_grad():
        part: Any = tensor.to_local()
        part = part.wait() if type(part) is not Tensor and hasattr(part, "wait") else part
        return part.contiguous()  # type: ignore[no-any-return]


def spread(tensor: Any) -> Spread:
    """Return how a ``DTensor`` is spread; ``CaptureError`` if the format cannot express it."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names
    return Spread(
        tuple(tensor.shape),
        tuple(map(_placed, tensor.placements)),
        tuple(mesh.mesh.shape),
        None if names is None else tuple(names),
        tuple(mesh.mesh.flatten().tolist()),
    )


_REFUSED: Final = "cannot be stored. Let a transform redistribute it, or take its to_local()"


def _placed(placement: Any) -> Placement:
    from torch.distributed.tensor import Partial, Replicate, Shard  # noqa: PLC0415  # takes a second

    kind = type(placement)  # not isinstance(): a subclass means something else
    if kind is Replicate:
        return ("replicate",)
    if kind is Shard:
        return ("shard", placement.dim)
    if kind is Partial and placement.reduce_op in _REDUCE:
        return ("partial", placement.reduce_op)
    message = f"a DTensor with the placement {placement} {_REFUSED}"
    raise CaptureError(message)
