"""Layers side by side: the same calls of each, cut into the same rows.

The calls of a layer that lie behind each other in a file are one *stretch*. Everything here goes from
stretch to stretch, so a stored recording of a million calls is as fast to align as one of a few.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, takewhile
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from actrec._recordings.layer import Layer, nth_calls
from actrec._recordings.recording import Recording
from actrec._values.forms import form
from actrec.errors import AlignmentError, OptionError
from actrec.store.read_only import ChosenLayer
from actrec.store.reader import StoredLayer
from actrec.store.stream import LiveLayer
from actrec.store.whole import WholeLayer

from .columns import Column, coalesced
from .sources import File, Held, Made, Shape, Source, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from actrec._recordings.layer import Moment
    from actrec.store.index import Group, Leaf

__all__ = ["Selector", "Table", "table"]

#: A layer by its name, or one that is at hand; with steps, what they lead to in each of its values.
Selector = str | Layer | tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """Columns of as many rows each, and maybe a mask beside them."""

    columns: list[Column]
    mask: Column | None
    #: What recordings the columns are of; none, if they are in memory.
    origins: tuple[str, ...]
    #: How many passes raised, and are left out.
    raised: int

    def __len__(self) -> int:
        return len(self.columns[0])


def table(
    call: str,
    recording: Recording,
    selectors: Sequence[Selector],
    *,
    flatten: bool,
    mask: Selector | Tensor | None,
    nth: int | None,
    as_stored: bool = False,
) -> Table:
    """Align the layers, in the order of the calls, or as they lie in the files."""
    given: object = recording
    if not isinstance(given, Recording):
        message = f"{call}: expected a recording, such as actrec.load(path), got {recording!r}."
        raise OptionError(message)
    if not selectors:
        message = f"{call}: no layer was named. {call}(recording, {next(iter(recording), 'name')!r}), say."
        raise OptionError(message)
    answers = _answers(call, mask) if isinstance(mask, Tensor) else None
    chosen = [*selectors, *([] if mask is None or isinstance(mask, Tensor) else [mask])]
    raised = recording._raised()
    picked = [_picked(call, recording, selector, nth, raised) for selector in chosen]
    _check_calls(call, picked)
    files: dict[str, File] = {}
    # All layers go from shard to shard together, so that each header is read once.
    aligned = list(_zipped([_stretches(call, pick, files) for pick in picked]))
    cut = _Cut(call, picked, flatten=flatten, masked=len(chosen) > len(selectors), answers=answers)
    runs = cut.runs(aligned)
    if as_stored:
        runs = coalesced(runs)
    columns = cut.columns(runs)
    origins = sorted({o for pick in picked for o in _origins(pick.layer)})
    found = columns[: len(selectors)], None if mask is None else columns[-1]
    return Table(*found, tuple(origins), len(raised))


def _answers(call: str, mask: Tensor) -> Tensor:
    """A mask that is a tensor, as answers of our own: the user may write to theirs."""
    if not _is_plain(mask):
        message = (
            f"{call}(mask={form(mask)}): expected a plain tensor with one number for each row."
        )
        raise OptionError(message)
    return (mask.detach() != 0).cpu()


# --- Which layers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pick:
    """A layer, the steps that lead to a tensor in its values, and which of its calls count."""

    title: str
    layer: Layer
    steps: tuple[Any, ...]
    moments: list[Moment]  # of the calls that count
    calls: list[int] | None  # their numbers; none, if all count


def _picked(
    call: str,
    recording: Recording,
    selector: Selector,
    nth: int | None,
    raised: AbstractSet[Moment],
) -> _Pick:
    layer, *steps = selector if selector and isinstance(selector, tuple) else (selector,)
    if isinstance(layer, str):
        layer = recording[layer]
    if not isinstance(layer, Layer):
        message = (
            f"{call}: {selector!r} is no layer. Give the name of one, a layer such as acts.inputs['conv1'], or a "
            "tuple of either and what leads to a tensor in its values: ('lstm', 0)."
        )
        raise OptionError(message)
    title = repr(layer.name) + "".join(f"[{step!r}]" for step in steps)
    layer = layer._stored if isinstance(layer, LiveLayer) else layer
    moments = layer._moments()
    calls: Sequence[int] = range(len(moments))
    if raised:
        numbers = {number for _, number in raised}
        calls = [
            index
            for index, (rank, number) in enumerate(moments)
            if not (
                number in numbers if rank is None else {(rank, number), (None, number)} & raised
            )
        ]
    if nth is not None:
        calls = nth_calls(f"{call}(nth={nth!r})", title, moments, nth, calls)
    counting = [moments[index] for index in calls]
    if isinstance(layer, ChosenLayer):
        calls, layer = [layer.calls[index] for index in calls], layer.base
    return _Pick(
        title, layer, tuple(steps), counting, None if len(calls) == len(layer) else [*calls]
    )


def _origins(layer: Layer) -> set[str]:
    if isinstance(layer, WholeLayer):
        return _origins(layer.recorded)
    if isinstance(layer, StoredLayer):
        return {source.rank.manifest.recording for source in layer._sources}
    return set()


def _check_calls(call: str, picks: list[_Pick]) -> None:
    """Check that all layers have the same calls; one that does not know its ranks goes with a layer of one rank."""
    alone = next((pick for pick in picks if any(rank is None for rank, _ in pick.moments)), None)
    moments = [pick.moments for pick in picks]
    if alone is not None:
        for pick in picks:
            ranks = sorted({rank for rank, _ in pick.moments if rank is not None})
            if len(ranks) > 1:
                message = (
                    f"{call}: layer {pick.title} was recorded by {len(ranks)} ranks, and {alone.title} is in memory, where "
                    f"nothing says which rank its calls are of. Open one rank, actrec.load(path, rank={ranks[0]}), say."
                )
                raise AlignmentError(message)
        moments = [[(None, number) for _, number in pick.moments] for pick in picks]
    for other, found in zip(picks[1:], moments[1:], strict=True):
        if found != moments[0]:
            raise _misaligned(call, (picks[0].title, moments[0]), (other.title, found))


def _misaligned(
    call: str, first: tuple[str, list[Moment]], other: tuple[str, list[Moment]]
) -> AlignmentError:
    (title, expected), (name, found) = first, other
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False))
    )
    message = (
        f"{call}: layers {title} and {name} do not have the same calls. {title} has {len(expected)}, {name} has "
        f"{len(found)}, and call {same} is {_moment(expected, same)} of {title} and {_moment(found, same)} of {name}. "
        "Choose layers that are called equally often in each pass, take one call of each pass (nth=0), or record them "
        "in a run of their own."
    )
    return AlignmentError(message)


def _moment(moments: list[Moment], index: int) -> str:
    if index >= len(moments):
        return "missing"
    rank, number = moments[index]
    return f"in pass {number}" if rank is None else f"in pass {number}, rank {rank},"


# --- Stretches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """Calls of a layer, of one shape, whose tensors lie behind each other."""

    calls: int
    shape: Shape
    dtype: torch.dtype
    key: int  # of what they lie in
    #: Given the shape of a row: what they lie in.
    source: Callable[[Shape], Source]
    offset: int = 0  # of the first call there, in bytes
    step: int = 0  # from call to call, in bytes

    def after(self, calls: int) -> Stretch:
        """What is left without the first calls."""
        return replace(self, calls=self.calls - calls, offset=self.offset + calls * self.step)


def _stretches(call: str, pick: _Pick, files: dict[str, File]) -> Iterator[Stretch]:
    """The stretches of the calls that count."""
    found = _all_stretches(call, pick, files)
    return found if pick.calls is None else _only(found, pick.calls)


def _only(stretches: Iterator[Stretch], calls: list[int]) -> Iterator[Stretch]:
    """What the stretches of all calls have of these, which are in order."""
    ranges = deque(_ranges(calls))
    begin = 0
    for stretch in stretches:
        end = begin + stretch.calls
        while ranges and ranges[0][0] < end:
            first, stop = max(ranges[0][0], begin), min(ranges[0][1], end)
            yield replace(stretch.after(first - begin), calls=stop - first)
            if ranges[0][1] > end:  # it goes on in the next
                break
            ranges.popleft()
        begin = end


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Numbers that follow each other, as where they begin and stop.

    >>> list(_ranges([0, 1, 2, 5]))
    [(0, 3), (5, 6)]
    """
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], found[-1] + 1


