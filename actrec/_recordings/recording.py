"""A recording: a mapping from layer name to that layer's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, overload

from typing_extensions import TypeVar, override

from actrec._tables.html import as_html
from actrec._tables.text import as_text
from actrec._text import nearest, shown
from actrec.errors import UnknownLayerError

from .layer import Layer, V
from .stats import Stats, stats
from .table import State, recording_table

if TYPE_CHECKING:
    import os

    from actrec._tables.table import Table

    from .passes import Count, Moment

__all__ = ["Recording"]

T = TypeVar("T")


class Recording(Mapping[str, Layer[V]], Generic[V]):
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

    The keys are the names of the chosen layers in the order of the queries, without what wrappers add to them,
    then the names given to :meth:`Recorder.add`. A layer that has several names (a module used in two places, a name with or
    without ``module.``) is found under each of them, and listed once.
    """

    #: ``model`` is the type of the recorded model, ``order`` what is known of the execution order, ``passes``
    #: what counts the passes; without it, they are counted by those that calls belong to.
    def __init__(
        self,
        model: str,
        layers: Mapping[str, Layer[V]],
        aliases: Mapping[str, str],
        order: Iterable[str] = (),
        passes: Count | None = None,
        *,
        inputs: Mapping[str, Layer[dict[str, Any]]] | None = None,
        grads: Mapping[str, Layer[V]] | None = None,
    ) -> None:
        self._model = model
        self._layers = dict(layers)
        self._aliases = aliases
        self._order = order
        self._passes = passes
        more = (aliases, order, passes)
        self._inputs = Recording(model, inputs, *more) if inputs else None
        self._grads = Recording(model, grads, *more) if grads else None

    def _key(self, name: object) -> str | None:
        """The name under which a layer is listed; ``None`` if there is none."""
        key = name if name in self._layers else self._aliases.get(name)  # type: ignore[call-overload]
        return key if key in self._layers else None

    @override
    def __contains__(self, name: object) -> bool:
        return self._key(name) is not None

    @overload
    def get(self, name: str, /) -> Layer[V] | None: ...
    @overload
    def get(self, name: str, /, default: Layer[V] | T) -> Layer[V] | T: ...
    @override
    def get(self, name: str, /, default: Any = None) -> Any:
        """Return a layer, or ``default`` if there is none of that name."""
        key = self._key(name)
        return default if key is None else self[key]

    @override
    def __getitem__(self, name: str) -> Layer[V]:
        key = self._key(name)
        if key is None:
            message = f"acts[{name!r}]: no layer of that name was recorded. {nearest(str(name), self._layers)}"
            raise UnknownLayerError(message)
        self._deliver()
        return self._layers[key]

    def _deliver(self) -> None:
        """Wait for calls that are on their way from a device. Only a :class:`Recorder` has any."""

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    @override
    def __len__(self) -> int:
        return len(self._layers)

    @property
    def num_passes(self) -> int:
        """The number of passes so far, those in which no chosen layer was called included."""
        if self._passes is not None:
            return self._passes.count
        return max((index for layer in self.values() for index in layer.passes), default=-1) + 1

    @property
    def failed_passes(self) -> list[int]:
        """The passes that raised or were interrupted. Layers behind the place where it happened have no call in them.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> with record(model) as acts:
        ...     for width in (4, 5, 4):
        ...         try:
        ...             output = model(torch.zeros(2, width))
        ...         except RuntimeError:
        ...             pass
        >>> acts.failed_passes, acts["0"].passes
        ([1], [0, 2])

        What was recorded of them is there; :func:`actrec.data.rows` leaves it out.
        """
        return sorted({number for _, number in self._raised()})

    def _raised(self) -> set[Moment]:
        """The passes that raised, each with its rank, if it has one."""
        return {(None, number) for number in list(self._passes.raised)} if self._passes else set()

    @property
    def inputs(self) -> Recording[dict[str, Any]]:
        """What the calls received. ``acts.inputs[name][i]`` is a dict from parameter name to value.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Linear(4, 3)
        >>> with record(model, "", inputs=True) as acts:
        ...     output = model(torch.zeros(5, 4))
        >>> acts.inputs[""][0]["input"].shape
        torch.Size([5, 4])

        It lines up with ``acts[name][i]`` and holds what the call was given, not the defaults; ``None``
        for a call that had begun before the block. Needs ``record(..., inputs=True)``.
        """
        if self._inputs is None:
            message = "acts.inputs: inputs were not recorded. Ask for them: record(model, layers, inputs=True)."
            raise AttributeError(message)
        self._deliver()
        return self._inputs

    @property
    def grads(self) -> Recording[V]:
        """The gradients. ``acts.grads[name][i]`` is that of the loss with respect to ``acts[name][i]``.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
        >>> with record(model, "0", grads=True) as acts:
        ...     loss = model(torch.randn(5, 4)).square().mean()
        >>> list(acts.grads["0"])
        [None]
        >>> loss.backward()
        >>> acts.grads["0"][0].shape
        torch.Size([5, 3])

        It lines up with ``acts[name]`` and is nested in the same way, with ``None`` for what no gradient has
        reached. It belongs to the value as the layer returned it, also where a layer behind it works in
        place. (Where it cannot be told, it stays ``None``, and a warning names the layer: see
        :class:`actrec.errors.MissingGradientWarning`.) ``backward()`` may come inside the block or after it. A second one through the same forward adds
        to what is there, as it does for the ``.grad`` of a parameter; so does ``torch.autograd.grad``.

        Gradients are copied as values are, and moved and cast by ``device`` and ``dtype``. A ``transform`` is
        applied to each as it arrives, with zeros in the place of what did not: what it selects or averages of
        a value, it selects or averages of the gradient. Gradients of a scaled loss are scaled.

        Needs ``record(..., grads=True)``.
        """
        if self._grads is None:
            message = "acts.grads: gradients were not recorded. Ask for them: record(model, layers, grads=True)."
            raise AttributeError(message)
        return self._grads

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the recording holds, inputs and gradients included.

        What several calls share counts once: what one layer returned and the next one received, mostly. A value that the model did not overwrite is shared with the model copy-on-write, so after a
        forward that goes on this is an upper bound of what recording has cost.
        """
        held = [
            recording for recording in (self, self._inputs, self._grads) if recording is not None
        ]
        places = (place for one in held for layer in one.values() for place in layer._places())
        return sum(dict(places).values())

    @property
    def execution_order(self) -> list[str]:
        """The names of the layers that have calls, in the order in which their first calls ended.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with record(model, ["1", "", "0"]) as acts:
        ...     output = model(torch.randn(5, 4))
        >>> list(acts), acts.execution_order
        (['1', '', '0'], ['0', '1', ''])

        A module that contains others ends after them. The iteration order of the recording is that of
        the queries.
        """
        self._deliver()
        known = [name for name in self._order if name in self._layers]
        return [name for name in dict.fromkeys([*known, *self]) if len(self._layers[name])]

    def _in_order(self) -> Iterable[str]:
        """All names, in execution order; last those of the layers without calls."""
        return dict.fromkeys([*self.execution_order, *self])

    def stats(self) -> Stats:
        """Return statistics of every layer, over all its calls: one row for each tensor it returns.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU())
        >>> with record(model) as acts:
        ...     output = model(torch.tensor([[-1.0, 0.0, 2.0, 3.0]]))
        >>> acts.stats()
        statistics of 2 layers
        layer  count  mean    std  min  max  zeros  nan  inf  memory
        0          4     1  1.826   -1    3    25%    0    0    16 B
        1          4  1.25    1.5    0    3    50%    0    0    16 B

        The rows are in execution order, so this is the first layer that returned a NaN or an infinity,
        or ``None``:

        >>> acts.stats().first_nonfinite

        ``pandas.DataFrame(acts.stats())`` makes a data frame of them. See :class:`Stats` for the columns.

        It reads call after call in blocks, so besides the recording it needs a few megabytes. Nothing is
        changed. It may be called inside the block.
        """
        return stats(self[name] for name in self._in_order())

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the recording to ``path``, to be opened with :func:`actrec.load`: see :func:`actrec.save`.

        Args:
            path: a new folder, or the URL of one.
            overwrite: whether a recording that is there may be replaced.

        Raises:
            RecordingExistsError: there is something at the path; it was not touched.
            CaptureError: a value cannot be stored. Raised before anything is written.
            WriteError: writing failed.
        """
        self._write(self, path, overwrite=overwrite)

    #: Writes a recording. The store, which does it, knows recordings and not they it: ``actrec`` sets this.
    _write: ClassVar[Callable[..., None]]

    def _state(self) -> State:
        return "recorded"

    def _title(self) -> str:
        state = self._state()
        head = f"{'recording' if state == 'recording' else 'recorded'} {shown(self._model)}"
        return head + (" (interrupted, partial)" if state == "interrupted" else "")

    def _table(self) -> Table:
        beside = {"inputs": self._inputs, "gradients": self._grads}
        return recording_table(
            self._title(),
            {name: self[name] for name in self},
            self._state(),
            passes=self.num_passes,
            raised=len(self.failed_passes),
            beside={what: one.values() for what, one in beside.items() if one is not None},
        )

    @override
    def __repr__(self) -> str:
        return as_text(self._table())

    def _repr_html_(self) -> str:
        return as_html(self._table())

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)
