"""``save()``: writes an existing recording to a path."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from actrec._progress import showing
from actrec._recordings.layer import Layer, Role
from actrec._recordings.pass_numbers import RankPass
from actrec._recordings.recording import Recording
from actrec._recordings.reduced import Reduced
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
from .reduced import state_call
from .replace import replacing
from .units import key_call
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
    layers = list(_layers(recording))
    _check(layers, progress=progress)
    folder = Folder.of(path)
    there = place(folder)
    if not (overwrite and there.names()):
        _write(recording, layers, folder, progress=progress)
    elif isinstance(there, Disk):
        with replacing(there) as new:
            _write(recording, layers, replace(folder, path=new), progress=progress)
    else:
        message = (
            f"save({str(there)!r}, overwrite=True): an object store cannot replace a recording by another in one step. "
            "Delete what is there first, or choose another path."
        )
        raise OptionError(message)


def _write(
    recording: Recording[Any],
    layers: list[tuple[Slot, Layer[Any]]],
    folder: Folder,
    *,
    progress: bool,
) -> None:
    description = Description(
        recording._run.model,
        tuple(
            LayerInfo(
                slot.name, slot.type, layer._transform, slot.role, reduction=_reduction(layer)
            )
            for slot, layer in layers
            if slot.role != "added"
        ),
        dict(recording._run.aliases),
    )
    opening = Opening("save({path!r})", folder, description, alone=True)
    count, numbers = _numbers(recording, layers)
    raised = {numbers.get(rank_pass, rank_pass[1]) for rank_pass in recording._run.raised()}
    with opening.lock:
        passes = 0
        writer = Writer(
            opening.own, opening.ledger, folder, lambda: passes, raised, order=recording._run.order
        )
        error: str | None = "save() did not finish"
        try:
            for call in _calls(recording, layers, numbers, progress=progress):
                passes = call.number
                writer.keep(call)
            error = None
        finally:
            writer.close(count if error is None else 0, error)
        keep_warnings(opening.own, opening.ledger.heading.began, recording._run.warnings())
        failure = writer.take_error()
        if failure is not None:
            raise failure


def _layers(recording: Recording[Any]) -> Iterator[tuple[Slot, Layer[Any]]]:
    """Yield the layers, each with its slot in the format."""
    numbers: Counter[Role] = Counter()
    for what, part in recording._parts.items():
        for layer in part.values():
            role: Role = "added" if layer.type == "added" else what
            yield Slot(role, numbers[role], layer.name, layer.type), layer
            numbers[role] += 1


def _reduction(layer: Layer[Any]) -> str | None:
    """Return the reduction of a layer, as text; ``None`` if it was not reduced."""
    if not isinstance(layer, Reduced):
        return None
    sink = layer.sink
    return repr(sink) if isinstance(sink, Reduction) else layer._kind


def _check(layers: list[tuple[Slot, Layer[Any]]], *, progress: bool) -> None:
    """Raise ``CaptureError`` for a value that cannot be stored, before anything is written."""
    for slot, layer in layers:
        if isinstance(layer, Reduced):
            _check_reduction(slot, layer)
    # A value that was stored once can be stored again: of a layer on disk, one call is enough.
    kept = [
        (slot, layer[:1] if isinstance(layer, ReadOnlyLayer) else layer)
        for slot, layer in layers
        if not isinstance(layer, Reduced)
    ]
    calls = sum(len(values) for _, values in kept)
    with showing("save, first look", calls, progress=progress) as each:
        for slot, values in kept:
            for number, value in enumerate(each(values)):
                try:
                    Call.of(slot, 0, value)
                except CaptureError as error:
                    message = f"save(): call {number} of {slot.name!r} cannot be stored: {error}."
                    raise CaptureError(message) from error


def _check_reduction(slot: Slot, layer: Reduced) -> None:
    try:
        state_call(slot, layer, lambda rank_pass: rank_pass[1])
    except (CaptureError, AttributeError) as error:
        message = f"save(): the {layer._kind} of {slot.name!r} cannot be stored: {error}."
        raise CaptureError(message) from error


def _numbers(
    recording: Recording[Any], layers: list[tuple[Slot, Layer[Any]]]
) -> tuple[int, dict[RankPass, int]]:
    """Return how many passes are written, and the new numbers of those that are renumbered.

    Each rank counts its own passes, and a pass has the key of at most one unit: if several ranks have units, all passes are
    renumbered, in the order in which their calls are read. If several ranks have recorded parts of a unit, they become one
    pass; if each has recorded all of it, they stay separate passes.
    """
    units = recording._run.units.keys
    if len({rank for rank, _ in units}) <= 1:
        return recording.num_passes, {}
    rank_passes = {rank_pass for _, layer in layers for rank_pass in layer._rank_passes()}
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


def _calls(
    recording: Recording[Any],
    layers: list[tuple[Slot, Layer[Any]]],
    numbers: dict[RankPass, int],
    *,
    progress: bool,
) -> Iterator[Call]:
    """Yield all calls, pass by pass, within a pass in execution order, and after them the key of its unit."""
    names = dict.fromkeys([*recording._run.order, *recording])
    rank = {name: number for number, name in enumerate(names)}

    def number(rank_pass: RankPass) -> int:
        return max(numbers.get(rank_pass, rank_pass[1]), 0)  # pass -1: the user appended it

    reduced = {
        at: state_call(slot, layer, number)
        for at, (slot, layer) in enumerate(layers)
        if isinstance(layer, Reduced) and len(layer)
    }
    order = [
        (number(rank_pass), rank.get(slot.name, len(rank)), at, call)
        for at, (slot, layer) in enumerate(layers)
        if not isinstance(layer, Reduced)
        for call, rank_pass in enumerate(layer._rank_passes())
    ]
    order += [(call.number, len(rank), at, 0) for at, call in reduced.items()]
    keys = {
        numbers.get(rank_pass, rank_pass[1]): key
        for rank_pass, key in dict(recording._run.units.keys).items()
    }
    order += [(own, len(rank) + 1, len(layers), 0) for own in keys]
    with showing("save", len(order), progress=progress) as each:
        for pass_, _, at, call in each(sorted(order)):
            if at == len(layers):
                yield key_call(pass_, keys[pass_])
            elif at in reduced:
                yield reduced[at]
            else:
                slot, layer = layers[at]
                yield Call.of(slot, pass_, layer[call])
