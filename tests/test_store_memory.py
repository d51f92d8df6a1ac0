"""Recording more than fits takes no more memory than was allowed."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from tests import memory

if TYPE_CHECKING:
    from pathlib import Path

MIB = memory.MIB


def test_recording_gigabytes_takes_the_budget_and_little_more(tmp_path: Path) -> None:
    stored, recorded, bare = memory.measure(tmp_path, gib=1.5, budget=256 * MIB)
    shutil.rmtree(tmp_path)
    assert stored > 1500 * MIB
    assert 0 < recorded - bare <= (256 + 300) * MIB