def _all_stretches(call: str, pick: _Pick, files: dict[str, File]) -> Iterator[Stretch]:
    if isinstance(pick.layer, StoredLayer):
        leaves: dict[Group, Leaf] = {}
        for group, first, many in _stored_calls(pick.layer):
            if group not in leaves:
                leaves[group] = _leaf(call, pick, group)
            file = files.setdefault(group.shard.path, File(group.shard))
            yield from _in_file(leaves[group], file, first, many)
    elif isinstance(pick.layer, WholeLayer):
        for number in range(len(pick.layer)):
            tensor = _tensor(call, pick, number, pick.layer.example(number))
            make = partial(_made_whole, pick.layer, number, pick.steps)
            yield Stretch(1, tuple(tensor.shape), tensor.dtype, -1, partial(Made, make))
    else:
        for number, value in enumerate(pick.layer):
            tensor = _tensor(call, pick, number, value)
            yield Stretch(1, tuple(tensor.shape), tensor.dtype, id(tensor), partial(Held, tensor))


def _made_whole(layer: WholeLayer, number: int, steps: tuple[Any, ...]) -> Tensor:
    """A tensor that several ranks have parts of."""
    value = layer[number]
    for step in steps:
        value = value[step]
    return value  # type: ignore[no-any-return]


def _stored_calls(layer: StoredLayer) -> Iterator[tuple[Group, int, int]]:
    if layer._order is None:
        for part in layer.parts():
            yield from part.calls
    else:
        yield from ((*layer._place(index), 1) for index in range(len(layer)))


