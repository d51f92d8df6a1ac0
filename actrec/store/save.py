"""``save()``: writes an existing recording to a path."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from actrec._progress import showing
from actrec._recordings.layer import Layer, Role
from actrec._recordings.pass_numbers import RankPass
from actrec._recordings.recording import Recording
from actrec._recordings.reduced import Reduced
from actrec._values.containers import Value
from actrec.errors import CaptureError, OptionError
from actrec.reduce import Reduction

from .call import Call
from .description import Description, LayerInfo
from .disk import Disk
from .folder import Folder
from .format import Slot
from .opening import Opening
from .place import place
from .read_only import ReadOnlyLayer
from .reduced import saved_state
from .replace import replacing
from .units import UNIT, tensor_of
from .warned import keep_warnings
from .writer import Writer


def save(
    recording: Recording[Any],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write a recording to ``path``, a new folder or the URL of one, to be opened with :func:`actrec.load`.

    >>> import tempfile, torch, actrec
    >>> model = torch.nn.Linear(4, 3)
    >>> with actrec.record(model, "") as acts:
    ...     output = model(torch.randn(5, 4))
    >>> path = tempfile.mkdtemp() + "/run"
    >>> actrec.save(acts, path)
    >>> actrec.save(acts, path, overwrite=True)
    >>> torch.equal(actrec.load(path)[""][0], acts[""][0])
    True

    Tensors are stored as they are, without the graph, inputs and gradients included. To record more than fits into
    memory, record into a path: ``record(model, layers, into=path)``.

    Args:
        recording: the recording to write. It may be a loaded one, even from this very path.
        path: a path, a URL, or a :class:`actrec.store.Folder`, which is a path with settings.
        overwrite: whether a recording that is there may be replaced. The new one is written next to it and then takes its
            place, so that one of them exists whatever happens. Nothing but a recording is ever replaced. Only for a path on
            disk.
        progress: whether to show the progress, as in :meth:`Recording.stats() <actrec.Recording.stats>`.

    Raises:
        RecordingExistsError: there is something at the path already, or, with ``overwrite``, something other than a
            recording, or one that a run is recording now. It was not changed.
        CaptureError: a value cannot be stored. Raised before anything is written.
        OptionError: ``overwrite`` was given with a URL at which there is something.
        WriteError: writing failed.
    """
    saved = _saved(recording)
    _check(saved.lists, progress=progress)
    folder = Folder.of(path)
    there = place(folder)
    if not (overwrite and there.names()):
        _write(saved, folder, progress=progress)
    elif isinstance(there, Disk):
        with replacing(there) as new:
            _write(saved, replace(folder, path=new), progress=progress)
    else:
        message = (
            f"save({str(there)!r}, overwrite=True): an object store cannot replace a recording by another in one step. "
            "Delete what is there first, or choose another path."
        )
        raise OptionError(message)


# --- What is written -----------------------------------------------------------------------------------


class _Calls(NamedTuple):
    """A list of calls in the new recording: those of a layer, the state of a reduction, or the keys of units."""

    slot: Slot
    passes: list[int]
    values: Sequence[Value]


class _Saved(NamedTuple):
    """The content of the new recording."""

    description: Description
    lists: list[_Calls]  # calls of a pass are written in this order
    passes: int
    raised: set[int]
    order: Iterable[str]  # of execution, the names of layers
    warnings: Sequence[str]


def _saved(recording: Recording[Any]) -> _Saved:
    """Collect what is written; ``CaptureError`` if a reduction cannot be stored."""
    run = recording._run
    layers = list(_layers(recording))
    count, numbers = _numbers(recording, [layer for _, layer in layers])

    def number(rank_pass: RankPass) -> int:
        return max(numbers.get(rank_pass, rank_pass[1]), 0)  # pass -1: the user appended it

    infos = [
        LayerInfo(slot.name, slot.type, layer._transform, slot.role, _reduction(layer))
        for slot, layer in layers
        if slot.role != "added"
    ]
    description = Description(run.model, tuple(infos), dict(run.aliases))
    kept = [
        _Calls(slot, [*map(number, layer._rank_passes())], layer)
        for slot, layer in layers
        if not isinstance(layer, Reduced)
    ]
    states = [_state(slot, layer, number) for slot, layer in layers if isinstance(layer, Reduced)]
    keys = {number(rank_pass): key for rank_pass, key in dict(run.units.keys).items()}
    units = _Calls(UNIT, list(keys), list(map(tensor_of, keys.values())))
    raised = set(map(number, run.raised()))
    lists = [*kept, *states, units]
    return _Saved(description, lists, count, raised, run.order, run.warnings())


