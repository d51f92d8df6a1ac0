"""Recordings: a mapping from layer name to that layer's calls.

A :class:`Layer` is the list of the calls of one layer, a :class:`Recording` the mapping of all of them,
and a :class:`Recorder` the recording that the ``with`` block of :func:`actrec.record` yields, with what
only a live one can do.
"""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice, repeat, zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from actrec._calls.clean_room import in_a_clean_room
from actrec._calls.passes import Count
from actrec._tables import html as _html
from actrec._tables import text as _display
from actrec._text import nearest, shown
from actrec._values.containers import Value
from actrec._values.join import joined
from actrec._values.memory import held
from actrec._values.spec import same, tensors
from actrec._values.summary import Summary
from actrec.errors import (
    ActrecError,
    CaptureError,
    OptionError,
    UnknownLayerError,
)

from . import stats as _stats

if TYPE_CHECKING:
    import os
    from typing import SupportsIndex

    from actrec._calls.capture import Capture
    from actrec._calls.layer import Session, Track
    from actrec._calls.overflow import Overflows

__all__ = [
    "Layer",
    "ListLayer",
    "Moment",
    "PassNumbers",
    "Recorder",
    "Recording",
    "SinkLayer",
    "nth_calls",
]

T = TypeVar("T")

#: Which rank a call is of, ``None`` if its layer does not know, and of which pass.
Moment: TypeAlias = tuple[int | None, int]


def nth_calls(
    call: str, title: str, moments: Sequence[Moment], nth: int, among: Iterable[int]
) -> list[int]:
    """The n-th call of each pass, among some calls; all of them, if none of the passes has more than one."""
    given: object = nth
    if isinstance(given, bool) or not isinstance(given, int):
        message = (
            f"{call}: expected a whole number: 0 for the first call of each pass, -1 for the last."
        )
        raise OptionError(message)
    passes: dict[Moment, list[int]] = {}
    among = list(among)
    for index in among:
        passes.setdefault(moments[index], []).append(index)
    most = max(map(len, passes.values()), default=0)
    if most < 2:  # noqa: PLR2004
        return among
    found = [calls[nth] for calls in passes.values() if -len(calls) <= nth < len(calls)]
    if not found:
        message = f"{call}: no pass has that many calls of layer {title}, which was called up to {most} times in each."
        raise OptionError(message)
    return sorted(found)


