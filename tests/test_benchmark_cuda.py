"""The script for machines with a GPU runs its logic here, on the stand-in, and finds what is wrong."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch

from actrec._calls import transfer
from tests.benchmarks import cuda
from tests.stand_in import StandIn, standing_in

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def gpu() -> Iterator[cuda.Gpu]:
    with standing_in(StandIn()):
        yield cuda.Gpu(
            devices=[torch.device("cpu")],
            synchronize=lambda: None,
            new_stream=lambda: None,
            on_stream=nullcontext,
            pinned=lambda n: torch.empty(n, dtype=torch.uint8),
            dtype=torch.float32,
        )


def test_it_checks_measures_and_prints_a_table(gpu: cuda.Gpu, capsys: Any) -> None:
    assert cuda.main(["--quick"], gpu) == 0
    out = capsys.readouterr().out
    for name in cuda.CHECKS:
        assert f"ok     {name}" in out
    assert "time: actrec / .cpu() hooks, 3 layers of 64" in out
    assert cuda.main(["--quick", "--markdown"], gpu) == 0
    assert "| time: actrec / unrecorded" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["an alias in place of a snapshot", "no waiting"])
def test_it_finds_wrong_values(
    broken: str, gpu: cuda.Gpu, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if broken == "no waiting":
        monkeypatch.setattr("tests.stand_in.StandInEvent.synchronize", lambda _: None)
    else:
        monkeypatch.setattr(transfer, "_on_device", lambda tensor, _: tensor)
    assert cuda.main(["--quick"], gpu) == 1
    assert "WRONG  exact, with a write right after every layer" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
