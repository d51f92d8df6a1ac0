"""Layers side by side: the same calls of each, cut into the same rows.

The calls of a layer that lie behind each other in a file are one *stretch*. Everything here goes from
stretch to stretch, so a stored recording of a million calls is as fast to align as one of a few.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from actrec._forms import form
from actrec._recording import Layer
from actrec.errors import AlignmentError, OptionError
from actrec.store._live import LiveLayer
from actrec.store._reader import StoredLayer
from actrec.store._whole import WholeLayer

from ._columns import Column, coalesced
from ._sources import File, Held, Made, Shape, Source, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from actrec._recording import Recording
    from actrec.store._index import Group, Leaf

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

    def __len__(self) -> int:
        return len(self.columns[0])


def table(
    call: str,
    recording: Recording,
    selectors: Sequence[Selector],
    *,
    flatten: bool,
    mask: Selector | None,
    as_stored: bool = False,
) -> Table:
    """Align the layers, in the order of the calls, or as they lie in the files."""
    given: object = recording
    if not isinstance(given, Mapping):
        message = f"{call}: expected a recording, such as actrec.load(path), got {recording!r}."
        raise OptionError(message)
    if not selectors:
        message = f"{call}: no layer was named. {call}(recording, {next(iter(recording), 'name')!r}), say."
        raise OptionError(message)
    chosen = [*selectors, *([] if mask is None else [mask])]
    picked = [_picked(call, recording, selector) for selector in chosen]
    _check_calls(call, picked)
    files: dict[str, File] = {}
    aligned = list(_zipped([list(_stretches(call, pick, files)) for pick in picked]))
    cut = _Cut(call, picked, flatten=flatten, masked=mask is not None)
    runs = cut.runs(aligned)
    if as_stored:
        runs = coalesced(runs)
    columns = cut.columns(runs)
    origins = sorted({o for pick in picked for o in _origins(pick.layer)})
    return Table(columns[: len(selectors)], None if mask is None else columns[-1], tuple(origins))


# --- Which layers ------------------------------------------------------------------------------------


class _Pick(NamedTuple):
    """A layer, and the steps that lead to a tensor in its values."""

    title: str
    layer: Layer
    steps: tuple[Any, ...]


def _picked(call: str, recording: Recording, selector: Selector) -> _Pick:
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
    return _Pick(title, layer, tuple(steps))


def _origins(layer: Layer) -> set[str]:
    if isinstance(layer, WholeLayer):
        return _origins(layer.recorded)
    if isinstance(layer, StoredLayer):
        return {source.rank.manifest.recording for source in layer._sources}
    return set()


def _check_calls(call: str, picks: list[_Pick]) -> None:
    first, *others = picks
    expected = _moments(first.layer)
    for other in others:
        found = _moments(other.layer)
        if found != expected:
            raise _misaligned(call, (first.title, expected), (other.title, found))


def _moments(layer: Layer) -> list[Any]:
    """For each call, its pass, and which rank it is of where the layer knows."""
    ranks = getattr(layer, "ranks", None)
    return layer.passes if ranks is None else list(zip(layer.passes, ranks, strict=True))


def _misaligned(
    call: str, first: tuple[str, list[Any]], other: tuple[str, list[Any]]
) -> AlignmentError:
    (title, expected), (name, found) = first, other
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False))
    )
    message = (
        f"{call}: layers {title} and {name} do not have the same calls. {title} has {len(expected)}, {name} has "
        f"{len(found)}, and call {same} is {_moment(expected, same)} of {title} and {_moment(found, same)} of {name}. "
        "Choose layers that are called equally often in each pass, or record them in a run of their own."
    )
    return AlignmentError(message)


def _moment(moments: list[Any], index: int) -> str:
    if index >= len(moments):
        return "missing"
    moment = moments[index]
    return (
        f"in pass {moment[0]}, rank {moment[1]},"
        if isinstance(moment, tuple)
        else f"in pass {moment}"
    )


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


def _zipped(columns: list[list[Stretch]]) -> Iterator[tuple[Stretch, ...]]:
    """The stretches of all layers side by side, cut so that they have the same calls."""
    iterators = [iter(column) for column in columns]
    rest: list[Stretch | None] = [None] * len(columns)
    for head in iterators[0]:
        rest[0] = head
        while rest[0] is not None:
            heads = [part or next(it) for part, it in zip(rest, iterators, strict=True)]
            calls = min(part.calls for part in heads)
            yield tuple(replace(part, calls=calls) for part in heads)
            rest = [part.after(calls) if part.calls > calls else None for part in heads]


# --- Rows --------------------------------------------------------------------------------------------


def _fits(shape: Shape, taken: int, lead: Shape) -> bool:
    """Whether that many dimensions are positions, all of them or the first ones."""
    return 0 < taken <= min(len(shape), len(lead)) and shape[:taken] == lead[:taken]


class _Cut:
    """Cuts stretches into rows."""

    def __init__(self, call: str, picks: list[_Pick], *, flatten: bool, masked: bool) -> None:
        self._call = call
        self._picks = picks
        self._flatten = flatten
        self._masked = masked
        self._shapes: list[Shape] = []
        self._dtypes: list[torch.dtype] = []
        self._sources: list[list[Source]] = [[] for _ in picks]

    def runs(self, aligned: list[tuple[Stretch, ...]]) -> list[Tensor]:
        """For each layer its runs, as lines of a tensor."""
        starts = list(accumulate((stretches[0].calls for stretches in aligned), initial=0))
        for stretches, start in zip(aligned, starts, strict=False):
            self._check_dimensions(stretches, start)
        leads = [self._lead(stretches) for stretches in aligned]
        takes = [self._taken(column, leads) for column in zip(*aligned, strict=True)]
        numbers: list[dict[int, int]] = [{} for _ in self._picks]
        lines: list[list[tuple[int, int, int, int]]] = [[] for _ in self._picks]
        for stretches, lead, start in zip(aligned, leads, starts, strict=False):
            shapes = self._shapes_of_rows(stretches, lead, takes, start)
            rows = math.prod(lead) * stretches[0].calls
            for column, (stretch, shape) in enumerate(zip(stretches, shapes, strict=True)):
                number = self._number(column, numbers[column], stretch, shape)
                width = math.prod(shape) * stretch.dtype.itemsize
                first = stretch.offset // width if width else 0
                repeat = max(1, math.prod(lead[takes[column] :]))
                lines[column].append((rows, number, first, repeat))
        return [
            torch.tensor(column, dtype=torch.int64, device="cpu").view(-1, 4) for column in lines
        ]

    def columns(self, runs: list[Tensor]) -> list[Column]:
        """The columns of these runs."""
        if not self._shapes:
            self._shapes = [()] * len(self._picks)
            self._dtypes = [torch.float32] * len(self._picks)
        parts = zip(self._picks, self._dtypes, self._shapes, self._sources, runs, strict=True)
        return [
            Column(pick.title, dtype, shape, sources, lines)
            for pick, dtype, shape, sources, lines in parts
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

    def _shapes_of_rows(
        self, stretches: tuple[Stretch, ...], lead: Shape, takes: list[int], start: int
    ) -> list[Shape]:
        """The shape of a row of each layer, after a look at whether the layers have the same rows."""
        for column, (stretch, taken) in enumerate(zip(stretches, takes, strict=True)):
            if not _fits(stretch.shape, taken, lead):
                raise self._unequal(stretches, column, lead, start)
        shapes = [stretch.shape[taken:] for stretch, taken in zip(stretches, takes, strict=True)]
        if self._masked and shapes[-1]:
            fix = "." if self._flatten else "; flatten=True makes a row of each position."
            message = (
                f"{self._at(self._picks[-1], start)} has shape {stretches[-1].shape}, more than one number for each row, "
                f"so it is no mask. The rows are those of {lead}{fix}"
            )
            raise AlignmentError(message)
        self._check_alike(stretches, shapes, start)
        return shapes

    def _lead(self, stretches: tuple[Stretch, ...]) -> Shape:
        """The dimensions whose positions are the rows."""
        if not self._flatten:
            return stretches[0].shape[:1]
        layers = stretches[: len(stretches) - self._masked]
        longest = max(layers, key=lambda stretch: len(stretch.shape)).shape
        return longest[:-1] if len(longest) > 1 else longest

    def _taken(self, column: tuple[Stretch, ...], leads: list[Shape]) -> int:
        """How many dimensions of a layer are positions, in all of its calls; the others make a row."""
        most = len(column[0].shape)
        choices = [taken for taken in (most, most - 1) if taken] if self._flatten else [1]

        def good(taken: int) -> int:
            """The number of calls before the first that this does not go with."""
            pairs = zip(column, leads, strict=True)
            return sum(
                1 for _ in takewhile(lambda pair: _fits(pair[0].shape, taken, pair[1]), pairs)
            )

        return max(choices, key=good)

    def _unequal(
        self, stretches: tuple[Stretch, ...], column: int, lead: Shape, done: int
    ) -> AlignmentError:
        other = self._picks[column]
        fix = (
            "Its first dimensions have to be the same."
            if self._flatten
            else "Record with a transform that gives every layer one row for each sample."
        )
        message = (
            f"{self._at(other, done)} has shape {stretches[column].shape}, and the rows are those of {lead}, as in "
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
        return f"{self._call}: call {done} (pass {pick.layer.passes[done]}) of {pick.title}"
