"""After a kill, a full disk or a failure: every committed pass is there, and the run goes on after it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import actrec
from actrec import (
    CorruptRecordingError,
    RecordingNotFoundError,
    ResumeError,
    WriteError,
    load,
    record,
)
from actrec._text import count
from actrec.store import Folder
from actrec.store import new_file as _new_file
from tests.stored import Net, assert_same, batches, same

if TYPE_CHECKING:
    from pathlib import Path

KIB = 1024
PASSES = 30
KILLS = int(os.environ.get("ACTREC_KILLS", "4"))  # "nox -s crash" asks for many


def run(
    path: Path | str | None, *, passes: int = PASSES, resume: bool = False, **options: Any
) -> Any:
    """The run of all tests here: what it records depends on nothing but the number of the pass."""
    torch.manual_seed(0)
    net = Net()
    into: Any = list if path is None else Folder(path, **options)
    with record(net, inputs=True, into=into, resume=resume) as acts:
        everything = batches(PASSES)
        for step in range(acts.num_passes, passes):
            net(everything[step])
            acts.add("step", {"number": step, "label": torch.tensor([step])})
    return acts


@pytest.fixture(scope="module")
def unbroken() -> Any:
    return run(None)


def assert_is_the_beginning(found: Any, whole: Any) -> None:
    """``found`` has exactly the first passes of ``whole``."""
    for mine, theirs in ((found, whole), (found.inputs, whole.inputs)):
        for name in theirs:
            expected = [
                i for i, number in enumerate(theirs[name].passes) if number < found.num_passes
            ]
            layer = mine.get(name, [])
            assert len(layer) == len(expected)
            assert all(same(layer[i], theirs[name][i]) for i in expected), name


# --- Kill --------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from tests.test_store_resume import run
import actrec.store.disk, actrec.store.new_shard
# Killed anywhere: between any two system calls, and in the middle of a file.
run(sys.argv[1], resume=True, shard_bytes=int(sys.argv[2]), budget=2 * int(sys.argv[2]))
"""


