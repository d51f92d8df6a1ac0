"""Joins the values of several calls into one, or says why they cannot be joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from actrec.errors import JoinError, OptionError

from .containers import Container, Value
from .memory import WORTH_IT, give_back
from .spec import Spec, flatten, tensors

How: TypeAlias = Literal["cat", "stack"]

#: A value is written into a message up to this length.
_LONGEST: Final = 400


def joined(
    values: list[Value], how: How, dim: int, call: str, *, pop: Callable[[], Value] | None = None
) -> Value:
    """Join values of one structure, tensor by tensor, as ``torch.cat`` or ``torch.stack`` does.

    >>> import torch
    >>> joined([(torch.zeros(2), 1), (torch.ones(1), 1)], "cat", 0, "joined()")
    (tensor([0., 0., 1.]), 1)

    Args:
        values: the values to join, at least one; with ``pop`` the list may be emptied.
        how: along an existing dimension, or a new one.
        dim: the number of that dimension.
        call: the calling function, for messages.
        pop: removes the last value from the place where it is kept, and returns it. With it, plain tensors are copied and
            dropped one after the other, the last first, so that only the result and one value are in memory at a time.

    Raises:
        OptionError: ``dim`` is not a number.
        JoinError: the values do not fit together; nothing was dropped.
    """
    if not hasattr(dim, "__index__"):
        message = f"{call}: expected the number of a dimension, such as 0."
        raise OptionError(message)
    spec, columns = _columns(call, values)
    _check(call, how, dim, columns)
    if pop is None or not all(map(_is_plain, columns)):
        function = torch.cat if how == "cat" else torch.stack
        return spec.fill([function(column, dim) for column in columns])
    results = [_empty_result(how, dim, column) for column in columns]
    count = len(values)
    values.clear()
    columns.clear()
    _move(pop, count, results, how, dim)
    return spec.fill(results)


# --- Checking --------------------------------------------------------------------------------------


def _columns(call: str, values: list[Value]) -> tuple[Spec, list[list[Tensor]]]:
    """Return the spec of all values; and for every tensor in it, the tensors of all values."""
    flat = [flatten(value) for value in values]
    first = flat[0][1]
    if not any(found for found, _ in flat):
        message = (
            f"{call}: the calls have no tensors; call 0 is {_told(first)}. Numbers can be joined by torch.tensor([*acts[name]]), "
            "arrays by numpy.concatenate(acts[name])."
        )
        raise JoinError(message)
    for index, (_, spec) in enumerate(flat):
        if spec != first:
            message = (
                f"{call}: call {index} is {_told(spec)}, while call 0 is {_told(first)}. They can be joined "
                "by hand: acts[name][i]."
            )
            raise JoinError(message)
    if any(isinstance(step, Container) and step.type is PackedSequence for step in first.steps):
        message = (
            f"{call}: the calls are packed sequences, each with several batches in one tensor. Unpack them first, "
            "with torch.nn.utils.rnn.pad_packed_sequence."
        )
        raise JoinError(message)
    return first, [list(column) for column in zip(*(row for row, _ in flat), strict=True)]


def _told(spec: Spec) -> str:
    """Return a value as text; a long one as its kind."""
    text = str(spec)
    return text if len(text) <= _LONGEST else spec.kind


def _check(call: str, how: How, dim: int, columns: list[list[Tensor]]) -> None:
    for column in columns:
        for problem in _problems(how, dim, column, columns):
            message = f"{call}: the calls {problem}"
            raise JoinError(message)


def _problems(
    how: How, dim: int, column: list[Tensor], columns: list[list[Tensor]]
) -> Iterator[str]:
    """Yield what keeps tensors from being joined, the most basic reason first."""
    if any(tensor.is_nested for tensor in column):
        yield "are nested tensors. They can be used one by one: acts[name][i]."
    dtypes = sorted({str(tensor.dtype) for tensor in column})
    if len(dtypes) > 1:
        several = ", ".join(dtypes)
        yield f"have several dtypes, {several}. Cast them first, or record with dtype=."
    devices = sorted({str(tensor.device) for tensor in column})
    if len(devices) > 1:
        yield f"are on several devices, {', '.join(devices)}."
    shape = tuple(column[0].shape)
    dimensions = len(shape) + (how == "stack")
    if dimensions == 0:
        yield "are single numbers, without a dimension to join along. Use stack()."
    if not -dimensions <= dim < dimensions:
        yield f"have no dimension {dim}; the calls have shape {shape}."
    joined_at = dim % dimensions if how == "cat" else None
    rest = {(t.dim(), *(n for at, n in enumerate(t.shape) if at != joined_at)) for t in column}
    if len(rest) > 1:
        where = "every dimension" if how == "stack" else f"every dimension but {dim}"
        yield f"do not agree in {where}: {_shapes(column)}. {_instead(columns)}"


def _instead(columns: list[list[Tensor]]) -> str:
    """Return how values whose shapes differ can be joined or used."""
    ways = []
    dimensions = min(tensor.dim() for column in columns for tensor in column)
    if dims := [dim for dim in range(dimensions) if all(_agree(dim, one) for one in columns)]:
        ways.append(f"along the dimension that differs, cat(dim={dims[0]})")
    (column, *others) = columns
    widths = {tensor.shape[-1] for tensor in column if tensor.dim() > 2}  # noqa: PLR2004  # samples, positions, width
    if not others and len(widths) == 1 and all(tensor.dim() == dimensions > 2 for tensor in column):  # noqa: PLR2004
        ways.append("with a row for each position, actrec.data.rows(acts, name, flatten=True)")
    if not ways:
        return "They can be used one by one: acts[name][i]."
    return f"They can be joined {', or '.join(ways)}."


def _agree(dim: int, column: list[Tensor]) -> bool:
    """Whether tensors agree in all dimensions but one."""
    return len({(*tensor.shape[:dim], None, *tensor.shape[dim + 1 :]) for tensor in column}) == 1


def _shapes(column: Iterable[Tensor], most: int = 6) -> str:
    """``calls 0-2 are (8, 3), call 3 is (2, 4)``."""
    runs = []
    for shape, group in groupby(enumerate(column), key=lambda item: tuple(item[1].shape)):
        indices = [index for index, _ in group]
        one = len(indices) == 1
        which = f"call {indices[0]} is" if one else f"calls {indices[0]}-{indices[-1]} are"
        runs.append(f"{which} {shape}")
    more = f", and {len(runs) - most} more changes" if len(runs) > most else ""
    return ", ".join(runs[:most]) + more


# --- Releasing -------------------------------------------------------------------------------------

#: The memory of the values is returned to the system in so many portions.
_PORTIONS: Final = 16


def _is_plain(column: list[Tensor]) -> bool:
    return all(
        type(t) is Tensor and t.layout is torch.strided and not (t.is_quantized or t.requires_grad)
        for t in column
    )


def _piece(tensor: Tensor, how: How, dim: int) -> Tensor:
    """Return a tensor as a part of the result: stacking is joining along a new dimension of size 1."""
    return tensor if how == "cat" else tensor.unsqueeze(dim)


def _empty_result(how: How, dim: int, column: list[Tensor]) -> Tensor:
    """Allocate the result for the tensors of a column."""
    shapes = [_piece(tensor, how, dim).shape for tensor in column]
    shape = list(shapes[0])
    shape[dim] = sum(shape[dim] for shape in shapes)
    return torch.empty(shape, dtype=column[0].dtype, device=column[0].device)


def _move(pop: Callable[[], Value], count: int, results: list[Tensor], how: How, dim: int) -> None:
    """Copy value after value into the results, the last one first, and drop each as soon as it is copied."""
    ends = [result.shape[dim] for result in results]
    portion = max(WORTH_IT, sum(result.nbytes for result in results) // _PORTIONS)
    freed = 0
    for _ in range(count):
        for at, tensor in enumerate(tensors(pop())):
            piece = _piece(tensor, how, dim)
            ends[at] -= piece.shape[dim]
            results[at].narrow(dim, ends[at], piece.shape[dim]).copy_(piece)
            freed += tensor.nbytes
            del tensor, piece
        if freed >= portion:  # else the freed memory would stay allocated
            give_back(freed)
            freed = 0
