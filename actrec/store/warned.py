"""The warnings at the end of a block, in a file next to the shards, for those who open the recording later."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from actrec.errors import ActrecError

from .description import read_json
from .forms import checked
from .place import Place

_NAME: Final = re.compile(r"warned-[0-9]{1,20}\.json")


def is_warnings(name: str) -> bool:
    """Whether a file in the folder of a rank contains warnings."""
    return _NAME.fullmatch(name) is not None


def keep_warnings(rank: Place, began: int, messages: Sequence[str]) -> None:
    """Write the warnings of a run, if there are any. ``began`` is when it began.

    If the file cannot be written, as on a full disk, there is none: the user gets the warnings anyway.
    """
    if messages:
        content = json.dumps([*messages]).encode()
        with suppress(OSError, ActrecError):
            rank.commit(f"warned-{began}.json", lambda file: file.write(content))


def warnings_of(rank: Place) -> list[str]:
    """Return the warnings of the runs of a rank.

    Raises:
        CorruptRecordingError: a file is damaged.
    """
    names = sorted(filter(is_warnings, rank.names()))
    parsed = partial(checked, form=[str], what="the file")
    return [text for name in names for text in read_json(rank, name, parsed)]
