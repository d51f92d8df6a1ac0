"""A shard: some calls of a rank, in one safetensors file. Writing and reading it, side by side.

All calls of a layer whose values have one structure, one dtype and one number of dimensions for each tensor
are a *group*, and each tensor of a group is one tensor of the file: the elements of all calls, one behind the
other. Beside it stand the shapes. So ten thousand small calls are three entries in the header, joining them
again is one copy, and whoever has the safetensors library has the data.

For a layer with the key ``output.00003`` the file has

========================  ============  ==================  =====================================================
``output.00003.calls``    int64         ``(calls, 2)``      for each call, its pass and its group
``output.00003.0.1``      of the layer  any                 the elements of tensor 1 of all calls of group 0
``….0.1.shapes``          int64         ``(calls, dims)``   the shape of that tensor in each call of the group
========================  ============  ==================  =====================================================

and the metadata say the rest: see ``docs/reference/format.md``, which is normative.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from actrec._values.memory import memory, writable
from actrec._values.summary import Summary
from actrec.errors import CaptureError

from . import ledger, safetensors
from .format import (
    DTYPES,
    MAX_DIMS,
    MAX_SIZE,
    ROLES,
    VERSION,
    Defect,
    Role,
    Slot,
    corrupt,
    integer,
    items,
    mapping,
    need,
    text,
)
from .ledger import Heading, SoFar
from .values import Structure, decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from actrec._values.containers import Value

    from .place import Mapped, Place

__all__ = ["Call", "Group", "Laid", "Leaf", "Part", "Shard", "lay_out", "storable", "write"]

_PIECE: Final = 1 << 24  # bytes that are made contiguous at a time
_NAMES: Final = {dtype: name for name, (dtype, _) in DTYPES.items()}
_STORED: Final = dict(DTYPES.values())


# --- Tensors -----------------------------------------------------------------------------------------


def storable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as it can be written; ``CaptureError`` if it cannot be."""
    if type(tensor) is not Tensor:
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise CaptureError(_refused(f"a {type(tensor).__name__}"))
        tensor = tensor.as_subclass(Tensor)
    if tensor.is_meta:
        message = "a tensor on the meta device has no data that could be stored"
        raise CaptureError(message)
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise CaptureError(_refused(f"a {kind} tensor"))
    if tensor.dtype not in _STORED:
        raise CaptureError(_refused(f"a tensor of dtype {tensor.dtype}"))
    if tensor.dim() + _STORED[tensor.dtype].pair > MAX_DIMS:
        raise CaptureError(_refused(f"a tensor of {tensor.dim()} dimensions"))
    if not tensor.is_cpu:  # pragma: no cover  # needs another device
        tensor = tensor.cpu()
    # Each would make another tensor, also of one that is plain already, as nearly all are.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor


def _refused(what: str) -> str:
    return f"{what} cannot be stored. Let a transform make plain tensors of it, with to_dense() say"


# --- Writing -----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Call:
    """A value that waits to be written."""

    slot: Slot
    number: int  #: of its pass
    structure: str
    tensors: list[Tensor]
    size: int = 0  #: the bytes that it counts against the budget


class _Group:
    """Calls that are alike, while they are laid out."""

    def __init__(self, number: int, key: str, call: Call) -> None:
        self.number = number
        self.key = key
        self.structure = call.structure
        self.dtypes = [tensor.dtype for tensor in call.tensors]
        self.dims = [tensor.dim() for tensor in call.tensors]
        self.columns: list[list[Tensor]] = [[] for _ in call.tensors]

    def add(self, tensors: list[Tensor]) -> None:
        for column, tensor in zip(self.columns, tensors, strict=True):
            column.append(tensor)

    def shapes(self, number: int) -> Tensor:
        """The shape of one tensor in each call, ``(calls, dims)``."""
        column = [list(tensor.shape) for tensor in self.columns[number]]
        return torch.tensor(column, dtype=torch.int64, device="cpu").view(
            len(column), self.dims[number]
        )

    def entries(self, looks: Summary) -> Iterator[safetensors.Tensor]:
        """The tensors that are written."""
        shapes = [self.shapes(number) for number in range(len(self.columns))]
        for number, column in enumerate(self.columns):
            name = f"{self.key}.{number}"
            yield _data(name, self.dtypes[number], column, shapes[number])
            yield _index(f"{name}.shapes", shapes[number])
        _look(looks, decode(self.structure), self.dtypes, shapes)

    def node(self) -> dict[str, Any]:
        """As it stands in the metadata."""
        structure = json.loads(self.structure)
        return {"structure": structure, "dtypes": [_NAMES[dtype] for dtype in self.dtypes]}


