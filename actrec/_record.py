"""``record()``: resolve the queries, place the hooks, hand out the recorder, take the hooks off."""

from __future__ import annotations

import os
import weakref
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch.compiler import is_dynamo_compiling
from typing_extensions import override

from actrec._calls.capture import Capture
from actrec._calls.compiled import COMPILING
from actrec._calls.destination import Destination, Memory
from actrec._calls.gradients import Gradients
from actrec._calls.hooks import (
    BeginPass,
    Below,
    CallHook,
    EndPass,
    Hook,
    Hooks,
    InputHook,
    LayerHook,
    OutputHook,
    StopHook,
)
from actrec._calls.inputs import Parameters
from actrec._calls.layer import Session, Track
from actrec._calls.options import Options
from actrec._calls.overflow import Overflows
from actrec._calls.passes import is_tracing
from actrec._calls.recorder import Recorder
from actrec._calls.self_test import offload_for
from actrec._calls.stop_early import EarlyStop, refuse_sharded
from actrec._calls.warnings import (
    warn_incomplete,
    warn_not_stopped,
    warn_overflow,
    warn_ungraded,
    warn_unused,
)
from actrec._selection.names import type_name
from actrec._selection.selection import Choice, Selection, select
from actrec._values.fsdp import frees_weights

from .errors import ActrecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    import torch
    from torch import nn

    from actrec._recordings.layer import Layer, V
    from actrec._selection.queries import Query, Transform

    from ._recordings.layer import Role

__all__ = ["record"]


