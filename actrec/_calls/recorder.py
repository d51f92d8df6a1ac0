"""A recording that is being made."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from typing_extensions import override

from actrec._recordings.layer import Layer, V
from actrec._recordings.pass_numbers import Count
from actrec._recordings.recording import Recording
from actrec._recordings.run import Run, State
from actrec._recordings.units import Key
from actrec._selection.selection import Selection
from actrec._selection.treatment import WHATS, What
from actrec._values.containers import Value
from actrec.errors import ActrecError, CaptureError, OptionError

from .open_units import Unit
from .session import Session
from .tracks import Tracks
from .units import UnitRecorder

K = TypeVar("K", bound=Key)
T = TypeVar("T")


class Recorder(Recording[V], Generic[V]):
    """A recording that is being made: what the ``with`` block of :func:`actrec.record` yields.

    >>> import torch
    >>> from torch import nn
    >>> from actrec import record
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with record(model, "0") as acts:
    ...     output = model(torch.randn(5, 4))
    ...     print(repr(acts).splitlines()[0])
    recording Sequential: 1 layer, 1 pass, 60 B
    >>> acts.num_passes
    1

    After the block it can still be used, as a recording.

    Its values are typed as tensors. Where a layer returns something else, declare it with
    ``block: AbstractContextManager[Recorder[MyOutput]] = record(model)``, or ``Recorder[Any]``.
    """

    def __init__(self, model: str, selection: Selection, tracks: Tracks) -> None:
        session, destination = tracks.session, tracks.destination
        layers = {
            role: {c.key: tracks.of[c.key].layers[role] for c in selection.of(role)}
            for role in WHATS
        }
        asked = {query.what for query in selection.functions}
        beside: dict[What, Mapping[str, Layer[Any]]] = {
            role: those
            for role, those in layers.items()
            if role != "output" and (those or role in asked)
        }
        keys = {choice.module: choice.key for choice in selection.choices}
        run = _LiveRun(
            model,
            selection.aliases,
            session.order,
            session.passes,
            destination.units(),
            destination.where,
            modules=weakref.WeakKeyDictionary(keys),
            session=session,
        )
        super().__init__(run, layers["output"] | tracks.added, beside)
        self._session = session
        self._tracks = tracks  # the hooks refer to them weakly: this reference keeps them alive
        self._unit_recorder = UnitRecorder(tracks, self._run.units)
        tracks.show_in(self)

    def _show(self, name: str, layers: Mapping[What, Layer[Any]]) -> None:
        """Show these layers under a name, and no others. Threads that iterate over all do so over a copy."""
        for role, recording in self._parts.items():
            if role in layers:
                layers[role]._units = self._run.units
                recording._layers[name] = layers[role]
            else:
                recording._layers.pop(name, None)

    @property
    def transfers(self) -> dict[str, str]:
        """How values were moved from each GPU into memory, while the model continued or while it waited.

        ``{"cuda:0": "asynchronous"}``, or ``"blocking"`` for a GPU on which the self-test of asynchronous copies has
        failed. Other devices, and GPUs from which nothing was moved, are not in it; with ``detach=False``, it is empty.
        """
        offload = self._session.offload
        trusted = {} if offload is None else offload.trusted
        ways = {True: "asynchronous", False: "blocking"}
        return {str(device): ways[is_trusted] for device, is_trusted in trusted.items()}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing inside this block: validation between training steps, say.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     output = model(torch.randn(5, 4))
        ...     with acts.pause():
        ...         output = model(torch.randn(5, 4))
        >>> len(acts[""]), acts.num_passes
        (1, 1)

        It applies to all threads. The hooks stay on the model.

        Returns:
            A context manager. Pauses nest, and recording continues after the outermost.
        """
        self._run.deliver()
        self._session.pause(by=1)
        try:
            yield
        finally:
            self._session.pause(by=-1)

    # --- Units ---------------------------------------------------------------------------------------------

    def unit(self, key: Key) -> AbstractContextManager[None]:
        """Make everything inside this block one pass, identified by a key, and kept or dropped as a whole.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for key, text in enumerate([torch.randn(2, 4), torch.randn(5, 4)]):
        ...         with acts.unit(key):
        ...             for token in text:
        ...                 output = model(token)
        ...             acts.add("length", len(text))
        >>> acts[""].units, acts["length"].units
        ([0, 0, 1, 1, 1, 1, 1], [0, 1])

        A unit is one piece of your work: a batch, a prompt with all its generated tokens, a document, an episode. However often
        the model, or methods of it, are called inside, all their calls belong to the unit's pass.

        If the block raises, also by an interrupt, everything of the unit is dropped: its calls, inputs, gradients and added
        values. Its pass is one of ``failed_passes``, the error propagates, and the key may be used again. So a batch that did
        not fit into memory may be recorded again, in halves:

        >>> with record(model, "") as acts:
        ...     try:
        ...         with acts.unit("a"):
        ...             output = model(torch.randn(5, 4))
        ...             raise MemoryError
        ...     except MemoryError:
        ...         with acts.unit("a"):
        ...             output = [model(half) for half in torch.randn(5, 4).split(3)]
        >>> acts[""].units, acts.failed_passes
        (['a', 'a'], [0])

        If an error is caught inside the block, the unit is kept, with a forward that ended early.

        A container given as ``into=`` gets the calls of a unit when the unit has ended. A recording that is written to a path
        commits a unit as it does a pass, without waiting for the next one. A unit inside :meth:`pause` records nothing,
        and its key is not done.

        A unit belongs to the thread or the ``asyncio`` task that has opened it. Calls in other threads belong to the open
        unit, if exactly one is open.

        Args:
            key: an int or a string that no other unit of the recording has.

        Returns:
            A context manager. Units do not nest.

        Raises:
            OptionError: the key is neither an int nor a str.
            ActrecError: a unit with that key is done, or this is inside another unit or a forward, or the recording has
                ended. Raised at the end of the block: other threads are still in a forward that belongs to the unit.
        """
        return self._unit_recorder.unit(key)

    def remaining(
        self, pairs: Iterable[tuple[K, T]], *, divide: bool = False
    ) -> Iterator[tuple[K, T]]:
        """Iterate over pairs of key and item, without those whose key is done.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model, batches = nn.Linear(4, 3), torch.randn(3, 5, 4)
        >>> with record(model, "") as acts:
        ...     for key, batch in acts.remaining(enumerate(batches)):
        ...         with acts.unit(key):
        ...             output = model(batch)
        ...     list(acts.remaining(enumerate(batches)))
        []

        A resumed run continues where the earlier runs stopped: units that *any rank* of the path has committed are left out,
        however many ranks there were.

        Under several ranks, each rank passes its own pairs, those that its sampler gave it. With ``divide=True`` all ranks pass
        the same pairs in the same order, and each key goes to one rank, without communication: of every ``world_size``
        successive pairs, each rank gets one.

        Args:
            pairs: an iterable of ``(key, item)``, such as ``enumerate(batches)``. It is consumed lazily.
            divide: whether to divide the pairs among the ranks.

        Returns:
            An iterator over the remaining pairs.

        Raises:
            OptionError: an argument is invalid. Raised while iterating: an item is not a pair, or a key occurs twice.
        """
        return self._unit_recorder.remaining(pairs, divide=divide)  # type: ignore[return-value]

    @property
    @override
    def done(self) -> AbstractSet[Key]:
        """The keys of the units that are done, as a set.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     with acts.unit("a"):
        ...         output = model(torch.randn(5, 4))
        ...     "a" in acts.done
        True

        In a resumed run, they include the units that any rank of the path had committed before, however many ranks there
        were in each run.
        """
        return self._unit_recorder.done

    # --- Values of the user's ------------------------------------------------------------------------------

    def add(self, name: str, value: Value) -> None:
        """Keep a value of your own in the recording, for the latest pass: labels, token ids, a loss.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for batch, labels in [(torch.randn(5, 4), torch.arange(5))]:
        ...         output = model(batch)
        ...         acts.add("label", labels)
        >>> acts["label"].cat()
        tensor([0, 1, 2, 3, 4])

        Call it after the forward that the value belongs to, or anywhere inside the :meth:`unit`. In :meth:`pause` it does
        nothing.

        Args:
            name: the key in the recording. It must not be the name of a layer.
            value: tensors are detached, copied like a layer's values, and moved to ``device``; anything else is kept as
                it is.

        Raises:
            ActrecError: ``name`` is the name of a layer, there was no pass yet, or the block has ended, or the unit that the
                value would belong to.
            CaptureError: the value cannot be kept.
        """
        if not self._session.active:
            message = (
                f"acts.add({name!r}): the recording has ended. Add values inside the with block."
            )
            raise ActrecError(message)
        given: object = name
        if not isinstance(given, str):
            message = f"acts.add({given!r}, ...): expected a string as the name, such as 'label'."
            raise OptionError(message)
        if name in self._tracks.of or name in self._run.aliases:
            message = (
                f"acts.add({name!r}): that is the name of a recorded layer. Choose another one."
            )
            raise ActrecError(message)
        if not self._session.recording:
            return
        if self.num_passes == 0:
            message = f"acts.add({name!r}): there was no pass yet. Call the model first, then add what belongs to it."
            raise ActrecError(message)
        number = self._session.passes.latest()
        if number is None:
            raise ActrecError(_no_unit(name, self._session.passes.units.open()))
        try:
            self._tracks.keep(name, value, number)
        except CaptureError as error:
            message = f"acts.add({name!r}): {error}."
            raise CaptureError(message) from error

    def clear(self) -> None:
        """Forget all calls, inputs, gradients and added values, and count the passes from 0 again.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Linear(4, 3)
        >>> means = []
        >>> with record(model, "") as acts:
        ...     for batch in torch.randn(3, 5, 4):
        ...         output = model(batch)
        ...         means.append(acts[""].cat().mean(0))
        ...         acts.clear()
        >>> len(means), len(acts[""])
        (3, 0)

        For long runs, processed in portions. Call it between two passes. The keys of units may be used again.

        Raises:
            ActrecError: a unit is open.
        """
        if self._session.passes.units.open():
            message = "acts.clear(): a unit is open. Clear the recording between two units."
            raise ActrecError(message)
        self._run.deliver()
        self._tracks.clear()
        self._unit_recorder.clear()
        self._session.passes.restart()

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle is a plain Recording, which does not record.
        self._run.deliver()
        layers = {
            role: {name: copy(layer) for name, layer in [*part._layers.items()]}
            for role, part in self._parts.items()
        }
        return Recording, (copy(self._run), layers.pop("output"), layers)


def _no_unit(name: str, units: list[Unit]) -> str:
    if units:
        return (
            f"acts.add({name!r}): {len(units)} units are open, and this thread is inside none of them, so it is unknown to which "
            "the value belongs. Add it in the thread that has opened the unit."
        )
    return (
        f"acts.add({name!r}): the unit has ended, and may have been committed already. Add values inside "
        "with acts.unit(key):"
    )


@dataclass(eq=False)
class _LiveRun(Run):
    """The run of a block that has not ended."""

    session: Session = field(kw_only=True)

    @override
    def state(self) -> State:
        if self.session.active:
            return "recording"
        return "interrupted" if self.session.interrupted else "recorded"

    @override
    def deliver(self) -> None:
        self.session.deliver()

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # What is copied stays as it is now.
        count = Count(self.passes.count, set(self.passes.raised))
        known = (self.model, dict(self.aliases), [*self.order], count, self.units.copy())
        return Run, (*known, self.where, self.warned)