def _look(
    looks: Summary, structure: Structure, dtypes: list[torch.dtype], shapes: list[Tensor]
) -> None:
    """Take in what the values of a group look like."""
    looks.dtypes.update(dict.fromkeys(_NAMES[dtype] for dtype in dtypes))
    for ends in (torch.amin, torch.amax):
        looks.add_spec(structure.spec, [ends(shape, 0).tolist() for shape in shapes])


def _data(
    name: str, dtype: torch.dtype, column: list[Tensor], shapes: Tensor
) -> safetensors.Tensor:
    """The elements of all calls; as rows, where all calls have rows of one shape."""
    stored = _STORED[dtype]
    nbytes = sum(tensor.nbytes for tensor in column)
    tails = shapes[:, 1:]
    if shapes.shape[1] and bool((tails == tails[0]).all()):
        shape = [int(shapes[:, 0].sum()), *tails[0].tolist()]
    else:
        shape = [nbytes // dtype.itemsize]
    shape += [2] * stored.pair
    return safetensors.Tensor(
        name, stored.code, tuple(shape), nbytes, lambda: _views(column), dtype.itemsize
    )


def _index(name: str, numbers: Tensor) -> safetensors.Tensor:
    shape = tuple(numbers.shape)
    return safetensors.Tensor(
        name, "I64", shape, numbers.nbytes, lambda: iter([memory(numbers)]), 8, index=True
    )


def _views(tensors: Iterable[Tensor]) -> Iterator[safetensors.Piece]:
    for tensor in tensors:
        yield from map(memory, [tensor] if tensor.is_contiguous() else _made_contiguous(tensor))


def _made_contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """A few rows at a time, so that no second copy of a large tensor comes into being."""
    rows = max(1, _PIECE * len(tensor) // tensor.nbytes) if tensor.nbytes else 1
    for part in torch.split(tensor, rows):
        yield part.contiguous()


@dataclass(frozen=True, slots=True)
class Laid(ledger.Laid):
    """The calls of one layer, laid out as groups."""

    groups: list[_Group]
    entries: list[safetensors.Tensor]


def lay_out(calls: Iterable[Call]) -> list[Laid]:
    """Sort calls, which come as they ended, into layers, by the first call of each, and these into groups."""
    by_slot: dict[Slot, list[Call]] = defaultdict(list)
    for call in calls:
        by_slot[call.slot].append(call)
    return [_laid_out(*item) for item in by_slot.items()]


def _laid_out(slot: Slot, calls: list[Call]) -> Laid:
    ordered = sorted(calls, key=attrgetter("number"))
    groups: dict[object, _Group] = {}
    lines = []
    for call in ordered:
        alike = call.structure, *((tensor.dtype, tensor.dim()) for tensor in call.tensors)
        if alike not in groups:
            groups[alike] = _Group(len(groups), f"{slot.key}.{len(groups)}", call)
        groups[alike].add(call.tensors)
        lines.append((call.number, groups[alike].number))
    table = torch.tensor(lines, dtype=torch.int64, device="cpu")
    looks = Summary()
    entries = [_index(f"{slot.key}.calls", table)]
    for group in groups.values():
        entries += group.entries(looks)
    nbytes = sum(tensor.nbytes for call in ordered for tensor in call.tensors)
    in_parts = any(decode(group.structure).parts for group in groups.values())
    return Laid(slot, table[:, 0], nbytes, in_parts, looks, list(groups.values()), entries)


def write(
    file: safetensors.Writable, heading: Heading, layers: Mapping[Slot, SoFar], laid: Sequence[Laid]
) -> None:
    """Write a shard.

    Args:
        file: what is written to.
        heading: what it says of itself.
        layers: what there is of each layer with this shard, which ``heading`` counts.
        laid: the calls of the layers that have any in this shard.
    """
    here = {one.slot: one for one in laid}
    nodes = []
    for slot, so_far in layers.items():
        one = here.get(slot)
        groups = [] if one is None else [group.node() for group in one.groups]
        before = so_far.stored - (0 if one is None else len(one.passes))
        nodes.append(
            {**slot._asdict(), "before": before, "groups": groups, "so_far": so_far.node()}
        )
    about = {"version": VERSION, **asdict(heading), "layers": nodes}
    metadata = {"actrec": json.dumps(about, separators=(",", ":"))}
    safetensors.write(file, metadata, [entry for one in laid for entry in one.entries])


# --- Reading -----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Leaf:
    """One tensor of the values of a group: the elements of all calls lie behind each other in the file."""

    name: str
    dtype: torch.dtype
    begin: int  #: byte in the file
    shapes: Tensor  #: (calls, dims)
    starts: Tensor  #: (calls + 1,), the elements before each call

    def shape(self, call: int) -> tuple[int, ...]:
        """The shape of the tensor in a call."""
        return tuple(self.shapes[call].tolist())

    def extent(self, first: int, many: int = 1) -> tuple[int, int]:
        """Where the bytes of some calls begin in the file, and how many they are."""
        begin, end = self.starts[first].item(), self.starts[first + many].item()
        size = self.dtype.itemsize
        return self.begin + int(begin) * size, int(end - begin) * size


@dataclass(slots=True, eq=False)
class Group:
    """Calls of a layer that are alike."""

    structure: Structure
    text: str  #: JSON, equal for equal structures
    leaves: list[Leaf]


@dataclass(slots=True, eq=False)
class Part:
    """What a shard holds of one layer."""

    slot: Slot
    before: int  #: calls of the layer in the shards before this one
    so_far: SoFar
    groups: list[Group]
    passes: Tensor  #: (calls,)
    group: Tensor  #: (calls,), which group each call is in
    within: Tensor  #: (calls,), its number there

    def __len__(self) -> int:
        return len(self.passes)

    def place(self, call: int) -> tuple[Group, int]:
        """Where a call of the part is: in which group, and its number there."""
        return self.groups[int(self.group[call])], int(self.within[call])

    def laid(self) -> ledger.Laid:
        """Return it as the ledger counts it."""
        looks, nbytes = Summary(), 0
        for group in self.groups:
            leaves = group.leaves
            _look(looks, group.structure, [o.dtype for o in leaves], [o.shapes for o in leaves])
            nbytes += sum(leaf.extent(0, len(leaf.shapes))[1] for leaf in leaves)
        in_parts = any(group.structure.parts for group in self.groups)
        return ledger.Laid(self.slot, self.passes, nbytes, in_parts, looks)


class Shard:
    """A shard whose header was read and checked. Its data is untouched until it is asked for."""

    def __init__(self, disk: Place, name: str) -> None:
        self.disk = disk
        self.name = name
        self.path = disk.shown(name)
        self.head = b""  #: what tells the file from any other
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

    # --- Data ------------------------------------------------------------------------------------------

    def value(self, group: Group, call: int) -> Value:
        """Return what call number ``call`` of a group returned."""
        return group.structure.spec.fill([self.tensor(leaf, call) for leaf in group.leaves])

    def tensor(self, leaf: Leaf, call: int) -> Tensor:
        """Return one tensor of a call.

        What is small is read. What is large is a view of the mapped file, private to this process.
        """
        begin, nbytes = leaf.extent(call)
        shape = torch.Size(leaf.shape(call))
        if nbytes <= _SMALL:
            data = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self.read_into(begin, data)
            own = data.untyped_storage()
        else:
            # Saved with torch.save, a call must not take the whole shard along.
            own = self._mapped(slice(begin, begin + nbytes))
            if begin % leaf.dtype.itemsize:  # to read a complex128 there would end the process
                own = own.clone()  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=leaf.dtype, device="cpu")
        return empty.set_(own, 0, shape)  # type: ignore[call-overload,no-any-return]

    def read_into(self, begin: int, data: Tensor) -> None:
        """Fill a contiguous tensor with the bytes of the file from ``begin`` on."""
        if data.nbytes:
            try:
                self.disk.read_into(self.name, self.head, begin, writable(data))
            except Defect as defect:
                raise corrupt(self.path, defect) from None

    def _mapped(self, part: slice) -> torch.UntypedStorage:
        if self._memory is None:
            self._memory = self.disk.map(self.name, self.container.size, self.head)
        try:
            return self._memory[part]
        except Defect as defect:
            raise corrupt(self.path, defect) from None

    # --- Layers ----------------------------------------------------------------------------------------

    def check_identity(self, other: Heading, number: int) -> None:
        """Check that the shard is number ``number`` of the rank that ``other`` is of, and no other file that was put there."""
        heading = self.heading
        for what, found, expected in (
            ("recording", heading.recording, other.recording),
            ("rank", heading.rank, other.rank),
            ("shard", heading.shard, number),
        ):
            if found != expected:
                defect = f"it says that it belongs to {what} {str(found)[:60]}, not {expected}"
                raise corrupt(self.path, defect)

    def so_far(self, role: Role, name: str) -> SoFar:
        """What there is of a layer with this shard."""
        found = self.layers.get((role, name))
        return SoFar() if found is None else found.so_far

    def before(self, role: Role, name: str) -> int:
        """How many calls of a layer the shards before this one hold."""
        found = self.layers.get((role, name))
        return 0 if found is None else found.before

    def part(self, role: Role, name: str) -> Part | None:
        """What the shard holds of a layer."""
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
        key = listed.slot.key
        table = self._numbers(f"{key}.calls", 2)
        passes, group = table.unbind(1)
        many = len(listed.groups)
        need(len(table), f"layer {listed.slot.name[:60]!r} has groups and no calls")
        need(
            bool((passes[1:] >= passes[:-1]).all()), "the calls of a layer are not ordered by pass"
        )
        need(int(group.max()) < many, "a call is in a group that is not there")
        counts = torch.bincount(group, minlength=many)
        within = torch.empty_like(group)
        groups = []
        for number, node in enumerate(listed.groups):
            here = (group == number).nonzero()[:, 0]
            within[here] = torch.arange(len(here), device="cpu")
            groups.append(self._group(f"{key}.{number}", node, int(counts[number])))
        stored = listed.so_far.stored - listed.before
        need(
            stored == len(table),
            f"layer {listed.slot.name[:60]!r} has {len(table)} calls, and claims {stored}",
        )
        return Part(listed.slot, listed.before, listed.so_far, groups, passes, group, within)

    def _group(self, key: str, node: Any, calls: int) -> Group:
        node = mapping(node, "a group", "structure", "dtypes")
        structure_text = _json(node["structure"])
        structure = decode(structure_text)
        dtypes = items(node["dtypes"], "the dtypes of a group")
        need(calls > 0, "a group has no calls")
        need(
            structure.spec.count == len(dtypes),
            "a structure has other than as many tensors as its group",
        )
        leaves = [self._leaf(f"{key}.{at}", dtype, calls) for at, dtype in enumerate(dtypes)]
        scalars = [leaves[number].shapes for number in structure.scalars]
        need(not any(shapes.shape[1] for shapes in scalars), "a NumPy scalar has dimensions")
        return Group(structure, structure_text, leaves)

    def _leaf(self, name: str, dtype: Any, calls: int) -> Leaf:
        need(type(dtype) is str and dtype in DTYPES, f"tensor {name[:60]!r} has an unknown dtype")
        extent = self._extent(name)
        kind, stored = DTYPES[dtype]
        need(stored.code == extent.code, f"tensor {name[:60]!r} is not of dtype {dtype}")
        shapes = self._numbers(f"{name}.shapes")
        need(len(shapes) == calls, f"tensor {name[:60]!r} has not as many shapes as calls")
        sizes = shapes.clamp(min=1).double().prod(1) * kind.itemsize
        need(float(sizes.max()) <= MAX_SIZE, f"tensor {name[:60]!r} has an impossible shape")
        starts = torch.zeros(calls + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(shapes.prod(1), 0, out=starts[1:])
        need(
            float(shapes.double().prod(1).sum()) * kind.itemsize == extent.end - extent.begin,
            f"the calls of a layer take other than the bytes that tensor {name[:60]!r} has",
        )
        return Leaf(name, kind, extent.begin, shapes, starts)

    def _extent(self, name: str) -> safetensors.Extent:
        need(name in self.container.tensors, f"there is no tensor {name[:60]!r}")
        return self.container.tensors[name]

    def _numbers(self, name: str, columns: int | None = None) -> Tensor:
        """A tensor of numbers, read and checked: none is negative."""
        extent = self._extent(name)
        shape = extent.shape
        fit = len(shape) == 2 and shape[1] == (shape[1] if columns is None else columns)  # noqa: PLR2004
        need(
            extent.code == "I64" and fit and shape[1] <= MAX_DIMS,
            f"tensor {name[:60]!r} is no table",
        )
        data = bytearray(self.disk.read(self.name, extent.begin, extent.end - extent.begin))
        need(len(data) == extent.end - extent.begin, "it became shorter while it was read")
        need(zlib.crc32(data) == extent.checksum, f"the checksum of tensor {name[:60]!r} is wrong")
        self.nbytes += 2 * len(data)
        if not data:
            return torch.empty(shape, dtype=torch.int64, device="cpu")
        numbers = torch.frombuffer(data, dtype=torch.int64).view(shape)
        need(int(numbers.min()) >= 0, f"there is a negative number in tensor {name[:60]!r}")
        return numbers


def _json(structure: Any) -> str:
    try:
        return json.dumps(structure, separators=(",", ":"))
    except RecursionError:
        message = "a value is nested too deep"
        raise Defect(message) from None


_SMALL: Final = (
    1 << 20
)  #: bytes that are read rather than mapped: a process can map no more than 65,530 files
_HEAD: Final = (
    64  #: bytes that tell a shard from every other: the checksum is of what tells the data's
)
_OBJECTS: Final = 8  #: Python's objects take so many times the bytes that a header has


class Listed(NamedTuple):
    """What the header of a shard says of one layer."""

    slot: Slot
    before: int
    groups: list[Any]
    so_far: SoFar


def _contents(description: str) -> tuple[Heading, dict[tuple[Role, str], Listed]]:
    try:
        about = json.loads(description)
    except (ValueError, RecursionError) as error:
        message = f"its description is no JSON ({error})"
        raise Defect(message) from error
    keys = [each.name for each in fields(Heading)]
    about = mapping(about, "the description", "version", *keys, "layers")
    need(about["version"] == VERSION, "it is of another version of the format")
    parts = [items(part, "a part") for part in items(about["parts"], "the parts")]
    need(all(len(part) == 2 for part in parts), "a part is not shard and pass")  # noqa: PLR2004
    ended = about["ended"]
    heading = Heading(
        text(about["recording"], "the recording"),
        integer(about["rank"], "the rank"),
        integer(about["ranks"], "the number of ranks"),
        integer(about["began"], "when the run began"),
        integer(about["shard"], "the number of the shard"),
        integer(about["committed"], "the number of committed passes"),
        tuple((integer(a, "a shard"), integer(b, "a pass")) for a, b in parts),
        tuple(integer(shard, "a shard") for shard in items(about["void"], "the void shards")),
        tuple(
            integer(one, "a pass that raised")
            for one in items(about["raised"], "the passes that raised")
        ),
        ended if ended is None else text(ended, "how it ended"),
    )
    raised = max(heading.raised, default=-1)
    need(raised < heading.committed, "a pass raised that is not committed")
    layers = {}
    for node in items(about["layers"], "the layers"):
        listed = _listed(node)
        key = listed.slot.role, listed.slot.name
        need(key not in layers, "it lists a layer twice")
        layers[key] = listed
    return heading, layers


def _listed(node: Any) -> Listed:
    node = mapping(node, "a layer", *Slot._fields, "before", "groups", "so_far")
    need(node["role"] in ROLES, "a layer is of an unknown role")
    slot = Slot(
        node["role"],
        integer(node["number"], "the number of a layer"),
        text(node["name"], "the name of a layer"),
        text(node["type"], "the type of a layer"),
    )
    before = integer(node["before"], "the calls before")
    groups = items(node["groups"], "the groups of a layer")
    calls = integer(
        mapping(node["so_far"], "what there is so far", "stored")["stored"], "the calls so far"
    )
    fit = calls > before if groups else calls == before
    need(fit, f"layer {slot.name[:60]!r} has other calls than it says there are so far")
    return Listed(slot, before, groups, SoFar.parsed(node["so_far"], calls))