class _Numbers(Protocol):
    """Numbers in order."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...
    def __iter__(self) -> Iterator[int]: ...


class PassNumbers(Sequence[int]):
    """The pass of each call: a view, which follows its layer until that is cleared. It equals a list of the same numbers."""

    __slots__ = ("_numbers",)

    def __init__(self, numbers: _Numbers) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self._numbers[at] for at in range(len(self))[index]]
        return self._numbers[range(len(self))[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, PassNumbers)):
            return NotImplemented
        return [*self] == [*other]

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr([*self])


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
    #: Counts what did not fit into ``dtype=``. For the recorder; not for you.
    overflows: Overflows | None = None

    @abstractmethod
    def keep(self, value: Value, number: int) -> None:
        """Append a value of pass ``number``. For the recorder; not for you."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all calls."""

    @property
    @abstractmethod
    def passes(self) -> Sequence[int]:
        """For each call, the index of the pass that it belongs to.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> relu = nn.ReLU()
        >>> model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
        >>> with record(model, ["0", "1"]) as acts:
        ...     for batch in torch.randn(2, 5, 4):
        ...         output = model(batch)
        >>> acts["0"].passes, acts["1"].passes
        ([0, 1], [0, 0, 1, 1])

        A pass is one outermost forward of the recorded model. Layers line up by pass, not by position: a
        layer may be called several times in a pass, or not at all.
        """

    def nth(self, number: int) -> Layer:
        """Return the layer with one call of each pass: the first for 0, the second for 1, the last for -1.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> relu = nn.ReLU()
        >>> model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
        >>> with record(model, "1") as acts:
        ...     for batch in torch.randn(2, 5, 4):
        ...         output = model(batch)
        >>> acts["1"].cat().shape, acts["1"].nth(0).cat().shape
        (torch.Size([20, 4]), torch.Size([10, 4]))
        >>> torch.equal(acts["1"].nth(-1)[0], acts["1"][1])
        True

        A module that is used in two places of a forward has two calls in each pass, and only one of them is beside the
        inputs and labels of the pass, row by row. Passes that have fewer calls are left out. A layer that has no more
        than one call in any pass is returned as it is, for any number.

        Values are not copied; a stored layer reads them when they are asked for. Raises ``OptionError`` if no pass has
        so many calls.
        """
        moments = self._moments()
        call = f"acts[{self.name!r}].nth({number!r})"
        calls = nth_calls(call, repr(self.name), moments, number, range(len(moments)))
        return self if len(calls) == len(moments) else self._of(calls)

    def _of(self, calls: list[int]) -> Layer:
        """A layer with these calls alone."""
        passes = self.passes
        found = ListLayer(self.name, [self[index] for index in calls], self.type)
        found._passes = [passes[index] for index in calls]
        return found

    def _moments(self) -> list[Moment]:
        """For each call its pass, and its rank where the layer knows."""
        ranks = getattr(self, "ranks", None)
        return list(zip(repeat(None) if ranks is None else ranks, self.passes, strict=False))

    def cat(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along an existing dimension, as ``torch.cat`` does: by default the batch.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for batch in torch.randn(10, 4).split(8):
        ...         output = model(batch)
        >>> acts[""].cat().shape
        torch.Size([10, 3])

        Values that nest tensors are joined tensor by tensor, and come back nested in the same way.

        The result is a new tensor; the calls stay as they are, so for a moment a layer is in memory
        twice. With ``release=True`` each call is dropped as soon as it is copied, and the layer is empty
        in the end: the result and one call is all that is held at a time.

        >>> acts[""].cat(release=True).shape, len(acts[""])
        (torch.Size([10, 3]), 0)

        Raises ``JoinError`` if there are no calls, or if their structures, dtypes or sizes in other
        dimensions differ; it names what differs, and nothing is released.
        """
        return joined(self, "cat", dim, release=release)

    def stack(self, dim: int = 0, *, release: bool = False) -> Value:
        """Join all calls along a new dimension, as ``torch.stack`` does: item ``i`` is call ``i``.

        >>> import torch
        >>> from torch import nn
        >>> from actrec import record
        >>> model = nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for one in torch.randn(2, 4):
        ...         output = model(one)
        >>> acts[""].stack().shape
        torch.Size([2, 3])

        All calls must have the same shape. Otherwise as :meth:`cat`.
        """
        return joined(self, "stack", dim, release=release)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the calls hold. What several of them share counts once."""
        return sum(dict(self._places()).values())

    def _places(self) -> Iterator[tuple[object, int]]:
        """The memory that the calls hold: where it is, and how many bytes. Equal places are shared."""
        values = self._readable()
        return (place for value in values for tensor in tensors(value) for place in held(tensor))

    def _readable(self) -> Iterable[Value]:
        """The calls that can be looked at: all of them, unless a container of the user's keeps them."""
        return self

    def __eq__(self, other: object) -> bool:
        # That of a list would ask a tensor of truth values whether it is true.
        if not isinstance(other, (list, Layer)):
            return NotImplemented
        return self is other or (len(self) == len(other) and all(map(same, self, other)))

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def _seen(self) -> tuple[Summary, Mapping[object, int] | int]:
        """What the calls look like, and the memory that they hold, by place; or in bytes, if that is known without a look."""
        looks = Summary()
        places: dict[object, int] = {}
        known: set[object] = set()
        for value in self._readable():
            if type(value) is Tensor and not value.is_nested:  # nearly all are, and look alike
                look = value.shape, value.dtype, value.device
                if look in known:
                    places.update(held(value))
                    continue
                known.add(look)
            looks.add(value)
            for tensor in tensors(value):
                places.update(held(tensor))
        return looks, places

    def _per_pass(self) -> tuple[int, int]:
        """How many calls there are in the pass with most, and how many passes with any."""
        counts = Counter(number for number in self.passes if number >= 0)
        return max(counts.values(), default=0), len(counts)

    def __repr__(self) -> str:
        return _display.layer_line(self)

    def _repr_html_(self) -> str:
        return _html.layer_html(self)


class ListLayer(list[Value], Layer):
    """A layer in memory: a real ``list``."""

    def __init__(self, name: str, values: Iterable[Value] = (), kind: str = "Tensor") -> None:
        super().__init__(values)
        self.name = name
        self.type = kind
        self._passes = list(range(len(self)))

    __eq__ = Layer.__eq__
    __ne__ = Layer.__ne__
    __hash__: ClassVar[None] = None
    __repr__ = Layer.__repr__

    @property
    def passes(self) -> PassNumbers:
        self._align()
        return PassNumbers(self._passes)

    def keep(self, value: Value, number: int) -> None:
        if len(self._passes) != len(self):
            self._align()
        self._passes.append(number)
        self.append(value)

    def _align(self) -> None:
        """Bring the passes in line, after an interrupt in keep(), or if the user has appended (-1: no pass)."""
        del self._passes[len(self) :]
        self._passes += [-1] * (len(self) - len(self._passes))

    def pop(self, index: SupportsIndex = -1) -> Value:
        self._align()
        value = super().pop(index)
        self._passes.pop(index)
        return value

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        self._align()
        super().__delitem__(index)
        del self._passes[index]

    # What follows is for users who work on the list as on any other: passes stay with their calls.

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            self._align()
            value = list(value)
            super().__setitem__(index, value)
            self._passes[index] = [-1] * len(value)
        else:
            super().__setitem__(index, value)

    def insert(self, index: SupportsIndex, value: Value) -> None:
        self._align()
        super().insert(index, value)
        self._passes.insert(index, -1)

    def remove(self, value: Value) -> None:
        del self[self.index(value)]

    def reverse(self) -> None:
        self._align()
        super().reverse()
        self._passes.reverse()

    def sort(self, *, key: Callable[[Any], Any] | None = None, reverse: bool = False) -> None:
        keys = [*self] if key is None else [*map(key, self)]
        order = sorted(range(len(keys)), key=keys.__getitem__, reverse=reverse)
        calls, passes = [*self], self.passes
        super().__setitem__(slice(None), [calls[index] for index in order])
        self._passes[:] = [passes[index] for index in order]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_passes": [*self.passes]}  # a copy has passes of its own

    def clear(self) -> None:
        super().clear()
        self._passes = []  # who holds those of before keeps them


#: Of this many calls that a bounded container has dropped, the passes may still be remembered.
_SLACK = 64


class SinkLayer(Layer):
    """A layer whose calls go into a container of the user's, made by the factory given as ``into``.

    Whatever else the container can do, the layer can do: ``acts["conv1"].mean`` is the container's.
    """

    def __init__(self, name: str, sink: Any, make: Callable[[], Any], kind: str) -> None:
        self.name = name
        self.type = kind
        self.sink = sink
        self._make = None if hasattr(self.sink, "clear") else make
        self._passes: deque[int] = (
            deque()
        )  # of the latest calls that made it longer, or changed its end
        self._known: dict[
            int, tuple[weakref.ref[Any], int]
        ] = {}  # by id: what is in it, and its pass

    @property
    def passes(self) -> PassNumbers:
        # A bounded container has dropped the oldest calls; -1: the user has appended.
        latest = [*self._passes][-len(self) :] if len(self) else []
        latest += [-1] * (len(self) - len(latest))
        if not self._known:
            return PassNumbers(latest)
        # It may have dropped others, or sorted them: what can be recognized is more than what can be counted.
        found = map(self._pass_of, self._readable())
        pairs = zip_longest(latest, islice(found, len(latest)))
        return PassNumbers([number if known is None else known for number, known in pairs])

    def keep(self, value: Value, number: int) -> None:
        before, last = len(self), self._last()
        devices = {tensor.device for tensor in tensors(value) if not tensor.is_cpu}
        in_a_clean_room(self.sink.append, value, devices, grad=torch.is_grad_enabled())
        newest = self._last()
        grown = len(self) - before if hasattr(self.sink, "__len__") else 1
        if grown > 0:
            self._passes.extend([number] * grown)
        elif newest is None or newest is not last:
            self._passes.append(number)
        while len(self._passes) > 2 * len(self) + _SLACK:
            self._passes.popleft()
        for item in (value, newest):  # which is the value, or what the container has made of it
            if item is not last and self._pass_of(item) is None:
                self._remember(item, number)

    def _last(self) -> Value:
        return self.sink[-1] if isinstance(self.sink, (list, deque)) and self.sink else None

    def _remember(self, item: Value, number: int) -> None:
        thing = next(iter(tensors(item)), item)
        with suppress(TypeError):  # a number, say, cannot be recognized
            gone = partial(_forget, self._known, id(thing))
            self._known[id(thing)] = weakref.ref(thing, gone), number

    def _pass_of(self, item: Value) -> int | None:
        """The pass of something in the container, if it can be recognized."""
        for thing in (item, *tensors(item)):
            reference, number = self._known.get(id(thing), (None, -1))
            if reference is not None and reference() is thing:
                return number
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_passes": deque(self.passes),
            "_known": {},
        }  # no copy is the same thing

    def clear(self) -> None:
        if self._make is None:
            self.sink.clear()
        else:
            self.sink = self._make()
        self._passes.clear()
        self._known.clear()

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value:
        return list(self)[index] if isinstance(index, slice) else self._items()[index]

    def __setitem__(self, index: int, value: Value) -> None:
        self.sink[index] = value

    def __len__(self) -> int:
        return len(self.sink) if hasattr(self.sink, "__len__") else len(self._passes)

    def __iter__(self) -> Iterator[Value]:
        return iter(self._items())

    def _readable(self) -> Iterable[Value]:
        return self.sink if hasattr(self.sink, "__iter__") else ()

    def _items(self) -> Any:
        if not hasattr(self.sink, "__iter__"):
            message = (
                f"acts[{self.name!r}]: its calls went into a {type(self.sink).__name__}, from which they cannot be "
                f"read. It is at acts[{self.name!r}].sink."
            )
            raise ActrecError(message)
        return self.sink

    def __getattr__(self, name: str) -> Any:
        if name == "sink":  # while it is copied or unpickled there is none yet
            raise AttributeError(name)
        return getattr(self.sink, name)


