"""What the header of a shard says, checked: which calls it holds, and where their bytes are."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _container
from ._format import (
    DTYPES,
    MAX_DIMS,
    MAX_ITEMS,
    MAX_SIZE,
    ROLES,
    VERSION,
    Defect,
    Slot,
    corrupt,
    counting,
    integer,
    items,
    mapping,
    need,
    text,
)
from ._shard import Heading, stored_row
from ._tree import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from actrec._nested import Value

    from ._container import Container
    from ._parts import Spread
    from ._place import Mapped, Place

__all__ = ["Group", "Opened", "Part", "Run", "Shard", "numbers", "open_shard"]

#: ``first, step, how many``.
Run: TypeAlias = tuple[int, int, int]


def numbers(runs: Iterable[Run]) -> Iterator[int]:
    """The numbers of some runs."""
    for first, step, many in runs:
        yield from range(first, first + many) if step else [first] * many


@dataclass(slots=True, eq=False)
class Leaf:
    """A tensor in the values of a group: the calls follow each other in one tensor of the file."""

    dtype: torch.dtype
    tail: tuple[int, ...]
    expanded: tuple[int, ...]
    scalar: bool
    begin: int
    row: int  # bytes
    calls: list[
        int
    ]  # where each run of calls with the same number of rows begins, and where the last ends
    rows: list[int]  # of each call in that run
    before: list[int] = field(init=False)  # the rows in the file before that run, and in all

    def __post_init__(self) -> None:
        calls = enumerate(pairwise(self.calls))
        rows = (self._stored(run) * (end - begin) for run, (begin, end) in calls)
        self.before = list(accumulate(rows, initial=0))

    def shape(self, call: int) -> tuple[int, ...]:
        """The shape of the tensor in a call."""
        return () if self.scalar else (self._rows(call), *self.tail)

    def tensor(self, call: int, storage: Callable[[], Mapped]) -> Tensor:
        """The tensor of a call, as a view of the file."""
        shape = self.shape(call)
        stored = [1 if dim in self.expanded else size for dim, size in enumerate(shape)]
        return self._view(
            lambda begin, end: storage()[begin:end], *self.place(call), stored
        ).expand(shape)

    def place(self, call: int) -> tuple[int, int]:
        """Where the bytes of a call begin in the file, and how many they are."""
        run = bisect_right(self.calls, call) - 1
        before = self.before[run] + self._stored(run) * (call - self.calls[run])
        return self.begin + before * self.row, self._stored(run) * self.row

    def whole(self, storage: Callable[[], Mapped], *shape: int) -> Tensor:
        """All calls as one tensor of this shape, to be looked at and not kept."""
        return self._view(storage().view, self.begin, self.nbytes, shape)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Where the bytes of each call begin in the file, and how many they are."""
        begin = self.begin
        for run, (first, end) in enumerate(pairwise(self.calls)):
            nbytes = self._stored(run) * self.row
            for _ in range(end - first if nbytes else 0):
                yield begin, nbytes
                begin += nbytes

    def _view(
        self,
        part: Callable[[int, int], torch.UntypedStorage],
        begin: int,
        nbytes: int,
        shape: Any,
    ) -> Tensor:
        if not nbytes:
            return torch.empty(shape, dtype=self.dtype, device="cpu")
        # A storage of its own: saved with torch.save, a call must not take the whole shard along.
        own = part(begin, begin + nbytes)
        if begin % self.dtype.itemsize:  # to read a complex128 there would end the process
            own = own.clone()  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(own, 0, torch.Size(shape))  # type: ignore[call-overload,no-any-return]

    def _rows(self, call: int) -> int:
        return self.rows[bisect_right(self.calls, call) - 1]

    def _stored(self, run: int) -> int:
        return 1 if 0 in self.expanded or self.scalar else self.rows[run]

    @property
    def nbytes(self) -> int:
        """The bytes that all calls take in the file."""
        return self.before[-1] * self.row


@dataclass(slots=True, eq=False)
class Group:
    """Calls of a layer whose values are alike."""

    shard: Shard
    structure: str
    leaves: list[Leaf]

    def value(self, call: int) -> Value:
        """What call number ``call`` of the group returned."""
        return self.decoded(lambda k: self.leaves[k].tensor(call, self.shard.storage))

    def example(self, call: int) -> Value:
        """A value like it, that takes no memory and touches no data."""
        return self.decoded(
            lambda k: torch.zeros((), dtype=self.leaves[k].dtype, device="cpu").expand(
                self.leaves[k].shape(call)
            )
        )

    def filled(self, tensors: list[Tensor]) -> Value:
        """A value of the same structure with these tensors."""
        return self.decoded(tensors.__getitem__)

    def decoded(
        self,
        tensor: Callable[[int], Tensor],
        whole: Callable[[int, Spread], Tensor] | None = None,
    ) -> Value:
        """A value of the group, of these tensors; ``whole`` makes those of which there are parts."""
        try:
            return decode(self.structure, tensor, whole)
        except Defect as defect:
            raise corrupt(self.shard.path, defect) from None


