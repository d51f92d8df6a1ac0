"""``load()``: a stored recording, opened as the same kind of object as one in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from actrec._recordings.layer import V
from actrec._recordings.units import Key, missing
from actrec._text import count
from actrec.errors import CorruptRecordingError, MissingUnitsError, RecordingNotFoundError

from .place import Place, place
from .rank_folder import Rank, is_described, rank_folders, rank_number
from .reader import StoredRecording, check_rank

_SHOWN: Final = 8  # keys in a message
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

    Opening reads one header of each rank and no data, so it takes milliseconds however large the recording is. A
    call is read from the disk when it is asked for; one of more than a megabyte is a view of the mapped file. Writing
    to it never changes the file, but may be seen where this recording gives out the same bytes again; take a
    ``clone()`` to write to. ``cat()`` and ``stack()`` return new tensors.

    A recording that was not closed properly (the process was killed, the block left by an exception, the
    disk full) has all the passes that were committed, and says so: ``acts.complete`` is false.

    What several ranks of ``torch.distributed`` have recorded is read as one recording: calls are ordered by
    pass, and within a pass by rank; ``acts[name].ranks`` says whose they are. The parts of a ``DTensor`` become one
    call, a plain tensor that is whole, assembled when it is asked for; where a part is missing, the call is left
    out. ``acts.ranks`` says how far each rank has come, and ``acts.rank(2)`` is what rank 2 has recorded, with its
    parts as they are. With ``rank=2``, nothing but the folder of that rank is opened: it can be read though
    another one is damaged.

    Data is not checked when it is read: a file whose bytes were changed, by a bad disk say, gives other numbers without a
    word. ``check=True`` reads everything once, compares the checksums, and raises for the first that does not fit;
    :func:`verify` lists all of them.

    Containers come back in their structure: tuples, lists, dicts, named tuples, NumPy arrays and Python's
    numbers and strings as themselves, dataclasses and other classes as :class:`actrec.store.Fields`. No
    class that a file names is ever imported.

    A URL such as ``"s3://bucket/run"`` is opened through ``fsspec``. What is asked for is downloaded, in blocks of
    4 MiB, of which the last ones stay in memory. For a path on disk ``cache_bytes`` means nothing.

    Args:
        path: the folder, or the URL.
        rank: the rank whose folder alone is opened.
        check: whether to read and check all data first, which takes as long as reading it.
        units: the keys of units that have to be there. :meth:`Recording.missing` says which are not without raising.
        storage_options: what ``fsspec`` passes to the file system of a URL: credentials, an endpoint.
        cache_bytes: about how many bytes of what was downloaded are kept.
        progress: whether to show how far the check is, as in :meth:`Recording.stats`.

    Returns:
        A :class:`actrec.Recording` whose layers are lazy. It also has ``complete``, ``ranks`` and ``rank()``.

    Raises:
        RecordingNotFoundError: there is no recording at ``path``.
        OptionError: there is no such rank, or something in ``units`` is no key.
        MissingUnitsError: keys of ``units`` are not there; the message and its ``missing`` say which.
        CorruptRecordingError: a file is damaged; the message names it and what is wrong with it. Only
            headers are checked, unless ``check=True``.
        ReadError: an object store could not be reached, or refused.
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
        first = ", ".join(map(repr, lacking[:_SHOWN]))
        more = len(lacking) - _SHOWN
        message = (
            f"{call}: {count(len(lacking), 'unit')} that should be there {'is' if len(lacking) == 1 else 'are'} not: {first}{f' and {more:,} more' * (more > 0)}; "
            f"there are {len(recording.done):,}. load(path).missing(keys) returns all of them."
        )
        raise MissingUnitsError(message, lacking)


def opened(disk: Place, *, rank: int | None = None) -> StoredRecording[Any]:
    """Open what is at a place; of a ``rank`` that is there, nothing else is looked at."""
    folders = {rank_number(folder.name): folder for folder in rank_folders(disk)}
    if type(rank) is int and rank in folders and is_described(folders[rank]):
        return StoredRecording(disk, [Rank(folders[rank])], only=rank)
    described = [folder for folder in folders.values() if is_described(folder)]
    if not described:
        message = f"load({str(disk)!r}): {_what_is_there(disk)}."
        raise RecordingNotFoundError(message)
    if rank is None:
        return StoredRecording(disk, [Rank(folder, of=len(described)) for folder in described])
    first = Rank(described[0])
    numbered = range(max(first.index.heading.ranks - 1, *folders) + 1)
    check_rank(f"load({str(disk)!r}, rank={rank!r})", rank, numbered)
    return StoredRecording(disk, [], only=rank, model=first.description.model)


def _what_is_there(disk: Place) -> str:
    """What is at a place where there is no recording, and what to write instead."""
    is_file = disk.is_file()
    if not (is_file or disk.exists()):
        return "there is no recording there (no such folder)"
    inside = _INSIDE.fullmatch(str(disk))
    if inside is not None and (is_file or is_described(disk)):
        whole, number = inside["whole"], int(inside["rank"])
        what = "a file of a recording" if is_file else f"the folder of rank {number} of a recording"
        return f"that is {what}. Write load({whole!r}), or load({whole!r}, rank={number}) for what that rank has written"
    if is_file:
        return "that is a file, and a recording is a folder. What record(..., into=path) has written is opened with load(path)"
    return "there is no recording there (no rank.json in any folder in it)"