def _forget(known: dict[int, Any], key: int, _: object) -> None:
    """What was known by ``key`` is no more."""
    known.pop(key, None)


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

    The keys are the names of the chosen layers in the order of the queries, without what wrappers add to them,
    then the names given to :meth:`Recorder.add`. A layer that has several names (a module used in two places, a name with or
    without ``module.``) is found under each of them, and listed once.
    """

    #: ``model`` is the type of the recorded model, ``order`` what is known of the execution order, ``passes``
    #: what counts the passes; without it, they are counted by those that calls belong to.
    def __init__(
        self,
        model: str,
        layers: Mapping[str, Layer],
        aliases: Mapping[str, str],
        order: Iterable[str] = (),
        passes: Count | None = None,
        *,
        inputs: Mapping[str, Layer] | None = None,
        grads: Mapping[str, Layer] | None = None,
    ) -> None:
        self._model = model
        self._layers = dict(layers)
        self._aliases = aliases
        self._order = order
        self._passes = passes
        self._inputs = Recording(model, inputs, aliases, order, passes) if inputs else None
        self._grads = Recording(model, grads, aliases, order, passes) if grads else None

    def _key(self, name: object) -> str | None:
        """The name under which a layer is listed; ``None`` if there is none."""
        key = name if name in self._layers else self._aliases.get(name)  # type: ignore[call-overload]
        return key if key in self._layers else None

    def __contains__(self, name: object) -> bool:
        return self._key(name) is not None

    @overload
    def get(self, name: str, /) -> Layer | None: ...
    @overload
    def get(self, name: str, /, default: Layer | T) -> Layer | T: ...
    def get(self, name: str, /, default: Any = None) -> Any:
        """Return a layer, or ``default`` if there is none of that name."""
        key = self._key(name)
        return default if key is None else self[key]

    def __getitem__(self, name: str) -> Layer:
        key = self._key(name)
        if key is None:
            message = f"acts[{name!r}]: no layer of that name was recorded. {nearest(str(name), self._layers)}"
            raise UnknownLayerError(message)
        self._deliver()
        return self._layers[key]

    def _deliver(self) -> None:
        """Wait for calls that are on their way from a device. Only a :class:`Recorder` has any."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

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
        """The passes that raised, or were interrupted: layers behind the place where it happened have no call in them.

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
    def inputs(self) -> Recording:
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
    def grads(self) -> Recording:
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
        :class:`actrec.MissingGradientWarning`.) ``backward()`` may come inside the block or after it. A second one through the same forward adds
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

    def stats(self) -> _stats.Stats:
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
        0          4     1  1.581   -1    3    25%    0    0    16 B
        1          4  1.25  1.299    0    3    50%    0    0    16 B

        The rows are in execution order, so this is the first layer that returned a NaN or an infinity,
        or ``None``:

        >>> acts.stats().first_nonfinite

        ``pandas.DataFrame(acts.stats())`` makes a data frame of them. See :class:`Stats` for the columns.

        It reads call after call in blocks, so besides the recording it needs a few megabytes. Nothing is
        changed. It may be called inside the block.
        """
        return _stats.stats(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to ``path``, a new folder or the URL of one, to be opened with :func:`actrec.load`.

        >>> import tempfile, torch, actrec
        >>> model = torch.nn.Linear(4, 3)
        >>> with actrec.record(model, "") as acts:
        ...     output = model(torch.randn(5, 4))
        >>> path = tempfile.mkdtemp() + "/run"
        >>> acts.save(path)
        >>> torch.equal(actrec.load(path)[""][0], acts[""][0])
        True

        Tensors are stored as they are, without the graph, inputs and gradients included; what shares memory
        is stored once. To record more than fits into memory, record into a path:
        ``record(model, layers, into=path)``.

        Raises ``RecordingExistsError`` if there is something at the path, ``CaptureError`` for a value
        that cannot be stored, before anything is written, and ``WriteError`` if writing fails.
        """
        from actrec.store.save import save  # noqa: PLC0415  # the store knows recordings, not they it

        save(self, path)

    def _state(self) -> _display.State:
        return "recorded"

    def _title(self) -> str:
        state = self._state()
        head = f"{'recording' if state == 'recording' else 'recorded'} {shown(self._model)}"
        return head + (" (interrupted, partial)" if state == "interrupted" else "")

    def __repr__(self) -> str:
        return _display.table(self)

    def _repr_html_(self) -> str:
        return _html.recording_html(self)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class Recorder(Recording):
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
    """

    def __init__(
        self,
        model: str,
        layers: Mapping[str, Layer],
        aliases: Mapping[str, str],
        session: Session,
        *,
        inputs: Mapping[str, Layer],
        grads: Mapping[str, Layer],
        capture: Capture,
        tracks: Sequence[Track],
        added: Callable[[str], Layer] = lambda name: ListLayer(name, (), "added"),
    ) -> None:
        super().__init__(
            model, layers, aliases, session.order, session.passes, inputs=inputs, grads=grads
        )
        self._added = added
        self._chosen = frozenset([*layers, *aliases])
        self._session = session
        self._capture = capture
        self._tracks = tracks  # the hooks refer to them weakly: this is what keeps them
        self._adding = threading.Lock()

    def _deliver(self) -> None:
        self._session.deliver()

    @property
    def transfers(self) -> dict[str, str]:
        """How values have come from each GPU into memory: while the model went on, or while it waited.

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
        given: object = name
        if not isinstance(given, str):
            message = f"acts.add({given!r}, ...): the name is to be a string, such as 'label'."
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
        for name in self:
            with locks.get(name, self._adding):  # other threads keep calls in one step, too
                for recording in (self, self._inputs, self._grads):
                    if recording is not None and name in recording:
                        layer = recording[name]
                        layer.clear()
                        if layer.overflows is not None:
                            layer.overflows.clear()
        self._session.passes.restart()

    def __reduce__(self) -> tuple[Callable[..., Recording], tuple[dict[str, Any]]]:
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

    def _state(self) -> _display.State:
        if self._session.active:
            return "recording"
        return "interrupted" if self._session.interrupted else "recorded"


def _copied(state: dict[str, Any]) -> Recording:
    return Recording(**state)
