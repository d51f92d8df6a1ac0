"""Recording more than fits takes no more memory than was allowed."""

from __future__ import annotations

import ctypes
import shutil
from typing import TYPE_CHECKING, Any

from actrec._values import memory as _memory
from tests import memory

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

MIB = memory.MIB


def test_recording_gigabytes_takes_the_budget_and_little_more(tmp_path: Path) -> None:
    stored, recorded, bare = memory.measure(tmp_path, gib=0.75, budget=128 * MIB)
    shutil.rmtree(tmp_path)
    assert stored > 750 * MIB
    assert 0 < recorded - bare <= (128 + 300) * MIB


def test_only_large_shards_are_worth_giving_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(_memory, "_trim", asked.append)
    _memory.give_back(_memory.WORTH_IT - 1)
    assert asked == []
    _memory.give_back(_memory.WORTH_IT)
    assert asked == [0]


def test_another_c_library_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: Any) -> Any:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", without)
    assert _memory._found()(0) == 0
