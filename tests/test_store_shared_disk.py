"""Disks that several machines share, and those that lack locks or hard links: nothing is lost or mixed without a word."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import actrec
from actrec import (
    ActrecError,
    RecordingExistsError,
    UnlockedWarning,
    UnusedLayerWarning,
    load,
    record,
)
from actrec.store import Folder
from actrec.store import disk as _disk
from actrec.store import new_file as _new_file

if TYPE_CHECKING:
    from collections.abc import Iterator


class Twice(nn.Module):
    """Calls its layer twice, and something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.between: Any = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer(x)
        self.between()
        return self.layer(x)


class Run:
    """A run, step by step: it is resumed, has some passes, and ends."""

    def __init__(self, path: Path, value: float, **options: Any) -> None:
        self.value, self.error = value, ""
        self.model = Twice()
        self.block = record(self.model, "layer", into=Folder(path, seconds=0, **options), resume=True)  # fmt: skip
        self.acts = self.block.__enter__()
        self.begun, self.had = True, 0

    def one_pass(self, between: Any = lambda: None) -> None:
        self.model.between = between
        self.said(lambda: self.model(torch.full((1, 2), self.value)))
        self.had += not self.error

    def end(self) -> None:
        self.begun = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusedLayerWarning)  # it may have had no pass
            self.said(lambda: self.block.__exit__(None, None, None))

    def said(self, step: Any) -> None:
        try:
            step()
        except ActrecError as error:
            self.error = str(error)


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


LOCKS = {
    "there are none": no_locks,
    "every machine has its own": lambda *_: None,
}


@pytest.fixture(params=LOCKS)
def _nobody_is_kept_out(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fcntl, "flock", LOCKS[request.param])
    said = pytest.warns(UnlockedWarning) if "none" in request.param else contextlib.nullcontext()
    with said:
        yield


def wait_for_passes(path: Path, count: int) -> None:
    """Wait until so many are committed."""
    while load(path).num_passes < count:
        time.sleep(0.001)


def passes_of(path: Path) -> list[float]:
    """The value of each pass, each of which is whole."""
    assert actrec.verify(path) == []
    acts = load(path)
    if not acts.num_passes:
        return []
    assert acts["layer"].passes == [n for n in range(acts.num_passes) for _ in range(2)]
    values = acts["layer"].cat()[:, 0].view(-1, 2)
    assert (values[:, 0] == values[:, 1]).all(), "the two calls of a pass are those of one run"
    return values[:, 0].tolist()