def _in_file(leaf: Leaf, file: File, first: int, many: int) -> Iterator[Stretch]:
    end = first + many
    while first < end:
        run = bisect_right(leaf.calls, first) - 1
        calls = min(leaf.calls[run + 1], end) - first
        shape = leaf.shape(first)
        if leaf.expanded:
            # The file has one element for many.
            make = partial(leaf.tensor, first, file.storage)
            source: Callable[[Shape], Source] = partial(Made, make)
            yield Stretch(1, shape, leaf.dtype, -1, source)
            first += 1
        else:
            step = leaf.row * (leaf.rows[run] if not leaf.scalar else 1)
            offset = leaf.before[run] * leaf.row + step * (first - leaf.calls[run])
            yield Stretch(
                calls, shape, leaf.dtype, id(leaf), partial(_in_leaf, file, leaf), offset, step
            )
            first += calls


def _in_leaf(file: File, leaf: Leaf, shape: Shape) -> Source:
    return Stored(file, leaf, math.prod(shape) * leaf.dtype.itemsize)


def _leaf(call: str, pick: _Pick, group: Group) -> Leaf:
    """The tensor in the values of a group that the steps lead to."""
    marks = [torch.empty(() if leaf.scalar else 0, device="cpu") for leaf in group.leaves]
    found = _tensor(call, pick, None, group.filled(marks))
    return next(leaf for leaf, mark in zip(group.leaves, marks, strict=True) if mark is found)


def _tensor(call: str, pick: _Pick, number: int | None, value: Any) -> Tensor:
    for step in pick.steps:
        try:
            value = value[step]
        except (LookupError, TypeError):
            message = f"{call}: {pick.title}: {form(value).kind or 'a tensor'} has no [{step!r}]."
            raise AlignmentError(message) from None
    if not _is_plain(value):
        which = "a call" if number is None else f"call {number}"
        kind = (
            form(value).kind
            or f"a tensor of layout {value.layout}, quantized, nested or without data"
        )
        message = (
            f"{call}: {which} of {pick.title} is {kind}, and rows are cut out of plain tensors. Name what is in it, "
            f"as in ({pick.layer.name!r}, 0), or record with a transform that returns a tensor."
        )
        raise AlignmentError(message)
    return value  # type: ignore[no-any-return]


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested or value.is_meta)
    )


