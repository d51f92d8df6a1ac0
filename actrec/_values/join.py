"""Joining the values of several calls into one, and saying what is wrong where they do not fit."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from actrec.errors import JoinError, OptionError

from .memory import WORTH_IT, give_back
from .spec import Container, Spec, flatten, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .containers import Value

__all__ = ["How", "joined"]

How: TypeAlias = Literal["cat", "stack"]


def joined(
    values: list[Value], how: How, dim: int, call: str, *, pop: Callable[[], Value] | None = None
) -> Value:
    """Join values of one structure, tensor by tensor, as ``torch.cat`` or ``torch.stack`` does.

    >>> import torch
    >>> joined([(torch.zeros(2), 1), (torch.ones(1), 1)], "cat", 0, "joined()")
    (tensor([0., 0., 1.]), 1)

    Args:
        values: what is joined, at least one; with ``pop`` the list may be emptied.
        how: along an existing dimension, or a new one.
        dim: the number of that dimension.
        call: who asks, for messages.
        pop: drops the last value from where it is kept besides, and returns it. With it, plain tensors are copied and
            dropped one after the other, the last first, so that the result and one value are held at a time.

    Raises:
        OptionError: ``dim`` is no number.
        JoinError: the values do not fit together; nothing was dropped.
    """
    if not hasattr(dim, "__index__"):
        message = f"{call}: expected the number of a dimension, such as 0."
        raise OptionError(message)
    spec, columns = _columns(call, values)
    for column in columns:
        _check_column(call, how, dim, column)
    if pop is None or not all(map(_is_plain, columns)):
        function = torch.cat if how == "cat" else torch.stack
        return spec.fill([function(column, dim) for column in columns])
    results = [_empty_result(how, dim, column) for column in columns]
    count = len(values)
    values.clear()
    columns.clear()
    del column  # the last one, which the loop has left
    _move(pop, count, results, how, dim)
    return spec.fill(results)


# --- Checking --------------------------------------------------------------------------------------


def _columns(call: str, values: Sequence[Value]) -> tuple[Spec, list[list[Tensor]]]:
    """The spec that all values have; and for every tensor in it, the tensors of all values."""
    tensors, first = flatten(values[0])
    _check_spec(call, first)
    columns: list[list[Tensor]] = [[] for _ in tensors]
    for index, value in enumerate(values):
        found, spec = flatten(value)
        if spec != first:
            message = (
                f"{call}: call {index} is {spec}, while call 0 is {first}. They can be joined "
                "by hand: acts[name][i]."
            )
            raise JoinError(message)
        for column, tensor in zip(columns, found, strict=True):
            column.append(tensor)
    if not columns:
        message = f"{call}: the calls hold no tensors; call 0 is {first}."
        raise JoinError(message)
    return first, columns


def _check_spec(call: str, spec: Spec) -> None:
    if any(isinstance(step, Container) and step.type is PackedSequence for step in spec.steps):
        message = (
            f"{call}: the calls are packed sequences, which hold several batches in one tensor. Unpack them first, "
            "with torch.nn.utils.rnn.pad_packed_sequence."
        )
        raise JoinError(message)


def _check_column(call: str, how: How, dim: int, column: list[Tensor]) -> None:
    if any(tensor.is_nested for tensor in column):
        message = (
            f"{call}: the calls are nested tensors. They can be used one by one: acts[name][i]."
        )
        raise JoinError(message)
    dtypes = {tensor.dtype for tensor in column}
    if len(dtypes) > 1:
        message = (
            f"{call}: the calls have several dtypes, {', '.join(sorted(map(str, dtypes)))}. Cast them first, or record "
            "with dtype=."
        )
        raise JoinError(message)
    devices = {tensor.device for tensor in column}
    if len(devices) > 1:
        message = (
            f"{call}: the calls are on several devices, {', '.join(sorted(map(str, devices)))}."
        )
        raise JoinError(message)
    dimensions = column[0].dim() + (how == "stack")
    if how == "cat" and dimensions == 0:
        message = (
            f"{call}: the calls are single numbers, without a dimension to join along. Use stack()."
        )
        raise JoinError(message)
    if not -dimensions <= dim < dimensions:
        message = (
            f"{call}: there is no dimension {dim}; the calls have shape {tuple(column[0].shape)}."
        )
        raise JoinError(message)
    rest = {_fixed(tensor.shape, how, dim) for tensor in column}
    if len(rest) > 1:
        must = (
            "agree in every dimension" if how == "stack" else f"agree in every dimension but {dim}"
        )
        message = f"{call}: the calls do not {must}: {_shapes(column)}. They can be used one by one: acts[name][i]."
        raise JoinError(message)


def _fixed(shape: torch.Size, how: How, dim: int) -> tuple[int, ...]:
    """The sizes that have to be the same in all calls (and how many there are)."""
    if how == "stack":
        return tuple(shape)
    dim %= max(len(shape), 1)
    return (len(shape), *shape[:dim], *shape[dim + 1 :])


def _shapes(column: Iterable[Tensor], most: int = 6) -> str:
    """``calls 0-2 are (8, 3), call 3 is (2, 4)``."""
    runs = []
    for shape, group in groupby(enumerate(column), key=lambda item: tuple(item[1].shape)):
        indices = [index for index, _ in group]
        one = len(indices) == 1
        which = f"call {indices[0]} is" if one else f"calls {indices[0]}-{indices[-1]} are"
        runs.append(f"{which} {shape}")
    return ", ".join(runs[:most]) + (
        f", and {len(runs) - most} more changes" if len(runs) > most else ""
    )


# --- Releasing -------------------------------------------------------------------------------------

#: The memory of the values is given back to the system in so many portions.
_PORTIONS = 16


def _empty_result(how: How, dim: int, column: list[Tensor]) -> Tensor:
    """Where the tensors of a column will be joined."""
    shape = list(column[0].shape)
    if how == "stack":
        shape.insert(dim % (len(shape) + 1), len(column))
    else:
        shape[dim] = sum(tensor.shape[dim] for tensor in column)
    return torch.empty(shape, dtype=column[0].dtype, device=column[0].device)


def _is_plain(column: list[Tensor]) -> bool:
    return all(
        type(t) is Tensor and t.layout is torch.strided and not (t.is_quantized or t.requires_grad)
        for t in column
    )


def _move(pop: Callable[[], Value], count: int, results: list[Tensor], how: How, dim: int) -> None:
    """Copy value after value into the results, the last one first, and drop each as soon as it is copied."""
    ends = [result.shape[dim] for result in results]
    portion = max(WORTH_IT, sum(result.nbytes for result in results) // _PORTIONS)
    freed = 0
    for index in reversed(range(count)):
        for place, tensor in enumerate(tensors(pop())):
            if how == "stack":
                results[place].select(dim, index).copy_(tensor)
            else:
                ends[place] -= tensor.shape[dim]
                results[place].narrow(dim, ends[place], tensor.shape[dim]).copy_(tensor)
            freed += tensor.nbytes
            del tensor
        if freed >= portion:  # or else the results are there, and the room of the values is too
            give_back(freed)
            freed = 0
