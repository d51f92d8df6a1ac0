"""Comparing two recordings layer by layer, to find where a port, a new kernel or a smaller dtype first differs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeAlias

from actrec._progress import showing
from actrec._selection.nearest import nearest
from actrec.errors import OptionError, UnknownLayerError

from .compare_layers import rows
from .comparison import Comparison
from .layer import Layer
from .masks import Mask, Masks
from .recording import Recording

#: The names of the layers of the first recording in the second.
Names: TypeAlias = Mapping[str, str] | Callable[[str], str | None]


def compare(
    a: Recording[Any],
    b: Recording[Any],
    names: Names | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    mask: Mask | None = None,
    progress: bool = False,
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

    A mismatch is reported, never raised: numbers of calls, shapes, dtypes and structures in the rows, layers that only one
    recording has in ``only_a`` and ``only_b``. The recordings may be in memory or on disk, on different devices, and of
    different dtypes: elements are compared in float64. Numbers and NumPy arrays are compared like tensors, texts for equality,
    and objects not at all. Calls are paired by the keys of their units if all have one, else by their order. Both
    recordings are read call by call in blocks of a few megabytes, and not changed.

    Args:
        a: a recording.
        b: the recording to compare it with. Relative errors are relative to it.
        names: the names in ``b`` of the layers of ``a``, where they differ: a mapping (a name that is not in it is the same
            in both), or a function that returns the name, or ``None`` to leave the layer out.
        rtol: elements are close if ``|a - b| <= atol + rtol * |b|``. By default the tolerances are those
            of ``torch.testing.assert_close`` for the less precise of the two dtypes: ``1.3e-6`` and
            ``1e-5`` for float32, ``1e-3`` and ``1e-5`` for float16, ``1.6e-2`` and ``1e-5`` for bfloat16,
            ``1e-7`` both for float64, and 0 for integers and bools.
        atol: see ``rtol``.
        mask: a mask ``(batch, tokens)`` in ``a``, or a function that makes one, as in :meth:`Recording.stats`: positions where it
            is 0, such as padding, are not compared. If it is given by a name, and ``b`` has a mask with that name, that one is used
            for ``b``, so the same tokens may be at other positions. Tensors that do not have these positions are compared in full.
        progress: whether to show the progress, as in :meth:`Recording.stats`.

    Returns:
        A :class:`Comparison`: a tuple of rows in the execution order of ``a``, which prints as a table.
        ``pandas.DataFrame(compare(a, b))`` makes a data frame of it.

    Raises:
        OptionError: an argument is of the wrong type, or a tolerance is negative.
        UnknownLayerError: a key of the mapping ``names`` is not a layer of ``a``, or its value is not a layer of ``b``; or ``a``
            has no mask with that name.
        AlignmentError: a pass has no mask, or no layer has the positions of the mask.
    """
    _check(a, b, names, rtol=rtol, atol=atol)
    pairs = _pairs(a, b, names)
    tolerances = rtol, atol
    masks = None if mask is None else _masks(a, b, mask)
    compared = [(name, other) for name, other in pairs if other in b]
    layers = [(a[name], b[other]) for name, other in compared]
    calls = sum(min(len(one), len(two)) for one, two in layers)
    with showing("compare", calls, progress=progress) as each:
        result = Comparison(
            row for one, two in layers for row in rows(one, two, tolerances, masks, each)
        )
    if masks is not None:
        masks[0].check()
    matched = {b[other].name for _, other in compared}
    result.only_a = tuple(name for name, other in pairs if other not in b)
    result.only_b = tuple(name for name in b if name not in matched)
    return result


def _check(a: object, b: object, names: object, **tolerances: object) -> None:
    for recording in (a, b):
        if not isinstance(recording, Recording):
            message = f"compare(a, b): expected two recordings, such as those of record() and load(), got {type(recording).__name__!r}."
            if isinstance(recording, (str, os.PathLike)):
                message += (
                    f" Open the recording that is stored there: load({os.fspath(recording)!r})."
                )
            if isinstance(recording, Layer):
                message += f" A recording of one layer is acts.select({recording.name!r})."
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
    """Return the names of the layers of ``a``, in execution order, with their names in ``b``."""
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


def _masks(a: Recording[Any], b: Recording[Any], mask: Mask) -> tuple[Masks, Masks | None]:
    """Return the masks of ``a`` and of ``b``; ``None`` for ``b`` if those of ``a`` apply to it too."""
    named = mask[0] if mask and isinstance(mask, tuple) else mask
    is_of_both = callable(named) or (isinstance(named, str) and named in b)
    own = Masks("compare", a, a._run.raised(), mask)
    return own, Masks("compare", b, b._run.raised(), mask) if is_of_both else None
