"""A recording: a mapping from layer name to that layer's calls."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib import import_module
from types import MappingProxyType
from typing import Any, Generic, overload

from torch import nn
from typing_extensions import TypeVar, override

from actrec._selection.functions import canonical
from actrec._selection.queries import Query
from actrec._selection.treatment import What
from actrec._tables.rows import Shown
from actrec._tables.table import Table
from actrec._text import listed, shown
from actrec._values.join import How
from actrec.errors import JoinError, UnknownLayerError

from .instead import NOT_RECORDED, explained, no_attribute_of_recording, no_layer
from .layer import Layer, V
from .look import Together
from .masks import Mask, Masks
from .pass_numbers import ListView
from .run import Run
from .selecting import Known, chosen
from .stats import Stats, stats
from .table import recording_table
from .units import Key, missing

T = TypeVar("T")


@explained(no_attribute_of_recording)
class Recording(Shown, Mapping[str, Layer[V]], Generic[V]):
    """What was recorded: a read-only mapping from layer name to :class:`Layer`.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
    >>> with record(model) as acts:
    ...     output = model(torch.randn(5, 4))
    >>> list(acts)
    ['0', '1']
    >>> acts
    recorded Sequential: 2 layers, 1 pass, 120 B
    layer  type    calls  shape   dtype    memory
    0      Linear      1  (5, 3)  float32    60 B
    1      ReLU        1  (5, 3)  float32    60 B

    The keys are the names of the chosen layers in the order of the queries, without wrapper segments such as ``module.``,
    then the names given to :meth:`Recorder.add`. A layer that has several names (a module used in two places, a name with
    wrapper segments) is listed once, and each of its names is accepted, and in a recording that was made here also the
    module itself: ``acts[model.layer4]``.
    """

    def __init__(
        self,
        run: Run,
        layers: Mapping[str, Layer[V]],
        beside: Mapping[What, Mapping[str, Layer[Any]]] = MappingProxyType({}),
        role: str = "",
    ) -> None:
        """``beside`` are the layers of inputs and gradients, if recorded; ``role`` says what the values are, if not outputs."""
        self._run = run
        self._role = role
        self._together = Together()
        self._layers = dict(layers)
        for layer in self._layers.values():
            if layer._units is None:  # else a recorder may share the layer
                layer._units = run.units
        self._beside: dict[What, Recording[Any]] = {
            what: Recording(run, those, role=f"{what}s") for what, those in beside.items()
        }

    @property
    def _parts(self) -> dict[What, Recording[Any]]:
        """The recordings of outputs, inputs and gradients, as far as they were recorded."""
        return {"output": self, **self._beside}

    def _key(self, name: object) -> str | None:
        """Return the listed name of a layer; ``None`` if there is no such layer."""
        if isinstance(name, nn.Module):
            name = self._run.modules.get(name)
        aliases = self._run.aliases
        key = name if name in self._layers else aliases.get(name)  # type: ignore[call-overload]
        if key is None and isinstance(name, str) and ":" in name:  # module:function
            module, _, function = name.rpartition(":")
            key = f"{aliases.get(f'{module}:', f'{module}:')}{canonical(function)}"
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
        """Return a layer, or a default if there is no layer with that name.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     output = model(torch.randn(5, 4))
        >>> print(acts.get("head"))
        None

        Args:
            name: the name of a layer.
            default: the result if there is no such layer.

        Returns:
            The layer, or ``default``.
        """
        key = self._key(name)
        return default if key is None else self[key]

    @override
    def __getitem__(self, name: str | nn.Module) -> Layer[V]:
        given: object = name
        key = self._key(name) if isinstance(given, (str, nn.Module)) else None
        if key is None:
            raise UnknownLayerError(no_layer(self, self._beside, given))
        self._run.deliver()
        return self._layers[key]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter([*self._layers])  # a recorder may get more, from other threads

    @override
    def __len__(self) -> int:
        return len(self._layers)

    @property
    def num_passes(self) -> int:
        """The number of passes so far, including those in which no chosen layer was called.

        If several ranks have recorded, each counts its own: the number of the rank that has most.
        """
        return self._run.passes.count

    @property
    def failed_passes(self) -> list[int]:
        """The passes that raised or were interrupted. Layers that would have run later have no call in them.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> with record(model) as acts:
        ...     for width in (4, 5, 4):
        ...         try:
        ...             output = model(torch.zeros(2, width))
        ...         except RuntimeError:
        ...             pass
        >>> acts.failed_passes, acts["0"].passes
        ([1], [0, 2])

        The calls before the error are kept; :func:`actrec.data.rows` leaves them out.
        """
        return self._run.failed()

    # --- Units ---------------------------------------------------------------------------------------------

    @property
    def units(self) -> Sequence[Key]:
        """The keys of the units, in the order of their passes.

        See :meth:`Recorder.unit`.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for key, batch in acts.remaining(enumerate(torch.randn(3, 5, 4))):
        ...         with acts.unit(key):
        ...             output = model(batch)
        >>> acts.units
        [0, 1, 2]
        """
        keys = self._run.units.keys
        return ListView([keys[one] for one in sorted(keys, key=lambda one: (one[1], one[0] or 0))])

    @property
    def done(self) -> AbstractSet[Key]:
        """The keys of the units that the recording has, as a set."""
        return dict.fromkeys(self._run.units.keys.values()).keys()

    def missing(self, wanted: Iterable[Key]) -> list[Key]:
        """Return the keys for which the recording has no unit.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for key in (0, 1, 3):
        ...         with acts.unit(key):
        ...             output = model(torch.randn(5, 4))
        >>> acts.missing(range(5))
        [2, 4]

        Args:
            wanted: the keys that the recording should have.

        Returns:
            The keys that it does not have, in the order of ``wanted``, each once.

        Raises:
            OptionError: one of them is neither an int nor a str.
        """
        return missing("acts.missing()", wanted, self.done)

    @property
    def inputs(self) -> Recording[dict[str, Any]]:
        """The arguments of the calls. ``acts.inputs[name][i]`` is a dict from parameter name to value.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "", inputs=True) as acts:
        ...     output = model(torch.zeros(5, 4))
        >>> acts.inputs[""][0]["input"].shape
        torch.Size([5, 4])

        Item ``i`` belongs to the call of ``acts[name][i]``. Parameters that were left at their defaults are not in the dict;
        the item is ``None`` for a call that began before the block. Values were copied before the call ran.

        Raises:
            AttributeError: inputs were not recorded. Record them with ``record(..., inputs=True)``.
        """
        if "input" not in self._beside:
            raise AttributeError(NOT_RECORDED["inputs"])
        self._run.deliver()
        return self._beside["input"]

    @property
    def grads(self) -> Recording[V]:
        """The gradients. ``acts.grads[name][i]`` is the gradient of the loss with respect to ``acts[name][i]``.

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

        It is nested like ``acts[name][i]``, with ``None`` where no gradient has arrived. It is the gradient of the value as
        the layer returned it, also if a later layer writes to that value in place. If that gradient is not defined, it stays
        ``None``, and a :class:`actrec.errors.MissingGradientWarning` names the layer.

        ``backward()`` may be called inside the block or after it. Calling it again for the same forward accumulates, as
        in the ``.grad`` of a parameter; so does ``torch.autograd.grad``. Gradients of a scaled loss are scaled.

        Gradients are copied like values, and moved and cast by ``device`` and ``dtype``. A ``transform`` is applied to
        each when it arrives, with zeros for tensors of the value that have no gradient.

        Raises:
            AttributeError: gradients were not recorded. Record them with ``record(..., grads=True)``.
        """
        if "gradient" not in self._beside:
            raise AttributeError(NOT_RECORDED["grads"])
        return self._beside["gradient"]

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the recording occupies, inputs and gradients included.

        Memory that several calls share counts once, such as the output of one layer that is the input of the next. A value
        that the model has not overwritten is shared with the model copy-on-write. So this is an upper bound of the memory
        that recording adds, while the model still has the value.
        """
        layers = [layer for part in self._parts.values() for layer in part.values()]
        for layer in layers:
            layer._look_again()
        return self._together.nbytes([layer._seen()[1] for layer in layers])

    @property
    def execution_order(self) -> list[str]:
        """The names of the layers that have calls, in the order in which their first calls ended.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> with record(model, ["1", "", "0"]) as acts:
        ...     output = model(torch.randn(5, 4))
        >>> list(acts), acts.execution_order
        (['1', '', '0'], ['0', '1', ''])

        The call of a module ends after those of the modules in it. The recording itself is in the order of the queries.
        """
        self._run.deliver()
        known = [name for name in [*self._run.order] if name in self._layers]  # it may grow
        return [name for name in dict.fromkeys([*known, *self]) if len(self._layers[name])]

    def _in_order(self) -> Iterable[str]:
        """Return all names in execution order, those of layers without calls last."""
        return dict.fromkeys([*self.execution_order, *self])

    def select(self, layers: Query | Iterable[Query]) -> Recording[V]:
        """Select some layers, by the queries that :func:`actrec.record` takes.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with record(model) as acts:
        ...     output = model(torch.randn(5, 4))
        >>> list(acts.select("[02]")), list(acts.select(nn.ReLU))
        (['0', '2'], ['1'])

        Nothing is copied: the layers are the same, and so are inputs and gradients.

        Args:
            layers: names, globs, regular expressions, types, modules, functions of name and module, or several of these. A
                recording that was loaded or copied has only the names of its layers and of their types, not the modules.

        Returns:
            A recording of the selected layers, in the order of the queries.

        Raises:
            SelectionError: a query selects no recorded layer; the message names close matches.
        """
        self._run.deliver()
        types: dict[str, str] = {}
        for part in self._parts.values():
            for name, layer in [*part._layers.items()]:
                types.setdefault(name, layer.type)
        run = self._run
        names = chosen(layers, Known(types, run.aliases, run.modules))
        some = {
            what: {name: part._layers[name] for name in names if name in part._layers}
            for what, part in self._parts.items()
        }
        return Recording(run, some.pop("output"), some, self._role)

    def cat(self, dim: int = 0) -> dict[str, V]:
        """Concatenate the calls of every layer: ``{name: layer.cat(dim)}``.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> with record(model) as acts:
        ...     for batch in torch.randn(2, 5, 4):
        ...         output = model(batch)
        >>> {name: tuple(value.shape) for name, value in acts.cat().items()}
        {'0': (10, 3), '1': (10, 3)}

        Args:
            dim: the dimension in which sizes may differ, by default the batch.

        Returns:
            A dict from the name of each layer to a new value. See :meth:`Layer.cat`.

        Raises:
            JoinError: nothing was recorded of a layer, or its calls cannot be joined.
            OptionError: ``dim`` is not an int.
        """
        return self._join("cat", dim)

    def stack(self, dim: int = 0) -> dict[str, V]:
        """Stack the calls of every layer: ``{name: layer.stack(dim)}``.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> with record(model) as acts:
        ...     for batch in torch.randn(2, 5, 4):
        ...         output = model(batch)
        >>> {name: tuple(value.shape) for name, value in acts.stack().items()}
        {'0': (2, 5, 3), '1': (2, 5, 3)}

        Args:
            dim: the position of the new dimension.

        Returns:
            A dict from the name of each layer to a new value. See :meth:`Layer.stack`.

        Raises:
            JoinError: as for :meth:`cat`, and where the calls of a layer do not all have the same shape.
            OptionError: ``dim`` is not an int.
        """
        return self._join("stack", dim)

    def _join(self, how: How, dim: int) -> dict[str, V]:
        empty = [name for name, layer in self.items() if not len(layer)]
        if empty:
            message = (
                f"acts.{how}(): nothing was recorded of {listed(empty)}, so there is nothing to join. The layers that have "
                f"calls: acts.select(acts.execution_order).{how}()."
            )
            raise JoinError(message)
        return {name: layer._join(how, dim) for name, layer in self.items()}

    def stats(self, *, mask: Mask | None = None, progress: bool = False) -> Stats:
        """Compute statistics of every layer over all its calls, with one row for each tensor that it returns.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())
        >>> with record(model) as acts:
        ...     output = model(torch.tensor([[-1.0, 0.0, 2.0, 3.0]]))
        >>> acts.stats()
        statistics of 2 layers
        layer  shape   values, 0.5-99.5 %    mean    std  min  max  zeros  memory
        0      (1, 4)  █▁▁▁▁█▁▁▁▁▁▁▁▁▁█▁▁▁█     1  1.826   -1    3    25%    16 B
        1      (1, 4)  █▁▁▁▁▁▁▁▁▁▁▁▁▅▂▁▁▁▁▆  1.25    1.5    0    3    50%    16 B

        The title says where the first NaN or infinity is. The range of a histogram leaves out half a per cent of the elements
        on each side; they are counted in its first and last bar. A bar that is much higher than the others is cut, such as that
        of the zeros of a ReLU.

        Calls are read one after the other in blocks of a few megabytes, and not changed. It may be called inside the block. Layers
        whose calls were not kept, because they were reduced, have no rows; the title names them.

        With a mask, such as the attention mask of each batch, padding does not count:

        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
        >>> ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
        >>> with record(model) as acts:
        ...     output = model(ids)
        ...     acts.add("mask", ids != 0)
        >>> [(row.layer, row.count, row.left_out) for row in acts.stats(mask="mask")]
        [('0', 16, 8), ('mask', 4, 2)]

        Args:
            mask: the name of a mask ``(batch, tokens)`` that each pass has, 0 at the positions to leave out; or a layer, or what is
                in its values: ``mask=(acts.inputs[""], "attention_mask")``; or a function that makes one from the values of a pass:
                ``mask=lambda values: values["ids"] != 0``. It applies to all tensors ``(batch, tokens, ...)``, with the calls of a
                pass joined, and ``(batch * tokens, ...)``, as in :func:`actrec.data.rows`. A tensor with other positions, such as one
                vector for each sample, counts in full: ``left_out`` says how many elements of each tensor were left out.
            progress: whether to show the progress: a bar of ``tqdm`` if that is installed, else a line on stderr.

        Returns:
            :class:`Stats`: a tuple of rows in execution order, which prints as a table. ``pandas.DataFrame(acts.stats())``
            makes a data frame of it.

        Raises:
            AlignmentError: a pass has no mask, or no layer has its positions.
            UnknownLayerError: there is no mask with that name.
            OptionError: ``mask`` is neither a layer nor a function.
        """
        masks = None if mask is None else Masks("acts.stats", self, self._run.raised(), mask)
        return stats([self[name] for name in self._in_order()], masks, progress=progress)

    def save(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, progress: bool = False
    ) -> None:
        """Write the recording to ``path``, to be opened with :func:`actrec.load`: :func:`actrec.save` as a method.

        >>> import tempfile, torch, actrec
        >>> model = torch.nn.Linear(4, 3)
        >>> with actrec.record(model, "") as acts:
        ...     output = model(torch.randn(5, 4))
        >>> acts.save(tempfile.mkdtemp() + "/run")

        Args:
            path: a new folder, or the URL of one.
            overwrite: whether a recording that is there may be replaced.
            progress: whether to show the progress.

        Raises:
            RecordingExistsError: there is something at the path; it was not changed.
            CaptureError: a value cannot be stored. Raised before anything is written.
            WriteError: writing failed.
        """
        # The store imports recordings, not the other way round.
        import_module("actrec.store").save(self, path, overwrite=overwrite, progress=progress)

    def report(self, path: str | os.PathLike[str], *, progress: bool = False) -> None:
        """Write an HTML page about the recording: one self-contained file, which needs no server and no network.

        >>> import tempfile, torch
        >>> from actrec import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> with record(model) as acts:
        ...     for batch in torch.randn(5, 16, 8):
        ...         output = model(batch)
        >>> acts.report(tempfile.mkdtemp() + "/run.html")

        It has the table, the warnings, the statistics with the first NaN or infinity, the distributions, how statistics change
        over the passes, how similar the layers are, and how to load the recording. A picture says what it leaves out.

        A recording may be larger than memory: it is read call by call, three times, and not changed. A page that is there is
        replaced when the new one is complete.

        Args:
            path: the file, with a name that ends in ``.html``.
            progress: whether to show the progress, as in :meth:`stats`.

        Raises:
            OptionError: the path is that of a folder, or does not end in ``.html``. Raised before anything is read.
            RecordingExistsError: there is a file at the path that is not a report. It was not changed.
            WriteError: writing failed. A page that was there before is unchanged.
        """
        # Reports are made of recordings, not the other way round.
        import_module("actrec._report").report(self, path, progress=progress)

    def _title(self) -> str:
        state, model = self._run.state(), shown(self._run.model)
        what = f"{self._role} of {model}" if self._role else model
        head = f"{'recording' if state == 'recording' else 'recorded'} {what}"
        return head + (" (interrupted, partial)" if state == "interrupted" else "")

    @override
    def _table(self) -> Table:
        layers = {part._role: [*part.values()] for part in self._parts.values()}
        return recording_table(self._title(), self._run, layers, self._together)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)
