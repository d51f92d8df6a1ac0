"""Layers side by side, as columns of rows: the same calls of each, cut into the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actrec._recordings.passes import nth_calls
from actrec._recordings.recording import Recording
from actrec.errors import AlignmentError, OptionError

from .calls import located
from .columns import columns
from .cutting import cut
from .selecting import is_plain, kind, select

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from actrec._recordings.passes import Moment

    from .calls import Calls
    from .columns import Column
    from .selecting import Selector

__all__ = ["Table", "table"]


@dataclass(frozen=True)
class Table:
    """Columns of as many rows each, and maybe a mask beside them."""

    columns: list[Column]
    mask: Column | None
    origins: tuple[str, ...]  #: what recordings the columns are of; none, if they are in memory
    raised: int  #: how many passes raised, and are left out

    def __len__(self) -> int:
        return len(self.columns[0])


def table(
    call: str,
    recording: Recording[Any],
    selectors: Sequence[Selector],
    *,
    flatten: bool,
    mask: Selector | Tensor | None,
    nth: int | None,
    as_stored: bool = False,
) -> Table:
    """Align the layers, in the order of the calls, or as they lie in the files. See :func:`actrec.data.rows`."""
    given: object = recording
    if not isinstance(given, Recording):
        message = f"{call}: expected a recording, such as actrec.load(path), got {recording!r}."
        raise OptionError(message)
    if not selectors:
        message = f"{call}: no layer was named. {call}(recording, {next(iter(recording), 'name')!r}), say."
        raise OptionError(message)
    answers = _answers(call, mask) if isinstance(mask, Tensor) else None
    masks = [] if mask is None or isinstance(mask, Tensor) else [mask]
    selected = [select(call, recording, selector) for selector in (*selectors, *masks)]
    raised = recording._raised()
    layers = [_counting(call, calls, nth, raised) for calls in located(selected)]
    _check_same_calls(call, layers)
    runs = cut(call, layers, flatten=flatten, masked=bool(masks), answers=answers)
    found = columns(runs, as_stored=as_stored)
    origins = sorted({origin for one in selected for origin in one.origins})
    given_mask = None if mask is None else found.pop()
    return Table(found, given_mask, tuple(origins), len(raised))


def _answers(call: str, mask: Tensor) -> Tensor:
    """A mask that is a tensor, as answers of our own: the user may write to theirs."""
    if not is_plain(mask):
        message = (
            f"{call}(mask={kind(mask)}): expected a plain tensor with one number for each row."
        )
        raise OptionError(message)
    return (mask.detach() != 0).cpu().contiguous()


# --- Which calls count -------------------------------------------------------------------------------


def _counting(call: str, calls: Calls, nth: int | None, raised: AbstractSet[Moment]) -> Calls:
    """Leave out the calls of passes that raised, and all but the n-th of each pass."""
    numbers = {number for _, number in raised}

    def is_good(rank: int | None, number: int) -> bool:
        if number not in numbers:
            return True
        # What knows no rank, a call or a pass, may be of any.
        return rank is not None and not {(rank, number), (None, number)} & raised

    found = [number for number, moment in enumerate(calls.moments) if is_good(*moment)]
    if nth is not None:
        found = nth_calls(f"{call}(nth={nth!r})", calls.title, calls.moments, nth, found)
    return calls.of(found)


def _check_same_calls(call: str, layers: Sequence[Calls]) -> None:
    """Check that all layers have the same calls; one that does not know its ranks goes with a layer of one rank."""
    alone = next((one for one in layers if any(rank is None for rank, _ in one.moments)), None)
    moments = [one.moments for one in layers]
    if alone is not None:
        for one in layers:
            ranks = sorted({rank for rank, _ in one.moments if rank is not None})
            if len(ranks) > 1:
                message = (
                    f"{call}: layer {one.title} was recorded by {len(ranks)} ranks, and {alone.title} is in memory, where "
                    f"nothing says which rank its calls are of. Open one rank, actrec.load(path, rank={ranks[0]}), say."
                )
                raise AlignmentError(message)
        moments = [[(None, number) for _, number in one.moments] for one in layers]
    for other, found in zip(layers[1:], moments[1:], strict=True):
        if found != moments[0]:
            raise _misaligned(call, (layers[0].title, moments[0]), (other.title, found))


def _misaligned(
    call: str, first: tuple[str, list[Moment]], other: tuple[str, list[Moment]]
) -> AlignmentError:
    (title, expected), (name, found) = first, other
    pairs = zip(expected, found, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
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