class Stretch(NamedTuple):
    """Successive calls of a layer that are in one group."""

    group: Group
    first: int  # in the group
    many: int


@dataclass(slots=True, eq=False)
class Part:
    """What a shard has of one layer."""

    slot: Slot
    passes: list[Run]
    groups: list[Group]
    calls: list[Stretch]
    starts: list[int] = field(init=False)  # of each stretch, and where the last ends

    def __post_init__(self) -> None:
        self.starts = list(accumulate((stretch.many for stretch in self.calls), initial=0))

    @property
    def memory(self) -> int:
        """About how many bytes it takes in Python's memory."""
        leaves = [leaf for group in self.groups for leaf in group.leaves]
        runs = len(self.passes) + len(self.calls) + sum(len(leaf.rows) for leaf in leaves)
        text = sum(len(group.structure) for group in self.groups)
        return 1024 + 160 * runs + 512 * len(leaves) + 128 * len(self.groups) + text

    def place(self, call: int) -> tuple[Group, int]:
        """Where a call is: in which group, and the how-manieth there."""
        at = bisect_right(self.starts, call) - 1
        group, first, _ = self.calls[at]
        return group, first + call - self.starts[at]


class Shard:
    """A shard whose header was read and checked; its data is untouched."""

    def __init__(self, disk: Place, name: str) -> None:
        self._disk = disk
        self.name = name
        self.path = disk.shown(name)
        self.size = 0
        self.heading = Heading("", 0, 0, 0)
        self.head = b""  # the beginning of the file, with the checksum of its header
        self._storage: Mapped | None = None

    def storage(self) -> Mapped:
        """The memory of the file."""
        if self._storage is None:
            self._storage = self._disk.map(self.name, self.size, self.head)
        return self._storage


class Opened(NamedTuple):
    """A shard, and beside it what it holds, which refers to it: so they are no cycle that waits for the collector."""

    shard: Shard
    container: Container
    parts: list[Part]

    @property
    def memory(self) -> int:
        """About how many bytes all parts take in Python's memory."""
        return 1024 + sum(part.memory for part in self.parts)

    def part(self, role: str, name: str) -> Part | None:
        """What it holds of a layer."""
        same = (part for part in self.parts if (part.slot.role, part.slot.name) == (role, name))
        return next(same, None)


#: Bytes at the beginning of a shard that tell it from every other: the checksum is of what tells the data's.
_HEAD: Final = 64


def open_shard(disk: Place, name: str) -> Opened:
    """Read and check the header of a shard, or raise ``CorruptRecordingError``."""
    shard = Shard(disk, name)

    def read(most: int) -> bytes:
        found = disk.read(name, most)
        shard.head = found[:_HEAD]
        return found

    try:
        container = _container.parse(disk.size(name), read)
        shard.size = container.size
        shard.heading, parts = _contents(shard, container)
    except Defect as defect:
        raise corrupt(shard.path, defect) from None
    except FileNotFoundError:
        raise corrupt(shard.path, "it is missing") from None
    return Opened(shard, container, parts)


#: What every shard says of itself.
_NEEDED: Final = tuple(
    name for name in Heading._fields if name not in Heading._field_defaults or name == "part"
)

# --- Checking ----------------------------------------------------------------------------------------


def _contents(shard: Shard, container: Container) -> tuple[Heading, list[Part]]:
    try:
        about = json.loads(container.metadata.get("actrec", "null"))
    except (ValueError, RecursionError) as error:
        message = f"its description is no JSON ({error})"
        raise Defect(message) from error
    about = mapping(about, "the description", "version", *_NEEDED, "layers", "structures")
    need(about["version"] == VERSION, "it is of another version of the format")
    need(type(about["part"]) is bool, "'part' is neither true nor false")
    heading = Heading(
        text(about["recording"], "the recording"),
        integer(about["rank"], "the rank"),
        integer(about["shard"], "the number of the shard"),
        integer(about["committed"], "the number of committed passes"),
        about["part"],
        tuple(
            integer(one, "a pass that raised")
            for one in items(about.get("raised", []), "the passes that raised")
        ),
    )
    need(
        all(one < heading.committed for one in heading.raised),
        "a pass raised that is not committed",
    )
    structures = [
        text(structure, "a structure") for structure in items(about["structures"], "the structures")
    ]
    checker = _Checker(shard, container, structures)
    parts = [checker.part(layer) for layer in items(about["layers"], "the layers")]
    slots = {(part.slot.role, part.slot.name) for part in parts}
    need(len(slots) == len(parts), "it lists a layer twice")
    return heading, parts


def _stretches(groups: list[Group], order: list[tuple[int, int]]) -> Iterator[Stretch]:
    had = [0] * len(groups)
    for many, number in order:
        yield Stretch(groups[number], had[number], many)
        had[number] += many