@pytest.mark.usefixtures("_nobody_is_kept_out")
@pytest.mark.parametrize("seed", range(6))
def test_of_runs_that_resume_one_rank_at_once_each_is_whole_or_says_that_it_is_not(
    tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    options = {
        "shard_bytes": draw.choice([1, 10**6])
    }  # so that passes are written in parts, or not
    path = tmp_path / "r"
    runs: list[Run] = []

    def begin() -> None:
        with contextlib.suppress(RecordingExistsError):
            runs.append(Run(path, len(runs) + 1, **options))

    begin()
    for _ in range(30):
        run = draw.choice(runs)
        step = draw.choice(["begin", "pass", "pass", "pass", "begin between", "end"])
        if step == "begin" and len(runs) < 4:
            begin()
        elif run.begun and step == "end" and draw.random() < 0.3:
            run.end()
        elif run.begun:
            run.one_pass(begin if step == "begin between" and len(runs) < 4 else lambda: None)
        passes_of(path)
    for run in runs:
        if run.begun:
            run.end()
    found = passes_of(path)
    for run in runs:
        assert run.error or found.count(run.value) == run.had, f"run {run.value} has lost passes"
        if run.error:
            assert "another run has" in run.error
    order = list(dict.fromkeys(found))
    assert found == [value for value in order for _ in range(found.count(value))], "none are mixed"
    assert not any(run.error for run in runs) or len(runs) > 1


@pytest.mark.usefixtures("_nobody_is_kept_out")
def test_a_run_that_was_taken_over_learns_it_from_its_next_call_and_where_to_go(
    tmp_path: Path,
) -> None:
    first = Run(tmp_path / "r", 1)
    first.one_pass()
    first.one_pass()
    wait_for_passes(tmp_path / "r", 1)
    second = Run(tmp_path / "r", 2)
    second.one_pass()
    second.end()
    before = passes_of(tmp_path / "r")
    first.one_pass()
    first.end()
    assert "another run has written it" in first.error
    assert "That run continues there; choose another path for this one." in first.error
    assert passes_of(tmp_path / "r") == before
    assert load(tmp_path / "r").complete


@pytest.mark.usefixtures("_nobody_is_kept_out")
def test_a_run_that_ends_after_another_has_gone_on_does_not_speak_for_it(tmp_path: Path) -> None:
    path = tmp_path / "r"
    first = Run(path, 1)
    first.one_pass()
    first.one_pass()
    wait_for_passes(path, 1)
    second = Run(path, 2)
    second.one_pass()
    second.one_pass()
    wait_for_passes(path, 2)
    first.end()
    assert "another run has written it" in first.error
    assert load(path).ranks[0].error == "killed or still recording"
    assert passes_of(path) == [1, 2]
    second.end()
    assert second.error == ""
    assert load(path).complete
    assert passes_of(path) == [1, 2, 2]


CHILD = """
import fcntl, sys, time, torch
from pathlib import Path
from actrec import ActrecError, record
from actrec.store import Folder
fcntl.flock = lambda *_: None  # granted to everybody, as that of a directory is on NFS
path, value = Path(sys.argv[1]), float(sys.argv[2])
model = torch.nn.Identity()
(path.parent / sys.argv[2]).touch()
while len(list(path.parent.glob("?.0"))) < 2:
    time.sleep(0.001)
try:
    with record(model, "", into=Folder(path, seconds=0), resume=True) as acts:
        for _ in range(30):
            model(torch.full((1, 2), value))
            time.sleep(0.002)
    print("whole")
except ActrecError as error:
    print(error)
"""


def test_of_two_processes_that_a_lock_does_not_keep_apart_one_records_and_the_other_says_so(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path / "r")]
    both = [
        subprocess.Popen([*command, str(value)], stdout=subprocess.PIPE, text=True)
        for value in (1.0, 2.0)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    acts = load(tmp_path / "r")
    found = acts[""].cat()[:, 0].tolist()
    assert "whole" in said, said
    for value, text in ((1.0, said[0]), (2.0, said[1])):
        assert found.count(value) == 30 if text == "whole" else "another run" in text
    assert acts.complete
    assert actrec.verify(tmp_path / "r") == []


# --- Locks -------------------------------------------------------------------------------------------


def test_the_lock_is_one_of_a_file_open_for_writing_which_network_file_systems_pass_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, modes = fcntl.flock, []

    def locks(fd: int, how: int) -> None:
        modes.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", locks)
    run = Run(tmp_path / "r", 1)
    with pytest.raises(RecordingExistsError, match="another run is recording there now"):
        Run(tmp_path / "r", 2)
    run.end()
    Run(tmp_path / "r", 3).end()
    assert set(modes) == {os.O_RDWR}
    assert len(modes) >= 3


# --- Names -------------------------------------------------------------------------------------------


def test_a_name_that_was_given_though_the_answer_was_lost_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def lost(*paths: Any) -> None:
        link(*paths)
        raise FileExistsError(errno.EEXIST, "File exists")  # NFS has asked twice

    monkeypatch.setattr(os, "link", lost)
    run = Run(tmp_path / "r", 1)
    for _ in range(3):
        run.one_pass()
    run.end()
    assert (run.error, passes_of(tmp_path / "r")) == ("", [1, 1, 1])


def _no_links(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.usefixtures("_nobody_is_kept_out")
def test_where_there_are_no_links_either_no_shard_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    test_a_run_that_was_taken_over_learns_it_from_its_next_call_and_where_to_go(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_a_process_left_that_was_killed_while_it_gave_a_name_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr(_new_file, "_PATIENCE", 0.05)
    path = tmp_path / "r"
    (path / "rank-00000").mkdir(parents=True)
    (path / "rank-00000/rank.json.turn.tmp").touch()
    (path / "rank-00000/000000.safetensors.turn.tmp").touch()
    run = Run(path, 1)
    run.one_pass()
    run.end()
    assert (run.error, passes_of(path)) == ("", [1])
    assert not list(path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("links", "fails"), [(True, "write"), (True, "link"), (False, "write"), (False, "replace")]
)
def test_a_run_that_could_not_begin_is_not_in_the_way_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, links: bool, fails: str
) -> None:
    def full(*args: Any) -> None:
        if fails == "write":
            os.write(args[0].fd, args[1][:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    model = nn.Identity()
    with monkeypatch.context() as patch:
        owner = {"write": _new_file.FileBeingWritten, "link": os, "replace": Path}[fails]
        patch.setattr(owner, fails, full)
        if fails == "link":
            patch.setattr(_new_file, "_name_without_links", full)
        with pytest.raises(OSError, match="No space left on device"):
            Run(tmp_path / "r", 1)
    with record(model, "", into=tmp_path / "r"):
        model(torch.ones(1))
    assert load(tmp_path / "r").complete
    assert actrec.verify(tmp_path / "r") == []
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.usefixtures("_nobody_is_kept_out")
def test_of_two_runs_that_tidy_up_at_once_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    Run(path, 1).end()
    (path / "rank-00000/000001.safetensors.tmp").touch()
    begin = _disk.Disk.begin
    runs = []

    def late(*args: Any) -> Any:
        monkeypatch.setattr(_disk.Disk, "begin", begin)
        runs.append(Run(path, 2))
        return begin(*args)

    monkeypatch.setattr(_disk.Disk, "begin", late)
    with pytest.raises(RecordingExistsError, match="another run is recording there now"):
        Run(path, 3)
    runs[0].one_pass()
    runs[0].end()
    assert (runs[0].error, passes_of(path)) == ("", [2])


def test_a_file_that_is_tidied_up_before_it_has_its_name_is_told(tmp_path: Path) -> None:
    disk = _disk.Disk(tmp_path)
    unfinished = disk.begin("a", lambda file: file.write(b"ours"))
    disk.sweep()
    with pytest.raises(FileExistsError, match="another run has taken over the folder"):
        unfinished.finish()
    assert disk.names() == []


def test_where_there_are_no_links_a_name_that_was_given_while_one_waited_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = _new_file._take

    def late(turn: Path) -> None:
        take(turn)
        (tmp_path / "a").write_bytes(b"theirs")

    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr(_new_file, "_take", late)
    with pytest.raises(FileExistsError, match="another run has written it"):
        _disk.Disk(tmp_path).begin("a", lambda file: file.write(b"ours")).finish()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"theirs"}
