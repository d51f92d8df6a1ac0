"""A shard: all calls of a contiguous range of passes, laid out so that those of a layer lie together.

The calls of a layer whose values have the same structure, dtypes and shapes (but for the first dimension)
form a *group*. A group has one safetensors tensor for each tensor in the value, which is the calls joined
along the first dimension; which calls they are, and how many rows each has, stands in the metadata. So ten
thousand small calls are one entry in the header, and joining them again is one copy.

Memory that several values share is written once: the others say where it is.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from actrec._values.snapshot import address, memory
from actrec.errors import CaptureError

from . import safetensors as _container
from .format import DTYPES, MAX_DIMS, VERSION, Slot, Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .safetensors import Piece, Writable

__all__ = ["Call", "Heading", "described", "named", "place", "runs", "storable", "write"]

_PIECE: Final = 1 << 24  # bytes that are made contiguous at a time


@dataclass(slots=True, eq=False)
class Call:
    """A value that waits to be written."""

    slot: Slot
    number: int  # of its pass
    structure: str
    tensors: list[Tensor]
    size: int  # what it counts against the budget


def described(structure: str, tensors: Sequence[Tensor]) -> int:
    """The bytes that a value takes in the header of a shard at most, which is where no other value is like it."""
    # In text that is in text, each of these is four characters.
    escaped = len(structure) + 3 * (structure.count('"') + structure.count("\\"))
    return 128 + escaped + 288 * len(tensors) + 48 * sum(map(Tensor.dim, tensors))


@lru_cache(maxsize=1 << 12)
def named(slot: Slot) -> int:
    """The bytes that the name of a layer takes in the header of a shard."""
    return 128 + len(json.dumps(json.dumps(slot)))


class Heading(NamedTuple):
    """What a shard says about itself."""

    recording: str
    rank: int
    shard: int
    committed: int  # with this shard, the passes before this number are complete
    part: bool = False  # of a pass that is not complete yet
    raised: tuple[int, ...] = ()  # those of the passes that it commits that raised

    def text(self) -> dict[str, Any]:
        """As it stands in the metadata."""
        about = self._asdict()
        if not self.raised:
            del about["raised"]
        return {"version": VERSION, **about}


# --- Tensors -----------------------------------------------------------------------------------------

_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
_STORED = dict(DTYPES.values())


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


def place(tensor: Tensor) -> tuple[object, int]:
    """The memory of a plain tensor, and its bytes."""
    return address(tensor), tensor.untyped_storage().nbytes()


class _Form(NamedTuple):
    """What the tensors of a group have in common."""

    dtype: torch.dtype
    tail: tuple[int, ...]  # the dimensions after the first
    expanded: tuple[int, ...]  # the dimensions that repeat one element
    scalar: bool  # whether there is no first dimension


def _form(tensor: Tensor) -> _Form:
    shape = tuple(tensor.shape)
    expanded: tuple[int, ...] = ()
    if 0 in tensor.stride() and tensor.numel():
        both = enumerate(zip(shape, tensor.stride(), strict=True))
        expanded = tuple(dim for dim, (size, stride) in both if stride == 0 and size > 1)
    return _Form(tensor.dtype, shape[1:], expanded, not shape)


def _base(tensor: Tensor, form: _Form) -> Tensor:
    """What is written of a tensor: of dimensions that repeat one element, that element."""
    for dim in form.expanded:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _views(tensors: Iterable[Tensor]) -> Iterator[Piece]:
    for tensor in tensors:
        yield from map(memory, [tensor] if tensor.is_contiguous() else _made_contiguous(tensor))


def _made_contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """A few rows at a time, so that no second copy of a large tensor comes into being."""
    rows = max(1, _PIECE * len(tensor) // tensor.nbytes)
    for part in torch.split(tensor, rows):
        yield part.contiguous()


# --- Groups ------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Entry:
    """A safetensors tensor in the making."""

    name: str
    form: _Form
    pieces: list[Tensor] = field(default_factory=list)
    nbytes: int = 0

    def finished(self) -> _container.Tensor:
        stored = _STORED[self.form.dtype]
        tail = list(self.form.tail)
        for dim in self.form.expanded:
            if dim:
                tail[dim - 1] = 1
        rows = sum(1 if self.form.scalar else piece.shape[0] for piece in self.pieces)
        shape = (rows, *tail, *([2] if stored.pair else []))
        size = self.form.dtype.itemsize
        return _container.Tensor(
            self.name, stored.code, shape, self.nbytes, lambda: _views(self.pieces), size
        )


class _At(NamedTuple):
    """Where the bytes of a tensor are: after so many bytes of an entry."""

    entry: _Entry
    offset: int


#: Where the memory of a tensor was met before: nowhere, in an entry, or in the same value.
_Found: TypeAlias = _At | int | None


@dataclass(slots=True, eq=False)
class _Leaf:
    """One tensor of the values of a group."""

    entry: _Entry
    offset: int
    form: _Form
    own: bool = False
    twin: int | None = None  # the earlier tensor of the same value that has the same memory
    rows: list[int] = field(default_factory=list)
    nbytes: int = 0

    def goes_on_at(self, at: _Found) -> bool:
        if not isinstance(at, _At):
            return self.twin == at and self.own == (at is None)
        follows = self.entry is at.entry and self.offset + self.nbytes == at.offset
        return follows and self.twin is None and not self.own

    def add(self, tensor: Tensor, base: Tensor) -> None:
        # PyTorch takes microseconds to answer len().
        self.rows.append(1 if self.form.scalar else tensor.shape[0])
        self.nbytes += base.nbytes
        if self.own:
            self.entry.pieces.append(base)
            self.entry.nbytes += base.nbytes

    def text(self) -> dict[str, Any]:
        leaf: dict[str, Any] = {"tensor": self.entry.name, "dtype": _NAMES[self.form.dtype]}
        if not self.form.scalar:
            leaf |= {"shape": self.form.tail, "rows": list(lengths(self.rows))}
        if self.form.expanded:
            leaf["expanded"] = self.form.expanded
        if self.offset:
            leaf["offset"] = self.offset
        return leaf


@dataclass(slots=True, eq=False)
class _Group:
    """Calls that are alike."""

    structure: str
    leaves: list[_Leaf]

    def goes_on_at(self, found: Sequence[_Found]) -> bool:
        return all(leaf.goes_on_at(at) for leaf, at in zip(self.leaves, found, strict=True))


class _Layout:
    """Finds the groups of all calls, and which tensors share memory."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.places: dict[object, _At] = {}

    def groups(self, slot: Slot, calls: Iterable[Call]) -> tuple[list[_Group], list[int]]:
        """The groups of a layer, and for each call the number of its group."""
        groups: list[_Group] = []
        latest: dict[object, int] = {}  # of the groups whose calls are alike
        order: list[int] = []
        for call in calls:
            forms = [_form(tensor) for tensor in call.tensors]
            bases = [_base(*pair) for pair in zip(call.tensors, forms, strict=True)]
            keys = [_memory_key(base) for base in bases]
            found = [self.met(key, keys[:at]) for at, key in enumerate(keys)]
            alike = call.structure, *forms
            number = latest.get(alike)
            if number is None or not groups[number].goes_on_at(found):
                number = latest[alike] = len(groups)
                leaves = self.leaves(f"{slot.key}.{number:05d}", forms, found)
                groups.append(_Group(call.structure, leaves))
            order.append(number)
            for leaf, tensor, base, key in zip(
                groups[number].leaves, call.tensors, bases, keys, strict=True
            ):
                if leaf.own and key is not None:
                    self.places[key] = _At(leaf.entry, leaf.nbytes)
                leaf.add(tensor, base)
        return groups, order

    def met(self, key: object, before: list[object]) -> _Found:
        if key is None:
            return None
        return before.index(key) if key in before else self.places.get(key)

    def leaves(self, name: str, forms: list[_Form], found: Sequence[_Found]) -> list[_Leaf]:
        leaves: list[_Leaf] = []
        for number, (form, at) in enumerate(zip(forms, found, strict=True)):
            if at is None:
                self.entries.append(_Entry(f"{name}.{number}", form))
                leaves.append(_Leaf(self.entries[-1], 0, form, own=True))
            elif isinstance(at, _At):
                leaves.append(_Leaf(at.entry, at.offset, form))
            else:
                twin = leaves[at]
                leaves.append(_Leaf(twin.entry, twin.offset, form, twin=at))
        return leaves


def _memory_key(base: Tensor) -> object:
    """Equal for tensors that have the same bytes in the same memory; ``None`` if that cannot be known."""
    if not base.is_contiguous() or not base.nbytes:
        return None
    return place(base)[0], base.storage_offset(), base.nbytes, base.dtype


# --- Writing -----------------------------------------------------------------------------------------


def write(file: Writable, heading: Heading, calls: Iterable[Call]) -> None:
    """Write a shard with these calls, which come as they ended: layer by layer, and in each by pass."""
    layout = _Layout()
    structures: dict[str, int] = {}
    by_slot: dict[Slot, list[Call]] = defaultdict(list)
    for call in calls:
        by_slot[call.slot].append(call)
    layers = []
    for slot, called in by_slot.items():  # in the order of their first calls
        ordered = sorted(called, key=attrgetter("number"))
        groups, order = layout.groups(slot, ordered)
        layers.append(
            {
                **slot._asdict(),
                "passes": list(runs(call.number for call in ordered)),
                "calls": list(lengths(order)),
                "groups": [
                    {
                        "structure": structures.setdefault(group.structure, len(structures)),
                        "tensors": [leaf.text() for leaf in group.leaves],
                    }
                    for group in groups
                ],
            }
        )
    about = {**heading.text(), "layers": layers, "structures": list(structures)}
    metadata = {"actrec": json.dumps(about, separators=(",", ":"))}
    _container.write(file, metadata, [entry.finished() for entry in layout.entries])


def lengths(numbers: Iterable[int]) -> Iterator[list[int]]:
    """``[how many times, number]`` for each run of one number.

    >>> list(lengths([8, 8, 8, 2]))
    [[3, 8], [1, 2]]
    """
    for number, run in groupby(numbers):
        yield [sum(1 for _ in run), number]


def runs(numbers: Iterable[int]) -> Iterator[list[int]]:
    """``[first, step, how many]`` for each run of numbers that stay the same or go up by one.

    >>> list(runs([0, 1, 2, 2, 2, 3]))
    [[0, 1, 3], [2, 0, 2], [3, 1, 1]]
    """
    run: list[int] = []
    for number in numbers:
        if run and run[2] == 1 and number - run[0] in {0, 1}:
            run = [run[0], number - run[0], 2]
        elif run and number == run[0] + run[1] * run[2]:
            run[2] += 1
        else:
            if run:
                yield run
            run = [number, 1, 1]
    if run:
        yield run


def stored_row(dtype: torch.dtype, tail: Iterable[int], expanded: Iterable[int]) -> int:
    """The bytes of one row in the file."""
    stored: Stored = _STORED[dtype]
    sizes = list(tail)
    for dim in expanded:
        if dim:
            sizes[dim - 1] = 1
    return math.prod(sizes) * stored.itemsize * (1 + stored.pair)
