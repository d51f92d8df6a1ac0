"""A layer: the list of the calls of one module."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from types import MappingProxyType
from typing import Any, ClassVar, Final, Generic, Literal, TypeAlias

from torch import Tensor
from typing_extensions import TypeVar, override

from actrec._selection.treatment import What
from actrec._tables.html import as_html
from actrec._text import count, shown, size
from actrec._values.join import How, joined
from actrec._values.shapes import Summary
from actrec._values.spec import same
from actrec.errors import ActrecError, JoinError

from .instead import explained, no_attribute_of_layer
from .layer_view import layer_table
from .look import Look
from .overflow import Overflows
from .pass_numbers import ListView, RankPass, nth_calls
from .units import Key, Units

#: What the values of a layer are: outputs, inputs, gradients of outputs, values that the user added, or keys of units.
Role: TypeAlias = What | Literal["added", "unit"]

#: The type of a layer that is a function.
FUNCTION: Final = "function"

#: The type of what each call of a layer returned: a tensor, unless the user declares another one.
V = TypeVar("V", default=Tensor)
M = TypeVar("M")


@explained(no_attribute_of_layer)
class Layer(Sequence[V], Generic[V]):
    """The calls of one layer, in the order in which they ended.

    >>> import torch
    >>> from actrec import record
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
    >>> with record(model, "0") as acts:
    ...     for batch in torch.randn(2, 5, 4):
    ...         output = model(batch)
    >>> acts["0"]
    Layer '0' (Linear): 2 calls, (5, 3) float32, 120 B
    >>> acts["0"][1].shape
    torch.Size([5, 3])
    >>> acts["0"].cat().shape
    torch.Size([10, 3])

    In memory a layer is a ``list``: index it, iterate over it, pass it to ``torch.cat``. On disk it is a lazy
    ``Sequence``. Each item is the output of one call: a tensor, or tensors nested as the layer returned them. Items never
    alias tensors of the model: writing to one changes nothing else.
    """

    #: The key of this layer in its recording.
    name: str
    #: The type of the module, as ``type(module).__name__``.
    type: str
    #: Counts the values that overflowed in the cast to ``dtype=``.
    _overflows: Overflows | None = None
    #: The name of the transform that made its values.
    _transform: str | None = None
    #: Tracks which passes still await gradients; only for gradients that are recorded to a path.
    _backwards: Any = None
    #: By pass, the calls of units that have not ended, which the layer does not have yet.
    _held_back: Mapping[int, list[Any]] = MappingProxyType({})
    #: The units of its recording.
    _units: Units | None = None

    @abstractmethod
    def _keep(self, value: V, number: int) -> None:
        """Append a value of pass ``number``. The recorder calls it."""

    @abstractmethod
    def _drop(self, number: int) -> None:
        """Forget the calls of pass ``number``, a unit that has failed. The recorder calls it."""

    def _settle(self, number: int) -> None:
        """Keep the calls of pass ``number``, a unit that has ended. The recorder calls it."""
        # Most layers have them already.

    @abstractmethod
    def clear(self) -> None:
        """Drop all calls.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     output = model(torch.randn(5, 4))
        >>> acts[""].clear()
        >>> len(acts[""])
        0

        Raises:
            ActrecError: the layer is on disk.
        """

    @property
    @abstractmethod
    def passes(self) -> Sequence[int]:
        """The index of each call's pass, in a read-only view that grows with the layer.

        >>> import torch
        >>> from actrec import record
        >>> relu = torch.nn.ReLU()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), relu, torch.nn.Linear(4, 4), relu)
        >>> with record(model, ["0", "1"]) as acts:
        ...     for batch in torch.randn(2, 5, 4):
        ...         output = model(batch)
        >>> acts["0"].passes, acts["1"].passes
        ([0, 1], [0, 0, 1, 1])

        A pass is one outermost forward of the recorded model. A layer may be called several times in a pass, or not
        at all: calls of different layers belong together if their passes, not their indices, are equal. A value that the
        user put into the list has pass -1.
        """

    @property
    def units(self) -> Sequence[Key | None]:
        """The key of each call's unit, parallel to :attr:`passes`: ``None`` for a call outside of :meth:`Recorder.unit`.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for key in ("a", "b"):
        ...         with acts.unit(key):
        ...             for step in range(2):
        ...                 output = model(torch.randn(5, 4))
        >>> acts[""].units
        ['a', 'a', 'b', 'b']

        Calls of different layers with the same key belong together, also if several ranks have recorded, although their
        passes have the same numbers.
        """
        rank_passes = self._rank_passes()
        units = self._units
        return ListView([None] * len(rank_passes) if units is None else units.of(rank_passes))

    def nth(self, number: int) -> Layer[V]:
        """Select one call of each pass: the first for 0, the second for 1, the last for -1.

        >>> import torch
        >>> from actrec import record
        >>> relu = torch.nn.ReLU()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), relu, torch.nn.Linear(4, 4), relu)
        >>> with record(model, "1") as acts:
        ...     for batch in torch.randn(2, 5, 4):
        ...         output = model(batch)
        >>> acts["1"].cat().shape, acts["1"].nth(0).cat().shape
        (torch.Size([20, 4]), torch.Size([10, 4]))
        >>> torch.equal(acts["1"].nth(-1)[0], acts["1"][1])
        True

        If no pass has more than one call, there is nothing to select, and the layer itself is returned, whatever the number.
        Else passes that have fewer calls are left out. Values are not copied; a stored layer reads them when they are used.

        Args:
            number: which call of each pass.

        Returns:
            A layer of these calls, with their passes.

        Raises:
            OptionError: some passes have several calls but none has so many, or ``number`` is not an int.
        """
        rank_passes = self._rank_passes()
        call = f"acts[{self.name!r}].nth({number!r})"
        calls = nth_calls(call, repr(self.name), rank_passes, number)
        return self if len(calls) == len(rank_passes) else self._of(calls)

    @abstractmethod
    def _of(self, calls: list[int]) -> Layer[V]:
        """Return a layer of these calls."""

    def _rank_passes(self) -> list[RankPass]:
        """Return the rank (``None`` in memory) and the pass of each call."""
        ranks = getattr(self, "ranks", None)
        return list(zip(repeat(None) if ranks is None else ranks, self.passes, strict=False))

    def cat(self, dim: int = 0, *, release: bool = False) -> V:
        """Concatenate all calls along an existing dimension, by default the batch, as ``torch.cat`` does.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for batch in torch.randn(10, 4).split(8):
        ...         output = model(batch)
        >>> acts[""].cat().shape
        torch.Size([10, 3])

        The result is a copy, also of a single call. With ``release=True`` each call is dropped as soon as it is copied:
        the peak is the result and one call instead of twice the layer, and the layer is empty afterwards.

        >>> acts[""].cat(release=True).shape, len(acts[""])
        (torch.Size([10, 3]), 0)

        Args:
            dim: the dimension in which sizes may differ.
            release: whether to drop the calls. A stored layer ignores it.

        Returns:
            A new tensor, ``(N_1, *), ..., (N_k, *) -> (N_1 + ... + N_k, *)``. Nested values are concatenated tensor by
            tensor, and the result is nested in the same way.

        Raises:
            JoinError: there are no calls, or their structures, dtypes or sizes in other dimensions differ. The message
                names the difference, and nothing is released.
            OptionError: ``dim`` is not an int.
        """
        return self._join("cat", dim, release=release)

    def stack(self, dim: int = 0, *, release: bool = False) -> V:
        """Stack all calls along a new dimension, as ``torch.stack`` does: item ``i`` is call ``i``.

        >>> import torch
        >>> from actrec import record
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for one in torch.randn(2, 4):
        ...         output = model(one)
        >>> acts[""].stack().shape
        torch.Size([2, 3])

        Args:
            dim: the position of the new dimension.
            release: as for :meth:`cat`.

        Returns:
            A new tensor, ``(*), ..., (*) -> (k, *)`` for ``k`` calls, nested as the calls are.

        Raises:
            JoinError: as for :meth:`cat`, and where the calls do not all have the same shape.
            OptionError: ``dim`` is not an int.
        """
        return self._join("stack", dim, release=release)

    def compute(self) -> Any:
        """Return the result of the reduction, if the calls were reduced.

        >>> import torch
        >>> from actrec import record, reduce
        >>> model = torch.nn.Linear(4, 3)
        >>> with torch.no_grad(), record(model, {"": reduce.Norms()}) as acts:
        ...     for batch in torch.randn(2, 5, 4):
        ...         output = model(batch)
        >>> acts[""].compute().shape
        torch.Size([3])

        Returns:
            The result of the reduction's ``compute()``. That of a :class:`actrec.reduce.TopK` has the keys of units.

        Raises:
            ActrecError: the calls were kept; or they were loaded, and their reduction is not one of :mod:`actrec.reduce`.
        """
        sink: Any = getattr(self, "sink", None)  # a container of the user's
        if hasattr(sink, "compute"):
            return sink.compute()
        raise ActrecError(self._not_reduced("compute()"))

    def merge_into(self, metric: M) -> M:
        """Merge this layer's reduction into another one of the same kind.

        >>> import torch
        >>> from actrec import record, reduce
        >>> model = torch.nn.Linear(4, 3)
        >>> with torch.no_grad(), record(model, {"": reduce.Norms()}) as acts:
        ...     output = model(torch.randn(5, 4))
        >>> both = acts[""].merge_into(reduce.Norms())
        >>> both.merge_state(acts[""].sink.state())
        >>> both.rows
        tensor(10)

        A stored metric that is not from :mod:`actrec.reduce` is read in this way, merged over all ranks:
        ``acts["conv1"].merge_into(MeanMetric()).compute()``.

        Args:
            metric: a reduction or metric of the same kind, with ``merge_state()``. It is changed.

        Returns:
            ``metric``.

        Raises:
            ActrecError: the calls were kept.
            OptionError: ``metric`` is of another kind, or has other settings.
        """
        raise ActrecError(self._not_reduced(f"merge_into({type(metric).__name__}(...))"))

    def _not_reduced(self, call: str) -> str:
        return (
            f"acts[{self.name!r}].{call}: its calls were kept. To reduce them while recording, give a reduction with the query: "
            f"record(model, {{{self.name!r}: actrec.reduce.Moments()}}). To reduce calls that were kept, pass each one to "
            f"update(): for value in acts[{self.name!r}]: moments.update(value)."
        )

    def _join(self, how: How, dim: int, *, release: bool = False) -> V:
        call = f"acts[{self.name!r}].{how}(dim={dim!r})"
        values = [*self]  # read once: each read from disk makes a new value
        if not len(self):
            message = f"{call}: nothing was recorded of this layer, so there is nothing to join."
            raise JoinError(message)
        if len(values) != len(self):
            message = f"{call}: the container given as into= has {len(values)} of {len(self)} calls. Join its items: acts[{self.name!r}].sink."
            raise JoinError(message)
        pop = getattr(self, "pop", None) if release else None
        value: V = joined(values, how, dim, call, pop=pop)
        if release:
            self.clear()
        return value

    @property
    def nbytes(self) -> int:
        """The bytes that the calls occupy, in memory or on disk. Memory that several of them share counts once."""
        self._look_again()
        return sum(self._seen()[1].values())

    @property
    def _is_kept(self) -> bool:
        """Whether the calls can be read: not if they were reduced, or a container has them that cannot be iterated over."""
        return True

    def _readable(self) -> Iterable[V]:
        """Return the calls that can be read."""
        return self if self._is_kept else ()

    @override
    def __eq__(self, other: object) -> bool:
        # list.__eq__ would call bool() on the result of tensor == tensor.
        if not isinstance(other, (list, Layer)):
            return NotImplemented
        return self is other or (len(self) == len(other) and all(map(same, self, other)))

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def _seen(self) -> tuple[Summary, Mapping[object, int]]:
        """Look at each call once: return a summary of all, and the bytes at each address that they occupy."""
        look = Look()
        look.at(self._readable())
        return look.summary, look.places

    def _look_again(self) -> None:
        """Forget what was remembered of the calls: they may share less memory than before, without having changed."""
        # Most layers remember nothing.

    def _per_pass(self) -> tuple[int, int]:
        """Return the most calls of any pass, and the number of passes that have any."""
        counts = Counter(one for one in self._rank_passes() if one[1] >= 0)  # each rank has its own
        return max(counts.values(), default=0), len(counts)

    @override
    def __repr__(self) -> str:
        looks, places = self._seen()
        facts = [count(len(self), "call"), f"{looks.what} {', '.join(looks.dtypes)}".strip()]
        facts = [*filter(None, facts), size(sum(places.values()))]
        return f"Layer {self.name!r} ({shown(self.type)}): {', '.join(facts)}"

    def _repr_html_(self) -> str:
        """Show, for each shape, the range and a histogram of the first calls, and pictures if they are images."""
        return as_html(layer_table(repr(self), len(self), self._readable()))