def killed_after(path: Path, seconds: float, shard_bytes: int) -> bool:
    """Start the run in another process, and kill it after it has begun; whether it was still running."""
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(shard_bytes)])
    until = time.monotonic() + 120
    while not (path / "rank-00000/rank.json").exists() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("seed", range(KILLS // 2))
def test_after_a_kill_there_are_the_committed_passes_and_resuming_completes_the_run(
    tmp_path: Path, unbroken: Any, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    path = tmp_path / "r"
    shard_bytes = draw.choice([20, 100, 400]) * KIB
    for _ in range(2):
        killed_after(path, draw.uniform(0, 0.3), shard_bytes)
        found = load(path)
        assert found.num_passes <= PASSES
        assert actrec.verify(path) == []
        assert_is_the_beginning(found, unbroken)
    acts = run(path, resume=True, shard_bytes=shard_bytes)
    assert_same(acts, unbroken)
    assert_same(load(path), unbroken)
    assert load(path).complete
    assert actrec.verify(path) == []
    assert not list(path.rglob("*.tmp"))


class Killed(BaseException):
    """Stands for the end of the process: nothing runs after it."""


def steps_of(path: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None) -> int:
    """Record, and let the disk stop working at step ``stop``, as if the process had been killed there."""
    count = 0

    def step(function: Any) -> Any:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if stop is not None and count >= stop:
                raise Killed
            return function(*args, **kwargs)

        return stepping

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "open"), (os, "fsync"), (os, "link"), (_new_file.FileBeingWritten, "write"), (_new_file.FileBeingWritten, "write_at_start"),
            (type(path), "replace"), (type(path), "mkdir"),
        ):  # fmt: skip
            patch.setattr(owner, name, step(getattr(owner, name)))
        patch.setattr(type(path), "unlink", lambda *_, **__: None)  # the dead tidy nothing up
        with contextlib.suppress(Killed, WriteError):
            run(path, shard_bytes=10**9, seconds=0, passes=2)
    return count


def test_wherever_it_stops_the_committed_passes_are_there_and_resuming_completes_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(None, passes=2)
    steps = steps_of(tmp_path / "all", monkeypatch, None)
    assert steps > 30
    seen = set()
    each = 1 if KILLS > 4 else 3
    for stop in sorted({1, *range(2, steps, each), steps}):
        path = tmp_path / str(stop)
        steps_of(path, monkeypatch, stop)
        try:
            found = load(path)
        except RecordingNotFoundError:
            seen.add(-1)
        else:
            seen.add(found.num_passes)
            assert_is_the_beginning(found, whole)
        assert_same(run(path, passes=2, resume=True), whole)
        assert actrec.verify(path) == []
        assert not list(path.rglob("*.tmp"))
        shutil.rmtree(path)
    assert seen == {-1, 0, 1, 2}


@pytest.mark.parametrize("shard_bytes", [1, 10**6])  # in parts, and whole
def test_what_is_complete_is_committed_in_time_though_no_call_follows(
    tmp_path: Path, shard_bytes: int
) -> None:
    net = Two()
    with record(net, "a", into=Folder(tmp_path / "r", shard_bytes, seconds=0.2)) as acts:
        for _ in range(3):
            net(torch.ones(1))
        until = time.monotonic() + 60
        while load(tmp_path / "r").num_passes < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        acts.add("late", 1)  # the last pass is complete when another one has begun
    assert load(tmp_path / "r").num_passes == 3
    assert load(tmp_path / "r")["late"].passes == [2]


# --- Full disk ---------------------------------------------------------------------------------------

FULL = """
import resource, sys
from actrec import WriteError
from actrec.store import new_file as _new_file
from tests.test_store_resume import run

write, written = _new_file.FileBeingWritten.write, 0

def until_full(file, data):
    global written
    write(file, data)
    written += len(memoryview(data))
    if written > 600_000:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

_new_file.FileBeingWritten.write = until_full
try:
    run(sys.argv[1], shard_bytes=100_000)
except WriteError as error:
    print(error)
    assert isinstance(error.__cause__, OSError)
else:
    sys.exit("no error")
"""


def test_a_full_disk_is_told_and_what_was_committed_stays(tmp_path: Path, unbroken: Any) -> None:
    path = tmp_path / "r"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], check=True, capture_output=True, text=True
    )
    assert "File too large" in done.stdout
    assert str(path) in done.stdout
    found = load(path)
    assert 0 < found.num_passes < PASSES
    assert not found.complete
    assert f"Committed and safe: {count(found.num_passes, 'pass')}" in done.stdout
    assert not list(path.rglob("*.tmp")), "and what could not be finished takes no room"
    assert_is_the_beginning(found, unbroken)
    assert_same(run(path, resume=True), unbroken)
    assert actrec.verify(path) == []


# --- Resume ------------------------------------------------------------------------------------------


def test_resume_begins_a_run_that_is_not_there_and_goes_on_with_one_that_was_finished(
    tmp_path: Path, unbroken: Any
) -> None:
    run(tmp_path / "r", passes=10, resume=True)
    assert load(tmp_path / "r").complete
    acts = run(tmp_path / "r", resume=True)
    assert_same(acts, unbroken)
    assert_same(load(tmp_path / "r"), unbroken)


def test_resume_without_anything_left_to_do_warns_of_nothing(tmp_path: Path) -> None:
    run(tmp_path / "r", passes=3)
    acts = run(tmp_path / "r", passes=3, resume=True)
    assert acts.num_passes == 3
    assert load(tmp_path / "r").complete


