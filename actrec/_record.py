"""``record()``: its arguments, checked before anything happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Never

import torch
from torch import nn

from actrec._calls.compiled import refuse_compiling
from actrec._calls.options import Options, checked_device
from actrec._calls.recorder import Recorder
from actrec._calls.stop_early import refuse_sharded
from actrec._recordings.layer import V
from actrec._selection.queries import Query, Transform
from actrec._selection.selection import select
from actrec._selection.treatment import Queries, Reducer

from ._block import Block
from .errors import OptionError


def record(
    model: nn.Module,
    layers: Queries | None = None,
    *others: Never,
    transform: Transform | None = None,
    inputs: bool | Queries = False,
    grads: bool | Query | Iterable[Query] | Mapping[Query, Transform | None] = False,
    detach: bool = True,
    device: torch.device | str | int | None = "cpu",
    dtype: torch.dtype | None = None,
    stop_early: bool = False,
    compiled: bool = False,
    into: Callable[[], Any] | Reducer | str | os.PathLike[str] = list,
    resume: bool = False,
) -> AbstractContextManager[Recorder[V]]:
    r"""Record what the chosen layers of ``model`` return while the ``with`` block runs.

    >>> import torch
    >>> from torch import nn
    >>> from actrec import record
    >>> model = nn.Sequential(
    ...     nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 10)
    ... )
    >>> with record(model, ["0", "3"]) as acts:
    ...     for images in torch.randn(4, 16, 1, 8, 8):
    ...         output = model(images)
    >>> acts["0"][0].shape
    torch.Size([16, 8, 6, 6])
    >>> acts["3"].cat().shape
    torch.Size([64, 10])
    >>> acts
    recorded Sequential: 2 layers, 4 passes, 76.3 kB
    layer  type    calls  shape          dtype     memory
    0      Conv2d      4  (16, 8, 6, 6)  float32  73.7 kB
    3      Linear      4  (16, 10)       float32   2.6 kB

    The recorded values are **exactly** what the layers returned: the in-place ReLU above overwrites its input, and the
    recorded output of the convolution keeps its negative numbers. The model computes what it would have computed
    unrecorded. When the block ends, also by an exception, the hooks are removed.

    A CPU tensor of two dimensions or more that occupies its whole storage is shared with the model copy-on-write;
    anything else is copied at once, and a slice never keeps a larger storage alive. Recorded tensors are normal tensors, also
    under ``torch.inference_mode()``, and writing to them does not change the model. Containers are rebuilt; objects
    that actrec does not take apart, such as key-value caches, become an :class:`Opaque`.

    ``layers`` is a query, several in a list, or ``None`` for every leaf module:

    ===========================================  ====================================================
    ``"layer1.0.conv1"``                         that module, by exact name; ``""`` is the model itself
    ``"layer*.*.conv1"``, ``"blocks.**.attn"``   a glob: ``*`` stays inside one segment, ``**`` crosses dots
    ``"layer1.*:relu"``                          functions that those modules call themselves, by name or glob
    ``re.compile(r"h\.\d+")``                    the names that the regular expression matches fully
    ``nn.Conv2d``                                all modules of that type
    ``model.layer4``                             that module object
    ``lambda name, module: ...``                 the modules for which it returns true
    ``{query: transform}``                       as above, each with a transform of its own
    ``{query: reduction}``                       the result of the reduction, instead of the calls
    ===========================================  ====================================================

    Names may leave out the segments that wrappers add, such as ``module.`` and ``_orig_mod.``; the keys of the recording
    are without them. A module with several names is recorded once and found under each of them. Where queries overlap,
    a name or a module object takes precedence over a pattern; otherwise the first query does.

    A reduction is updated with each value and keeps none: one of :mod:`actrec.reduce`, or a metric of torchmetrics. Each layer has its
    own, alone or after a transform: ``{"layer*": reduce.Moments(), "head": (torch.abs, reduce.TopK(k=5))}``.

    A function is one of PyTorch, a method or an operator: ``add`` for ``x + y``, ``x.add(y)`` and ``x += y``. Each call is one item,
    and ``inputs`` are its arguments. ``"**:*"`` records all that are called: the way to find their names.

    Args:
        model: any ``torch.nn.Module``. Compiled models run eagerly inside the block, unless ``compiled=True``.
        layers: the layer queries. With ``()`` only what ``inputs`` or ``grads`` ask for is recorded:
            ``record(model, (), inputs="**.o_proj")``.
        others: not allowed; pass several queries as one list.
        transform: ``value -> value``, applied to what a layer returns before it is copied or moved, such
            as ``lambda t: t.mean((2, 3))``. It runs on the tensor's device, without gradients, autocast and inference mode, on
            a value that is independent of the model's. Layers that it calls are not recorded, and random numbers that it draws
            do not change those of the model. A call for which it returns ``None`` is skipped, its inputs and gradients included.
        inputs: record what calls received, as ``acts.inputs[name][i]``: a dict from parameter name to value, copied before
            the call runs. ``True`` for the layers in ``layers``; or separate layer queries, in the form that ``layers`` takes. A
            transform in them gets that dict, such as ``lambda received: received["input"].abs()``. The transforms of
            outputs, and ``transform``, are not applied to inputs.
        grads: record the gradient of the loss with respect to what calls returned, as ``acts.grads[name][i]``:
            nested as the value is, ``None`` until ``backward()`` reaches it, in the block or after it. See
            :attr:`Recording.grads`. ``True`` for the layers in ``layers``, with their transforms; or separate layer
            queries. When recording to a path, call ``backward()`` inside the block, and inside the unit if there are units: a
            gradient that comes later is left out, with a warning.
        detach: ``False`` keeps the autograd graph, for losses on activations, and with it the graph's
            memory. Values are still independent of in-place writes. ``False`` is not supported when recording to a path.
        device: where values are kept; ``None`` leaves them on their device. From a GPU, values are copied asynchronously if
            a self-test on that GPU has passed. A call is appended to its layer when its values have arrived: at the latest at
            the end of the pass, and earlier if ``acts[name]`` is read.
        dtype: cast floating-point values to this dtype. Integer, bool and complex values keep theirs. Finite values that overflow
            are counted: a warning and the table say how many, and ``acts.stats()`` does not count them as infinities of the
            layer.
        stop_early: end each forward as soon as every chosen layer has run in it once: later layers are not computed, and
            the call of the model returns ``None``. A forward in which a chosen layer does not run is not ended. For functions,
            the module that calls them has to run. With ``grads=True`` it needs ``detach=False``.
        compiled: keep compiled code compiled in the block. What calls a chosen layer is compiled once more when it is first called
            in the block, and not again for the same layers. The values are those that the compiled code computes. Not supported
            with ``stop_early``, ``detach=False`` and functions. See :doc:`/how-to/compiled`.
        into: where the values go. A path, a URL such as ``"s3://bucket/run"``, or a :class:`actrec.store.Folder`, which is a path with
            settings: they are written while the block runs, within a budget of memory (1 GiB), and committed pass by pass. Committed
            passes survive a crash of the process or the machine and a full disk. Under ``torchrun``, all ranks record into the
            same path. See :doc:`/how-to/large-recordings`.

            Or what makes a container for the calls of each layer, in memory: a function that returns an object with ``append``, such as
            ``functools.partial(collections.deque, maxlen=10)``; or a reduction of each layer, such as ``actrec.reduce.Moments``. They
            run as transforms do, without gradients and autocast.
        resume: with a path: continue the recording that is there, if any; what was not committed is dropped. Open a
            :meth:`unit <Recorder.unit>` for each batch, prompt or document, and iterate over :meth:`Recorder.remaining`, which
            skips the units that any rank has committed.

    Returns:
        A context manager that yields the :class:`Recorder`, a mapping from layer name to :class:`Layer`. Each call of a module
        is one item of its layer, except for what activation checkpointing recomputes.

    Raises:
        UnsupportedModelError: ``model`` is not a module, or is of a kind in which hooks never run.
        OptionError: an argument is invalid, or not supported with another one.
        SelectionError: a query matches nothing, or only containers that are never called; the message names close
            matches. Like all errors above, it is raised before any hook is placed.
        TransformError: the transform raised. Raised from the call of the model, with layer and call number; earlier calls
            stay recorded.
        CaptureError: a value cannot be recorded, such as one inside ``torch.func.vmap`` or while a CUDA graph is
            captured, or cannot be stored or moved.
        RecordingExistsError: there is something at the path already; it was not changed.
        ResumeError: the recording at the path is of other layers or options; the message says which.
        WriteError: writing failed; committed passes stay. Raised once, from the next recorded call or at the end of the block.

    Warns:
        UnusedLayerWarning: nothing was recorded of a layer; the message gives the likely cause. Like the following, at the end
            of the block.
        ResumeWarning: a run is resumed without units, and passes look like steps of ``generate()``. Issued at the beginning of
            the block if the stored passes look so already.
        OverflowWarning: finite values overflowed in the cast to ``dtype``.
        MissingGradientWarning: gradients were asked for, or ``detach=False``, and nothing that a layer returned requires grad.
            From ``backward()``: a gradient is left out, because the layer returned a view of what the model may have used
            elsewhere, and one of them was written in place.
        IncompleteLayerWarning: calls of a layer are missing, or may differ from what it returned: the module was replaced, or
            hooks were added to it in the middle of a forward.
    """
    if others:
        raise OptionError(_several(layers, others))
    refuse_compiling()
    if isinstance(into, (str, os.PathLike)):
        # Imported here, because recording into memory does not need the store.
        from .store.folder import Folder  # noqa: PLC0415

        into = Folder.of(into)
    options = Options(
        grads=grads is not False,
        detach=detach,
        device=checked_device(device),
        dtype=dtype,
        stop_early=stop_early,
        compiled=compiled,
        into=into,
        resume=resume,
    )
    selection = select(model, layers, transform, inputs=inputs, grads=grads)
    options.check(selection)
    if stop_early:
        refuse_sharded(model)
    if compiled:
        from ._calls.in_graph.self_test import prepare  # noqa: PLC0415

        prepare()
    return Block(model, selection, options)


def _several(layers: object, others: tuple[object, ...]) -> str:
    """Return the message for several queries that are not a list, or an option without its name."""
    shown = ", ".join(
        repr(one) if isinstance(one, str) else getattr(one, "__name__", "...")
        for one in (layers, *others)
    )
    return (
        f"record(model, {shown}): pass several layers as one list, record(model, [{shown}]), and options by name, such as "
        "transform=... and into=..."
    )
