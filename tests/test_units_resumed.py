"""Units of runs that were left, killed and resumed, by any number of ranks: each exactly once, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import (
    ActrecError,
    MissingUnitsError,
    OptionError,
    ResumeWarning,
    WriteError,
    load,
    record,
    reduce,
    verify,
)
from actrec._rank import Position
from actrec.errors import CorruptRecordingError
from actrec.store import Folder
from actrec.store import units as _units
from tests.stored import same

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

X = torch.ones(2, 4)


class Steps(nn.Module):
    """A layer that is called once for each step of a unit, on numbers that the key alone decides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.linear(x))

    def work(self, key: int) -> None:
        generator = torch.Generator().manual_seed(key)
        for _ in range(1 + key % 3):
            self(torch.randn(2, 4, generator=generator))


def work_off(acts: Any, model: Steps, key: int) -> None:
    model.work(key)
    acts.add("key", torch.tensor([key]))


#: One layer is kept, another one reduced, its inputs too: to what does not depend on the order in which units come.
LAYERS = {"linear": None, "": reduce.TopK(k=3)}


def unbroken(keys: Iterable[int]) -> Any:
    model = Steps()
    with record(model, LAYERS, inputs=True) as acts:
        for key in keys:
            with acts.unit(key):
                work_off(acts, model, key)
    return acts


def by_unit(layer: Any) -> dict[Any, list[Any]]:
    """The calls of a layer, by the key of their unit."""
    found: dict[Any, list[Any]] = {}
    for key, value in zip(layer.units, layer, strict=True):
        found.setdefault(key, []).append(value)
    return found


def assert_the_same_units(found: Any, whole: Any) -> None:
    pairs = [(found[name], whole[name]) for name in ("linear", "key") if name in found]
    for mine, theirs in [*pairs, (found.inputs["linear"], whole.inputs["linear"])]:
        a, b = by_unit(mine), by_unit(theirs)
        assert a.keys() <= b.keys()
        assert all(same(a[key], b[key]) for key in a)
    assert found.done == set(by_unit(found["linear"]))
    assert len(found.units) == len(found.done)
    if found.done:
        assert_the_same_reductions(found, unbroken(sorted(found.done)))


def assert_the_same_reductions(found: Any, whole: Any) -> None:
    # Where the zeros of the ReLU were is open.
    for one, other, what in (
        (found, whole, ["values"]),
        (found.inputs, whole.inputs, ["values", "unit", "sample"]),
    ):
        mine, theirs = one[""], other[""]
        assert sorted(mine.units) == sorted(theirs.units)
        assert int(mine.rows) == int(theirs.rows)
        a, b = mine.compute(), theirs.compute()
        assert all(torch.equal(a[name], b[name]) for name in what)


# --- Any failures, kills and restarts ----------------------------------------------------------------------

KEYS = range(9)
WHOLE = unbroken(KEYS)


class Killed(BaseException):
    """Stands for the end of the process: nothing runs after it."""


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, set[int], list[int]]]:
    """For each start: how many ranks, which keys fail once, and after how many units each rank is killed."""
    starts = draw(st.integers(1, 3))
    some = st.sets(st.sampled_from(KEYS), max_size=3)
    kills = st.lists(st.integers(0, 5), min_size=4, max_size=4)
    return [(draw(st.integers(1, 4)), draw(some), draw(kills)) for _ in range(starts)]


def one_rank(folder: Folder, failing: set[int], most: int | None) -> None:
    """Work off what is left for a rank; it is killed in the middle of a unit, after ``most`` of them."""
    model, done = Steps(), 0
    recording = record(model, LAYERS, inputs=True, into=folder, resume=True)
    acts = recording.__enter__()
    try:
        for key, item in acts.remaining(zip(KEYS, KEYS, strict=True), divide=True):
            if key in failing:
                failing.remove(key)
                with pytest.raises(MemoryError), acts.unit(key):
                    work_off(acts, model, -1 - key)
                    raise MemoryError
            with acts.unit(key):
                work_off(acts, model, item)
                if done == most:
                    raise Killed
            done += 1
    except Killed:
        # Nothing is written from here on, as after a kill; the lock goes with the process.
        recording._destination._writer._held.clear()
        recording._destination._passes.count = 0
        recording._destination._opening.lock.close()
        recording._destination._writer._fail(OSError("killed"))
        recording._clean_up()
    else:
        recording.__exit__(None, None, None)


