"""``load()``: a stored recording, opened as the same kind of object as one in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from actrec._recordings.layer import V
from actrec._recordings.units import Key, missing
from actrec._text import count, listed
from actrec.errors import CorruptRecordingError, MissingUnitsError, RecordingNotFoundError

from .file_names import is_described, rank_folders, rank_number
from .place import Place, place
from .rank import Rank
from .reader import StoredRecording, check_rank

#: The folder of a rank, or a file in it.
_INSIDE: Final = re.compile(
    r"(?P<whole>.+)[/\\\\]rank-(?P<rank>[0-9]{5})([/\\\\][^/\\\\]+)?", re.DOTALL
)


def load(
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    check: bool = False,
    units: Iterable[Key] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_bytes: int = 1 << 30,
    progress: bool = False,
) -> StoredRecording[V]:
    """Open a stored recording.

    >>> import tempfile, torch, actrec
    >>> from torch import nn
    >>> folder = tempfile.mkdtemp() + "/run"
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with actrec.record(model, "0", into=folder) as acts:
    ...     for batch in torch.randn(2, 5, 4):
    ...         output = model(batch)
    >>> acts = actrec.load(folder)
    >>> acts
    stored Sequential: 1 layer, 2 passes, 120 B
    layer  type    calls  shape   dtype    memory
    0      Linear      2  (5, 3)  float32   120 B
    >>> acts["0"][1].shape, acts["0"].cat().shape
    (torch.Size([5, 3]), torch.Size([10, 3]))

    Opening reads one header of each rank and no data, so it takes milliseconds however large the recording is. Each access
    reads a call from the disk; a call of more than a megabyte is a view of the mapped file. Writing to it never changes the
    file, but other values that this recording returns may share the memory: write to a ``clone()``. ``cat()`` and
    ``stack()`` return new tensors.

    A recording that was not closed properly (the process was killed, an exception ended the block, the disk was full)
    has all the passes that were committed, and ``acts.complete`` is false.

    What several ranks of ``torch.distributed`` have recorded is read as one recording: calls are ordered by
    pass, and within a pass by rank; ``acts[name].ranks`` has the rank of each. The parts of a ``DTensor`` become one
    call, a plain, whole tensor, assembled when it is read; if a part is missing, the call is left out. ``acts.ranks``
    says how far each rank has come, and ``acts.rank(2)`` is the recording of rank 2, with its local parts. With
    ``rank=2``, only the folder of that rank is opened: it can be read even if another one is damaged.

    Data is not checked when it is read: a file whose bytes were changed, for example by a bad disk, silently gives other
    numbers. ``check=True`` reads everything once, compares the checksums, and raises for the first that does not match;
    :func:`verify` lists all of them.

    Containers are restored with their structure: tuples, lists, dicts, named tuples, NumPy arrays and Python's
    numbers and strings as themselves, dataclasses and other classes as :class:`actrec.store.Fields`. No
    class that a file names is ever imported.

    A URL such as ``"s3://bucket/run"`` is opened through ``fsspec``. Data is downloaded on access, in blocks of
    4 MiB, of which the last ones are cached in memory. ``cache_bytes`` has no effect for a path on disk.

    Args:
        path: the folder, or the URL.
        rank: open only the folder of this rank.
        check: whether to read and check all data first, which takes as long as reading it.
        units: the keys of units that must be there. :meth:`Recording.missing` returns those that are not, without raising.
        storage_options: options that ``fsspec`` passes to the file system of a URL: credentials, an endpoint.
        cache_bytes: about how many downloaded bytes are cached.
        progress: whether to show the progress of the check, as in :meth:`Recording.stats`.

    Returns:
        A :class:`actrec.Recording` whose layers are lazy. It also has ``complete``, ``ranks`` and ``rank()``.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        OptionError: there is no such rank, or an item of ``units`` is not a key.
        MissingUnitsError: keys of ``units`` are not there; the message and the attribute ``missing`` name them.
        CorruptRecordingError: a file is damaged; the message names it and what is wrong with it. Only
            headers are checked, unless ``check=True``.
        ReadError: an object store could not be reached, or refused the request.
    """
    recording = opened(place(path, storage_options, cache_bytes), rank=rank)
    problem = next(recording.problems(progress=progress), None) if check else None
    if problem is not None:
        raise CorruptRecordingError(problem)
    if units is not None:
        _check_units(recording, units)
    return recording


def _check_units(recording: StoredRecording[Any], units: Iterable[Key]) -> None:
    call = f"load({str(recording.place)!r}, units=...)"
    lacking = missing(call, units, recording.done)
    if lacking:
        message = (
            f"{call}: {count(len(lacking), 'unit')} that should be there {'is' if len(lacking) == 1 else 'are'} not: {listed(lacking)}; "
            f"there are {len(recording.done):,}. load(path).missing(keys) returns all of them."
        )
        raise MissingUnitsError(message, lacking)


def opened(disk: Place, *, rank: int | None = None) -> StoredRecording[Any]:
    """Open the recording at a place, or only its ``rank``."""
    folders = {rank_number(folder): folder for folder in rank_folders(disk)}
    if type(rank) is int and rank in folders and is_described(folders[rank]):
        return StoredRecording(disk, [Rank(folders[rank])], only=rank)
    described = [folder for folder in folders.values() if is_described(folder)]
    if not described:
        message = f"load({str(disk)!r}): {_what_is_there(disk)}."
        raise RecordingNotFoundError(message)
    if rank is None:
        return StoredRecording(disk, [Rank(folder, of=len(described)) for folder in described])
    first = Rank(described[0])
    numbered = range(max(first.heading.ranks - 1, *folders) + 1)
    check_rank(f"load({str(disk)!r}, rank={rank!r})", rank, numbered)
    return StoredRecording(disk, [], only=rank, model=first.description.model)


def _what_is_there(disk: Place) -> str:
    """Return what is at a place without a recording, and what to write instead."""
    is_file = disk.is_file()
    if not (is_file or disk.exists()):
        return "there is no recording there (no such folder)"
    inside = _INSIDE.fullmatch(str(disk))
    if inside is not None and (is_file or is_described(disk)):
        whole, number = inside["whole"], int(inside["rank"])
        what = "a file of a recording" if is_file else f"the folder of rank {number} of a recording"
        return f"that is {what}. Write load({whole!r}), or load({whole!r}, rank={number}) for what that rank has written"
    if is_file:
        return "that is a file, and a recording is a folder. Open what record(..., into=path) has written with load(path)"
    return "there is no recording there (no rank.json in any folder in it)"
