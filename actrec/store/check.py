"""Finds what is wrong with the shards of ranks: reads all their data, and counts again what their headers say."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Final

from actrec._progress import showing
from actrec.errors import CorruptRecordingError

from .description import read_description
from .file_names import rank_number, shard_name, shard_names
from .format import corrupt
from .ledger import Commit, Heading, Ledger
from .part import Part
from .place import Place
from .shard import Shard

_CHUNK: Final = 1 << 24


def shard_problems(folders: Sequence[Place], what: str, *, progress: bool) -> Iterator[str]:
    """Yield what is wrong with the shards in the folders of ranks; ``what`` is shown while it is done."""
    expected = [(folder, _expected(folder)) for folder in folders]
    with showing(what, sum(len(shards) for _, shards in expected), progress=progress) as each:
        for folder, shards in expected:
            yield from _rank_problems(folder, each(shards))


def _expected(folder: Place) -> range:
    """Return the numbers of all shards that there should be, judging by the last one."""
    names = shard_names(folder)
    last = int(names[-1].partition(".")[0]) if names else -1
    # A much larger number must be a foreign file.
    return range(min(last, 2 * len(names)) + 1)


def _rank_problems(folder: Place, numbers: Iterable[int]) -> Iterator[str]:
    nothing: Heading | None = None  # before the first shard; without it nothing is counted
    try:
        nothing = read_description(folder).heading(rank_number(folder))
    except CorruptRecordingError as error:
        yield str(error)
    except FileNotFoundError:
        pass  # if there are shards, opening has said so
    ledger = None if nothing is None else Ledger(nothing)
    for number in numbers:
        try:
            shard = Shard(folder, shard_name(number))
            if nothing is not None:
                shard.check_identity(nothing, number)
        except CorruptRecordingError as error:
            yield str(error)
            ledger = None
            continue
        parts, problems = _parts(shard)
        if ledger is not None and not problems:
            heading = shard.heading
            if heading.began != ledger.heading.began:  # the first of a resumed run
                ledger = ledger.resumed(heading.ranks, heading.began)
            defects = _miscounted(ledger, shard, parts)
            problems = [str(corrupt(shard.path, defect)) for defect in defects]
        yield from problems
        yield from _data_problems(shard)
        if problems:
            ledger = None


def _parts(shard: Shard) -> tuple[list[Part], list[str]]:
    """Return the part of each layer in a shard, and what is wrong with it."""
    parts, problems = [], []
    for key in shard.layers:
        try:
            part = shard.part(*key)
        except CorruptRecordingError as error:
            problems.append(str(error))
        else:
            parts += [] if part is None else [part]
    return parts, problems


# --- Counting again ----------------------------------------------------------------------------------


def _miscounted(ledger: Ledger, shard: Shard, parts: list[Part]) -> Iterator[str]:
    """Yield what a header says that does not follow from the calls and the shards before it."""
    heading, before = shard.heading, ledger.heading
    part_of = heading.parts[-1][1] if heading.is_part else None
    if heading.committed < before.committed:
        yield "it commits fewer passes than the shard before it"
        return
    void = heading.void[len(before.void) :]
    for one in parts:
        first, last = int(one.passes[0]), int(one.passes[-1])
        if last >= heading.committed if part_of is None else not first == last == part_of:
            yield f"it has calls of layer {one.slot.name[:60]!r} of passes that do not belong into it"
    raised = heading.raised[len(before.raised) :]
    dropped = {number for at, number in before.parts if at in void}
    ledger.next(parts, Commit(heading.committed, part_of, raised, dropped, heading.ended))
    if ledger.heading != heading:
        yield "what it says of the shards before it is wrong"
    found = {listed.slot: listed for listed in shard.layers.values()}
    if found.keys() != ledger.layers.keys():  # the order is that of the run
        yield "it does not list the layers that have calls"
        return
    here = {one.slot: len(one.passes) for one in parts}
    for slot, so_far in ledger.layers.items():
        stored = so_far.stored - here.get(slot, 0)
        if found[slot].before != stored or not found[slot].so_far.agrees(so_far):
            yield f"what it says of the calls of layer {slot.name[:60]!r} so far is wrong"


# --- Data --------------------------------------------------------------------------------------------


def _data_problems(shard: Shard) -> Iterator[str]:
    owners = {listed.slot.key: listed.slot.name for listed in shard.layers.values()}
    with shard.disk.open(shard.name) as file:
        for tensor, extent in shard.container.tensors.items():
            file.seek(extent.begin)
            found = _checksum(file, extent.end - extent.begin)
            if found != extent.checksum:
                layer = owners.get(".".join(tensor.split(".")[:2]), tensor)[:60]
                defect = f"the checksum of the data of layer {layer!r} is {found:08x}, and should be {extent.checksum:08x}"
                yield str(corrupt(shard.path, defect))


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            break
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum
