"""Layers side by side, as columns of rows: the same calls of each, cut into the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actrec._recordings.recording import Recording
from actrec.errors import OptionError

from .calls import located, side_by_side
from .columns import coalesced
from .cutting import Cut
from .picking import check_calls, pick
from .selecting import is_plain, kind, select

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    chosen = [*selectors, *([] if mask is None or isinstance(mask, Tensor) else [mask])]
    raised = recording._raised()
    selected = [select(call, recording, selector) for selector in chosen]
    pairs = zip(selected, located(selected), strict=True)
    picks = [pick(one, calls, nth, raised) for one, calls in pairs]
    check_calls(call, picks)
    cut = Cut(call, picks, flatten=flatten, masked=len(chosen) > len(selectors), answers=answers)
    runs = cut.runs(side_by_side([one.stretches for one in picks]))
    columns = cut.columns(coalesced(runs, cut.widths) if as_stored else runs)
    origins = sorted({origin for one in selected for origin in one.origins})
    found = columns[: len(selectors)], None if mask is None else columns[-1]
    return Table(*found, tuple(origins), len(raised))


def _answers(call: str, mask: Tensor) -> Tensor:
    """A mask that is a tensor, as answers of our own: the user may write to theirs."""
    if not is_plain(mask):
        message = (
            f"{call}(mask={kind(mask)}): expected a plain tensor with one number for each row."
        )
        raise OptionError(message)
    return (mask.detach() != 0).cpu().contiguous()
