"""Several ranks record into one path: undisturbed by each other, told apart, and read as one recording."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import FrozenInstanceError
from itertools import count
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import actrec
from actrec import (
    CorruptRecordingError,
    OptionError,
    RecordingExistsError,
    ResumeError,
    _rank,
    load,
    record,
)
from actrec._rank import here
from actrec.store import Folder, RankInfo
from actrec.store import layers as _layers
from actrec.store import opening as _opening
from actrec.store.disk import Disk
from tests.ranked import Same, as_rank, write
from tests.stored import Shards, assert_same, same

if TYPE_CHECKING:
    from collections.abc import Callable

LAUNCHER = re.compile(
    "RANK|WORLD_SIZE|MASTER_|TORCHELASTIC_|LOCAL_|GROUP_|SLURM_|PMI|OMPI_|I_MPI_|PALS_|FLUX_"
)
KILLED = "killed or still recording"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(LAUNCHER.match, list(os.environ)):
        monkeypatch.delenv(name)


def kill(path: Path, rank: int) -> None:
    """Take away the last shard of a rank, which says how the run ended; one with calls is left if there were two."""
    (*_, last) = sorted((path / f"rank-0000{rank}").glob("*.safetensors"))
    last.unlink()


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


# --- Which rank --------------------------------------------------------------------------------------


def test_a_process_that_nobody_launched_is_alone_and_never_the_same_run_again() -> None:
    assert here()[:2] == (0, 1)
    assert here().run != here().run


def test_torchrun_says_which_rank_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert here()[:2] == (3, 8)


@pytest.mark.parametrize(
    ("rank", "ranks"), [("3", None), ("x", "8"), ("3", ""), ("8", "8"), ("-1", "8"), ("1", "10000000")]
)  # fmt: skip
def test_an_environment_that_makes_no_sense_says_nothing(
    monkeypatch: pytest.MonkeyPatch, rank: str, ranks: str | None
) -> None:
    monkeypatch.setenv("RANK", rank)
    if ranks is not None:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    assert here()[:2] == (0, 1)


def test_an_initialised_process_group_knows_better_and_the_user_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with as_rank(1, 2):
        assert here()[:2] == (1, 2)
        assert here(5, 6)[:2] == (5, 6)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert here()[:2] == (3, 8)


def run_of(monkeypatch: pytest.MonkeyPatch, ranks: int = 4, **said: str) -> str | None:
    """The run that a rank belongs to, by what the launcher says."""
    with monkeypatch.context() as patch:
        for name, value in said.items():
            patch.setenv(name, value)
        return here(0, ranks).run


#: What launchers say: of one launch, and of another one.
LAUNCHES = [
    ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "b"}),
    ({"TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "1"}, {"TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "2"}),
    ({"TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "x"}, {"TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "y"}),
    ({"SLURM_JOB_ID": "1001"}, {"SLURM_JOB_ID": "1002"}),
    ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "1"}),
    ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4"}, {"SLURM_JOB_ID": "2", "SLURM_STEP_NUM_TASKS": "4"}),
    ({"SLURM_JOB_ID": "1"}, {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"}),
    ({"PMIX_NAMESPACE": "prterun-a-12@1"}, {"PMIX_NAMESPACE": "prterun-a-13@1"}),
    ({"OMPI_MCA_ess_base_jobid": "1", "OMPI_COMM_WORLD_SIZE": "4"}, {"OMPI_MCA_ess_base_jobid": "2", "OMPI_COMM_WORLD_SIZE": "4"}),
    ({"PMI_JOBID": "1", "PMI_SIZE": "4"}, {"PMI_JOBID": "2", "PMI_SIZE": "4"}),
    ({"I_MPI_HYDRA_UUID": "1"}, {"I_MPI_HYDRA_UUID": "2"}),
    ({"PALS_APID": "1"}, {"PALS_APID": "2"}),
    ({"FLUX_JOB_ID": "f1"}, {"FLUX_JOB_ID": "f2"}),
    # torchrun --master-addr has no name for a run; a torchrun for each node, all of them in one step, is one run.
    ({"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2"},
     {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_JOB_ID": "2", "SLURM_STEP_NUM_TASKS": "2"}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), LAUNCHES)
def test_a_run_is_known_by_what_its_launcher_says_and_by_how_many_ranks_there_are(
    monkeypatch: pytest.MonkeyPatch, one: dict[str, str], other: dict[str, str]
) -> None:
    first = run_of(monkeypatch, **one)
    assert first is not None
    assert first == run_of(monkeypatch, **one)
    assert run_of(monkeypatch, **other) not in {None, first}
    more = {name: value.replace("4", "5") for name, value in one.items()}
    assert run_of(monkeypatch, 5, **more) not in {None, first}
    assert first == run_of(monkeypatch, **one, TORCHELASTIC_RESTART_COUNT="1")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},  # which every script says
        {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"},
    ],
)  # fmt: skip
def test_where_nothing_names_a_run_of_several_ranks_a_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    assert run_of(monkeypatch, **said) is None
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    told = r"rank 1 of 4, and it is unknown of which run.*Folder\(path, run='2026-11-28-a'\)"
    with pytest.raises(OptionError, match=told):
        write(tmp_path / "r", 1, 4, [row(1)], folder={"run": None})
    assert not list(tmp_path.iterdir())
    for rank in range(4):
        write(tmp_path / "r", rank, 4, [row(rank)], folder={"run": "mine"})
    assert load(tmp_path / "r").complete


def test_a_run_that_is_resumed_needs_no_name(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path / "r", rank, 2, [row(rank)], folder={"run": None}, resume=True)
    assert load(tmp_path / "r").complete


def test_the_ranks_of_another_run_are_kept_out_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "r", 0, 2, [row(0)], folder={"run": "a"})
    with pytest.raises(RecordingExistsError, match="this is another run"):
        write(tmp_path / "r", 1, 2, [row(1)], folder={"run": "b"})
    write(tmp_path / "r", 1, 2, [row(1)], folder={"run": "a"})
    assert load(tmp_path / "r").complete


def test_the_processes_of_one_torchrun_know_each_other_by_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``torchrun --master-port`` on one machine has no name for the run either, but is one process."""
    said = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4"}
    first = run_of(monkeypatch, **said)
    assert first == run_of(monkeypatch, **said)
    parent = os.getppid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getppid", os.getpid)  # some other process that there is
        assert run_of(monkeypatch, **said) not in {None, first}
        patch.setattr(os, "getppid", lambda: parent)
        assert run_of(monkeypatch, **said) == first
        patch.setattr(_rank, "Path", lambda _: tmp_path / "no Linux")
        assert run_of(monkeypatch, **said) not in {None, first}


