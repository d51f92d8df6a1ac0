"""Real processes, started by torchrun, that record into one path."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import actrec
from actrec import load, record
from tests.stored import same
from tests.sweep import only_in_sweeps
from tests.torchrun import BATCHES, Layers, batch, network

ROOT = Path(__file__).parents[1]


def torchrun(
    what: str, folder: Path, ranks: int, *options: str, launch: tuple[str, ...] = ("--standalone",)
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", *launch, f"--nproc-per-node={ranks}", *options,
        "-m", "tests.torchrun", what, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)  # fmt: skip


def ran(what: str, ranks: int, folders: pytest.TempPathFactory) -> Path:
    folder = folders.mktemp(what)
    done = torchrun(what, folder, ranks)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran("two", 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran("four", 4, tmp_path_factory)


def in_one_process(model: Any, layers: Any, inputs: list[Tensor]) -> Any:
    with torch.no_grad(), record(model, layers) as acts:
        for x in inputs:
            model(x)
    return acts


def whole(path: Path) -> Any:
    acts = load(path)
    assert acts.complete, repr(acts)
    assert actrec.verify(path) == []
    return acts


def test_what_four_ranks_record_in_parallel_is_row_for_row_what_one_process_records(
    four: Path,
) -> None:
    acts = whole(four / "ddp")
    dealt = [batch(step, rank, 4) for step in range(BATCHES) for rank in range(4)]
    expected = in_one_process(network(), None, dealt)
    assert list(acts) == [*expected, "x"]
    assert acts["x"].ranks == [0, 1, 2, 3] * BATCHES
    assert same(acts["x"].cat(), torch.cat(dealt))
    for name in expected:
        assert same(acts[name].cat(), expected[name].cat()), name
        assert acts[f"module.{name}"].type == expected[name].type
    assert acts.num_passes == BATCHES


def test_ranks_that_begin_at_the_same_moment_never_make_two_recordings(four: Path) -> None:
    for path in (four / "begin").iterdir():
        assert whole(path)[""].cat().flatten().tolist() == [0, 1, 2, 3]


def test_a_fully_sharded_model_is_recorded_as_if_it_were_whole(two: Path) -> None:
    acts = whole(two / "fsdp")
    dealt = [batch(step, rank, 2) for step in range(BATCHES) for rank in range(2)]
    expected = in_one_process(network(), None, dealt)
    assert list(acts) == [*expected, "rank"]
    assert list(acts["rank"]) == [0, 1] * BATCHES
    for name in expected:
        assert torch.allclose(acts[name].cat(), expected[name].cat(), atol=1e-6)
        assert acts[name].type == expected[name].type
    assert repr(acts).startswith("stored Sequential: ")


def test_what_is_sharded_over_two_ranks_is_whole_when_it_is_read(two: Path) -> None:
    acts = whole(two / "tensor_parallel")
    expected = in_one_process(Layers(), ["up", "down", "norm"], [batch(s, 0, 1) for s in range(BATCHES)])  # fmt: skip
    for name in ("up", "down"):
        assert acts[name].ranks == [0] * BATCHES
        assert torch.allclose(acts[name].cat(), expected[name].cat(), atol=1e-6)
    assert torch.allclose(acts.inputs["down"][0]["input"], expected["up"][0].relu(), atol=1e-6)
    assert [acts.rank(rank)["up"][0].shape[1] for rank in (0, 1)] == [4, 3]
    assert acts["norm"].ranks == [0, 1] * BATCHES, "what is no DTensor, each rank has recorded"


def test_the_ranks_of_a_grid_make_one_call_for_each_row_of_it(four: Path) -> None:
    acts = whole(four / "grid")
    dealt = [batch(step, row, 2) for step in range(BATCHES) for row in range(2)]
    expected = in_one_process(Layers(), ["up", "down"], dealt)
    for name in ("up", "down"):
        assert acts[name].ranks == [0, 2] * BATCHES
        assert torch.allclose(acts[name].cat(), expected[name].cat(), atol=1e-6)


def test_recording_never_communicates(two: Path) -> None:
    acts = whole(two / "silent")
    assert acts[""].ranks == [0, 0, 0]
    assert acts[""][0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert acts[""][1].tolist() == [[1, 1], [1, 1]]
    assert [info.num_passes for info in acts.ranks] == [3, 2]


def test_the_stages_of_a_pipeline_do_not_disturb_each_other(four: Path) -> None:
    acts = whole(four / "pipeline")
    assert list(acts) == [f"stage{rank}" for rank in range(4)]
    assert [layer.passes for layer in acts.values()] == [list(range(n + 1)) for n in range(4)]
    assert [layer.ranks for layer in acts.values()] == [[n] * (n + 1) for n in range(4)]
    assert acts.num_passes == 4


@only_in_sweeps
def test_a_rank_that_is_killed_takes_nothing_with_it_and_a_restart_completes_the_run(
    tmp_path: Path,
) -> None:
    done = torchrun("killed", tmp_path, 4, "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-5000:]
    path = tmp_path / "left"
    acts = load(path)
    assert not acts.complete
    assert acts.ranks[2].error == "killed or still recording"
    assert all(info.num_passes for info in acts.ranks), "what they had committed is there"
    assert "killed or still recording" in repr(acts).splitlines()[0]
    assert actrec.verify(path) == []
    dealt = [[batch(step, rank, 4) for step in range(BATCHES)] for rank in range(4)]
    every = [in_one_process(network(), None, x) for x in dealt]
    for rank, expected in enumerate(every):
        for name in expected:
            found = list(acts.rank(rank)[name])
            assert all(same(a, b) for a, b in zip(found, expected[name], strict=False))
            assert len(found) == acts.ranks[rank].num_passes

    acts = whole(tmp_path / "run")
    for rank, expected in enumerate(every):
        assert all(same(acts.rank(rank)[n].cat(), expected[n].cat()) for n in expected)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@only_in_sweeps
def test_a_torchrun_without_a_name_is_known_on_one_machine_and_asks_for_one_on_two(
    tmp_path: Path,
) -> None:
    """``torchrun --master-addr`` gives a run no name."""
    launch = ("--master-addr=127.0.0.1", f"--master-port={free_port()}")
    done = torchrun("one_machine", tmp_path, 2, launch=launch)
    assert done.returncode == 0, done.stderr[-5000:]
    assert whole(tmp_path / "run")[""].ranks == [0, 1]
    again = torchrun("one_machine", tmp_path, 2, launch=launch)
    assert "RecordingExistsError" in again.stderr

    def node(number: int) -> subprocess.CompletedProcess[str]:
        return torchrun("two_machines", tmp_path / "two", 1, "--nnodes=2", f"--node-rank={number}", launch=launch)  # fmt: skip

    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(node, range(2)):
            assert done.returncode == 0, done.stderr[-5000:]
    assert whole(tmp_path / "two/run")[""].ranks == [0, 1]
