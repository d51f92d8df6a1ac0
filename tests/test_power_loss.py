"""After a power loss, at any call and whatever it leaves of what no ``fsync`` covers, nothing that was committed is lost or wrong."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import actrec
from actrec import RecordingNotFoundError, WriteError, load, record
from actrec.store import Folder
from tests.power import Choice, Fault, Journal, contents
from tests.stored import assert_same, same

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from actrec import Recording

# Of each run; "nox -s crash" asks for all.
CUTS = int(os.environ.get("ACTREC_CUTS", "6"))
FAULTS = int(os.environ.get("ACTREC_FAULTS", "4"))
PASSES = 4

NOTHING = Choice(names=False, sizes=False, data=False)
ALL = Choice(names=True, sizes=True, data=True)
CHOICES = [
    NOTHING,
    ALL,
    Choice(names=True, sizes=False, data=False),  # files that are empty
    Choice(names=True, sizes=True, data=False),  # files of zeros
    Choice(names=False, sizes=True, data=True),
    *(Choice(names=True, sizes=True, data=True, seed=seed) for seed in range(5)),
]


class Net(nn.Module):
    """Two layers, one of which writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 64)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.head(x))  # type: ignore[no-any-return]


def go_on(into: Any, *, passes: int = PASSES, resume: bool = False, stop: bool = False) -> Any:
    """Record what is missing: what is recorded depends on nothing but the number of the pass."""
    torch.manual_seed(0)
    net = Net()
    batches = torch.randn(PASSES, 8, 64)
    with torch.no_grad(), record(net, inputs=True, into=into, resume=resume) as acts:
        for number in range(acts.num_passes, passes):
            net(batches[number])
            acts.add("step", {"number": number, "label": torch.tensor([number])})
        if stop:
            raise ZeroDivisionError
    return acts


@cache
def unbroken() -> Any:
    return go_on(list)


def assert_begins(found: Recording, whole: Recording) -> None:
    """``found`` has exactly the first passes of ``whole``."""
    for name, layer in whole.items():
        expected = [i for i, number in enumerate(layer.passes) if number < found.num_passes]
        mine = found.get(name, [])
        assert len(mine) == len(expected), name
        assert all(same(mine[i], layer[i]) for i in expected), name


# --- Runs --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What is done before the disk is watched, and what is done then."""

    before: Callable[[Path], object]
    now: Callable[[Path], object]


def nothing(_: Path) -> None:
    pass


def small(path: Path) -> Folder:
    """So that each pass is written in parts."""
    return Folder(path, shard_bytes=100, budget=1000)


