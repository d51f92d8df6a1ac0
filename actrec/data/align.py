"""Aligns layers as columns of a table: the same calls of each, cut into the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor

from actrec._recordings.pass_numbers import RankPass, nth_calls
from actrec._recordings.recording import Recording
from actrec.errors import OptionError

from .calls import Calls, located
from .columns import Column
from .cutting import cut
from .kept import last_rows
from .masks import Function, checked, computed, of_rows
from .numbering import integers, numbered
from .origins import ORIGINS, Origins
from .selecting import Selector, select
from .steps import steps

#: A mask of rows: a layer or an added value, a tensor, or a function of the stored values of each pass.
Mask: TypeAlias = Selector | Tensor | Function
#: Whether all layers must have the same passes, or only the common ones are used.
Passes: TypeAlias = Literal["all", "common"]


@dataclass(frozen=True)
class Table:
    """Columns with equally many rows, and perhaps a mask."""

    columns: list[Column]
    mask: Column | None
    where: Origins
    origins: tuple[str, ...]  #: ids of the stored recordings of the columns
    raised: int  #: how many passes raised, and are left out

    def __len__(self) -> int:
        return len(self.columns[0])


@dataclass(frozen=True)
class RowOptions:
    """The user's options for the rows of a table."""

    flatten: bool
    mask: Mask | None
    nth: int | None
    passes: Passes
    last: bool


def table(
    call: str,
    recording: Recording[Any],
    selectors: Sequence[Selector],
    options: RowOptions,
    *,
    as_stored: bool = False,
    number: int = 0,
) -> Table:
    """Align the layers, in the order of the calls, or in that of the files. See :func:`actrec.data.rows`."""
    mask, flatten = options.mask, options.flatten or options.last
    _check(call, recording, selectors, options)
    answers = checked(call, mask) if isinstance(mask, Tensor) else None
    layers = [one for one in selectors if not _is_origin(one, recording)]
    masks = [] if mask is None or isinstance(mask, Tensor) or callable(mask) else [mask]
    selected = [select(call, recording, one) for one in (*layers, *masks)]
    raised = recording._run.raised()
    calls = [_counting(call, calls, options.nth, raised) for calls in located(selected)]
    if callable(mask):
        calls.append(computed(call, recording, mask, calls[0]))
    found = steps(call, calls, flatten=flatten, common=options.passes == "common")
    masked = len(calls) > len(layers)
    columns, where = cut(call, found, flatten=flatten, masked=masked)
    if answers is not None:
        columns.append(of_rows(call, answers, where))
    if options.last:
        beside = columns.pop().joined() if mask is not None else None
        rows = last_rows(where.joined(), beside)
        columns, where, mask = [one.picked(rows) for one in columns], where.picked(rows), None
    if as_stored:
        order = columns[0].place_order()
        columns, where = [one.ordered(order) for one in columns], where.ordered(order)
    columns, where = [one.joined() for one in columns], where.joined()
    given_mask = columns.pop() if mask is not None else None
    own = iter(columns)
    return Table(
        [
            where.column(one, number) if _is_origin(one, recording) else next(own)
            for one in selectors
        ],
        given_mask,
        where,
        tuple(sorted({origin for one in selected for origin in one.origins})),
        len(raised),
    )


def _is_origin(selector: Selector, recording: Recording[Any]) -> TypeGuard[str]:
    """Whether a name is that of a column of origins. A recorded layer with that name takes precedence."""
    return isinstance(selector, str) and selector in ORIGINS and selector not in recording


def _check(
    call: str, recording: Recording[Any], selectors: Sequence[Selector], options: RowOptions
) -> None:
    given: object = recording
    if not isinstance(given, Recording):
        message = f"{call}: expected a recording, such as actrec.load(path), got {recording!r}."
        raise OptionError(message)
    if all(_is_origin(selector, recording) for selector in selectors):
        message = f"{call}: no layer was named. Write {call}(recording, {next(iter(recording), 'name')!r}), for example."
        raise OptionError(message)
    if options.passes not in {"all", "common"}:
        message = (
            f'{call}(passes={options.passes!r}): expected "all", where all layers must have the same passes, or "common", '
            "which leaves out passes that a layer does not have."
        )
        raise OptionError(message)


# --- Which calls count -------------------------------------------------------------------------------


def _counting(call: str, calls: Calls, nth: int | None, raised: AbstractSet[RankPass]) -> Calls:
    """Leave out the calls of passes that raised, and all but the n-th of each pass."""
    if not raised and nth is None:
        return calls
    numbers = {number for _, number in raised}

    def is_bad(rank: int, number: int) -> bool:
        # A call or a pass without a known rank may be of any rank.
        return rank < 0 or bool({(rank, number), (None, number)} & raised)

    maybe = torch.isin(calls.moments[:, 1], integers([*numbers]))
    good = ~maybe
    good[maybe] = torch.tensor(
        [not is_bad(*moment) for moment in calls.moments[maybe].tolist()], device="cpu"
    ).bool()
    found = calls.of(good.nonzero()[:, 0])
    return found if nth is None else found.of(_nth(call, found, nth))


def _nth(call: str, calls: Calls, nth: int) -> Tensor:
    """The n-th call of each pass, of the passes that have so many."""
    passes, _ = numbered(*calls.moments.unbind(1))
    counts = torch.bincount(passes)
    most = max(counts.tolist(), default=0)
    # Which fails for the longest pass, it fails for all.
    nth_calls(f"{call}(nth={nth!r})", calls.title, [(None, 0)] * most, nth)
    order = passes.argsort(stable=True)
    if most < 2:  # noqa: PLR2004
        return order
    at = torch.full_like(counts, nth) if nth >= 0 else counts + nth
    return order[(counts.cumsum(0) - counts + at)[(at >= 0) & (at < counts)]].sort().values