@pytest.mark.parametrize("run", ["", 3, b"a"])
def test_a_name_of_a_run_is_text(run: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(f"Folder(run={run!r}): expected text")):
        Folder("r", run=run)


@pytest.mark.parametrize(
    ("rank", "ranks"), [(0, None), (None, 2), (2, 2), (-1, 2), (0, 0), (True, 2), (1.0, 2), (0, 10**6)]
)  # fmt: skip
def test_a_folder_for_an_impossible_rank_is_refused(rank: Any, ranks: Any) -> None:
    with pytest.raises(OptionError, match=rf"Folder\(rank={rank!r}, world_size={ranks!r}\)"):
        Folder("r", rank=rank, world_size=ranks)


def test_nobody_has_to_say_which_rank_it_is_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Identity()
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
        with record(model, "", into=tmp_path / "r"):
            model(row(rank))
    assert load(tmp_path / "r")[""].cat().tolist() == [[0], [1]]
    assert load(tmp_path / "r").complete


# --- Reading -----------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Three ranks: rank 0 has two passes, rank 2 three, one of which calls the layer twice."""
    path = tmp_path / "r"
    write(path, 2, 3, [row(20), (row(21), row(21.5)), row(22)])
    write(path, 0, 3, [row(0), row(1)])
    write(path, 1, 3, [row(10), row(11)])
    return path


