"""A layer: the list of the calls of one module."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import TypeVar, override

from actrec._tables import html as _html
from actrec._text import count, shown, size
from actrec._values.join import How, joined
from actrec._values.memory import held
from actrec._values.spec import same, tensors
from actrec._values.summary import Summary
from actrec.errors import JoinError

from .passes import Moment, PassNumbers, nth_calls

if TYPE_CHECKING:
    from typing import SupportsIndex

__all__ = ["Layer", "ListLayer", "Overflows", "Role", "V"]

#: What the values of a layer are: what it returned, what it received, what reached it backwards, or what the user added.
Role: TypeAlias = Literal["output", "input", "gradient", "added"]


#: What each call of a layer returned: a tensor, unless the user says otherwise.
V = TypeVar("V", default=Tensor)


class Overflows(Protocol):
    """Counts the values of a layer that did not fit into the dtype that they were cast to."""

    dtype: torch.dtype

    def counts(self) -> dict[int, int]:
        """How many values of each pass did not fit, where there were any."""

    def nonfinite(self) -> dict[int, int]:
        """How many infinities or NaN of each pass are the work of the cast."""

    def clear(self) -> None:
        """Forget the passes."""


class Layer(Sequence[V], Generic[V]):
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
    def keep(self, value: V, number: int) -> None:
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

    def nth(self, number: int) -> Layer[V]:
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

        Values are not copied; a stored layer reads them when they are asked for.

        Args:
            number: which call of each pass.

        Returns:
            A layer of these calls.

        Raises:
            OptionError: no pass has so many calls, or ``number`` is no whole number.
        """
        moments = self._moments()
        call = f"acts[{self.name!r}].nth({number!r})"
        calls = nth_calls(call, repr(self.name), moments, number, range(len(moments)))
        return self if len(calls) == len(moments) else self._of(calls)

    def _of(self, calls: list[int]) -> Layer[V]:
        """A layer with these calls alone."""
        passes = self.passes
        found = ListLayer(self.name, [self[index] for index in calls], self.type)
        found._passes = [passes[index] for index in calls]
        return found

    def _moments(self) -> list[Moment]:
        """For each call its pass, and its rank where the layer knows."""
        ranks = getattr(self, "ranks", None)
        return list(zip(repeat(None) if ranks is None else ranks, self.passes, strict=False))

    def cat(self, dim: int = 0, *, release: bool = False) -> V:
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

        The result is a new tensor; the calls stay as they are, so for a moment a layer is in memory
        twice. With ``release=True`` each call is dropped as soon as it is copied, and the layer is empty
        in the end: the result and one call is all that is held at a time.

        >>> acts[""].cat(release=True).shape, len(acts[""])
        (torch.Size([10, 3]), 0)

        Args:
            dim: the dimension in which sizes may differ.
            release: whether the calls are dropped. A stored layer ignores it.

        Returns:
            ``(N_1, *), ..., (N_k, *) -> (N_1 + ... + N_k, *)``. Values that nest tensors are joined tensor by tensor, and
            come back nested in the same way.

        Raises:
            JoinError: there are no calls, or their structures, dtypes or sizes in other dimensions differ; it names what
                differs, and nothing is released.
        """
        return self._join("cat", dim, release=release)

    def stack(self, dim: int = 0, *, release: bool = False) -> V:
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

        Args:
            dim: where the new dimension goes.
            release: as for :meth:`cat`.

        Returns:
            ``k`` calls of ``(*)`` ``-> (k, *)``, nested as the calls are.

        Raises:
            JoinError: as for :meth:`cat`, and where the calls do not all have the same shape.
        """
        return self._join("stack", dim, release=release)

    def _join(self, how: How, dim: int, *, release: bool = False) -> V:
        call = f"acts[{self.name!r}].{how}(dim={dim!r})"
        values = [*self._readable()]  # each call is read once: one on disk is made anew every time
        if not len(self):
            message = f"{call}: nothing was recorded of this layer, so there is nothing to join."
            raise JoinError(message)
        if len(values) != len(self):
            message = f"{call}: the container given as into= does not keep the calls, so there is nothing to join."
            raise JoinError(message)
        pop = getattr(self, "pop", None) if release else None
        value: V = joined(values, how, dim, call, pop=pop)
        if release:
            self.clear()
        return value

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the calls hold. What several of them share counts once."""
        return sum(dict(self._places()).values())

    def _places(self) -> Iterator[tuple[object, int]]:
        """The memory that the calls hold: where it is, and how many bytes. Equal places are shared."""
        values = self._readable()
        return (place for value in values for tensor in tensors(value) for place in held(tensor))

    def _readable(self) -> Iterable[V]:
        """The calls that can be looked at: all of them, unless a container of the user's keeps them."""
        return self

    @override
    def __eq__(self, other: object) -> bool:
        # That of a list would ask a tensor of truth values whether it is true.
        if not isinstance(other, (list, Layer)):
            return NotImplemented
        return self is other or (len(self) == len(other) and all(map(same, self, other)))

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def _seen(self) -> tuple[Summary, Mapping[object, int]]:
        """What the calls look like, and the memory that they hold as :meth:`_places` says it, after one look at each."""
        looks = Summary()
        places: dict[object, int] = {}
        known: set[object] = set()
        value: Any
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

    @override
    def __repr__(self) -> str:
        looks, places = self._seen()
        facts = [count(len(self), "call"), f"{looks.what} {', '.join(looks.dtypes)}".strip()]
        facts = [*filter(None, facts), size(sum(places.values()))]
        return f"Layer {self.name!r} ({shown(self.type)}): {', '.join(facts)}"

    def _repr_html_(self) -> str:
        return _html.line(repr(self))


