"""The notes of a report: warnings, and what is missing or odd in a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from actrec._recordings.layer import Layer
from actrec._recordings.recording import Recording
from actrec._recordings.stats import Row
from actrec._text import count, folded, listed, shown

_MOST: Final = 8


def notes(
    acts: Recording[Any], rows: Sequence[Row], left_out: Sequence[Layer[Any]]
) -> Iterator[str]:
    """Yield a sentence for each note.

    Args:
        acts: the recording.
        rows: its statistics.
        left_out: the layers whose calls cannot be read.
    """
    yield from acts._run.warnings()
    for rank in [one for one in getattr(acts, "ranks", ()) if not one.complete][:_MOST]:
        yield f"Rank {rank.number} was not closed properly, and has {count(rank.num_passes, 'pass')}: {rank.error}."
    failed = acts.failed_passes
    if failed:
        some = ", ".join(f"{number:,}" for number in failed[:_MOST])
        more = f" and {len(failed) - _MOST:,} more" if len(failed) > _MOST else ""
        yield f"{count(len(failed), 'pass')} raised: {some}{more}. The calls before the error are there."
    never = [name for name in acts if not len(acts[name])]
    if never:
        yield f"{count(len(never), 'layer')} never called: {listed(folded(never))}."
    if left_out:
        names = [layer.name for layer in left_out]
        yield f"No statistics of {listed(folded(names))}: their calls were not kept, but reduced."
    bad = [row for row in rows if row.nonfinite_pass is not None]
    if bad:
        yield f"NaN or infinity in {_tensors(bad)}."
    dead = [row for row in rows if row.count and row.zeros == 1]
    if dead:
        yield f"Nothing but zeros in {_tensors(dead)}."
    constant = [row for row in rows if row.count > 1 and row.min == row.max != 0]
    if constant:
        yield f"The same number everywhere in {_tensors(constant)}."


def _tensors(rows: Sequence[Row]) -> str:
    names = [shown(row.layer) + row.leaf for row in rows]
    return f"{count(len(rows), 'tensor')}: {listed(names)}"