def test_calls_are_ordered_by_pass_and_then_by_rank(uneven: Path) -> None:
    layer = load(uneven)["layer"]
    assert layer.cat().flatten().tolist() == [0, 10, 20, 1, 11, 21, 21.5, 22]
    assert layer.passes == [0, 0, 0, 1, 1, 1, 1, 2]
    assert layer.ranks == [0, 1, 2, 0, 1, 2, 2, 2]
    assert layer.stack().shape == (8, 1, 1)


PASSES = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 2), st.integers(0, 3)), max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(PASSES, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bool, torch.complex64, torch.float8_e5m2]),
    width=st.integers(0, 3),
    piece=st.sampled_from([1, 8, 1 << 22]),
)
def test_ranks_are_joined_as_if_call_by_call(
    ranks: list[list[tuple[int, int, int]]], dtype: torch.dtype, width: int, piece: int
) -> None:
    """Each rank has passes, some of them without a call, with calls of so many rows; each pass or two are a shard."""
    numbers = count(1)
    with tempfile.TemporaryDirectory() as folder:
        for rank, passes in enumerate(ranks):
            shards = Shards(Path(folder), ["a"], rank=rank, ranks=len(ranks))
            number, calls = 0, []
            for at, (skipped, many, rows) in enumerate(passes):
                number += skipped
                for _ in range(many):
                    value = torch.full((rows, width), next(numbers) % 7, dtype=torch.float32)
                    calls.append((0, number, value.to(dtype)))
                number += 1
                if at % 2:
                    shards.write(calls, number)
                    calls = []
            shards.write(calls, number, ended="")
        layer = load(folder).get("a", [])
        one = [*layer]
        with mock.patch.object(_layers, "_PIECE", piece):
            if not one:
                return
            assert same(layer.cat(), torch.cat(one))
            if len({value.shape for value in one}) == 1:
                assert same(layer.stack(), torch.stack(one))


def test_calls_of_ranks_are_joined_without_reading_them_one_by_one(
    uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = load(uneven)["layer"]
    monkeypatch.setattr(type(layer), "_call", None)
    assert layer.cat().flatten().tolist() == [0, 10, 20, 1, 11, 21, 21.5, 22]


def test_the_ranks_of_a_single_process_are_zero(tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=tmp_path / "r"):
        for _ in range(3):
            model(row(0))
    acts = load(tmp_path / "r")
    assert acts[""].ranks == [0, 0, 0]
    assert acts.ranks == (RankInfo(0, 3, complete=True, error=None),)
    assert_same(acts.rank(0), acts)


def test_each_rank_counts_its_own_passes_and_the_recording_those_of_the_rank_with_most(
    uneven: Path,
) -> None:
    acts = load(uneven)
    assert acts.num_passes == 3
    assert acts.complete
    assert acts.ranks == tuple(RankInfo(n, p, complete=True, error=None) for n, p in ((0, 2), (1, 2), (2, 3)))  # fmt: skip
    assert repr(acts).splitlines()[0] == "stored Same: 1 layer, 3 passes, 32 B"
    with pytest.raises(FrozenInstanceError):
        acts.ranks[0].number = 3  # type: ignore[misc]


def test_one_rank_can_be_read_alone(uneven: Path) -> None:
    acts = load(uneven)
    for one in (acts.rank(2), load(uneven, rank=2), copy.copy(acts).rank(2), pickle.loads(pickle.dumps(acts)).rank(2)):  # fmt: skip
        assert one["layer"].cat().flatten().tolist() == [20, 21, 21.5, 22]
        assert one["layer"].ranks == [2, 2, 2, 2]
        assert one.ranks == (RankInfo(2, 3, complete=True, error=None),)
        assert one.num_passes == 3
        assert one.complete
        with pytest.raises(OptionError, match="the recording has only rank 2"):
            one.rank(0)
    for wrong in (3, -1, "0", True):
        with pytest.raises(OptionError, match=r"there is no such rank; .* ranks 0 to 2"):
            acts.rank(wrong)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=r"load\(.*, rank=.*ranks 0 to 2"):
            load(uneven, rank=wrong)  # type: ignore[arg-type]