class _Checker:
    def __init__(self, shard: Shard, container: Container, structures: list[str]) -> None:
        self.shard = shard
        self.container = container
        self.structures = structures
        self.count = 0

    def part(self, layer: Any) -> Part:
        layer = mapping(layer, "a layer", *Slot._fields, "passes", "calls", "groups")
        need(layer["role"] in ROLES, "a layer is of an unknown role")
        slot = Slot(
            layer["role"],
            integer(layer["number"], "the number of a layer"),
            text(layer["name"], "the name of a layer"),
            text(layer["type"], "the type of a layer"),
        )
        described = items(layer["groups"], "the groups of a layer")
        order = [
            self.pair(pair, len(described))
            for pair in items(layer["calls"], "the calls of a layer")
        ]
        calls = [0] * len(described)
        for many, number in order:
            calls[number] += many
        groups = [self.group(*pair) for pair in zip(described, calls, strict=True)]
        passes = [self.run(run) for run in items(layer["passes"], "the passes of a layer")]
        need(
            sum(many for _, _, many in passes) == sum(calls),
            f"layer {slot.name[:60]!r} has {sum(calls)} calls, and passes for another number",
        )
        return Part(slot, passes, groups, list(_stretches(groups, order)))

    def pair(self, pair: Any, groups: int) -> tuple[int, int]:
        pair = items(pair, "a run of calls")
        need(len(pair) == 2, "a run of calls is not how many and of which group")  # noqa: PLR2004
        return (
            counting(pair[0], "a number of calls"),
            integer(pair[1], "the number of a group", groups - 1),
        )

    def run(self, run: Any) -> Run:
        run = items(run, "a run of passes")
        need(len(run) == 3, "a run of passes is not first, step and how many")  # noqa: PLR2004
        return (
            integer(run[0], "a pass"),
            integer(run[1], "the step from pass to pass", 1),
            counting(run[2], "a number of passes"),
        )

    def group(self, group: Any, calls: int) -> Group:
        group = mapping(group, "a group", "structure", "tensors")
        leaves = items(group["tensors"], "the tensors of a group")
        self.count += calls * max(1, len(leaves))
        need(calls > 0, "a group has no calls")
        need(self.count <= MAX_ITEMS, f"it claims more than {MAX_ITEMS} calls")
        structure = integer(
            group["structure"], "the number of a structure", len(self.structures) - 1
        )
        return Group(
            self.shard, self.structures[structure], [self.leaf(leaf, calls) for leaf in leaves]
        )

    def leaf(self, leaf: Any, calls: int) -> Leaf:
        leaf = mapping(leaf, "a tensor", "tensor", "dtype")
        name, dtype = text(leaf["tensor"], "the name of a tensor"), leaf["dtype"]
        need(name in self.container.tensors, f"there is no tensor {name[:60]!r}")
        need(type(dtype) is str and dtype in DTYPES, f"tensor {name[:60]!r} has an unknown dtype")
        extent = self.container.tensors[name]
        scalar = "shape" not in leaf
        tail = self.sizes(leaf.get("shape", []), "the shape of a tensor")
        expanded = self.sizes(leaf.get("expanded", []), "the expanded dimensions")
        need(all(dim <= len(tail) for dim in expanded), "a dimension is expanded that is not there")
        starts, rows = self.rows([[calls, 1]] if scalar else leaf.get("rows"), calls)
        offset = integer(leaf.get("offset", 0), "an offset")
        kind, stored = DTYPES[dtype]
        need(offset % stored.itemsize == 0, "an offset is not a whole number of elements")
        need(stored.code == extent.code, f"tensor {name[:60]!r} is not of dtype {dtype}")
        row = stored_row(kind, tail, expanded)
        made = Leaf(kind, tail, expanded, scalar, extent.begin + offset, row, starts, rows)
        need(
            made.begin + made.nbytes <= extent.end,
            f"the calls of a layer take more bytes than tensor {name[:60]!r} has",
        )
        most = math.prod(max(1, size) for size in (max(rows), *tail)) * kind.itemsize
        need(most <= MAX_SIZE, f"tensor {name[:60]!r} has an impossible shape")
        return made

    def sizes(self, sizes: Any, what: str) -> tuple[int, ...]:
        sizes = items(sizes, what)
        need(len(sizes) <= MAX_DIMS, f"{what} has {len(sizes)} entries")
        return tuple(integer(size, what) for size in sizes)

    def rows(self, runs: Any, calls: int) -> tuple[list[int], list[int]]:
        counts, rows = [], []
        for item in items(runs, "the rows of a tensor"):
            run = items(item, "a run of rows")
            need(len(run) == 2, "a run of rows is not how many and rows")  # noqa: PLR2004
            counts.append(counting(run[0], "a number of calls"))
            rows.append(integer(run[1], "a number of rows"))
        need(sum(counts) == calls, "a tensor has not as many rows as calls")
        return list(accumulate(counts, initial=0)), rows
