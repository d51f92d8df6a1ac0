"""The memory of a process: what it holds now, and the most that it holds during some work.

Mapped files do not count: the system takes their pages back whenever it likes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    T = TypeVar("T")


def anonymous() -> int:
    """The bytes that this process holds."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def most_during(work: Callable[[], T]) -> tuple[T, int]:
    """What some work returns, and the most bytes held during it beyond those before."""
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return result, max(most, anonymous()) - before


def printed_by(module: str, call: str) -> list[float]:
    """The numbers that a call of a function in ``module`` prints in a process of its own."""
    code = f"from {module} import {call.partition('(')[0]}; {call}"
    root = Path(__file__).parents[2]
    child = [sys.executable, "-c", code]
    printed = subprocess.run(child, check=True, capture_output=True, text=True, cwd=root).stdout
    return [float(number) for number in printed.split()]