def test_what_a_rank_sees_after_its_block_is_its_own(tmp_path: Path) -> None:
    write(tmp_path / "r", 0, 2, [row(0), row(1), row(2)])
    acts = write(tmp_path / "r", 1, 2, [row(10)])
    assert acts["layer"].cat().tolist() == [[10]]
    assert acts.num_passes == len(acts["layer"]) == 1


class Stage(nn.Module):
    """A stage of a pipeline."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Last(Stage):
    pass


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_may_record_different_layers_whoever_is_first(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    path = tmp_path / "r"
    stages = [Stage("c", "a"), Stage("d", "a"), Last("b")]
    for rank in order:
        write(path, rank, 3, [row(rank)] * (rank + 1), model=stages[rank], layers=None, inputs=rank == 1)  # fmt: skip
    acts = load(path)
    assert list(acts) == ["c", "a", "d", "b"]
    assert repr(acts).startswith("stored Stage, Last: 4 layers, 3 passes")
    assert {name: layer.ranks for name, layer in acts.items()} == {"c": [0], "a": [0, 1, 1], "d": [1, 1], "b": [2, 2, 2]}  # fmt: skip
    assert list(acts.rank(2)) == ["b"]
    assert acts.inputs["d"].ranks == [1, 1]
    assert not hasattr(acts.rank(0), "inputs")
    assert actrec.verify(path) == []
    assert sorted(path.rglob("rank.json")) == [path / f"rank-0000{n}/rank.json" for n in range(3)]


def test_every_rank_finds_its_layers_by_the_names_it_used(tmp_path: Path) -> None:
    shared = nn.Identity()
    model = nn.ModuleDict({"a": shared, "b": shared})
    model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[method-assign]
    for rank, layer in enumerate("ab"):
        write(tmp_path / "r", rank, 2, [row(1)], model=model, layers=layer)
    acts = load(tmp_path / "r")
    assert list(acts) == ["a", "b"]
    assert acts.rank(1)["a"].ranks == acts["b"].ranks == [1, 1]


def test_a_recording_that_is_not_whole_says_which_ranks_are_not(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for rank in (0, 1, 2, 4):
        with suppress(ZeroDivisionError):
            write(
                path,
                rank,
                6,
                (row(1 / (rank != 1 or turn)) for turn in (1, 0)),
                folder={"seconds": 0},
            )
        if rank in {2, 4}:
            kill(path, rank)
    acts = load(path)
    assert not acts.complete
    assert [info.error for info in acts.ranks] == [None, "left by ZeroDivisionError", KILLED, "wrote nothing", KILLED, "wrote nothing"]  # fmt: skip
    assert repr(acts).splitlines()[0] == (
        "stored Same (incomplete: rank 1 left by ZeroDivisionError; ranks 2 and 4 killed or still recording; "
        "ranks 3 and 5 wrote nothing): 1 layer, 2 passes, 16 B"
    )
    assert acts.rank(0).complete
    assert not acts.rank(2).complete
    assert repr(acts.rank(2)).startswith("stored Same (incomplete): ")
    assert list(acts.rank(3)) == list(load(path, rank=3)) == []
    assert acts.rank(3).num_passes == 0
    assert [info.num_passes for info in acts.ranks] == [2, 0, 1, 0, 1, 0]


def test_of_many_ranks_that_are_missing_some_are_named(tmp_path: Path) -> None:
    write(tmp_path / "r", 0, 20, [row(0)])
    assert "(incomplete: ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more wrote nothing)" in repr(load(tmp_path / "r"))  # fmt: skip


def test_a_rank_that_has_not_written_anything_yet_is_no_obstacle(uneven: Path) -> None:
    shutil.rmtree(uneven / "rank-00001")
    (uneven / "rank-00001").mkdir()
    (uneven / "rank-00001/000000.safetensors.tmp").touch()
    acts = load(uneven)
    assert acts.ranks[1] == RankInfo(1, 0, complete=False, error="wrote nothing")
    assert acts["layer"].ranks == [0, 2, 0, 2, 2, 2]
    shutil.copy(uneven / "rank-00000/rank.json", uneven / "rank-00001")
    acts = load(uneven)
    assert acts.ranks[1] == RankInfo(1, 0, complete=False, error=KILLED)
    assert acts["layer"].ranks == [0, 2, 0, 2, 2, 2]
    for rank in (0, 2):
        shutil.rmtree(uneven / f"rank-0000{rank}")
    assert len(load(uneven)["layer"]) == 0
    assert [info.error for info in load(uneven).ranks] == ["wrote nothing", KILLED, "wrote nothing"]


def test_a_damaged_rank_is_named_and_the_others_can_be_read(uneven: Path) -> None:
    shard = uneven / "rank-00001/000000.safetensors"
    shard.write_bytes(b"")
    with pytest.raises(CorruptRecordingError, match=r"rank-00001/000000.safetensors is damaged"):
        load(uneven)
    assert len(load(uneven, rank=0)["layer"]) == 2
    assert any("rank-00001" in problem for problem in actrec.verify(uneven))


# --- Two runs by mistake -----------------------------------------------------------------------------


def files(path: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in path.rglob("*")}


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ((0, 2), (0, 2), "there is a recording already"),
        ((0, 2), (1, 3), "a run of 2 ranks records there, or has recorded, and this is another run"),
        ((0, 1), (1, 2), "a single process records there, or has recorded, and this is another run"),
        ((0, 1), (0, 2), "there is a recording already"),
        ((1, 2), (0, 1), "a run of 2 ranks records there, or has recorded, and this is another run"),
    ],
)  # fmt: skip
def test_two_runs_into_one_path_are_refused_and_nothing_is_touched(
    tmp_path: Path, first: tuple[int, int], second: tuple[int, int], told: str
) -> None:
    path = tmp_path / "r"
    write(path, *first, [row(0)])
    before = files(path)
    with pytest.raises(RecordingExistsError, match=told):
        write(path, *second, [row(1)])
    assert files(path) == before


def test_the_same_command_once_more_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    write(tmp_path / "r", 0, 2, [row(0)], folder={"run": None})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    with pytest.raises(RecordingExistsError, match="this is another run"):
        write(tmp_path / "r", 1, 2, [row(0)], folder={"run": None})
    assert not (tmp_path / "r/rank-00001").exists()


def at_the_last_moment(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen once, when a rank has looked what is there and has not yet said that it records."""
    commit = Disk.commit

    def late(disk: Disk, name: str, write: Any) -> None:
        if name == "rank.json":
            monkeypatch.setattr(Disk, "commit", commit)
            happens()
        commit(disk, name, write)

    monkeypatch.setattr(Disk, "commit", late)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("other", [(1, 3), (1, 2)])
