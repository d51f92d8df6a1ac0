"""Recordings: a mapping from layer name to that layer's calls.

A :class:`Layer` is the list of the calls of one layer, a :class:`Recording` the mapping of all of them,
and a :class:`Recorder` the recording that the ``with`` block of :func:`actrec.record` yields, with what
only a live one can do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

from . import _display
from ._join import joined
from ._nested import Value, tensors
from ._snapshot import held
from .errors import ActrecError, CaptureError, UnknownLayerError, nearest

if TYPE_CHECKING:
    import os

    from ._capture import Capture
    from ._track import Session

__all__ = ["Layer", "ListLayer", "Recorder", "Recording", "SinkLayer"]


class Layer(Sequence[Value]):
    """The calls of one layer, in the order in which they ended.

    >>> import torch
    >>> from torch import nn
    >>> from actrec import record
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with record(model, "0") as acts:
    ...     for batch in torch.randn(2, 5, 4):
    ...         output = model(batch)
    >>> acts["0"]
    Layer '0' (Linear): 2 calls, (5, 3) float32, 120 B
    >>> acts["0"][1].shape
    torch.Size([5, 3])
    >>> acts["0"].cat().shape
    torch.Size([10, 3])

    In memory a layer is a ``list``: index it, iterate over it, give it to ``torch.cat``. Each item is
    what one call returned: a tensor, or tensors nested as the layer returned them. The items are the
    recording's own; writing to one changes nothing else.
    """

    #: The key of this layer in its recording.
    name: str
    #: The type of the module, as ``type(module).__name__``.
    type: str

    @abstractmethod
    def keep(self, value: Value, number: int) -> None:
        """Append a value of pass ``number``. For the recorder; not for you."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all calls."""

    @property
    @abstractmethod
    def passes(self) -> list[int]:
        """For each call, the index of the pass that it belongs to.

        A pass is one outermost forward of the recorded model. Layers line up by pass, not by position: a
        layer may be called several times in a pass, or not at all.
        """

    def cat(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along an existing dimension, as ``torch.cat`` does: by default the batch.

        >>> import torch
        >>> layer = ListLayer("conv", [torch.zeros(8, 3), torch.ones(2, 3)])
        >>> layer.cat().shape
        torch.Size([10, 3])

        Values that nest tensors are joined tensor by tensor, and come back nested in the same way.

        The result is a new tensor; the calls stay as they are, so for a moment a layer is in memory
        twice. With ``release=True`` each call is dropped as soon as it is copied, and the layer is empty
        in the end: the result and one call is all that is held at a time.

        >>> layer.cat(release=True).shape, len(layer)
        (torch.Size([10, 3]), 0)

        Raises ``JoinError`` if there are no calls, or if their structures, dtypes or sizes in other
        dimensions differ; it names what differs, and nothing is released.
        """
        return joined(self, "cat", dim, release=release)

    def stack(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along a new dimension, as ``torch.stack`` does: item ``i`` is call ``i``.

        >>> import torch
        >>> ListLayer("head", [torch.zeros(3), torch.ones(3)]).stack().shape
        torch.Size([2, 3])

        All calls must have the same shape. Otherwise as :meth:`cat`.
        """
        return joined(self, "stack", dim, release=release)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the calls hold. What several of them share counts once."""
        return sum(dict(self.places()).values())

    def places(self) -> Iterator[tuple[object, int]]:
        """The memory that the calls hold: where it is, and how many bytes. Equal places are shared."""
        return (place for value in self for tensor in tensors(value) for place in held(tensor))

    def outline(self) -> Sequence[Value]:
        """Values to tell the structures, shapes and dtypes of all calls from. On disk they hold no data."""
        return list(self)

    def __repr__(self) -> str:
        return _display.layer_line(self)


class ListLayer(list[Value], Layer):
    """A layer in memory: a real ``list``."""

    def __init__(self, name: str, values: Iterable[Value] = (), kind: str = "Tensor") -> None:
        super().__init__(values)
        self.name = name
        self.type = kind
        self._passes = list(range(len(self)))

    __repr__ = Layer.__repr__

    @property
    def passes(self) -> list[int]:
        return self._passes[: len(self)]

    def keep(self, value: Value, number: int) -> None:
        # Not append(): an interrupt between these two lines must not shift all that follows.
        self._passes[len(self) :] = (number,)
        self.append(value)

    def clear(self) -> None:
        super().clear()
        self._passes.clear()


class SinkLayer(Layer):
    """A layer whose calls go into a container of the user's, made by the factory given as ``into``.

    Whatever else the container can do, the layer can do: ``acts["conv1"].mean`` is the container's.
    """

    def __init__(self, name: str, sink: Any, kind: str) -> None:
        self.name = name
        self.type = kind
        self.sink = sink
        self._passes: list[int] = []

    @property
    def passes(self) -> list[int]:
        # A bounded container has dropped the oldest calls.
        return self._passes[-len(self) :] if len(self) else []

    def keep(self, value: Value, number: int) -> None:
        self._passes.append(number)
        self.sink.append(value)

    def clear(self) -> None:
        self.sink.clear()
        self._passes.clear()

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value:
        return list(self)[index] if isinstance(index, slice) else self.sink[index]

    def __len__(self) -> int:
        return len(self.sink) if hasattr(self.sink, "__len__") else len(self._passes)

    def __iter__(self) -> Iterator[Value]:
        return iter(self.sink if hasattr(self.sink, "__iter__") else ())

    def __getattr__(self, name: str) -> Any:
        if name == "sink":  # while it is copied or unpickled there is none yet
            raise AttributeError(name)
        return getattr(self.sink, name)


class Recording(Mapping[str, Layer]):
    """What was recorded: a read-only mapping from layer name to :class:`Layer`.

    >>> import torch
    >>> from torch import nn
    >>> from actrec import record
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with record(model) as acts:
    ...     output = model(torch.randn(5, 4))
    >>> list(acts)
    ['0', '1']
    >>> acts
    recorded Sequential: 2 layers, 1 pass, 120 B
    layer  type    calls  shape   dtype    memory
    0      Linear      1  (5, 3)  float32    60 B
    1      ReLU        1  (5, 3)  float32    60 B

    The keys are the names of the chosen layers in the order of the queries, then the names given to
    :meth:`Recorder.add`. A layer that has several names (a module used in two places, a name with or
    without ``module.``) is found under each of them, and listed once.
    """

    #: ``model`` is the type of the recorded model.
    def __init__(self, model: str, layers: Mapping[str, Layer], aliases: Mapping[str, str]) -> None:
        self._model = model
        self._layers = dict(layers)
        self._aliases = aliases

    def __getitem__(self, name: str) -> Layer:
        key = name if name in self._layers else self._aliases.get(name)
        if key is None:
            message = f"acts[{name!r}]: no layer of that name was recorded. {nearest(str(name), self._layers)}"
            raise UnknownLayerError(message)
        return self._layers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def num_passes(self) -> int:
        """The number of passes so far, those in which no chosen layer was called included."""
        return max((index for layer in self.values() for index in layer.passes), default=-1) + 1

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the recording holds. What several calls share counts once.

        A value that the model did not overwrite is shared with the model copy-on-write, so after a
        forward that goes on this is an upper bound of what recording has cost.
        """
        return sum({p: size for layer in self.values() for p, size in layer.places()}.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to ``path``, a new folder, to be opened with :func:`actrec.load`.

        >>> import tempfile, torch, actrec
        >>> model = torch.nn.Linear(4, 3)
        >>> with actrec.record(model, "") as acts:
        ...     output = model(torch.randn(5, 4))
        >>> path = tempfile.mkdtemp() + "/run"
        >>> acts.save(path)
        >>> torch.equal(actrec.load(path)[""][0], acts[""][0])
        True

        Tensors are stored as they are, without the graph; what shares memory is stored once. To record
        more than fits into memory, record into a path: ``record(model, layers, into=path)``.

        Raises ``RecordingExistsError`` if there is something at the path, ``CaptureError`` for a value
        that cannot be stored, before anything is written, and ``WriteError`` if writing fails.
        """
        from .store._save import save  # noqa: PLC0415  # the store knows recordings, not they it

        save(self, path)

    def _title(self) -> str:
        return f"recorded {self._model}"

    def __repr__(self) -> str:
        return _display.table(self, self._title())

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class Recorder(Recording):
    """A recording that is being made: what the ``with`` block of :func:`actrec.record` yields.

    When the block has ended it remains, as a recording.
    """

    def __init__(
        self,
        model: str,
        layers: Mapping[str, Layer],
        aliases: Mapping[str, str],
        session: Session,
        *,
        inputs: Mapping[str, Layer],
        capture: Capture,
        tracks: object,
        added: Callable[[str], Layer] = lambda name: ListLayer(name, (), "added"),
    ) -> None:
        super().__init__(model, layers, aliases)
        self._added = added
        self._inputs = Recording(model, inputs, aliases) if inputs else None
        self._chosen = frozenset([*layers, *aliases])
        self._session = session
        self._capture = capture
        self._tracks = tracks  # the hooks refer to them weakly: this is what keeps them

    @property
    def inputs(self) -> Recording:
        """What the calls received: ``acts.inputs[name][i]`` is a dict from parameter name to value.

        It lines up with ``acts[name][i]`` and holds what the call was given, not the defaults; ``None``
        for a call that had begun before the block. Needs ``record(..., inputs=True)``.
        """
        if self._inputs is None:
            message = "acts.inputs: inputs were not recorded. Ask for them: record(model, layers, inputs=True)."
            raise AttributeError(message)
        return self._inputs

    @property
    def num_passes(self) -> int:
        """The number of passes so far, those in which no chosen layer was called included."""
        return self._session.passes.count

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

        It holds for all threads. The hooks stay on the model.
        """
        self._session.pause(by=1)
        try:
            yield
        finally:
            self._session.pause(by=-1)

    def add(self, name: str, value: Value) -> None:
        """Keep a value of your own beside the layers, for the latest pass: labels, token ids, a loss.

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

        Call it after the forward that the value belongs to. Tensors are detached, copied as a layer's
        values are and moved to ``device``; anything else is kept as it is. In :meth:`pause` it does nothing.

        Raises ``ActrecError`` if ``name`` is that of a layer, if there was no pass yet, or if the block
        has ended.
        """
        if not self._session.active:
            message = (
                f"acts.add({name!r}): the recording has ended. Add values inside the with block."
            )
            raise ActrecError(message)
        if name in self._chosen:
            message = (
                f"acts.add({name!r}): that is the name of a recorded layer. Choose another one."
            )
            raise ActrecError(message)
        if not self._session.recording:
            return
        if self.num_passes == 0:
            message = f"acts.add({name!r}): there was no pass yet. Call the model first, then add what belongs to it."
            raise ActrecError(message)
        if name not in self._layers:
            self._layers[name] = self._added(name)
        try:
            self._layers[name].keep(self._capture.added(value), self.num_passes - 1)
        except CaptureError as error:
            message = f"acts.add({name!r}): {error}."
            raise CaptureError(message) from error

    def clear(self) -> None:
        """Forget all calls, inputs and added values, and count the passes from 0 again.

        For long runs that are worked off in portions. Call it between two passes.
        """
        for recording in (self, self._inputs):
            for layer in (recording or {}).values():
                layer.clear()
        self._session.passes.restart()

    def _title(self) -> str:
        if self._session.active:
            return f"recording {self._model}"
        return super()._title() + (" (interrupted)" if self._session.interrupted else "")
