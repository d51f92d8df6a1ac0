"""A layer whose calls were not kept: it has a reduction of them instead.

A reduction has the methods of a metric of torchmetrics: ``update()`` and ``compute()``, and, to be stored,
``metric_state``, a dict of tensors, and ``merge_state()``, which merges such a dict.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final, NoReturn, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from actrec._torch import count_an_update, reductions_of
from actrec._values.containers import Value
from actrec._values.memory import held
from actrec._values.shapes import Summary
from actrec._values.spec import tensors
from actrec.errors import ActrecError

from .layer import Layer
from .pass_numbers import PassRuns, RankPass

M = TypeVar("M")

#: The ways in which torchmetrics merges states whose result does not depend on the order.
_EXACT: Final = {"dim_zero_sum", "dim_zero_max", "dim_zero_min", "dim_zero_cat"}


def why_not_stored(make: Callable[[], Any]) -> str | None:
    """Return why the states of such a reduction cannot be stored and merged; ``None`` if they can be."""
    made = make()
    if not (hasattr(made, "metric_state") and callable(getattr(made, "merge_state", None))):
        return "it has no metric_state and merge_state(), which reductions of actrec.reduce and metrics of torchmetrics have"
    for name, how in reductions_of(made).items():
        if how not in _EXACT:
            return f"its state {name!r} cannot be merged in any order, by sum, max, min or cat"
    try:
        made.merge_state(make().metric_state)
    except Exception as error:  # noqa: BLE001  # the error says why
        return f"its merge_state() raised {type(error).__name__}: {error}".rstrip(".")
    return None


def merged(into: M, *states: Mapping[str, Any]) -> M:
    """Merge these states into ``into``, before its own, and return it."""
    metric: Any = into
    for state in reversed(states):  # torchmetrics puts a merged state before its own
        metric.merge_state(state)
        count_an_update(metric)
    return into


def followed(first: Any, second: Any) -> Any:
    """Return a reduction of the calls of both, in order. It is one of the two, changed."""
    if hasattr(first, "merge"):  # copies less than merge_state()
        first.merge(second)
        return first
    return merged(second, first.metric_state)


class Reduced(Layer[Any]):
    """A layer that has a reduction instead of calls.

    Other attributes are the reduction's: ``acts["conv1"].mean`` is ``acts["conv1"].sink.mean``.
    """

    @property
    @abstractmethod
    def sink(self) -> Any:
        """The reduction."""

    @abstractmethod
    def _states(self) -> list[Mapping[str, Any]]:
        """Return its states: one for each rank, if only the class of the metric can merge them."""

    @override
    def compute(self) -> Any:
        sink = self.sink
        found = sink.compute()
        name_units = getattr(sink, "name_units", None)
        return found if name_units is None else name_units(found, self._keys)

    @override
    def merge_into(self, metric: M) -> M:
        return merged(metric, *self._states())

    def _keys(self, ranks: Tensor, passes: Tensor) -> list[Any]:
        """Return the key of each pass's unit; of a recording without units, the number of the pass."""
        rank_passes = [
            self._rank_pass(*one) for one in zip(ranks.tolist(), passes.tolist(), strict=True)
        ]
        if self._units:
            return self._units.of(rank_passes)
        return [number for _, number in rank_passes]

    @abstractmethod
    def _rank_pass(self, rank: int, number: int) -> RankPass:
        """Return rank and pass as this recording identifies them (in memory the rank is ``None``)."""

    def _value(self, states: Sequence[Mapping[str, Any]], passes: PassRuns) -> dict[str, Any]:
        """Return the value to store: a copy of these states, and the passes of the calls that are in them."""
        runs = torch.tensor([*passes.runs()], dtype=torch.int64, device="cpu").view(-1, 3)
        return {"reduction": self._kind, "states": deepcopy([*states]), "passes": runs}

    # --- There are no calls ----------------------------------------------------------------------------------

    @override
    def __getitem__(self, index: int | slice) -> NoReturn:
        self._refuse()

    @override
    def __iter__(self) -> Iterator[Value]:
        self._refuse()

    @override
    def _of(self, calls: list[int]) -> Layer[Any]:
        self._refuse()

    @property
    @override
    def _is_kept(self) -> bool:
        return False

    def _refuse(self) -> NoReturn:
        message = (
            f"acts[{self.name!r}]: its calls were not kept, they were reduced by {self._kind}. The result is "
            f"acts[{self.name!r}].compute()."
        )
        raise ActrecError(message)

    @property
    @abstractmethod
    def _kind(self) -> str:
        """The name of its class."""

    @override
    def _seen(self) -> tuple[Summary, Mapping[object, int]]:
        places: dict[object, int] = {}
        for tensor in tensors(vars(self.sink)):
            places.update(held(tensor))
        return Summary({self._kind: None} if len(self) else {}), places

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while the layer is being copied there is no reduction yet
            raise AttributeError(name)
        return getattr(self.sink, name)
