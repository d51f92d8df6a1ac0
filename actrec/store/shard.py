"""Reads a shard: its header, with checks, when it is opened, its data on access.

Its content is described in ``new_shard.py``, which writes it, and in ``docs/reference/format.md``, which is normative.
"""

from __future__ import annotations

import json
import zlib
from contextlib import closing
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from actrec._recordings.layer import Role
from actrec._values.memory import writable

from . import safetensors
from .decoding import decode
from .disk import Mapped
from .format import DTYPES, MAX_DIMS, MAX_SIZE, ROLES, VERSION, Defect, Slot, corrupt, need
from .forms import checked
from .ledger import HEADING, SO_FAR, Heading, SoFar
from .part import Group, Leaf, Part
from .place import Place

#: Bytes that are read rather than mapped: a process can map no more than 65,530 files.
_SMALL: Final = 1 << 20
#: The first bytes of a shard identify it: they contain the checksum of the header, which has those of the data.
_HEAD: Final = 64
_OBJECTS: Final = 8  # the Python objects of a header take so many times its bytes

_LAYER: Final = {
    "role": str,
    "number": int,
    "name": str,
    "type": str,
    "before": int,
    "groups": list,
    "so_far": SO_FAR,
}
_DESCRIPTION: Final = {**HEADING, "layers": [_LAYER]}
_GROUP: Final = {"structure": None, "dtypes": [str]}


class Listed(NamedTuple):
    """The entry of one layer in the header of a shard."""

    slot: Slot
    before: int  #: calls of the layer in the shards before this one
    groups: list[Any]
    so_far: SoFar


