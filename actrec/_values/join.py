"""Joining the calls of a layer into one value, and saying what is wrong where they do not fit."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from actrec.errors import JoinError, OptionError

from .memory import WORTH_IT, give_back
from .spec import Container, Spec, flatten, tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from actrec._recordings.recording import Layer

    from .containers import Value

__all__ = ["joined"]

How = Literal["cat", "stack"]


def joined(layer: Layer, how: How, dim: int, *, release: bool = False) -> Value:
    """Return all calls of ``layer`` as one value. See :meth:`actrec.Layer.cat`."""
    call = f"acts[{layer.name!r}].{how}(dim={dim!r})"
    if not hasattr(dim, "__index__"):
        message = f"{call}: expected the number of a dimension, such as 0."
        raise OptionError(message)
    if not len(layer):
        message = f"{call}: nothing was recorded of this layer, so there is nothing to join."
        raise JoinError(message)
    values = list(layer._readable())  # each call is read once: one on disk is made anew every time
    if len(values) != len(layer):
        message = f"{call}: the container given as into= does not keep the calls, so there is nothing to join."
        raise JoinError(message)
    columns = _columns(call, values)
    for column in columns:
        _check_column(call, how, dim, column)
    if release and _can_release(layer, columns):
        results = [_empty_result(how, dim, column) for column in columns]
        value = _filled(values[0], results)
        values.clear()
        columns.clear()
        del column
        _move(layer, results, how, dim)
        return value
    function = torch.cat if how == "cat" else torch.stack
    value = _filled(values[0], [function(column, dim) for column in columns])
    if release:
        layer.clear()
    return value


def _filled(value: Value, results: list[Tensor]) -> Value:
    """A value of the same structure, with the results in the places of its tensors."""
    return flatten(value)[1].fill(results)


# --- Checking --------------------------------------------------------------------------------------


def _columns(call: str, values: Sequence[Value]) -> list[list[Tensor]]:
    """For every place of a tensor in the value, the tensors of all calls."""
    columns: list[list[Tensor]] = []
    first: Spec | None = None
    for index, value in enumerate(values):
        found, spec = flatten(value)
        if first is None:
            first, columns = spec, [[] for _ in found]
            _check_spec(call, spec)
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
    return columns


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

#: The memory of a layer's calls is given back to the system in so many portions.
_PORTIONS = 16


def _empty_result(how: How, dim: int, column: list[Tensor]) -> Tensor:
    """Where the tensors of a column will be joined."""
    shape = list(column[0].shape)
    if how == "stack":
        shape.insert(dim % (len(shape) + 1), len(column))
    else:
        shape[dim] = sum(tensor.shape[dim] for tensor in column)
    return torch.empty(shape, dtype=column[0].dtype, device=column[0].device)


def _can_release(layer: Any, columns: list[list[Tensor]]) -> bool:
    """Whether calls can be copied and dropped one by one: plain tensors in a container that lets go of them."""
    plain = all(
        type(t) is Tensor and t.layout is torch.strided and not (t.is_quantized or t.requires_grad)
        for column in columns
        for t in column
    )
    return plain and hasattr(layer, "pop")


def _move(layer: Any, results: list[Tensor], how: How, dim: int) -> None:
    """Copy call after call into the results, the last one first, and drop each as soon as it is copied."""
    ends = [result.shape[dim] for result in results]
    portion = max(WORTH_IT, sum(result.nbytes for result in results) // _PORTIONS)
    freed = 0
    while len(layer):
        index = len(layer) - 1
        for place, tensor in enumerate(tensors(layer.pop())):
            if how == "stack":
                results[place].select(dim, index).copy_(tensor)
            else:
                ends[place] -= tensor.shape[dim]
                results[place].narrow(dim, ends[place], tensor.shape[dim]).copy_(tensor)
            freed += tensor.nbytes
            del tensor
        if freed >= portion:  # or else the results are there, and the room of the calls is too
            give_back(freed)
            freed = 0
    layer.clear()
