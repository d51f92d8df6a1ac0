"""Import time, in fresh interpreters that take turns."""

from __future__ import annotations

import compileall
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import actrec

from .timing import Row, ratios, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET = 1.03

_CHILD = """
from time import process_time
start = process_time()
import {modules}
print(process_time() - start)
"""


def measure(*, quick: bool) -> Iterator[Row]:
    compileall.compile_dir(Path(actrec.__file__).parent, quiet=1)  # as installing it does
    variants = {
        "torch": partial(_seconds_to_import, "torch"),
        "both": partial(_seconds_to_import, "torch, actrec"),
    }
    times = take_turns(variants, rounds=1 if quick else 15)
    name = "import: torch and actrec / torch"
    yield Row.of(name, ratios(times, "both", "torch"), TARGET)


def _seconds_to_import(modules: str) -> float:
    child = [sys.executable, "-c", _CHILD.format(modules=modules)]
    return float(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
