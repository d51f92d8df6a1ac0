"""Compares two layers: their calls, paired by unit or by index, and what is at the same path in both values of a pair."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias

from torch import Tensor

from actrec._progress import Each
from actrec._text import count
from actrec._values.constants import Constant, as_tensor
from actrec._values.difference import Difference, Mismatch, Tolerances
from actrec._values.shapes import dtype_name
from actrec._values.spec import Spec, flatten

from .comparison import Row
from .layer import Layer
from .masks import Masks, left_in
from .reduced import Reduced
from .units import Key

#: A tensor; or a text, or an integer that is too large for a tensor, which can only be equal or not.
Leaf: TypeAlias = Tensor | str | bytes | int

#: The path of the type that :class:`~actrec._values.stand_ins.Fields` have.
_OF_STAND_IN: Final = "._type"


def rows(
    a: Layer[Any],
    b: Layer[Any],
    tolerances: Tolerances,
    masks: tuple[Masks, Masks | None] | None,
    each: Each,
) -> Iterator[Row]:
    """Yield a row for each path in the values of two layers.

    Args:
        a: a layer.
        b: the layer to compare it with.
        tolerances: see :func:`~actrec._recordings.compare.compare`.
        masks: the masks of the recordings of both; ``None`` for that of ``b`` if the one of ``a`` applies to it too.
        each: counts the calls.
    """
    found: dict[str, _Tally] = {}
    if isinstance(a, Reduced) != isinstance(b, Reduced):
        tally = _Tally()
        tally.differ(
            a.passes[0] if len(a) else 0, f"reduced in {'ab'[isinstance(b, Reduced)]} alone"
        )
        yield tally.row(a.name, "", b.name)
        return
    if isinstance(a, Reduced):
        masks = None  # it was applied when they were recorded
    kept_a = [] if masks is None else masks[0].of(a)
    kept_b = kept_a if masks is None or masks[1] is None else masks[1].of(b)
    pairing, passes = _paired(a, b), a.passes
    values = zip(each(_values(a, pairing.ours)), _values(b, pairing.theirs), strict=True)
    for (x, y), call, other in zip(values, pairing.ours, pairing.theirs, strict=False):
        number = passes[call]
        xs, ys = _comparable(x), _comparable(y)
        if masks is not None and (masks[1] is not None or _shapes(xs) == _shapes(ys)):
            xs, ys = _masked(xs, kept_a[call]), _masked(ys, kept_b[other])
        ys = _with_names_of(xs, ys)
        for path in dict.fromkeys([*xs, *ys]):
            tally = found.setdefault(path, _Tally())
            if path in xs and path in ys:
                tally.compare(xs[path], ys[path], call, number, tolerances)
            else:
                tally.differ(number, f"call {call} only in {'a' if path in xs else 'b'}")
    found = found or {"": _Tally()}
    for path, tally in found.items():
        if pairing.alone is not None:
            tally.differ(*pairing.alone)
        yield tally.row(a.name, path, b.name)


def _values(layer: Layer[Any], numbers: Sequence[int]) -> Iterable[Any]:
    """Return some calls of a layer; if it was reduced, its result."""
    if isinstance(layer, Reduced):
        return [layer.compute()]
    return layer if numbers == range(len(layer)) else map(layer.__getitem__, numbers)


def _masked(leaves: dict[str, Leaf], kept: Mapping[str, Tensor]) -> dict[str, Leaf]:
    """Return the leaves with only the positions of tensors that count."""
    tensors = {path: one for path, one in leaves.items() if isinstance(one, Tensor)}
    return leaves | {path: left_in(tensors[path], one) for path, one in kept.items()}


class _Tally:
    """Counts and differences of one tensor of a layer, over the calls compared so far."""

    def __init__(self) -> None:
        self.calls = 0
        self.difference = Difference()
        self.equal = True
        self.different_pass: int | None = None
        self.notes: dict[str, None] = {}

    def differ(self, number: int, note: str = "") -> None:
        """Note that pass ``number`` differs by more than the tolerances."""
        self.equal = False
        if self.different_pass is None or number < self.different_pass:
            self.different_pass = number
        if note:
            self.notes.setdefault(note)

    def compare(self, x: Leaf, y: Leaf, call: int, number: int, tolerances: Tolerances) -> None:
        """Compare a leaf of call ``call`` of ``a`` with that of the paired call."""
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            self.calls += 1
            if x is not y and x != y:
                self.differ(number, f"call {call}: {_quoted(x)} and {_quoted(y)}")
            return
        try:
            close = self.difference.add(x, y, tolerances)
        except Mismatch as mismatch:
            self.differ(number, f"call {call}: {mismatch}")
            return
        self.calls += 1
        if x.dtype != y.dtype:
            self.notes.setdefault(f"{dtype_name(x.dtype)} and {dtype_name(y.dtype)}")
        if not close:
            self.differ(number)

    def row(self, layer: str, leaf: str, other: str) -> Row:
        """Return the result as a row."""
        found = self.difference
        for which, many in zip("ab", found.nan, strict=True):
            if many:
                self.notes.setdefault(f"{many:,} NaN in {which} alone")
        return Row(
            layer,
            leaf,
            other,
            self.calls,
            found.count,
            found.max_abs,
            found.max_rel,
            found.cosine,
            self.equal and found.equal,
            self.different_pass is None,
            self.different_pass,
            _first(self.notes) if self.notes or self.calls else "nothing to compare",
            sum(found.nan),
        )


def _quoted(leaf: Leaf, most: int = 20) -> str:
    """Return a text, or the beginning of a long one."""
    text = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
    return text if len(text) <= most else f"{text[:most]}..."


def _first(notes: Iterable[str], most: int = 2) -> str:
    notes = list(notes)
    more = [f"{len(notes) - most:,} more"] if len(notes) > most else []
    return "; ".join([*notes[:most], *more])


# --- Which calls --------------------------------------------------------------------------------------


class _Pairing(NamedTuple):
    """The indices of paired calls of two layers."""

    ours: Sequence[int]
    theirs: Sequence[int]
    alone: tuple[int, str] | None  #: of the first call without a partner, the pass and a note


def _paired(a: Layer[Any], b: Layer[Any]) -> _Pairing:
    """Pair the calls of two layers, in the order of ``a``."""
    ours, theirs = [*a.units], [*b.units]
    if ours == theirs or isinstance(a, Reduced) or None in ours or None in theirs:
        both = range(min(len(a), len(b)))
        if len(a) == len(b):
            return _Pairing(both, both, None)
        longer = a if len(a) > len(b) else b
        note = f"{len(a):,} and {count(len(b), 'call')}"
        return _Pairing(both, both, (longer.passes[len(both)], note))
    waiting: dict[Key | None, deque[int]] = {key: deque() for key in theirs}
    for number, key in enumerate(theirs):
        waiting[key].append(number)
    pairs = [(at, waiting[key].popleft()) for at, key in enumerate(ours) if waiting.get(key)]
    found = {at for at, _ in pairs}
    alone = [(a.passes[at], key) for at, key in enumerate(ours) if at not in found]
    alone += [(b.passes[numbers[0]], key) for key, numbers in waiting.items() if numbers]
    first = None
    if alone:
        number, key = alone[0]
        here, there = ours.count(key), theirs.count(key)
        first = (number, f"{here:,} and {count(there, 'call')} of unit {key!r}")
    return _Pairing([at for at, _ in pairs], [at for _, at in pairs], first)


# --- Which parts of a value -----------------------------------------------------------------------------


def _comparable(value: Any) -> dict[str, Leaf]:
    """Return the parts of a value that are compared, by their paths: the index as one writes it after the value."""
    if isinstance(value, Tensor):
        return {"": value}
    tensors, spec = flatten(value)
    found: list[Leaf] = [*tensors]
    steps = [*spec.steps]
    for at, step in enumerate(steps):
        leaf = _leaf(step.value) if isinstance(step, Constant) else None
        if leaf is not None:
            steps[at] = len(found)
            found.append(leaf)
    paths = Spec((*steps,), len(found)).paths
    return {path: found[number] for path, number in paths if not path.endswith(_OF_STAND_IN)}


def _leaf(value: Any) -> Leaf | None:
    leaf = as_tensor(value)
    is_text = isinstance(value, (str, bytes, int)) and not isinstance(value, Enum)
    return value if leaf is None and is_text else leaf


def _shapes(leaves: Mapping[str, Leaf]) -> dict[str, object]:
    """Return the shape of each tensor that has one."""
    tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return {path: tensor.shape for path, tensor in tensors.items() if not tensor.is_nested}


# --- Paths in loaded values -----------------------------------------------------------------------------

_ITEM: Final = re.compile(r"\['([^\W\d]\w*)'\]")
_KEY: Final = re.compile(r"\[(?:<class '|Opaque\('|<)([\w.]+)(?:'>|'\)|: [^>]*>)\]")


def _with_names_of(xs: Mapping[str, Leaf], ys: dict[str, Leaf]) -> dict[str, Leaf]:
    """Return ``ys`` under the paths of ``xs``, of which one may have been loaded.

    A loaded value has other paths in two cases: a field of a dataclass is loaded as an item of a dict, and a key that is an
    enum member or a class as an ``Opaque``.
    """
    if xs.keys() == ys.keys():
        return ys
    known = {_plain(path): path for path in xs}
    return {path if path in xs else known.get(_plain(path), path): ys[path] for path in ys}


def _plain(path: str) -> str:
    path = _KEY.sub(lambda key: f"[{'.'.join(key[1].split('.')[-2:])}]", path)
    return _ITEM.sub(r".\1", path)
