"""Signs that a pass is only a part of a piece of the user's work, such as a step of ``generate()``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actrec._text import count

from .reader import StoredRecording


def steps(path: str, recording: StoredRecording[Any]) -> str | None:
    """Return a warning if passes of a recording without units look like such steps. No calls are read for it."""
    sign = next(_signs(recording), None)
    if sign is None:
        return None
    return (
        f"record(into={path!r}, resume=True): {sign}. If a piece of your work is several passes (a prompt and its tokens, a batch "
        "in chunks), acts.num_passes does not say where to continue: a piece that was begun would be recorded twice, or left out. "
        "Make a unit of each: for key, item in acts.remaining(enumerate(items)): with acts.unit(key): ..."
    )


def _signs(recording: StoredRecording[Any]) -> Iterator[str]:
    passes = recording.num_passes - len(recording.failed_passes)
    added = [layer for layer in recording.values() if layer.type == "added"]
    most = max((layer._per_pass()[1] for layer in added), default=0)
    if 0 < 2 * most <= passes:
        yield f"there are {count(passes, 'pass')}, and values that were added to {most:,} of them"
    for layer in recording.everything():
        for low, high in layer._seen()[0].shapes.values():
            # (batch, tokens, features): a token alone, after several.
            if len(low) > 2 and low[1] == 1 < high[1]:  # noqa: PLR2004
                yield f"layer {layer.name!r} has calls of one position, and others of up to {high[1]:,}, as in generate()"