def _layers(recording: Recording[Any]) -> Iterator[tuple[Slot, Layer[Any]]]:
    """Yield the layers, each with its slot in the format."""
    numbers: Counter[Role] = Counter()
    for what, part in recording._parts.items():
        for layer in part.values():
            role: Role = "added" if layer.type == "added" else what
            yield Slot(role, numbers[role], layer.name, layer.type), layer
            numbers[role] += 1


def _numbers(
    recording: Recording[Any], layers: list[Layer[Any]]
) -> tuple[int, dict[RankPass, int]]:
    """Return how many passes are written, and the new numbers of those that are renumbered.

    Each rank counts its own passes, and a pass has the key of at most one unit: if several ranks have units, all passes are
    renumbered, in the order in which their calls are read. If several ranks have recorded parts of a unit, they become one
    pass; if each has recorded all of it, they stay separate passes.
    """
    units = recording._run.units.keys
    if len({rank for rank, _ in units}) <= 1:
        return recording.num_passes, {}
    rank_passes = {rank_pass for layer in layers for rank_pass in layer._rank_passes()}
    ordered = sorted(
        {*rank_passes, *units, *recording._run.raised()}, key=lambda one: (one[1], one[0])
    )
    in_parts = not getattr(recording, "_repeated", 0)
    names = {rank_pass: units.get(rank_pass) if in_parts else None for rank_pass in ordered}
    passes: dict[object, int] = {}  # by unit, or else rank_pass
    for rank_pass, key in names.items():
        passes.setdefault(rank_pass if key is None else (key,), len(passes))
    numbers = {one: passes[one if key is None else (key,)] for one, key in names.items()}
    return len(passes), numbers


def _reduction(layer: Layer[Any]) -> str | None:
    """Return the reduction of a layer, as text; ``None`` if it was not reduced."""
    if not isinstance(layer, Reduced):
        return None
    sink = layer.sink
    return repr(sink) if isinstance(sink, Reduction) else layer._kind


def _state(slot: Slot, layer: Reduced, number: Callable[[RankPass], int]) -> _Calls:
    """Return the state of a reduction as the one call of its layer, if anything was reduced."""
    try:
        last, value = saved_state(layer, number)
        Call.of(slot, last, value)
    except (CaptureError, AttributeError) as error:
        message = f"save(): the {layer._kind} of {slot.name!r} cannot be stored: {error}."
        raise CaptureError(message) from error
    many = min(len(layer), 1)
    return _Calls(slot, [last] * many, [value] * many)


def _check(lists: list[_Calls], *, progress: bool) -> None:
    """Raise ``CaptureError`` for a value that cannot be stored, before anything is written."""
    # A value that was stored once can be stored again: of a layer on disk, one call is enough.
    kept = [
        (slot, values[:1] if isinstance(values, ReadOnlyLayer) else values)
        for slot, _, values in lists
    ]
    with showing("save, first look", sum(len(v) for _, v in kept), progress=progress) as each:
        for slot, values in kept:
            for number, value in enumerate(each(values)):
                try:
                    Call.of(slot, 0, value)
                except CaptureError as error:
                    message = f"save(): call {number} of {slot.name!r} cannot be stored: {error}."
                    raise CaptureError(message) from error


# --- Writing it ----------------------------------------------------------------------------------------


def _write(saved: _Saved, folder: Folder, *, progress: bool) -> None:
    opening = Opening("save({path!r})", folder, saved.description, alone=True)
    with opening.lock:
        complete = 0
        writer = Writer(
            opening.own, opening.ledger, folder, lambda: complete, saved.raised, order=saved.order
        )
        error: str | None = "save() did not finish"
        try:
            for call in _in_order(saved.lists, progress=progress):
                complete = call.number
                writer.keep(call)
            error = None
        finally:
            writer.close(saved.passes if error is None else 0, error)
        keep_warnings(opening.own, opening.ledger.heading.began, saved.warnings)
        failure = writer.take_error()
        if failure is not None:
            raise failure


def _in_order(lists: list[_Calls], *, progress: bool) -> Iterator[Call]:
    """Yield all calls, pass by pass."""
    order = sorted(
        (number, at, call)
        for at, calls in enumerate(lists)
        for call, number in enumerate(calls.passes)
    )
    with showing("save", len(order), progress=progress) as each:
        for number, at, call in each(order):
            yield Call.of(lists[at].slot, number, lists[at].values[call])