def _zipped(columns: list[Iterator[Stretch]]) -> Iterator[tuple[Stretch, ...]]:
    """The stretches of all layers side by side, cut so that they have the same calls."""
    rest: list[Stretch | None] = [None] * len(columns)
    for head in columns[0]:
        rest[0] = head
        while rest[0] is not None:
            heads = [part or next(column) for part, column in zip(rest, columns, strict=True)]
            calls = min(part.calls for part in heads)
            yield tuple(replace(part, calls=calls) for part in heads)
            rest = [part.after(calls) if part.calls > calls else None for part in heads]


# --- Rows --------------------------------------------------------------------------------------------


#: Reads a layer whose first dimension is all positions, as mixtures of experts have it: ``(batch * tokens, experts)``.
_MERGED: Final = 0


def _read(shape: Shape, lead: Shape, taken: int) -> tuple[Shape, int] | None:
    """The shape of a row, and for how many rows it is repeated, where so many dimensions are positions.

    ``None`` if they are not. In a tensor that has all dimensions of the positions and one more, a dimension of size 1
    stands for all its positions, where those after it do so too.
    """
    if taken == _MERGED:
        return (shape[1:], 1) if shape[0] == math.prod(lead) else None
    front = shape[:taken]
    if front != lead[:taken]:
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(front, lead, strict=False))
        )
        if not same or taken != len(lead) or len(shape) <= taken or set(front[same:]) != {1}:
            return None
        taken = same
        return shape[len(lead) :], max(1, math.prod(lead[same:]))
    return shape[taken:], max(1, math.prod(lead[taken:]))


def _has_width(dtype: torch.dtype) -> bool:
    """Whether the last dimension of a tensor may be a vector: integers are ids or answers, each a number of its own."""
    return dtype.is_floating_point or dtype.is_complex


def _positions(stretch: Stretch) -> Shape:
    """The dimensions of a layer that are positions if it is flattened."""
    shape = stretch.shape
    alone = len(shape) == 1 or (len(shape) == 2 and not _has_width(stretch.dtype))  # noqa: PLR2004
    return shape if alone else shape[:-1]