def failing(path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        go_on(Folder(path, seconds=0), stop=True)


def in_parts(path: Path) -> None:
    """What a power loss in the middle of a pass leaves."""
    aside = path.parent / "aside"
    aside.mkdir(parents=True)
    journal = Journal(aside)
    with journal.watching():
        go_on(small(aside / "run"), passes=2)
    for cut in reversed(range(len(journal.steps))):
        journal.disk(cut, NOTHING, aside / "cut")
        left = aside / "cut/run"
        if left.exists() and load(left).num_passes == 1 and load(left)._ranks[0].heading.parts:
            left.rename(path)
            break
        shutil.rmtree(aside / "cut")
    shutil.rmtree(aside)


RUNS = {
    "in one file for each pass": Run(nothing, lambda path: go_on(Folder(path, seconds=0))),
    "in one file": Run(nothing, go_on),
    "in parts": Run(nothing, lambda path: go_on(small(path))),
    "left by an error": Run(nothing, failing),
    "resumed": Run(
        lambda path: go_on(Folder(path, seconds=0), passes=2),
        lambda path: go_on(Folder(path, seconds=0), resume=True),
    ),
    "resumed after a part": Run(in_parts, lambda path: go_on(small(path), resume=True)),
    "saved": Run(nothing, lambda path: unbroken().save(path)),
    "resumed at the end": Run(go_on, lambda path: go_on(path, resume=True)),
}


@pytest.fixture(autouse=True)
def _no_disk_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is certain, the journal knows."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=RUNS.values(), ids=RUNS)
def a_run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


def watched(run: Run, root: Path, fault: Fault | None = None) -> Journal:
    """Do a run in a new folder, and record what it does to the disk."""
    before = root.parent / "before"
    if not before.exists():
        before.mkdir()
        run.before(before / "runs/a")
    shutil.copytree(before, root)
    journal = Journal(root, fault)
    with journal.watching():
        run.now(root / "runs/a")
    return journal


def passes_of(path: Path) -> int:
    """How many passes there are after an accident, and they are right; -1 if there is no recording."""
    try:
        found = load(path)
    except RecordingNotFoundError:
        return -1
    assert_begins(found, unbroken())
    assert_begins(found.inputs, unbroken().inputs)
    assert actrec.verify(path) == []
    return found.num_passes


def assert_completes(path: Path) -> None:
    """Going on makes the recording whole."""
    go_on(Folder(path, seconds=0), resume=True)
    assert_same(load(path), unbroken())
    assert load(path).complete
    assert actrec.verify(path) == []
    assert not list(path.rglob("*.tmp"))


# --- Power loss --------------------------------------------------------------------------------------


class Losses:
    """What a power loss leaves of a run, looked at once however many losses leave the same."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        self._journal = journal
        self._disk = folder / "cut"
        self._known: dict[bytes, int] = {}
        cuts = range(journal.begin, len(journal.steps) + 1)
        self.certain = {cut: self.passes(cut, NOTHING) for cut in cuts}
        self.all = [(cut, choice) for cut in cuts for choice in CHOICES]

    def passes(self, cut: int, choice: Choice, *, completes: bool = False) -> int:
        """How many passes are left."""
        root = self._journal.disk(cut, choice, self._disk)
        digest = hashlib.sha256(repr((completes, contents(root))).encode()).digest()
        try:
            if digest not in self._known:
                self._known[digest] = passes_of(root / "runs/a")
                if completes:
                    assert_completes(root / "runs/a")
        finally:
            shutil.rmtree(root)
        return self._known[digest]

    def check(self, draw: random.Random, most: int) -> None:
        """Look at some losses."""
        assert sorted(self.certain.values()) == list(self.certain.values())
        for cut, choice in draw.sample(self.all, min(most, len(self.all))):
            at = f"cut={cut} of {len(self._journal.steps)}, {choice}"
            assert self.passes(cut, choice, completes=True) >= self.certain[cut], at


def test_whatever_a_power_loss_leaves_the_committed_passes_are_there_and_the_run_can_go_on(
    tmp_path: Path, a_run: Run
) -> None:
    journal = watched(a_run, tmp_path / "live")
    end = len(journal.steps)
    everything = contents(journal.disk(end, ALL, tmp_path / "all"))
    assert everything == contents(tmp_path / "live"), "all was recorded that is done to the disk"
    losses = Losses(journal, tmp_path)
    assert losses.certain[end] == load(tmp_path / "live/runs/a").num_passes
    assert load(journal.disk(end, NOTHING, tmp_path / "end") / "runs/a").complete == (
        a_run.now is not failing
    )
    losses.check(random.Random(0), CUTS)  # noqa: S311  # not for secrets


def test_a_run_that_goes_on_after_a_kill_makes_certain_what_the_one_before_had_not(
    tmp_path: Path, a_run: Run
) -> None:
    journal = watched(a_run, tmp_path / "live")
    draw = random.Random(0)  # noqa: S311  # not for secrets
    cuts = range(journal.begin, len(journal.steps))
    for cut in draw.sample(cuts, min(-(-CUTS // 20), len(cuts))):
        killed = journal.killed(cut, tmp_path / "killed")
        with killed.watching():
            go_on(Folder(tmp_path / "killed/runs/a", seconds=0), resume=True)
        losses = Losses(killed, tmp_path)
        assert losses.certain[len(killed.steps)] == PASSES
        losses.check(draw, CUTS // 4)
        shutil.rmtree(tmp_path / "killed")


# --- Faults ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::actrec.errors.UnlockedWarning")
def test_whichever_call_fails_that_is_told_or_all_is_there_and_the_run_can_go_on(
    tmp_path: Path, a_run: Run
) -> None:
    calls = len(watched(a_run, tmp_path / "live").calls)
    faults = [Fault(call, after) for call in range(calls) for after in (False, True)]
    draw = random.Random(0)  # noqa: S311  # not for secrets
    root = tmp_path / "failed"
    for fault in draw.sample(faults, min(FAULTS, len(faults))):
        told = False
        try:
            journal = watched(a_run, root, fault)
        except (OSError, WriteError):
            told = True
        path = root / "runs/a"
        passes_of(path)
        assert told or load(path).complete or a_run.now is failing, (fault, journal.failed)
        assert_completes(path)
        shutil.rmtree(root)