class Shard:
    """A shard whose header was read and checked. Its data is read on access."""

    def __init__(self, disk: Place, name: str) -> None:
        self.disk = disk
        self.name = name
        self.path = disk.shown(name)
        self.head = b""  #: the first bytes, which identify the file
        self._memory: Mapped | None = None
        self._parts: dict[tuple[Role, str], Part] = {}
        try:
            self.container = safetensors.parse(disk.size(name), self._read)
            self.heading, self.layers = _contents(self.container.metadata.get("actrec", "null"))
        except Defect as defect:
            raise corrupt(self.path, defect) from None
        except FileNotFoundError:
            raise corrupt(self.path, "it is missing") from None
        self.nbytes = _OBJECTS * self.container.header  #: of memory, roughly

    def _read(self, most: int) -> bytes:
        found = self.disk.read(self.name, 0, most)
        self.head = found[:_HEAD]
        return found

    def check_identity(self, other: Heading, number: int) -> None:
        """Check that the file is shard ``number`` of the recording and rank of ``other``, and not another file put there."""
        heading = self.heading
        for what, found, expected in (
            ("recording", heading.recording, other.recording),
            ("rank", heading.rank, other.rank),
            ("shard", heading.shard, number),
        ):
            if found != expected:
                defect = f"it says that it belongs to {what} {str(found)[:60]}, not {expected}"
                raise corrupt(self.path, defect)

    # --- Data ------------------------------------------------------------------------------------------

    def tensor(self, leaf: Leaf, call: int) -> Tensor:
        """Return one tensor of a call.

        A small one is read; a large one is a view of the mapped file, private to this process.
        """
        begin, nbytes = leaf.extent(call)
        shape = torch.Size(leaf.shape(call))
        own = self._mapped(begin, nbytes) if nbytes > _SMALL else None
        if own is None:
            data = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self.read_into(begin, data)
            own = data.untyped_storage()
        elif begin % leaf.dtype.itemsize:  # an unaligned read may kill the process
            own = own.clone()  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=leaf.dtype, device="cpu")
        return empty.set_(own, 0, shape)  # type: ignore[call-overload,no-any-return]

    def read_into(self, begin: int, data: Tensor) -> None:
        """Fill a contiguous tensor with the bytes of the file from ``begin`` on."""
        if data.nbytes:
            with closing(self.disk.reading(self.name, self.head)) as file:
                file.into(begin, writable(data))

    def _mapped(self, begin: int, nbytes: int) -> torch.UntypedStorage | None:
        """Return a storage of its own, as torch.save() writes the whole one; ``None`` if the file cannot be mapped."""
        if self._memory is None:
            self._memory = self.disk.map(self.name, self.container.size, self.head)
        return None if self._memory is None else self._memory.part(begin, nbytes)

    # --- Layers ----------------------------------------------------------------------------------------

    def span(self, role: Role, name: str) -> range:
        """Return the numbers of the calls of a layer in the shard, void calls included."""
        listed = self.layers.get((role, name))
        return range(0) if listed is None else range(listed.before, listed.so_far.stored)

    def part(self, role: Role, name: str) -> Part | None:
        """Return the part of a layer in the shard; ``None`` if there is none."""
        key = role, name
        listed = self.layers.get(key)
        if listed is None or not listed.groups:
            return None
        if key not in self._parts:
            try:
                self._parts[key] = self._opened(listed)
            except Defect as defect:
                raise corrupt(self.path, defect) from None
        return self._parts[key]

    def _opened(self, listed: Listed) -> Part:
        slot = listed.slot
        table = self._numbers(f"{slot.key}.calls", columns=2)
        stored = listed.so_far.stored - listed.before  # at least one, as there are groups
        fit = len(table) == stored
        need(fit, f"layer {slot.name[:60]!r} has {len(table)} calls, and claims {stored}")
        passes, group = table.unbind(1)
        ordered = bool((passes[1:] >= passes[:-1]).all())
        need(ordered, "the calls of a layer are not ordered by pass")
        need(int(group.max()) < len(listed.groups), "a call is in a group that is not there")
        counts = torch.bincount(group, minlength=len(listed.groups)).tolist()
        groups = [
            self._group(f"{slot.key}.{number}", node, counts[number])
            for number, node in enumerate(listed.groups)
        ]
        return Part(slot, groups, passes, group)

    def _group(self, key: str, node: Any, calls: int) -> Group:
        node = checked(node, _GROUP, "a group")
        need(calls > 0, "a group has no calls")
        text = _json(node["structure"])
        structure = decode(text)
        fit = structure.spec.count == len(node["dtypes"])
        need(fit, "a group's structure does not have as many tensors as the group")
        names = enumerate(node["dtypes"])
        leaves = [self._leaf(f"{key}.{at}", dtype, calls) for at, dtype in names]
        scalars = [leaves[number].shapes for number in structure.scalars]
        need(not any(shapes.shape[1] for shapes in scalars), "a NumPy scalar has dimensions")
        return Group(text, structure, leaves)

    def _leaf(self, name: str, dtype: str, calls: int) -> Leaf:
        need(dtype in DTYPES, f"tensor {name!r} has an unknown dtype")
        extent = self._extent(name)
        kind, stored = DTYPES[dtype]
        need(stored.code == extent.code, f"tensor {name!r} is not of dtype {dtype}")
        shapes = self._numbers(f"{name}.shapes")
        need(len(shapes) == calls, f"tensor {name!r} does not have as many shapes as calls")
        # As floating-point numbers, because the product of a few sizes may be too large for int64.
        sizes = shapes.clamp(min=1).double().prod(1) * kind.itemsize
        need(float(sizes.max()) <= MAX_SIZE, f"tensor {name!r} has an impossible shape")
        nbytes = float(shapes.double().prod(1).sum()) * kind.itemsize
        fit = nbytes == extent.end - extent.begin
        need(fit, f"tensor {name!r} does not have as many bytes as its shapes need")
        return Leaf(kind, shapes, extent.begin)

    def _extent(self, name: str) -> safetensors.Extent:
        need(name in self.container.tensors, f"there is no tensor {name!r}")
        return self.container.tensors[name]

    def _numbers(self, name: str, columns: int | None = None) -> Tensor:
        """Read a table of numbers, and check that none is negative."""
        extent = self._extent(name)
        rows, *others = extent.shape or (0,)
        fit = extent.code == "I64" and len(others) == 1 and others[0] <= MAX_DIMS
        need(fit and columns in {None, *others}, f"tensor {name!r} is not a table")
        data = bytearray(self.disk.read(self.name, extent.begin, extent.end - extent.begin))
        need(len(data) == extent.end - extent.begin, "it became shorter while it was read")
        need(zlib.crc32(data) == extent.checksum, f"the checksum of tensor {name!r} is wrong")
        self.nbytes += 2 * len(data)
        if not data:
            return torch.empty((rows, *others), dtype=torch.int64, device="cpu")
        numbers = torch.frombuffer(data, dtype=torch.int64).view(rows, *others)
        need(int(numbers.min()) >= 0, f"there is a negative number in tensor {name!r}")
        return numbers


def _json(structure: Any) -> str:
    try:
        return json.dumps(structure, separators=(",", ":"))
    except RecursionError:
        message = "a value is nested too deep"
        raise Defect(message) from None


def _contents(description: str) -> tuple[Heading, dict[tuple[Role, str], Listed]]:
    """Return the heading of the shard and the entry of each layer from its header."""
    try:
        about = json.loads(description)
    except (ValueError, RecursionError) as error:
        message = f"its description is not JSON ({error})"
        raise Defect(message) from error
    version = checked(about, {"version": int}, "the description")["version"]
    need(version == VERSION, "it is of another version of the format")
    checked(about, _DESCRIPTION, "the description")
    layers: dict[tuple[Role, str], Listed] = {}
    for node in about["layers"]:
        need(node["role"] in ROLES, "a layer is of an unknown role")
        slot = Slot(*(node[key] for key in Slot._fields))
        need((slot.role, slot.name) not in layers, "it lists a layer twice")
        before, groups, so_far = node["before"], node["groups"], SoFar.of(node["so_far"])
        fit = so_far.stored > before if groups else so_far.stored == before
        need(fit, f"layer {slot.name[:60]!r} has other calls than it says there are so far")
        layers[slot.role, slot.name] = Listed(slot, before, groups, so_far)
    return Heading.of(about), layers
