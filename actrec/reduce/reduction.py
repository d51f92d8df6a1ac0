"""The base class of reductions: which rows of a value count, and the state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Final, Self, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from actrec._text import count
from actrec._values.chunks import dense
from actrec._values.containers import Value
from actrec._values.dtensor import is_distributed
from actrec._values.spec import tensors
from actrec.errors import CaptureError, OptionError

#: What some rows come to: a tensor for each name in ``_shapes()``.
State: TypeAlias = Sequence[Tensor]

#: Elements that are converted to float64 at a time.
_BLOCK: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a value, in blocks."""

    table: Tensor  #: (N, C)
    places: Tensor | None  #: (N,), their numbers among all rows, if a mask has left some out
    shape: tuple[int, ...]  #: of all rows

    def blocks(self) -> Iterator[Tensor]:
        """Yield the rows in float64, some at a time."""
        for block in torch.split(self.table, max(1, _BLOCK // max(1, self.table.shape[1]))):
            yield block.double()

    def index(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sample of some rows (given by number), and their position in it."""
        rows = rows if self.places is None else self.places[rows]
        inner = prod(self.shape[1:])
        return rows // inner, rows % inner


@dataclass(eq=False, kw_only=True, repr=False)
class Reduction:
    """Reduces the calls of a layer to a result of fixed size.

    Args:
        dim: the dimension of the channels; each index of the others is a row. ``None``: every element is a row.
        mask: the name of a mask that is added in each pass or unit, ``acts.add("mask", batch["attention_mask"])``.
    """

    dim: int | None = -1
    mask: str | None = None
    #: The dimension of the channels in the tensors of its state.
    _channels: ClassVar[int] = -1
    #: The number of rows.
    rows: Tensor = field(
        init=False, default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu")
    )

    def __post_init__(self) -> None:
        kind = type(self).__name__
        dim: object = self.dim
        mask: object = self.mask
        if dim is not None and type(dim) is not int:
            message = f"{kind}(dim={dim!r}): expected the number of a dimension, or None."
            raise OptionError(message)
        if mask is not None and not isinstance(mask, str):
            message = (
                f"{kind}(mask={type(mask).__name__}): expected the name by which a mask is added, such as 'mask'; "
                "update() takes the mask itself."
            )
            raise OptionError(message)

    # --- What a reduction does -----------------------------------------------------------------------------

    def update(
        self, value: Value, mask: Tensor | None = None, *, number: int = 0, start: int = 0
    ) -> None:
        """Add a value.

        Args:
            value: one tensor, alone or in a container; ``(B, T, *)``, or any other shape with dimension ``dim``.
            mask: which positions count, ``(B, T)``; of a longer one, the last columns are used; or one entry for each index of
                the first dimension.
            number: the number of the pass, for reductions that store where a row was.
            start: how many positions of the same samples came before, in other calls.

        Raises:
            CaptureError: the value is not one real tensor, or a ``DTensor``, its channels are not as many as before, or the mask does not fit.
        """
        found = tensors(value)
        if len(found) != 1:
            message = f"{type(self).__name__} needs one tensor, and this value has {len(found)}; choose one with a transform"
            raise CaptureError(message)
        if is_distributed(found[0]):
            message = (
                f"{type(self).__name__} needs plain tensors, and this is a DTensor, of which each rank has a part; take the part with a "
                "transform, for example to_local()"
            )
            raise CaptureError(message)
        for tensor in dense(found[0]):
            if tensor.is_complex():
                message = f"{type(self).__name__} needs real numbers, and this value is complex; choose a part with a transform"
                raise CaptureError(message)
            rows = self._rows(tensor, mask)
            if len(rows.table):
                for many, state in self._states(rows, number, start):
                    self._take_in(many, state)

    def merge(self, other: Self) -> None:
        """Add all rows of another reduction of the same kind and settings."""
        if type(other) is not type(self) or other.settings() != self.settings():
            message = f"{self!r}.merge({other!r}): they are of different kinds or settings."
            raise OptionError(message)
        if other.rows:
            self._take_in(int(other.rows), other._held())

    @abstractmethod
    def compute(self) -> Any:
        """Return the result."""

    @abstractmethod
    def _states(self, rows: Rows, number: int, start: int) -> Iterator[tuple[int, State]]:
        """Yield what rows come to, some at a time, and how many those are."""

    @abstractmethod
    def _merged(self, mine: State, theirs: State, before: int, many: int) -> State:
        """Return what ``before`` rows and ``many`` further ones come to. ``mine`` is used up."""

    def _take_in(self, many: int, state: State) -> None:
        mine, before = self._held(), int(self.rows)
        if not before:
            found: State = [one.clone() for one in state]
        else:
            width, channels = mine[0].shape[self._channels], state[0].shape[self._channels]
            if channels != width:
                message = (
                    f"{self!r}: a value with {count(channels, 'channel')} came after one with {width}; dim= says which dimension "
                    "the channels are"
                )
                raise CaptureError(message)
            state = [one.to(mine[0].device) for one in state]
            found = self._merged(mine, state, before, many)
        for name, one in zip(self._shapes(), found, strict=True):
            setattr(self, name, one)
        self.rows += many

    def _held(self) -> State:
        """What the rows so far come to; before there are any, nothing in the place of each tensor."""
        return [getattr(self, name) for name in self._shapes()]

    # --- State ---------------------------------------------------------------------------------------------

    @override
    def __repr__(self) -> str:
        said = (f"{name}={value!r}" for name, value in self.settings().items() if value is not None)
        return f"{type(self).__name__}({', '.join(said)})"

    def settings(self) -> dict[str, Any]:
        """Return the arguments that it was made with."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def state(self) -> dict[str, Any]:
        """Settings and state, of tensors and constants: what is stored."""
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        for name, value in held.items():
            if isinstance(value, list):  # of numbers: as many as there are, one thing to store
                held[name] = torch.tensor(value, dtype=torch.float64, device="cpu")
        return {"kind": type(self).__name__, **{k: v for k, v in held.items() if v is not None}}

    @property
    def metric_state(self) -> dict[str, Any]:
        """``state()``, under the name of torchmetrics."""
        return self.state()

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Merge the ``state()`` of another reduction."""
        self.merge(type(self).of(state))

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Make a reduction from its ``state()``."""
        made = cls(**{one.name: state.get(one.name) for one in fields(cls) if one.init})
        shapes = {"rows": (), **made._shapes()}
        for name, shape in shapes.items():
            value = state.get(name)
            if value is None and name != "rows" and not made.rows:
                continue
            if not isinstance(value, Tensor) or value.ndim != len(shape):
                message = f"its {name} must be a tensor of {count(len(shape), 'dimension')}"
                raise TypeError(message)
            for size, expected in zip(value.shape, shape, strict=True):
                if expected not in {None, size}:
                    message = f"its {name} has the shape {tuple(value.shape)}, which does not fit"
                    raise ValueError(message)
            setattr(made, name, value.clone())
        return made

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of each tensor of the state, with ``None`` for a dimension of any size."""

    # --- Where rows were, for reductions that store it -----------------------------------------------------

    def of_rank(self, rank: int) -> None:
        """Set the rank that has counted the passes."""

    def renumber(self, number: Callable[[int, int], int]) -> None:
        """Renumber the passes by ``number(rank, pass)``, as passes of a single rank."""

    def positions(self, value: Value) -> int:
        """Return how many positions the samples of a value have; 0 if a row is a whole sample."""
        shape = [self._rows(tensor, None).shape for tensor in tensors(value)]
        return shape[0][1] if len(shape) == 1 and len(shape[0]) > 1 else 0

    # --- Rows ----------------------------------------------------------------------------------------------

    def _rows(self, tensor: Tensor, mask: Tensor | None) -> Rows:
        dim = self.dim
        if dim is None:
            tensor = tensor.unsqueeze(-1)
        elif tensor.ndim and not -tensor.ndim <= dim < tensor.ndim:
            message = f"{self!r}: a value of shape {tuple(tensor.shape)} has no dimension {dim}"
            raise CaptureError(message)
        else:
            tensor = tensor.reshape(1, 1) if not tensor.ndim else tensor.movedim(dim, -1)
        shape = tuple(tensor.shape[:-1])
        rows = (
            tensor.reshape(-1, tensor.shape[-1])
            if tensor.numel()
            else tensor.new_empty(0, tensor.shape[-1])
        )
        if mask is None:
            return Rows(rows, None, shape)
        places = _counting(mask, shape).to(rows.device).flatten().nonzero().squeeze(1)
        return Rows(rows[places], places, shape)


def _counting(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a mask of the rows in their shape."""
    found = mask.bool()
    if found.ndim > 1 and len(shape) > 1 and len(found) == shape[0] and found.shape[1] >= shape[1]:
        found = found[:, -shape[1] :] if shape[1] else found[:, :0]
    elif shape and found.numel() == shape[0]:
        found = found.reshape(-1)
    else:
        message = f"a mask of shape {tuple(mask.shape)} does not fit rows of shape {shape}"
        raise CaptureError(message)
    return found.reshape(found.shape + (1,) * (len(shape) - found.ndim)).expand(shape)