def test_a_run_that_was_first_between_two_looks_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tuple[int, int], *, resume: bool
) -> None:
    path = tmp_path / "r"
    at_the_last_moment(monkeypatch, lambda: write(path, 0, 2, [row(0)]))
    if other == (1, 2):
        write(path, *other, [row(1)], resume=resume)
        assert load(path)["layer"].ranks == [0, 1]
    else:
        with pytest.raises(RecordingExistsError, match="this is another run"):
            write(path, *other, [row(1)], resume=resume)
        assert [file.name for file in (path / "rank-00001").iterdir()] == ["writer.lock"]
        assert load(path)["layer"].ranks == [0]
        write(path, 1, 2, [row(1)])
        assert load(path).complete
    assert actrec.verify(path) == []


def test_ranks_of_different_recordings_in_one_folder_are_named_and_can_be_read_alone(
    tmp_path: Path,
) -> None:
    for rank, name in enumerate("aab"):
        write(tmp_path / name, rank, 3, [row(rank)], folder={"run": name})
    shutil.move(tmp_path / "b/rank-00002", tmp_path / "a")
    told = r"ranks 0 and 2 in it belong to different recordings. load\(path, rank=...\) opens one of them"
    with pytest.raises(CorruptRecordingError, match=told):
        load(tmp_path / "a")
    assert any("different recordings" in problem for problem in actrec.verify(tmp_path / "a"))
    assert [load(tmp_path / "a", rank=n)["layer"][0].item() for n in range(3)] == [0, 1, 2]
    with pytest.raises(
        RecordingExistsError, match=r"a run of 3 ranks records there, .* another run"
    ):
        write(tmp_path / "a", 3, 4, [], folder={"run": "a"})


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("resume", [True, False])
def test_ranks_that_begin_at_the_same_moment_make_one_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, links: bool, resume: bool
) -> None:
    ranks = 6
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    with ThreadPoolExecutor(ranks) as threads:
        for turn in range(10):
            together = Barrier(ranks)

            def begin(rank: int, path: Path, together: Barrier) -> None:
                together.wait()
                write(path, rank, ranks, [row(rank)], model=Stage("a" * (rank % 2 + 1)), layers=None, resume=resume)  # fmt: skip

            path = tmp_path / str(turn)
            jobs = [threads.submit(begin, rank, path, together) for rank in range(ranks)]
            assert [job.exception() for job in jobs] == [None] * ranks
            acts = load(path)
            assert acts.complete
            assert acts["a"].ranks == [0, 2, 4]
            assert acts["aa"].ranks == [1, 3, 5]
            assert actrec.verify(path) == []
            assert not list(path.rglob("*.tmp"))


