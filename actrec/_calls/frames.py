"""Whose code a frame of Python's stack runs."""

from __future__ import annotations

import os
from pathlib import Path
from types import FrameType
from typing import Final

#: The folder that the files of actrec are in.
_PACKAGE: Final = f"{Path(__file__).parents[1]}{os.sep}"


def is_ours(frame: FrameType) -> bool:
    """Whether the code of a frame is actrec's. Examples in its docstrings are a user's."""
    return frame.f_code.co_filename.startswith(_PACKAGE)