class ListLayer(list[V], Layer[V], Generic[V]):
    """A layer in memory: a real ``list``."""

    def __init__(self, name: str, values: Iterable[V] = (), kind: str = "Tensor") -> None:
        super().__init__(values)
        self.name = name
        self.type = kind
        self._passes = list(range(len(self)))

    __eq__ = Layer.__eq__
    __ne__ = Layer.__ne__
    __hash__: ClassVar[None] = None
    __repr__ = Layer.__repr__

    @property
    @override
    def passes(self) -> PassNumbers:
        self._align()
        return PassNumbers(self._passes)

    @override
    def keep(self, value: V, number: int) -> None:
        if len(self._passes) != len(self):
            self._align()
        self._passes.append(number)
        self.append(value)

    def _align(self) -> None:
        """Bring the passes in line, after an interrupt in keep(), or if the user has appended (-1: no pass)."""
        del self._passes[len(self) :]
        self._passes += [-1] * (len(self) - len(self._passes))

    @override
    def pop(self, index: SupportsIndex = -1) -> V:
        self._align()
        value = super().pop(index)
        self._passes.pop(index)
        return value

    @override
    def __delitem__(self, index: SupportsIndex | slice) -> None:
        self._align()
        super().__delitem__(index)
        del self._passes[index]

    # What follows is for users who work on the list as on any other: passes stay with their calls.

    @override
    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            self._align()
            value = list(value)
            super().__setitem__(index, value)
            self._passes[index] = [-1] * len(value)
        else:
            super().__setitem__(index, value)

    @override
    def insert(self, index: SupportsIndex, value: V) -> None:
        self._align()
        super().insert(index, value)
        self._passes.insert(index, -1)

    @override
    def remove(self, value: V) -> None:
        del self[self.index(value)]

    @override
    def reverse(self) -> None:
        self._align()
        super().reverse()
        self._passes.reverse()

    @override
    def sort(self, *, key: Callable[[Any], Any] | None = None, reverse: bool = False) -> None:
        keys: list[Any] = [*self] if key is None else [*map(key, self)]
        order = sorted(range(len(keys)), key=keys.__getitem__, reverse=reverse)
        calls, passes = [*self], self.passes
        super().__setitem__(slice(None), [calls[index] for index in order])
        self._passes[:] = [passes[index] for index in order]

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_passes": [*self.passes]}  # a copy has passes of its own

    @override
    def clear(self) -> None:
        super().clear()
        self._passes = []  # who holds those of before keeps them