def test_of_two_runs_that_begin_at_the_same_moment_at_most_one_records(tmp_path: Path) -> None:
    outcomes = []
    for turn in range(20):
        path = tmp_path / str(turn)
        together = Barrier(4)

        def begin(rank: int, ranks: int, path: Path, together: Barrier) -> str:
            together.wait()
            try:
                write(path, rank, ranks, [row(rank)])
            except RecordingExistsError as error:
                return str(error)
            return f"run of {ranks}"

        with ThreadPoolExecutor(4) as threads:
            who = [(0, 2), (1, 2), (0, 3), (1, 1 + turn % 2 * 2)]
            who[3] = (0, 1) if turn % 2 == 0 else who[3]
            done = list(threads.map(lambda w, p=path, t=together: begin(*w, p, t), who))
        recorded = {text for text in done if text.startswith("run of")}
        assert len(recorded) <= 1
        assert all("Continue it" in text or "Choose another" in text for text in done if text not in recorded)  # fmt: skip
        assert not recorded or actrec.verify(path) == []
        outcomes += recorded
    assert outcomes, "as a rule, one of them gets there"


def test_a_run_that_has_taken_back_its_beginning_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "r", 1, 3, [row(1)])

    def taken_back(_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(_opening, "read_description", taken_back)
    assert write(tmp_path / "r", 0, 2, [row(0)]).num_passes == 1


def _no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


# --- Going on ----------------------------------------------------------------------------------------


def test_every_rank_goes_on_where_it_was(uneven: Path) -> None:
    assert write(uneven, 2, 3, [row(23)], resume=True).num_passes == 4
    assert write(uneven, 0, 3, [row(2)], resume=True)["layer"].passes == [0, 1, 2]
    acts = load(uneven)
    assert acts["layer"].cat().flatten().tolist() == [0, 10, 20, 1, 11, 21, 21.5, 2, 22, 23]
    assert acts.complete


def test_a_new_launch_goes_on_with_more_ranks_and_with_fewer(
    uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1234")
    write(uneven, 4, 5, [row(40)], resume=True)
    acts = load(uneven)
    assert [info.error for info in acts.ranks] == [None, None, None, "wrote nothing", None]
    write(uneven, 1, 5, [row(12)], resume=True)
    shutil.rmtree(uneven / "rank-00004")
    assert len(load(uneven).ranks) == 5, "rank 1 remembers that there were five"
    write(uneven, 0, 1, [row(2)], resume=True)
    acts = load(uneven)
    assert [info.num_passes for info in acts.ranks] == [3, 3, 3]
    assert acts.complete
    assert actrec.verify(uneven) == []


@pytest.mark.parametrize("first", [0, 1])
def test_fewer_ranks_than_before_complete_a_recording_and_keep_what_the_others_have_committed(
    tmp_path: Path, first: int
) -> None:
    path = tmp_path / "r"
    for rank in (0, 1, 2):  # and rank 3 wrote nothing
        with suppress(ZeroDivisionError):
            write(
                path,
                rank,
                4,
                (row(rank, 1 / (rank != 1 or turn)) for turn in (1, 0)),
                folder={"seconds": 0},
            )
    kill(path, 2)
    assert "rank 2 killed or still recording; rank 3 wrote nothing" in repr(load(path))
    before = load(path)["layer"].cat().tolist()
    assert [info.num_passes for info in load(path).ranks] == [2, 0, 1, 0]
    write(path, first, 2, [row(8, 8)], resume=True)
    acts = load(path)
    assert acts.complete == (first == 1), "rank 0 was closed, and rank 1 was not"
    write(path, 1 - first, 2, [row(9, 9)], resume=True)
    acts = load(path)
    assert acts.complete
    assert repr(acts).startswith("stored Same: ")
    assert [info.error for info in acts.ranks] == [None, None, KILLED]
    assert all(number in acts["layer"].cat().tolist() for number in before)
    assert actrec.verify(path) == []


def test_once_there_are_more_ranks_again_they_count_again_whoever_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    for rank in (0, 2):
        write(path, rank, 3, [row(rank)])
    assert not load(path).complete
    write(path, 0, 1, [row(0)], resume=True)
    assert load(path).complete
    write(path, 1, 3, [row(1)], resume=True)
    monkeypatch.setattr(time, "time_ns", lambda: 1)  # and the clock is put back
    with record(Same(), "layer", into=Folder(path, rank=0, world_size=3), resume=True):
        assert repr(load(path)).startswith("stored Same (incomplete: rank 0 killed or still")
    assert load(path).complete
    monkeypatch.undo()
    with record(Same(), "layer", into=Folder(path, rank=2, world_size=3), resume=True):
        assert repr(load(path)).startswith("stored Same (incomplete: rank 2 killed or still")
    assert load(path).complete


def test_a_rank_is_compared_with_what_it_recorded_itself(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for rank, names in enumerate(("a", "b")):
        write(path, rank, 2, [row(rank)], model=Stage(names), layers=None)
    before = files(path)
    for rank, name, told in ((0, "b", r"\['a'\] then, \['b'\] now"), (1, "a", r"\['b'\] then, \['a'\] now")):  # fmt: skip
        with pytest.raises(ResumeError, match=told):
            write(path, rank, 2, [row(0)], model=Stage(name), layers=None, resume=True)
    assert files(path) == before
    write(path, 1, 2, [row(2)], model=Stage("b"), layers=None, resume=True)
    assert load(path)["b"].cat().tolist() == [[1], [2]]


def test_a_rank_that_was_killed_before_it_wrote_anything_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write(path, 0, 2, [row(0)])
    (path / "rank-00001").mkdir()
    (path / "rank-00001/rank.json.tmp").write_text("{")
    write(path, 1, 2, [row(1)], model=Stage("x"), layers=None, resume=True)
    acts = load(path)
    assert (list(acts), acts.complete) == (["layer", "x"], True)
    assert not list(path.rglob("*.tmp"))


def test_a_recording_without_its_description_is_not_begun_anew_by_another_rank(
    uneven: Path,
) -> None:
    (uneven / "rank-00001/rank.json").unlink()
    shutil.rmtree(uneven / "rank-00002")
    for rank in (1, 2):
        with pytest.raises(CorruptRecordingError, match=r"1/rank.json is damaged: it is missing"):
            write(uneven, rank, 3, [row(0)])
    with pytest.raises(CorruptRecordingError, match=r"1/rank.json is damaged: it is missing"):
        write(uneven, 1, 3, [row(0)], resume=True)
    with pytest.raises(CorruptRecordingError, match=r"1/rank.json is damaged: it is missing"):
        load(uneven)
    assert any("1/rank.json is damaged" in problem for problem in actrec.verify(uneven))
    assert len(load(uneven, rank=0)["layer"]) == 2


def test_a_rank_is_recorded_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "r"
    model = Same()
    with record(model, "layer", into=Folder(path, rank=0, world_size=2, run="of the test")):
        model(row(0))
        with pytest.raises(RecordingExistsError, match="another run is recording there now"):
            write(path, 0, 2, [], resume=True)
        write(path, 1, 2, [row(1)])
    assert load(path).complete


# --- Damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("[", "it is not JSON"),
        ("[]", "the file is [], which is not a JSON object"),
        ({"recording": "x"}, "it says that it belongs to recording"),
        ({"recording": None}, "the file has no 'recording'"),
        ({"ranks": None}, "the file has no 'ranks'"),
        ({"ranks": 0}, "it is of a run of 0 ranks"),
        ({"ranks": 10**9}, "it is of a run of 1000000000 ranks, and a run has from 1 to 100000"),
        ({"ranks": True}, "the file.ranks is True"),
        ({"began": -1}, "the file.began is -1"),
        ({"model": 3}, "the file.model is 3, which is not a string"),
        ({"options": None}, "the file has no 'options'"),
        ({"options": {"inputs": True}}, "the file.options has no 'grads'"),
        ({"layers": {}}, "the file.layers is {}, which is not a list"),
        ({"layers": [{"name": "a"}]}, "the file.layers[0] has no 'type'"),
        ({"layers": [0] * 200_000}, "layers[0] is 0, which is not a JSON object"),
        ("{" + " " * (1 << 24) + "}", "it has 16777218 bytes, and 16777216 is the limit"),
        ({"names": None}, "the file has no 'names'"),
        ({"names": {"a": 1}}, "names.a is 1, which is not a string"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_description_of_a_rank_is_named(
    tmp_path: Path, change: Any, told: str, rank: int
) -> None:
    path = tmp_path / "r"
    for number in range(2):
        write(path, number, 2, [row(number)], model=Stage("ab"[number]), layers=None)
    file = path / f"rank-0000{rank}/rank.json"
    if isinstance(change, dict):
        content = json.loads(file.read_text()) | change
        change = json.dumps({key: value for key, value in content.items() if value is not None})
    file.write_text(change)
    with pytest.raises(CorruptRecordingError, match=" is damaged: ") as caught:
        load(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{file} is damaged: ") or change.count('"x"')
    assert str(caught.value) in actrec.verify(path)


def test_every_damaged_rank_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for rank in range(3):
        write(path, rank, 3, [row(rank)], model=Stage("abc"[rank]), layers=None)
        (path / f"rank-0000{rank}/000000.safetensors").write_text("{}")
    for rank in (1, 2):
        (path / f"rank-0000{rank}/rank.json").write_text("")
    problems = "\n".join(actrec.verify(path))
    for file in ("rank-00001/rank.json", "rank-00002/rank.json", "rank-00000/000000.safetensors", "rank-00001/000000.safetensors"):  # fmt: skip
        assert f"{file} is damaged" in problems


def test_what_was_saved_from_memory_is_one_rank(tmp_path: Path) -> None:
    model = Same()
    with record(model, "layer") as acts, as_rank(1, 2):
        model(row(1))
        acts.save(tmp_path / "r")
    assert load(tmp_path / "r").complete
    assert same(load(tmp_path / "r").rank(0)["layer"][0], row(1))
