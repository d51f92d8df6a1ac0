"""A recording that is being made."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic

from typing_extensions import override

from actrec._recordings.in_memory import ListLayer
from actrec._recordings.layer import Layer, V
from actrec._recordings.passes import Count
from actrec._recordings.recording import Recording
from actrec.errors import ActrecError, CaptureError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from actrec._recordings.table import State
    from actrec._values.containers import Value

    from .capture import Capture
    from .layer import Track
    from .session import Session

__all__ = ["Recorder"]


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

    When the block has ended it remains, as a recording.

    To type checkers and editors the values are tensors. Where a layer returns something else, say so with
    ``block: AbstractContextManager[Recorder[MyOutput]] = record(model)``, or ``Recorder[Any]``.
    """

    def __init__(
        self,
        model: str,
        layers: Mapping[str, Layer[Any]],
        aliases: Mapping[str, str],
        session: Session,
        *,
        inputs: Mapping[str, Layer[Any]],
        grads: Mapping[str, Layer[Any]],
        capture: Capture,
        tracks: Sequence[Track],
        modules: Mapping[nn.Module, str],
        added: Callable[[str], Layer[Any]] = lambda name: ListLayer(name, (), "added"),
    ) -> None:
        super().__init__(
            model, layers, aliases, session.order, session.passes, inputs=inputs, grads=grads
        )
        self._modules = weakref.WeakKeyDictionary(modules)
        for beside in (self._inputs, self._grads):
            if beside is not None:
                beside._modules = self._modules
        self._added = added
        self._chosen = frozenset([*layers, *inputs, *grads, *aliases])
        self._session = session
        self._capture = capture
        self._tracks = tracks  # the hooks refer to them weakly: this is what keeps them
        self._adding = threading.Lock()

    @override
    def _deliver(self) -> None:
        self._session.deliver()

    @property
    def transfers(self) -> dict[str, str]:
        """How values have come from each GPU into memory, while the model went on or while it waited.

        ``{"cuda:0": "asynchronous"}``, or ``"blocking"`` for a GPU on which the self-test of asynchronous copies has
        failed. Other devices, and GPUs of which nothing was moved, are not in it; with ``detach=False``, none is.
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

        It holds for all threads. The hooks stay on the model.

        Returns:
            A context manager. Pauses nest, and recording goes on after the outermost.
        """
        self._deliver()
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

        Call it after the forward that the value belongs to. In :meth:`pause` it does nothing.

        Args:
            name: the key in the recording, which no layer has.
            value: tensors are detached, copied as a layer's values are and moved to ``device``; anything else is kept as
                it is.

        Raises:
            ActrecError: ``name`` is that of a layer, there was no pass yet, or the block has ended.
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
        try:
            kept = self._capture.added(value)
            with self._adding:  # several threads may be the first to add by this name
                if name not in self._layers:
                    self._layers = {**self._layers, name: self._added(name)}
                    self._session.order.setdefault(name)
                self._layers[name].keep(kept, self.num_passes - 1)
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

        For long runs that are worked off in portions. Call it between two passes.
        """
        self._deliver()
        locks = {track.capture.layer: track.lock for track in self._tracks}
        recordings = [one for one in (self, self._inputs, self._grads) if one is not None]
        for name in dict.fromkeys(name for recording in recordings for name in recording):
            with locks.get(name, self._adding):  # other threads keep calls in one step, too
                for recording in recordings:
                    if name in recording:
                        layer = recording[name]
                        layer.clear()
                        if layer.overflows is not None:
                            layer.overflows.clear()
        self._session.passes.restart()

    @override
    def __reduce__(self) -> tuple[Callable[..., Recording[Any]], tuple[dict[str, Any]]]:
        # What is copied or pickled is what was recorded, not the recording of it.
        self._deliver()
        state = {
            "model": self._model,
            "layers": self._layers,
            "aliases": dict(self._aliases),
            "order": [*self._order],
            "passes": Count(self.num_passes, set(self.failed_passes)),
            "inputs": self._inputs and self._inputs._layers,
            "grads": self._grads and self._grads._layers,
        }
        return _copied, (state,)

    @override
    def _state(self) -> State:
        if self._session.active:
            return "recording"
        return "interrupted" if self._session.interrupted else "recorded"


def _copied(state: dict[str, Any]) -> Recording[Any]:
    return Recording(**state)