def test_a_run_that_is_resumed_knows_what_was_recorded_before(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    with record(net, "", into=tmp_path / "r") as acts:
        net(torch.ones(3, 1))
        acts.add("label", 0)
    with record(net, "", into=tmp_path / "r", resume=True) as acts:
        assert list(acts) == ["", "label"]
        assert (len(acts[""]), acts[""].passes, acts.num_passes) == (1, [0], 1)
        net(torch.ones(2, 1))
        acts.add("new", 1)
        acts.add("label", 1)
        assert (len(acts[""]), acts[""].passes, acts.num_passes) == (2, [0, 1], 2)
        assert repr(acts[""]) == "Layer '' (Linear): 2 calls, (2-3, 1) float32, 20 B"
    assert list(load(tmp_path / "r")) == list(acts) == ["", "label", "new"]
    assert list(acts["label"]) == [0, 1]


def test_a_run_that_is_resumed_knows_the_execution_order_of_what_was_recorded_before(
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    for resume in (False, True):
        with record(net, ["1", "0", ""], into=tmp_path / "r", resume=resume) as acts:
            net(torch.full((1,), torch.inf))
            acts.add("label", 0)
        assert (
            acts.execution_order == load(tmp_path / "r").execution_order == ["0", "1", "", "label"]
        )
    bad = acts.stats().first_nonfinite
    assert bad is not None
    assert bad.layer == "0"


class Two(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.a = nn.Identity()
        self.b = kind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def double(t: torch.Tensor) -> torch.Tensor:
    return t * 2


@pytest.mark.parametrize(
    ("net", "layers", "options", "told"),
    [
        (Two(), "a", {}, r"the layers were \['b'\] then, 'fewer' now"),
        (Two(), ["a", "b", ""], {}, r"the layers were 'fewer' then, \[''\] now"),
        (Two(), ["b", "a"], {}, r"the order of the layers was \['a', 'b'\] then, \['b', 'a'\] now"),
        (Two(nn.ReLU), ["a", "b"], {}, "the type of layer 'b' was 'Identity' then, 'ReLU' now"),
        (Two(), {"a": double, "b": None}, {}, "the transform of layer 'a' was None then, 'double' now"),
        (Two(), ["a", "b"], {"inputs": True}, "inputs was False then, True now"),
        (Two(), ["a", "b"], {"dtype": torch.float16}, "dtype was None then, 'torch.float16' now"),
        (nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()}), ["a", "b"], {}, "the model was 'Two'"),
    ],
)  # fmt: skip
def test_resuming_another_recording_is_refused_and_says_what_differs(
    tmp_path: Path, net: nn.Module, layers: Any, options: Any, told: str
) -> None:
    path = tmp_path / "r"
    model = Two()
    with record(model, ["a", "b"], into=path):
        model(torch.ones(1))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with (
        pytest.raises(ResumeError, match=told),
        record(net, layers, into=path, resume=True, **options),
    ):
        pass
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    with record(model, ["a", "b"], into=path, resume=True):
        model(torch.ones(1))
    assert load(path).num_passes == 2


def test_transforms_are_compared_by_their_names(tmp_path: Path) -> None:
    class Halve:
        def __call__(self, t: torch.Tensor) -> torch.Tensor:
            return t / 2

    model = Two()
    for _ in range(2):
        with record(model, {"a": Halve(), "b": double}, into=tmp_path / "r", resume=True):
            model(torch.ones(1))
    assert load(tmp_path / "r")["a"].stack().tolist() == [[0.5], [0.5]]


def test_parts_of_a_pass_that_was_never_completed_do_not_count_and_never_come_back(
    tmp_path: Path, unbroken: Any
) -> None:
    path = tmp_path / "r"

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    torch.manual_seed(0)
    net = Net()
    everything = batches(PASSES)
    with (
        pytest.raises(ZeroDivisionError),
        record(net, inputs=True, into=Folder(path, 20 * KIB, 40 * KIB)) as acts,
    ):
        for step in range(5):
            if step == 4:
                net.relu.register_forward_hook(stop)
            net(everything[step])
            acts.add("step", {"number": step, "label": torch.tensor([step])})
    found = load(path)
    assert found.num_passes == 4
    left = found._ranks[0].heading.uncounted
    assert left, "some of the fifth pass was on the disk already"
    assert_is_the_beginning(found, unbroken)
    assert actrec.verify(path) == []
    assert_same(run(path, resume=True), unbroken)
    again = load(path)
    heading = again._ranks[0].heading
    assert (heading.parts, heading.void) == ((), left)
    assert actrec.verify(path) == []


def test_a_recording_without_its_description_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path / "r", passes=3)
    (tmp_path / "r/rank-00000/rank.json").unlink()
    with pytest.raises(CorruptRecordingError, match=r"rank.json is damaged: it is missing"):
        run(tmp_path / "r", passes=3, resume=True)
    with pytest.raises(CorruptRecordingError, match=r"rank.json is damaged: it is missing"):
        load(tmp_path / "r")
    assert [problem.split("/")[-1] for problem in actrec.verify(tmp_path / "r")] == [
        "rank.json is damaged: it is missing."
    ]


def test_a_damaged_recording_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path / "r", passes=3, seconds=0)
    (tmp_path / "r/rank-00000/000001.safetensors").unlink()
    with pytest.raises(
        CorruptRecordingError, match=r"000001.safetensors is damaged: it is missing"
    ):
        run(tmp_path / "r", passes=3, resume=True)
