"""Writing a shard: some calls of a rank become one safetensors file. Reading it is in ``shard.py``.

All calls of a layer whose values have one structure, one dtype and one number of dimensions for each tensor
are a *group*, and each tensor of a group is one tensor of the file: the elements of all calls, one after the
other. Another tensor has the shapes. So ten thousand small calls are three entries in the header, joining them
is one copy, and the safetensors library alone can read the data.

For a layer with the key ``output.00003`` the file has

========================  ============  ==================  =====================================================
``output.00003.calls``    int64         ``(calls, 2)``      for each call, its pass and its group
``output.00003.0.1``      of the layer  any                 the elements of tensor 1 of all calls of group 0
``….0.1.shapes``          int64         ``(calls, dims)``   the shape of that tensor in each call of the group
========================  ============  ==================  =====================================================

and the metadata has the rest: see ``docs/reference/format.md``, which is normative.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import compress, pairwise
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor

from actrec._values.memory import memory
from actrec._values.shapes import dtype_name

from . import safetensors
from .call import Call
from .decoding import decode
from .format import STORED, VERSION, Slot
from .ledger import Heading, SoFar
from .new_file import FileBeingWritten
from .part import Group, Leaf, Part

_SMALL: Final = 1 << 16  # bytes
_TOGETHER: Final = 64  # so many small tensors are joined
_PIECE: Final = 1 << 24  # bytes that are made contiguous at a time


# --- From calls to tensors -----------------------------------------------------------------------------


def lay_out(calls: Iterable[Call]) -> tuple[list[Part], list[safetensors.Tensor]]:
    """Return the part of each layer, without the data, and the tensors of the file, of calls in the order in which they ended."""
    by_slot: dict[Slot, list[Call]] = defaultdict(list)
    for call in calls:
        by_slot[call.slot].append(call)
    parts, tensors = [], []
    for slot, some in by_slot.items():
        part, entries = _laid_out(slot, sorted(some, key=attrgetter("number")))
        parts.append(part)
        tensors += entries
    return parts, tensors


def _laid_out(slot: Slot, calls: list[Call]) -> tuple[Part, list[safetensors.Tensor]]:
    # Most calls share a look: work is done once for each look, and calls refer to it by its index. (A look is slow to hash: by
    # looks themselves, this takes four times as long.)
    looks = {look: at for at, look in enumerate(dict.fromkeys(call.look for call in calls))}
    numbers: dict[object, int] = {}
    group_of = _numbers([numbers.setdefault(look.group, len(numbers)) for look in looks])
    which = _numbers([looks[call.look] for call in calls])
    table = torch.stack([_numbers([call.number for call in calls]), group_of[which]], 1)
    groups = []
    entries = [_index(f"{slot.key}.calls", table)]
    for number in range(len(numbers)):
        here = table[:, 1] == number
        some = list(compress(calls, here.tolist()))
        alike = list(compress(looks, (group_of == number).tolist()))
        among = torch.cumsum(group_of == number, 0)[which[here]] - 1
        leaves = []
        for at, column in enumerate(zip(*(call.tensors for call in some), strict=True)):
            name = f"{slot.key}.{number}.{at}"
            shapes = _numbers([look.kinds[at][1] for look in alike])
            leaf = Leaf(column[0].dtype, shapes.view(len(alike), column[0].dim())[among])
            leaves.append(leaf)
            entries += [_data(name, leaf, column), _index(f"{name}.shapes", leaf.shapes)]
        structure = alike[0].structure
        groups.append(Group(structure, decode(structure), leaves))
    return Part(slot, groups, *table.unbind(1)), entries


def _numbers(numbers: Sequence[object]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _data(name: str, leaf: Leaf, column: Sequence[Tensor]) -> safetensors.Tensor:
    """Return the elements of all calls; as rows, if all calls have rows of one shape."""
    stored = STORED[leaf.dtype]
    row = leaf.row(new=False)
    shape = [int(leaf.starts[-1])] if row is None else [int(leaf.counts(new=False).sum()), *row]
    shape += [2] * stored.pair
    size = leaf.dtype.itemsize
    pieces = partial(_pieces, column, leaf, are_rows=row is not None)
    return safetensors.Tensor(name, stored.code, tuple(shape), leaf.nbytes, pieces, size)


def _index(name: str, numbers: Tensor) -> safetensors.Tensor:
    shape = tuple(numbers.shape)
    return safetensors.Tensor(
        name, "I64", shape, numbers.nbytes, lambda: iter([memory(numbers)]), 8, index=True
    )


def _pieces(column: Sequence[Tensor], leaf: Leaf, *, are_rows: bool) -> Iterator[safetensors.Piece]:
    """Yield the memory of large tensors as it is; small ones are joined, because a piece for each costs more than copying it."""
    sizes = leaf.starts.diff() * leaf.dtype.itemsize
    column = list(compress(column, sizes.tolist()))  # without empty ones, whose shapes may not fit
    small = sizes[sizes > 0] < _SMALL
    turns = (small.diff().nonzero().flatten() + 1).tolist()
    for begin, end in pairwise(dict.fromkeys([0, *turns, len(column)])):
        if small[begin]:
            for at in range(begin, end, _TOGETHER):
                few = column[at : min(at + _TOGETHER, end)]
                # torch.cat() only reads, so values stay shared with the model.
                yield memory(torch.cat(few if are_rows else [one.reshape(-1) for one in few]))
            continue
        for tensor in column[begin:end]:
            yield from map(memory, [tensor] if tensor.is_contiguous() else _made_contiguous(tensor))


def _made_contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a few rows at a time, so that a large tensor is never copied as a whole."""
    rows = max(1, _PIECE * len(tensor) // tensor.nbytes)
    for part in torch.split(tensor, rows):
        yield part.contiguous()


# --- The file ------------------------------------------------------------------------------------------


def write(
    file: FileBeingWritten,
    heading: Heading,
    layers: Mapping[Slot, SoFar],
    parts: Sequence[Part] = (),
    tensors: Sequence[safetensors.Tensor] = (),
) -> None:
    """Write a shard: its heading, the counts of all layers so far, and the parts of those that have calls in it."""
    here = {part.slot: part for part in parts}
    nodes = [_node(slot, so_far, here.get(slot)) for slot, so_far in layers.items()]
    about = {"version": VERSION, **asdict(heading), "layers": nodes}
    metadata = {"actrec": json.dumps(about, separators=(",", ":"))}
    safetensors.write(file, metadata, tensors)


def _node(slot: Slot, so_far: SoFar, part: Part | None) -> dict[str, Any]:
    """Return the entry of a layer in the metadata."""
    groups = [
        {
            "structure": json.loads(group.text),
            "dtypes": [dtype_name(leaf.dtype) for leaf in group.leaves],
        }
        for group in (part.groups if part is not None else ())
    ]
    before = so_far.stored - (len(part) if part is not None else 0)
    return {**slot._asdict(), "before": before, "groups": groups, "so_far": so_far.node()}