def record(
    model: nn.Module,
    layers: Query | Iterable[Query] | Mapping[Query, Transform | None] | None = None,
    *,
    transform: Transform | None = None,
    inputs: bool = False,
    grads: bool = False,
    detach: bool = True,
    device: torch.device | str | int | None = "cpu",
    dtype: torch.dtype | None = None,
    stop_early: bool = False,
    into: Callable[[], Any] | str | os.PathLike[str] = list,
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

    The values are **exactly** what the layers returned: the ReLU above overwrites its input, and the
    recorded output of the convolution keeps its negative numbers. The model computes what it would have
    computed unrecorded, and when the block ends, however it ends, its hooks are as they were.

    **Which layers.** ``layers`` is a query, several in a list, or ``None`` for every leaf module:

    ===========================================  ====================================================
    ``"layer1.0.conv1"``                         that module, by exact name; ``""`` is the model itself
    ``"layer*.*.conv1"``, ``"blocks.**.attn"``   a glob: ``*`` stays inside one segment, ``**`` crosses dots
    ``re.compile(r"h\.\d+")``                    the names that the regular expression matches fully
    ``nn.Conv2d``                                all modules of that type
    ``model.layer4``                             that module object
    ``lambda name, module: ...``                 the modules for which it returns true
    ``{query: transform}``                       as above, each with a transform of its own
    ===========================================  ====================================================

    Names may leave out what wrappers add (``module.``, ``_orig_mod.``, ``_fsdp_wrapped_module.``,
    ``_checkpoint_wrapped_module.``, ``_forward_module.``, ``_module.``, ``base_model.model.``). The keys of the
    recording are without it, and either name finds the layer. A module that is used under several names is recorded once, and
    found under each of them. Where queries overlap, a layer that is spelled out goes before a pattern;
    otherwise the first query counts.

    Args:
        model: any ``torch.nn.Module``. Compiled models run eagerly inside the block.
        layers: the layer queries.
        transform: ``value -> value``, applied to what a layer returns before it is copied or moved, such
            as ``lambda t: t.mean((2, 3))``. It runs where the tensor is, without gradients, autocast and
            inference mode, on a value of its own. What it calls in the model is not recorded. What it draws from PyTorch's
            global generators differs from call to call and leaves the model's random numbers as they are; those of NumPy
            and ``random`` it shares with the model. A call for which it returns ``None`` is skipped.
        inputs: also record what each call received, as ``acts.inputs[name][i]``: a dict from parameter
            name to value, taken before the call runs. ``transform`` is not applied to inputs.
        grads: also record the gradient of the loss with respect to each value, as ``acts.grads[name][i]``:
            nested as the value, ``None`` until ``backward()`` reaches it, in the block or after it. See
            :attr:`Recording.grads`.
        detach: ``False`` keeps the autograd graph, for losses on activations, and with it the graph's
            memory. The values are still safe from in-place writes.
        device: where values are kept; ``None`` leaves them where they are.
        dtype: cast floating-point values to this dtype. Integer, bool and complex values stay. Finite values that are too
            large for it are counted: a warning at the end and the table say how many, and ``acts.stats()`` does not take
            them for infinities of the layer.
        stop_early: end each forward as soon as every chosen layer has run in it (once, if it is called
            several times): nothing behind them is computed, and the call of the model returns ``None``. A
            forward in which one of them does not run goes on to its end and returns its result. With
            ``grads=True`` it goes only if ``detach=False``, for a loss of what was recorded.
        into: makes the container for the calls of a layer; anything with ``append`` will do, such as
            ``functools.partial(collections.deque, maxlen=10)``. Or a path, or a
            :class:`actrec.store.Folder`, which is a path with settings: the recording is written there while
            the block runs, and never takes more memory than a budget (1 GiB); see below. The path may be the
            URL of an object store, such as ``"s3://bucket/run"``.
        resume: with a path: go on after the last committed pass of the recording that is there, if there is
            one. ``acts.num_passes`` says how many passes that are.

    Returns:
        A context manager that yields the :class:`Recorder`, a mapping from layer name to :class:`Layer`.

    **What is copied.** A tensor on the CPU that fills its memory is shared with the model copy-on-write:
    nothing is copied unless the model writes to it. Anything else is copied at once, and never takes more
    memory than its content: a slice does not keep the tensor that it is a slice of. Recorded values never
    alias the model, also under ``torch.inference_mode()``, where they are normal tensors that a probe can
    train on. Containers are rebuilt; objects that actrec does not take apart, such as key-value caches,
    become an :class:`Opaque`.

    **From a GPU.** With ``device="cpu"``, the default, a value is copied on the GPU, and moved into memory while the model
    goes on. It is in its layer when it has arrived: at the latest when the pass ends, and inside a pass when you ask for
    ``acts[name]``. At most 512 MiB are on their way at a time. A GPU on which the self-test of these copies fails is not
    trusted with them: its values are moved while the model waits. :attr:`Recorder.transfers` says which way they came.

    **Recording to disk.** With ``into=path`` the values are written by a thread while the model goes on, a
    quarter of a gigabyte at a time, and read after the block, or with :func:`actrec.load`. What waits to be
    written, and what is on its way, never exceeds a budget: where the disk is too slow, the model waits.
    A pass is committed, all layers at once, when the next one has begun; what was committed survives
    a crash of the process, of the machine and a full disk. If the block is left by an exception, the
    last pass is not committed, as it may not be whole. To go on, pass ``resume=True`` and begin with the
    batch of number ``acts.num_passes``. An error of the writer is raised once: from the next recorded
    call, or at the end of the block. ``detach=False``, ``grads=True`` and ``acts.clear()`` do not go with
    a path.

    **Several processes.** Under ``torchrun``, every rank may record into the same path, and needs no option for it: each
    writes a folder of its own, without a word to the others, so that ranks may record different layers and different numbers
    of passes, or die. Of a ``DTensor``, each rank writes its part. :func:`actrec.load` reads what all of
    them have written as one recording. Two runs into one path are refused.

    **What counts as a call.** Every call of the module is one item, also of a module that is called
    several times in a forward. What activation checkpointing recomputes is not recorded again.
    ``Layer.passes`` says which forward a call belongs to.

    Raises:
        UnsupportedModelError: ``model`` is no module, or a form of one in which hooks never run.
        SelectionError: a query matches nothing, or only containers that are never called; it names what
            comes close. It is raised before any hook is placed.
        TransformError: the transform raised; from the call of the model, with layer and call number. The
            block keeps what was recorded before.
        CaptureError: a value cannot be kept, such as one inside ``torch.func.vmap`` or while a CUDA graph is
            captured, or cannot be stored, or not be moved.
        RecordingExistsError: there is something at the path already; it was not touched.
        ResumeError: what is there was recorded with other layers or options; the message says which.
        WriteError: writing failed; what was committed stays.

    Warns:
        UnusedLayerWarning: at the end of the block, if nothing was recorded of a layer, and why that may be.
        OverflowWarning: at the end of the block, if finite values are too large for ``dtype``.
        MissingGradientWarning: at the end of the block, if gradients were asked for (or ``detach=False``) and
            none can reach a layer, because nothing that it returned requires grad. From ``backward()``, if a
            gradient is left out: the layer returned a view of what the model may have used elsewhere, and one of
            them was written in place.
        IncompleteLayerWarning: at the end of the block, if calls of a layer were not recorded, or perhaps not as it
            returned them: another module was put in its place, or hooks were added to it in the middle of a forward.
    """
    if is_dynamo_compiling() or is_tracing():
        raise ActrecError(COMPILING)
    if isinstance(into, (str, os.PathLike)):
        # Who records into memory does not wait for the store to be imported.
        from .store.folder import Folder  # noqa: PLC0415

        into = Folder.of(into)
    options = Options(
        transform=transform,
        inputs=inputs,
        grads=grads,
        detach=detach,
        device=device,
        dtype=dtype,
        stop_early=stop_early,
        into=into,
        resume=resume,
    )
    selection = select(model, layers, transform)
    if stop_early:
        refuse_sharded(model)
    return _Block(model, selection, options)


class _Block(AbstractContextManager[Recorder[Any]]):
    """What ``with record(...)`` enters, once."""

    def __init__(self, model: nn.Module, selection: Selection, options: Options) -> None:
        self._model = model
        self._selection = selection
        self._options = options
        self._capture = Capture(
            detach=options.detach,
            share=not frees_weights(model),
            device=cast("torch.device | None", options.device),
            dtype=options.dtype,
        )
        stop = EarlyStop() if options.stop_early else None
        self._session = Session(stop=stop)
        self._session.offload = offload_for(self._capture, self._session.passes)
        self._tracks: dict[str, tuple[Choice, Track]] = {}
        self._yielded: Recorder | None = None  # which also keeps it, where the user does not

    @override
    def __enter__(self) -> Recorder[Any]:
        if self._yielded is not None:
            message = "record(): this block was entered before. Call record() again for another recording."
            raise ActrecError(message)
        hooks = Hooks()
        with ExitStack() as stack:
            self._destination = self._opened()
            stack.callback(self._destination.close)
            stack.callback(self._session.close)
            recorder = self._recorder()
            stack.enter_context(self._session.eager)
            if self._session.stop is not None:
                stack.callback(self._session.stop.remove)
                self._session.stop.place(self._model)
            stack.callback(hooks.remove)
            hooks.place(self._plan())
            for _, track in self._tracks.values():
                if track.grads is not None:
                    stack.callback(track.grads.end)
            # If the block is dropped without being left, as with a generator, this runs all the same.
            self._clean_up = weakref.finalize(recorder, stack.pop_all().close)
            self._clean_up.atexit = False
        _sessions.add(self._session)
        self._session.begin()
        self._yielded = recorder
        return recorder

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session = self._session
        session.end(interrupted=kind is not None)
        self._destination.left_by(error)
        self._clean_up()
        failure = session.unseen or self._destination.failure()
        if error is not None:
            if failure is not None:
                error.add_note(str(failure))
            return
        if failure is not None:
            raise failure
        if session.error is not None and not session.surfaced:
            # The model has caught it: without this, calls would be missing without a word.
            raise session.error
        warn_unused(self._model, self._tracks, stacklevel=2)
        warn_ungraded(self._model, self._tracks, stacklevel=2)
        warn_incomplete(self._model, self._tracks, stacklevel=2)
        warn_overflow(self._model, self._tracks, stacklevel=2)
        warn_not_stopped(self._model, session.stop, stacklevel=2)

    def __getitem__(self, name: str) -> NoReturn:
        raise ActrecError(_FORGOTTEN)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_FORGOTTEN)

    def _opened(self) -> Destination:
        """Open what the values go to, before anything happens to the model."""
        if self._options.path is None:
            return Memory(self._options)
        from .store.description import Description, LayerInfo, named  # noqa: PLC0415
        from .store.folder import Folder  # noqa: PLC0415
        from .store.stream import Stream  # noqa: PLC0415

        layers = tuple(
            LayerInfo(choice.key, type_name(choice.module), named(choice.transform))
            for choice in self._selection.choices
        )
        dtype = None if self._options.dtype is None else str(self._options.dtype)
        kind = type_name(self._model)
        description = Description(kind, layers, self._names(), self._options.inputs, dtype=dtype)
        folder = Folder.of(self._options.path)
        return Stream(folder, description, self._session.passes, resume=self._options.resume)

    def _recorder(self) -> Recorder[Any]:
        """Make what keeps the calls: a layer for each choice, and the track that leads to it."""
        layers = self._layers("output")
        inputs = self._layers("input") if self._options.inputs else {}
        grads = self._layers("gradient") if self._options.grads else {}
        for choice in self._selection.choices:
            key = choice.key
            track = self._track(choice, layers[key], inputs.get(key), grads.get(key))
            self._tracks[key] = choice, track
        if self._session.stop is not None:
            self._session.stop.layers = frozenset(self._tracks)
        recorder = Recorder(
            type_name(self._model),
            layers,
            self._names(),
            self._session,
            inputs=inputs,
            grads=grads,
            capture=self._capture,
            tracks=[track for _, track in self._tracks.values()],
            added=self._destination.added,
        )
        recorder._layers.update(self._destination.added_before())
        self._session.order.update(dict.fromkeys(self._destination.order))
        return recorder

    def _layers(self, role: Role) -> dict[str, Layer[Any]]:
        return {
            choice.key: self._destination.layer(role, at, choice.key, type_name(choice.module))
            for at, choice in enumerate(self._selection.choices)
        }

    def _track(
        self,
        choice: Choice,
        outputs: Layer[Any],
        inputs: Layer[Any] | None,
        grads: Layer[Any] | None,
    ) -> Track:
        offload = self._session.offload
        capture = replace(
            self._capture, layer=choice.key, transform=choice.transform, offload=offload
        )
        track = Track(self._session, self._counting(capture, outputs), outputs)
        track.kept = len(outputs)  # in a run that is resumed
        if inputs is not None:
            track.inputs = inputs
            track.parameters = Parameters.of(choice.module)
            track.receives = self._counting(capture, inputs)
        if grads is not None:
            # A backward has no end at which it could be delivered: a gradient is moved at once.
            what = replace(capture, what="the gradient of call", offload=None)
            track.grads = Gradients(self._counting(what, grads), grads, track.lock)
        return track

    def _counting(self, capture: Capture, layer: Layer[Any]) -> Capture:
        """The same capture, which counts what does not fit into the dtype, for ``layer`` to say."""
        if capture.dtype is None:
            return capture
        layer.overflows = Overflows(capture.dtype, self._session.passes)
        return replace(capture, overflows=layer.overflows)

    def _names(self) -> dict[str, str]:
        return {name: choice.key for choice in self._selection.choices for name in choice.names}

    def _plan(self) -> Iterator[tuple[nn.Module, Hook[Any]]]:
        """The hooks, in the order in which they go onto the model: passes around calls."""
        parents = self._selection.parents
        hooks: dict[nn.Module, list[LayerHook]] = {
            choice.module: [InputHook(track), CallHook(track)]
            if self._options.inputs
            else [OutputHook(track)]
            for choice, track in self._tracks.values()
        }
        for module in parents:
            yield (
                module,
                BeginPass(self._session, Below(module, hooks), is_root=module is self._model),
            )
        for module, its_hooks in hooks.items():
            yield from ((module, hook) for hook in its_hooks)
        for module in parents:
            yield module, EndPass(self._session)
        if self._session.stop is not None:
            for choice in self._selection.choices:
                yield choice.module, StopHook(self._session)


_FORGOTTEN = (
    "record() was not entered. Did you forget the with? Write: with record(model, ...) as acts:"
)


# --- Forked processes --------------------------------------------------------------------------------

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _end_all() -> None:
    """What a forked process would record, nobody could read: in there the hooks do nothing."""
    for session in _sessions:
        session.end(interrupted=True)


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows
    os.register_at_fork(after_in_child=_end_all)