@settings(max_examples=int(os.environ.get("ACTREC_KILLS", "3")), deadline=None)
@given(runs(), st.sampled_from([600, 10**6]))
def test_after_any_failures_and_kills_with_any_numbers_of_ranks_there_is_each_unit_once(
    tmp_path_factory: Any, starts: Any, shard_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("run")
    shutil.rmtree(path)
    for number, (ranks, failing, kills) in enumerate([*starts, (2, set(), None)]):
        for rank in range(ranks):
            folder = Folder(
                path,
                shard_bytes=shard_bytes,
                budget=4 * shard_bytes,
                seconds=0,
                rank=rank,
                world_size=ranks,
                run=str(number),
            )
            one_rank(folder, failing, None if kills is None else kills[rank])
        found = load(path)
        assert_the_same_units(found, WHOLE)
        assert verify(path) == []
        assert found.missing(KEYS) == [key for key in KEYS if key not in found.done]
    found = load(path, units=KEYS)
    assert found.complete
    assert found.done == set(KEYS)
    shutil.rmtree(path)


SCRIPT = """
import os, signal, sys, time
from actrec import record
from actrec.store import Folder
from tests.test_units_resumed import KEYS, LAYERS, Steps, work_off
model = Steps()
into = Folder(sys.argv[1], seconds=0)
with record(model, LAYERS, inputs=True, into=into, resume=True) as acts:
    for key, item in acts.remaining(zip(KEYS, KEYS)):
        with acts.unit(key):
            work_off(acts, model, item)
            if key == int(sys.argv[2]):
                while key > 3 and len(os.listdir(os.path.join(sys.argv[1], "rank-00000"))) < 3:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_kill_9_a_run_goes_on_with_what_is_not_committed(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    for last in (5, -1):
        process = subprocess.run([sys.executable, "-c", SCRIPT, path, str(last)], check=False)
        assert process.returncode == (-signal.SIGKILL if last >= 0 else 0)
        found = load(path)
        assert_the_same_units(found, WHOLE)
        assert found.complete == (last < 0)
        assert verify(path) == []
    assert found.missing(KEYS) == []


# --- Dividing ----------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.text(max_size=3), st.integers(0, 40))
def test_each_pair_goes_to_one_rank_and_as_many_to_each(ranks: int, run: str, many: int) -> None:
    shares = [Position(rank, ranks, run) for rank in range(ranks)]
    mine = [[at for at in range(many) if share.has(at)] for share in shares]
    assert sorted(chain(*mine)) == list(range(many))
    assert max(map(len, mine)) - min(map(len, mine)) <= 1


def test_in_memory_pairs_are_divided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with record(model := Steps()) as acts:
            found += [key for key, _ in acts.remaining(enumerate("abcde"), divide=True)]
            model(X)
    assert sorted(found) == [0, 1, 2, 3, 4]


# --- What is there -------------------------------------------------------------------------------------------


def recorded(path: Path, keys: Any, **options: Any) -> Any:
    model = Steps()
    with record(model, ["linear"], into=Folder(path, **options), resume=True) as acts:
        for key, item in acts.remaining((key, key) for key in keys):
            with acts.unit(key):
                work_off(acts, model, item)
    return acts


def test_which_units_are_missing_is_said(tmp_path: Path) -> None:
    recorded(tmp_path / "run", [0, 2])
    with pytest.raises(
        MissingUnitsError, match=r"1 unit that should be there is not: 1; there are 2"
    ) as found:
        load(tmp_path / "run", units=range(3))
    assert found.value.missing == [1]
    with pytest.raises(MissingUnitsError, match=r"18 units .* 9 and 10 more"):
        load(tmp_path / "run", units=[*range(20)])
    assert load(tmp_path / "run", units=[2, 0]).missing(["x"]) == ["x"]
    with pytest.raises(OptionError, match=r"load\(.*, units=...\): the key 0.5 is a float"):
        load(tmp_path / "run", units=[0.5])


def test_a_rank_that_has_nothing_left_is_not_warned_of(tmp_path: Path) -> None:
    for rank in range(2):
        acts = recorded(tmp_path / "run", [0], rank=rank, world_size=2, run="a")
        assert len(acts["linear"]) == 1 - rank
    assert load(tmp_path / "run").complete


def test_units_that_two_ranks_have_recorded_are_said(tmp_path: Path) -> None:
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "run": "a"}
        model = Steps()
        with record(model, into=Folder(tmp_path / "run", **options)) as acts:
            for key in (0, 1 + rank):
                with acts.unit(key):
                    model(X)
    found = load(tmp_path / "run")
    assert not found.complete
    assert "1 unit recorded by more than one rank" in repr(found)
    assert found.rank(1).units == [0, 2]
    assert found.units == [0, 0, 1, 2]


def test_what_was_not_written_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Steps()

    def full(*_: object, **__: object) -> None:
        message = "no space left"
        raise OSError(message)

    with pytest.raises(WriteError), record(model, into=tmp_path / "run") as acts:
        with acts.unit("a"):
            model(X)
        monkeypatch.setattr(acts._unit_recorder._destination._opening.own.__class__, "begin", full)
        assert acts.done == {"a"}
    assert (acts.done, acts.units) == (set(), [])


def test_values_of_earlier_runs_can_be_read_in_the_block(tmp_path: Path) -> None:
    recorded(tmp_path / "run", [0, 1])
    model = Steps()
    with record(model, ["linear"], into=tmp_path / "run", resume=True) as acts:
        assert acts["key"].cat().tolist() == [0, 1]
        assert same([*acts["linear"]], [*load(tmp_path / "run")["linear"]])
        with acts.unit(5):
            work_off(acts, model, 5)
            assert acts["key"].units == [0, 1, 5]
            assert [value.item() for value in acts["key"][:2]] == [0, 1]
            with pytest.raises(
                ActrecError, match=r"Calls of earlier runs can be read now: acts\['key'\]\[:2\]"
            ):
                acts["key"][2]
            with pytest.raises(ActrecError, match="are being written"):
                acts["key"].stack()
    assert acts["key"].cat().tolist() == [0, 1, 5]


def test_a_key_that_is_no_key_is_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, bad in enumerate((torch.ones(()), torch.tensor([255], dtype=torch.uint8))):
        monkeypatch.setattr(_units, "tensor_of", lambda _, bad=bad: bad)
        recorded(tmp_path / str(number), [0])
        with pytest.raises(CorruptRecordingError, match="the key of a unit is n"):
            len(load(tmp_path / str(number)).done)


# --- Without units -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [True, False])
def test_going_on_without_units_where_passes_look_like_steps_is_warned_of(
    tmp_path: Path, *, added: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    shapes = [(1, 5, 4), (1, 1, 4), (1, 1, 4)]
    with record(model, into=tmp_path / "run") as acts:
        for shape in shapes:
            model(torch.ones(shape[1:] if added else shape))
        if added:
            acts.add("prompt", 0)
    sign = (
        "there are 3 passes, and values that were added to 1 of them"
        if added
        else "up to 5, as in generate"
    )
    with (
        pytest.warns(ResumeWarning, match=sign),
        record(model, into=tmp_path / "run", resume=True) as acts,
    ):
        model(X)


def test_it_is_warned_of_at_the_end_where_it_is_seen_in_this_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with (
        pytest.warns(ResumeWarning, match="with acts.unit"),
        record(model, into=tmp_path / "run", resume=True),
    ):
        for tokens in (3, 1, 1):
            model(torch.ones(1, tokens, 4))


def test_a_run_with_units_is_not_warned_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for key in range(2):
        with record(model, into=tmp_path / "run", resume=True) as acts, acts.unit(key):
            for tokens in (3, 1, 1):
                model(torch.ones(1, tokens, 4))
            acts.add("prompt", key)
    assert load(tmp_path / "run").complete
