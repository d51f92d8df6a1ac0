"""Two recordings, layer by layer: where a port, a new kernel or a smaller dtype goes another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from typing_extensions import override

from actrec._tables.rows import Rows
from actrec._tables.table import Cells, Column, Table
from actrec._text import count, listed, nearest, shown
from actrec._values.difference import Difference, Mismatch, Tolerances
from actrec._values.spec import leaves
from actrec._values.summary import dtype_name
from actrec.errors import OptionError, UnknownLayerError

from .alike import named_alike
from .recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from .layer import Layer

__all__ = ["Comparison", "Names", "Row", "compare"]

#: How the layers of the first recording are called in the second.
Names: TypeAlias = Mapping[str, str] | Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor that a layer returns, over all calls: see :class:`Comparison`."""

    layer: str
    leaf: str
    other: str
    calls: int
    count: int
    max_abs: float
    max_rel: float
    cosine: float
    equal: bool
    close: bool
    different_pass: int | None
    note: str


class Comparison(Rows[Row]):
    """What :func:`compare` found: a tuple of rows, in execution order, that prints as a table.

    >>> import torch
    >>> from actrec import compare, record
    >>> model = torch.nn.Linear(4, 3)
    >>> with record(model, "") as acts:
    ...     output = model(torch.randn(5, 4))
    >>> [row.equal for row in compare(acts, acts)]
    [True]

    ===================  ==========================================================================
    ``layer``            the name of the layer in the first recording, ``a``
    ``leaf``             which of its tensors: what one writes behind ``a[layer][i]``, such as
                         ``[0]`` or ``['hidden']``; empty if the layer returns one tensor
    ``other``            the name of the layer in the second recording, ``b``
    ``calls``            how many calls were compared
    ``count``            how many elements
    ``max_abs``          the largest absolute difference, ``max |a - b|``
    ``max_rel``          that, divided by the largest finite magnitude in ``b``, ``max |b|``
    ``cosine``           of the angle between all of ``a`` and all of ``b``, seen as two vectors
    ``equal``            same calls, shapes, dtypes and bits
    ``close``            within the tolerances, in every element of every call
    ``different_pass``   the pass of ``a`` with the first difference beyond them, or ``None``
    ``note``             what does not match: numbers of calls, shapes, dtypes, structures
    ===================  ==========================================================================

    The relative error is relative to the layer, not to each element: next to zero, where the elements of
    ReLUs live, a relative difference of elements says nothing.

    NaN agrees with NaN, an infinity with an infinity of its sign. Where only one of the two is finite, or
    only one is NaN, ``max_abs`` is infinite. The cosine is that of the elements that are finite in both.
    What cannot be computed, of no element, is NaN. Of complex numbers the modulus of the difference
    counts, and the real part of the product.
    """

    #: The layers of ``a`` that ``b`` does not have, and those of ``b`` that nothing was compared with.
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Row | None:
        """The row where the recordings first differ by more than the tolerances.

        That is in the earliest pass of ``a``, and there in execution order. ``None`` if they do not differ.
        """
        found = [(row.different_pass, row) for row in self if row.different_pass is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def _title(self) -> str:
        verdicts = [_verdict(row) for row in self if row.calls or not row.close]
        numbers = [
            f"{verdicts.count(verdict):,} {verdict}"
            for verdict in ("equal", "close", "different")
            if verdict in verdicts
        ]
        layers = count(len({row.layer for row in self}), "layer")
        what = f"compared {count(len(self), 'tensor')} of {layers}"
        facts = [f"{what}: {', '.join(numbers)}" if numbers else what]
        if (first := self.first_difference) is not None:
            facts.append(f"first difference in {_place(first)}, pass {first.different_pass}")
        facts += [f"only in a: {listed(self.only_a)}"] * bool(self.only_a)
        facts += [f"only in b: {listed(self.only_b)}"] * bool(self.only_b)
        return "; ".join(facts)

    @override
    def _table(self) -> Table:
        return Table(self._title(), _COLUMNS, [_cells(row) for row in self])


_COLUMNS = (
    Column("layer"),
    *(Column(name, is_number=True) for name in ("calls", "count", "max abs", "max rel", "cosine")),
    Column("verdict"),
    Column("note", is_note=True),
)


def _cells(row: Row) -> Cells:
    errors = (row.max_abs, row.max_rel)
    return (
        _place(row),
        f"{row.calls:,}",
        f"{row.count:,}",
        *("" if math.isnan(error) else f"{error:.3g}" for error in errors),
        "" if math.isnan(row.cosine) else f"{row.cosine:.6f}",
        _verdict(row),
        row.note,
    )


def _place(row: Row) -> str:
    name, other = shown(row.layer), shown(row.other)
    leaf = shown(row.leaf) if row.leaf else ""
    return name + leaf + (f" -> {other}" if other != name else "")


def _verdict(row: Row) -> str:
    if not row.calls and row.close:
        return ""
    if row.equal:
        return "equal"
    return "close" if row.close else "different"


def compare(
    a: Recording[Any],
    b: Recording[Any],
    names: Names | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> Comparison:
    """Compare two recordings, layer by layer and call by call.

    >>> import copy, torch
    >>> from torch import nn
    >>> from actrec import compare, record
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, eps=1e-5), nn.ReLU())
    >>> ported = copy.deepcopy(model)
    >>> ported[1].eps = 1e-2
    >>> with record(model) as a:
    ...     output = model(torch.ones(1, 2))
    >>> with record(ported) as b:
    ...     output = ported(torch.ones(1, 2))
    >>> compare(a, b).first_difference.layer
    '1'

    Nothing is raised for what does not match: numbers of calls, shapes, dtypes and structures are told in
    the rows, and the layers that only one of the two has in ``only_a`` and ``only_b``. The recordings may
    lie in memory or on disk, on different devices, and have different dtypes: numbers are compared in
    float64. Only tensors are compared. Both are read call after call in blocks, so besides them it needs a
    few megabytes, and nothing is changed.

    Args:
        a: a recording.
        b: the recording to compare it with: the one that is right, if one is.
        names: how a layer of ``a`` is called in ``b``, where the names differ: a mapping (what is not in
            it keeps its name), or a function that returns the name, or ``None`` to leave the layer out.
        rtol: elements are close if ``|a - b| <= atol + rtol * |b|``. By default the tolerances are those
            of ``torch.testing.assert_close`` for the less precise of the two dtypes: ``1.3e-6`` and
            ``1e-5`` for float32, ``1e-3`` and ``1e-5`` for float16, ``1.6e-2`` and ``1e-5`` for bfloat16,
            ``1e-7`` both for float64, and 0 for integers and bools.
        atol: see ``rtol``.

    Returns:
        A :class:`Comparison`: a tuple of rows in the execution order of ``a``, which prints as a table.
        ``pandas.DataFrame(compare(a, b))`` makes a data frame of it.

    Raises:
        OptionError: ``a`` or ``b`` is no recording, or another argument cannot be meant.
        UnknownLayerError: a name in the mapping ``names`` is in neither recording.
    """
    _check(a, b, names, rtol=rtol, atol=atol)
    pairs = _pairs(a, b, names)
    tolerances = rtol, atol
    compared = [(name, other) for name, other in pairs if other in b]
    result = Comparison(
        row for name, other in compared for row in _rows(a[name], b[other], tolerances)
    )
    met = {b[other].name for _, other in compared}
    result.only_a = tuple(name for name, other in pairs if other not in b)
    result.only_b = tuple(name for name in b if name not in met)
    return result


def _check(a: object, b: object, names: object, **tolerances: object) -> None:
    for recording in (a, b):
        if not isinstance(recording, Recording):
            message = f"compare(a, b): expected two recordings, got {type(recording).__name__!r}."
            raise OptionError(message)
    if not (names is None or isinstance(names, Mapping) or callable(names)):
        message = (
            f"compare(names={names!r}): expected a mapping from layers of a to layers of b, a function of the name, "
            "or None."
        )
        raise OptionError(message)
    for name, value in tolerances.items():
        if not (value is None or (isinstance(value, Real) and float(value) >= 0)):
            message = f"compare({name}={value!r}): expected a number that is not negative, or None."
            raise OptionError(message)


def _pairs(a: Recording[Any], b: Recording[Any], names: Names | None) -> list[tuple[str, str]]:
    """The layers of ``a``, in execution order, with what they are called in ``b``."""
    if isinstance(names, Mapping):
        _check_mapping(a, b, names)
        keys = {a[name].name: other for name, other in names.items()}
        rename: Callable[[str], str | None] = lambda name: keys.get(name, name)  # noqa: E731
    else:
        rename = names or str
    return [(name, other) for name in a._in_order() if (other := rename(name)) is not None]


def _check_mapping(a: Recording[Any], b: Recording[Any], names: Mapping[str, str]) -> None:
    for name, other in names.items():
        for which, recording, wanted in (("a", a, name), ("b", b, other)):
            if wanted not in recording:
                message = (
                    f"compare(names={{{name!r}: {other!r}}}): {which} has no layer {wanted!r}. "
                    f"{nearest(wanted, recording)}"
                )
                raise UnknownLayerError(message)


# --- One layer ---------------------------------------------------------------------------------------


def _rows(a: Layer[Any], b: Layer[Any], tolerances: Tolerances) -> Iterator[Row]:
    found: dict[str, _Tally] = {}
    for call, (x, y, number) in enumerate(zip(a, b, a.passes, strict=False)):
        xs = dict(leaves(x))
        ys = named_alike(xs, dict(leaves(y)))
        for path in dict.fromkeys([*xs, *ys]):
            tally = found.setdefault(path, _Tally())
            if path in xs and path in ys:
                tally.compare(xs[path], ys[path], call, number, tolerances)
            else:
                tally.differ(number, f"call {call} only in {'a' if path in xs else 'b'}")
    found = found or {"": _Tally()}
    if len(a) != len(b):
        shorter, longer = sorted((a, b), key=len)
        for tally in found.values():
            tally.differ(longer.passes[len(shorter)], f"{len(a):,} and {count(len(b), 'call')}")
    for path, tally in found.items():
        yield tally.row(a.name, path, b.name)


class _Tally:
    """What is known so far about one tensor of a layer."""

    def __init__(self) -> None:
        self.calls = 0
        self.difference = Difference()
        self.equal = True
        self.different_pass: int | None = None
        self.notes: dict[str, None] = {}

    def differ(self, number: int, note: str = "") -> None:
        """Take down that pass ``number`` differs by more than the tolerances."""
        self.equal = False
        if self.different_pass is None or number < self.different_pass:
            self.different_pass = number
        if note:
            self.notes.setdefault(note)

    def compare(self, x: Tensor, y: Tensor, call: int, number: int, tolerances: Tolerances) -> None:
        """Compare what call ``call`` returned here and there."""
        try:
            close = self.difference.add(x, y, tolerances)
        except Mismatch as mismatch:
            self.differ(number, f"call {call}: {mismatch}")
            return
        self.calls += 1
        if x.dtype != y.dtype:
            self.notes.setdefault(f"{dtype_name(x)} and {dtype_name(y)}")
        if not close:
            self.differ(number)

    def row(self, layer: str, leaf: str, other: str) -> Row:
        """Return the row of a table."""
        found = self.difference
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
        )


def _first(notes: Iterable[str], most: int = 2) -> str:
    notes = list(notes)
    more = [f"{len(notes) - most:,} more"] if len(notes) > most else []
    return "; ".join([*notes[:most], *more])