class _Cut:
    """Cuts stretches into rows."""

    def __init__(
        self,
        call: str,
        picks: list[_Pick],
        *,
        flatten: bool,
        masked: bool,
        answers: Tensor | None,
    ) -> None:
        self._call = call
        self._answers = answers
        self._picks = picks
        self._flatten = flatten
        self._masked = masked
        self._shapes: list[Shape] = []
        self._dtypes: list[torch.dtype] = []
        self._sources: list[list[Source]] = [[] for _ in picks]

    def runs(self, aligned: list[tuple[Stretch, ...]]) -> list[Tensor]:
        """For each layer its runs, as lines of a tensor, and behind them those of a mask that is a tensor."""
        starts = list(accumulate((stretches[0].calls for stretches in aligned), initial=0))
        for stretches, start in zip(aligned, starts, strict=False):
            self._check_dimensions(stretches, start)
        leads = [self._lead(stretches) for stretches in aligned]
        columns = zip(*aligned, strict=True)
        takes = [self._taken(number, column, leads) for number, column in enumerate(columns)]
        numbers: list[dict[int, int]] = [{} for _ in self._picks]
        lines: list[list[tuple[int, int, int, int]]] = [[] for _ in self._picks]
        for stretches, lead, start in zip(aligned, leads, starts, strict=False):
            cuts = self._rows_of(stretches, lead, takes, start)
            rows = math.prod(lead) * stretches[0].calls
            for column, (stretch, (shape, repeat)) in enumerate(zip(stretches, cuts, strict=True)):
                number = self._number(column, numbers[column], stretch, shape)
                width = math.prod(shape) * stretch.dtype.itemsize
                first = stretch.offset // width if width else 0
                lines[column].append((rows, number, first, repeat))
        if self._answers is not None:
            lines.append(self._answered(aligned, leads))
        return [
            torch.tensor(column, dtype=torch.int64, device="cpu").view(-1, 4) for column in lines
        ]

    def columns(self, runs: list[Tensor]) -> list[Column]:
        """The columns of these runs."""
        if not self._shapes:
            self._shapes = [()] * len(self._picks)
            self._dtypes = [torch.float32] * len(self._picks)
        parts = zip(self._picks, self._dtypes, self._shapes, self._sources, runs, strict=False)
        found = [
            Column(pick.title, dtype, shape, sources, lines)
            for pick, dtype, shape, sources, lines in parts
        ]
        if self._answers is not None:
            held = [Held(self._answers.reshape(-1), ())]
            found.append(Column("mask", torch.bool, (), held, runs[-1]))
        return found

    def _answered(
        self, aligned: list[tuple[Stretch, ...]], leads: list[Shape]
    ) -> list[tuple[int, int, int, int]]:
        """The runs of a mask that is a tensor: an answer for each row, or for each sample."""
        assert self._answers is not None  # noqa: S101  # for the type checker
        calls = [stretches[0].calls for stretches in aligned]
        samples = [many * lead[0] for many, lead in zip(calls, leads, strict=True)]
        rows = [many * math.prod(lead) for many, lead in zip(calls, leads, strict=True)]
        shape = tuple(self._answers.shape)
        inner = {lead[1:] for lead in leads}
        if shape == (sum(rows),) or shape in {
            (sum(samples), *one) for one in inner if len(inner) == 1
        }:
            counts = rows
        elif shape == (sum(samples),):
            counts = samples
        else:
            message = (
                f"{self._call}: the mask is a tensor of shape {shape}, and there are {sum(rows)} rows. It needs one number "
                "for each, in the order of the rows."
            )
            raise AlignmentError(message)
        starts = accumulate(counts, initial=0)
        return [
            (many, 0, start, max(1, many // max(1, count)))
            for many, start, count in zip(rows, starts, counts, strict=False)
        ]

    def _number(self, column: int, numbers: dict[int, int], stretch: Stretch, shape: Shape) -> int:
        """The number of the source of a stretch; one that was met before keeps its number."""
        sources = self._sources[column]
        if stretch.key not in numbers or stretch.key == -1:
            numbers[stretch.key] = len(sources)
            sources.append(stretch.source(shape))
        return numbers[stretch.key]

    def _check_dimensions(self, stretches: tuple[Stretch, ...], start: int) -> None:
        for pick, stretch in zip(self._picks, stretches, strict=True):
            if not stretch.shape:
                message = (
                    f"{self._at(pick, start)} is a single number, without a dimension to cut rows from. Add values of "
                    "one number for each sample."
                )
                raise AlignmentError(message)

    def _rows_of(
        self, stretches: tuple[Stretch, ...], lead: Shape, takes: list[int], start: int
    ) -> list[tuple[Shape, int]]:
        """The shape of a row of each layer, and its repeats, after a look at whether the layers have the same rows."""
        found = []
        for column, (stretch, taken) in enumerate(zip(stretches, takes, strict=True)):
            read = _read(stretch.shape, lead, taken)
            if read is None:
                raise self._unequal(stretches, column, lead, start)
            found.append(read)
        shapes = [shape for shape, _ in found]
        if self._masked and shapes[-1]:
            fix = "." if self._flatten else "; flatten=True makes a row of each position."
            message = (
                f"{self._at(self._picks[-1], start)} has shape {stretches[-1].shape}, more than one number for each row, "
                f"so it is no mask. The rows are those of {lead}{fix}"
            )
            raise AlignmentError(message)
        self._check_alike(stretches, shapes, start)
        return found

    def _lead(self, stretches: tuple[Stretch, ...]) -> Shape:
        """The dimensions whose positions are the rows: those of the layer that has most, or of the mask."""
        if not self._flatten:
            return stretches[0].shape[:1]
        found = [_positions(stretch) for stretch in stretches[: len(stretches) - self._masked]]
        most = max(map(len, found))
        if most == 1 and self._masked and len(stretches[-1].shape) > 1:
            return stretches[-1].shape
        sizes = zip(*(shape for shape in found if len(shape) == most), strict=True)
        return tuple(next((size for size in column if size != 1), 1) for column in sizes)

    def _taken(self, column: int, stretches: tuple[Stretch, ...], leads: list[Shape]) -> int:
        """How many dimensions of a layer are positions, in all of its calls; the others make a row."""
        if not self._flatten:
            return 1
        dims, positions = len(stretches[0].shape), len(leads[0])
        is_mask = self._masked and column == len(self._picks) - 1
        is_sure = is_mask or dims > positions or not _has_width(stretches[0].dtype)
        choices = [min(dims, positions), *([] if is_sure else range(dims - 1, 0, -1)), _MERGED]
        pairs = [(stretch.shape, lead) for stretch, lead in zip(stretches, leads, strict=True)]
        reads = {taken: [_read(*pair, taken) for pair in pairs] for taken in choices}
        fitting = {taken: found for taken, found in reads.items() if None not in found}
        if not fitting:  # the one that goes furthest; where it ends, the error is
            return max(choices, key=lambda taken: reads[taken].index(None))
        alike = [
            taken
            for taken, found in fitting.items()
            if len({read and read[0] for read in found}) == 1
        ] or [*fitting]
        rows = [number for number, lead in enumerate(leads) if math.prod(lead)]
        different = {
            tuple(fitting[taken][number] for number in rows): taken for taken in reversed(alike)
        }
        if not is_sure and len(different) > 1:
            raise self._ambiguous(column, stretches[0], leads[0], [*different.values()][::-1])
        return alike[0]

    def _ambiguous(
        self, column: int, stretch: Stretch, lead: Shape, takes: list[int]
    ) -> AlignmentError:
        """The shapes fit two readings, in all calls."""
        readings = []
        for taken in takes:
            shape, _ = _read(stretch.shape, lead, taken) or ((), 1)
            what = f"rows of shape {shape}" if shape else "one number for each row"
            whole = lead if taken == _MERGED else (*lead[:taken], *[1] * (len(lead) - taken))
            say = f" (to say so, give it the shape {(*whole, *(shape or (1,)))})"
            readings.append(what + (say if len(shape) <= 1 else ""))
        message = (
            f"{self._at(self._picks[column], 0)} has shape {stretch.shape}, and the rows are those of {lead}. In all calls "
            f"that fits {len(readings)} readings: {', or '.join(readings)}. Reshape it in a transform, or where it is added."
        )
        return AlignmentError(message)

    def _unequal(
        self, stretches: tuple[Stretch, ...], column: int, lead: Shape, done: int
    ) -> AlignmentError:
        other, shape = self._picks[column], stretches[column].shape
        if not self._flatten:
            fix = "Record with a transform that gives every layer one row for each sample."
        elif 1 < len(shape) <= len(lead) and not _has_width(stretches[column].dtype):
            ones = (shape[0], *[1] * (len(lead) - 1), *shape[1:])
            fix = (
                "Integers are one number for each position, as token ids are. If they are a row for each sample, to be "
                f"repeated, give it the shape {ones}."
            )
        else:
            fix = "Its first dimensions have to be the same."
        message = (
            f"{self._at(other, done)} has shape {shape}, and the rows are those of {lead}, as in "
            f"{self._picks[0].title} of shape {stretches[0].shape}. {fix}"
        )
        return AlignmentError(message)

    def _check_alike(self, stretches: tuple[Stretch, ...], shapes: list[Shape], done: int) -> None:
        """Check that the rows are like those before."""
        dtypes = [stretch.dtype for stretch in stretches]
        self._shapes = self._shapes or shapes
        self._dtypes = self._dtypes or dtypes
        for pick, shape, before in zip(self._picks, shapes, self._shapes, strict=True):
            if shape != before:
                message = (
                    f"{self._at(pick, done)} has rows of shape {shape}, and the calls before it rows of shape {before}. "
                    "Rows of different shapes make no batch: "
                    + (
                        "record with a transform."
                        if self._flatten
                        else "take a row of each position, flatten=True, or record with a transform that pools."
                    )
                )
                raise AlignmentError(message)
        for pick, dtype, known in zip(self._picks, dtypes, self._dtypes, strict=True):
            if dtype != known:
                message = f"{self._at(pick, done)} is of {dtype}, and the calls before it of {known}. Record with dtype=."
                raise AlignmentError(message)

    def _at(self, pick: _Pick, done: int) -> str:
        number = done if pick.calls is None else pick.calls[done]
        return f"{self._call}: call {number} (pass {pick.moments[done][1]}) of {pick.title}"
