"""However many shards there are: opening reads one header, a call is found by a few, and nothing hides or invents one."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import shutil
import threading
import weakref
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actrec
from actrec import CorruptRecordingError, load, record
from actrec.store import Folder
from actrec.store import rank as _rank
from actrec.store.disk import Disk
from actrec.store.shard import Shard
from tests.stored import Net, Shards, assert_same, batches, opened_shards, same
from tests.test_store_reader import rewrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from actrec import Recording

PASSES = 4


def recorded(into: Any) -> Recording:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad(), record(net, inputs=True, into=into) as acts:
        for number, batch in enumerate(batches(PASSES)):
            net(batch)
            acts.add("label", torch.full((2,), number))
    return acts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recording of many shards."""
    recorded(Folder(tmp_path / "r", shard_bytes=1))
    return tmp_path / "r"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the header of each shard was read."""
    counts: Counter[str] = Counter()
    init = Shard.__init__

    def counted(shard: Shard, disk: Any, name: str) -> None:
        counts[name] += 1
        init(shard, disk, name)

    monkeypatch.setattr(Shard, "__init__", counted)
    return counts


# --- What is read ------------------------------------------------------------------------------------


def many(path: Path, count: int, ranks: int = 1) -> None:
    """Shards of two passes, in which layer "b" is called now and then."""
    for rank in range(ranks):
        shards = Shards(path, ["a", "b"], rank=rank, ranks=ranks)
        for n in range(count):
            calls = [(0, 2 * n + at, torch.tensor([2 * n + at])) for at in range(2)]
            calls += [(1, 2 * n, torch.tensor([n]))] * (n % 3 == 0)
            shards.write(calls, 2 * n + 2, ended="" if n == count - 1 else None)


@pytest.mark.parametrize("count", [1, 10, 300])
@pytest.mark.parametrize("ranks", [1, 3])
def test_opening_and_the_table_read_one_header_of_each_rank(
    tmp_path: Path, read: Counter[str], count: int, ranks: int
) -> None:
    many(tmp_path / "r", count, ranks)
    acts = load(tmp_path / "r")
    repr(acts)
    assert acts.nbytes > 0
    assert len(acts["a"]) == 2 * count * ranks
    assert acts.num_passes == 2 * count
    assert acts.complete
    assert read == {f"{count - 1:06d}.safetensors": ranks}


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_a_call_is_found_by_about_as_many_headers_as_the_logarithm_of_the_shards(
    tmp_path: Path, read: Counter[str], count: int
) -> None:
    many(tmp_path / "r", count)
    for name in ("a", "b"):
        for call in {0, 1, 2 * count // 3, 2 * count - 1}:
            acts = load(tmp_path / "r")
            if call >= len(acts[name]):
                continue
            read.clear()
            assert int(acts[name][call]) == call * (1 if name == "a" else 3)
            assert read.total() <= math.ceil(math.log2(count)) + 1


def test_one_call_after_the_other_reads_each_header_once(
    tmp_path: Path, read: Counter[str]
) -> None:
    many(tmp_path / "r", 50)
    acts = load(tmp_path / "r")
    assert [int(value) for value in acts["a"]] == list(range(100))
    assert acts["a"].cat().tolist() == list(range(100))
    assert set(read.values()) == {1}


def test_what_a_header_takes_does_not_grow_with_the_calls(tmp_path: Path) -> None:
    sizes = []
    for count in (10, 1000):
        shards = Shards(tmp_path / str(count), ["a"])
        for n in range(3):
            calls = [(0, at, torch.zeros(1)) for at in range(count * n, count * (n + 1))]
            shards.write(calls, count * (n + 1))
        sizes += [shard.container.header for shard in opened_shards(load(tmp_path / str(count)))]
    assert max(sizes) - min(sizes) <= 64


def test_while_it_is_recorded_a_recorder_knows_its_bytes(tmp_path: Path) -> None:
    net = torch.nn.Identity()
    with record(net, "", into=tmp_path / "r") as acts:
        net(torch.ones(2, 3))
        assert acts.nbytes == acts[""].nbytes == 24
    assert acts.nbytes == acts[""].nbytes == load(tmp_path / "r").nbytes == 24


# --- What is kept open -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "most"), [("_MOST_OPEN", 1), ("_MOST_OPEN", 5), ("_MOST_BYTES", 2)]
)
def test_few_shards_are_kept_open_and_all_calls_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, most: int, limit: str
) -> None:
    each = 1 if limit == "_MOST_OPEN" else max(s.nbytes for s in opened_shards(load(path)))
    monkeypatch.setattr(_rank, limit, most * each)
    acts = load(path)
    (rank,) = acts._ranks
    assert rank.count > most
    assert_same(acts, recorded(list))
    assert_same(acts.inputs, recorded(list).inputs)
    assert 1 <= len(rank._opened().shards) <= most
    assert rank._opened().nbytes == sum(counted for _, counted in rank._opened().shards.values())


def test_the_shard_that_was_not_used_for_longest_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rank, "_MOST_OPEN", 2)
    (rank,) = load(path)._ranks
    for number in (0, 1, 0, 2):
        rank.shard(number)
    assert list(rank._opened().shards) == [0, 2]


def test_all_ranks_together_keep_few_shards_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many(tmp_path / "r", 10, ranks=3)
    monkeypatch.setattr(_rank, "_MOST_OPEN", 5)
    acts = load(tmp_path / "r")
    assert len(acts["a"].cat()) == 3 * 20
    assert [len(rank._opened().shards) for rank in acts._ranks] == [1, 1, 1]


def test_what_is_closed_is_gone_without_waiting_for_the_collector(path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        opened = Shard(Disk(path / "rank-00000"), "000000.safetensors")
        assert all(opened.part(*key) for key in opened.layers)
        shard = weakref.ref(opened)
        del opened
        assert shard() is None
    finally:
        gc.enable()


def test_a_recording_that_is_open_can_be_pickled_and_copied(path: Path) -> None:
    acts = load(path)
    first = acts["conv"][0]
    again = pickle.loads(pickle.dumps(acts))
    assert torch.equal(again["conv"][0], first)
    assert_same(again, acts)


def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent_that_was_reading(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = load(path)
    expected = acts["conv"].cat()
    with acts._ranks[0]._opened().lock:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a process that was forked off now
        found: list[Any] = []
        reading = threading.Thread(target=lambda: found.append(acts["conv"].cat()), daemon=True)
        reading.start()
        reading.join(20)
    assert torch.equal(found[0], expected)


# --- Counting ----------------------------------------------------------------------------------------


class Run:
    """A run whose model calls layers "a" and "b", and what is true of it."""

    def __init__(self, path: Path) -> None:
        self.shards = Shards(path, ["a", "b"])
        self.stored: list[
            tuple[int, int, int]
        ] = []  # layer, pass, value; in the order of the shards
        self.parts: list[tuple[int, int, int]] = []
        self.raised: set[int] = set()
        self.count = 0

    @property
    def committed(self) -> int:
        return self.shards.ledger.heading.committed

    def calls(self, layers: list[int], number: int) -> list[tuple[int, int, int]]:
        found = []
        for layer in layers:
            self.count += 1
            found.append((layer, number, self.count))
        return found

    def write(self, calls: list[tuple[int, int, int]], committed: int, **more: Any) -> None:
        made = [(layer, number, torch.full((1, 2), value)) for layer, number, value in calls]
        self.shards.write(made, committed, **more)

    def commit(self, passes: list[list[int]], *, raises: bool) -> None:
        begin = self.committed
        calls = [c for n, layers in enumerate(passes) for c in self.calls(layers, begin + n)]
        committed = begin + len(passes)
        raised = [begin] if raises and passes else []
        self.raised.update(raised)
        self.write(calls, committed, raised=raised)
        self.stored += [c for c in self.parts if c[1] < committed]
        self.parts = [c for c in self.parts if c[1] >= committed]
        self.stored += calls

    def part(self, layers: list[int], ahead: int) -> None:
        number = self.committed + ahead
        calls = self.calls(layers, number)
        if calls:
            self.write(calls, self.committed, part_of=number)
            self.parts += calls

    def resume(self) -> None:
        self.shards.resume()
        self.parts = []


LAYERS = st.lists(st.integers(0, 1), max_size=3)
STEPS = st.one_of(
    st.tuples(st.just("commit"), st.lists(LAYERS, max_size=3), st.booleans()),
    st.tuples(st.just("part"), LAYERS, st.integers(0, 2)),
    st.tuples(st.just("resume")),
)


@given(steps=st.lists(STEPS, max_size=14))
@settings(deadline=None, max_examples=80)
def test_whatever_is_written_in_whatever_portions_the_last_header_says_what_there_is(
    steps: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("r")
    run = Run(path)
    for kind, *args in steps:
        if kind == "commit":
            run.commit(args[0], raises=args[1])
        else:
            getattr(run, kind)(*args)
    acts = load(path)
    assert (acts.num_passes, acts.complete) == (run.committed, False)
    assert acts.failed_passes == sorted(run.raised)
    assert actrec.verify(path) == []
    for layer, name in enumerate("ab"):
        true = defaultdict(list)
        for _, number, value in (call for call in run.stored if call[0] == layer):
            true[number].append(value)
        expected = [(number, v) for number in sorted(true) for v in sorted(true[number])]
        found = acts[name]
        assert list(found.passes) == [number for number, _ in expected]
        assert [int(value[0, 0]) for value in found] == [value for _, value in expected]
        assert len(found) == len(expected)
        assert found.nbytes == 16 * len(expected)
        assert found._per_pass() == (max(map(len, true.values()), default=0), len(true))
        if expected:
            assert found.cat().shape == (len(expected), 2)
            assert found._seen()[0].shape == "(1, 2)"


# --- Damage ------------------------------------------------------------------------------------------


def with_a_crash(path: Path) -> list[tuple[int, int, int]]:
    """A run that was killed within a pass, and went on."""
    run = Run(path)
    for number in range(4):
        run.commit([[0, 1], [1]], raises=number == 1)
    run.part([0, 1], 0)
    run.part([1, 1], 1)
    run.resume()
    run.part([0], 0)
    run.commit([[0, 1], [0]], raises=False)
    return run.stored


def truth(calls: list[tuple[int, int, int]]) -> list[list[tuple[int, int]]]:
    return [sorted((n, value) for layer, n, value in calls if layer == at) for at in range(2)]


def found_in(path: Path) -> list[list[tuple[int, int]]]:
    """The calls that a recording has, read in every way."""
    acts = load(path)
    found = []
    for layer in acts.values():
        calls = [(n, int(v[0, 0])) for n, v in zip(layer.passes, layer, strict=True)]
        assert layer.cat()[:, 0].tolist() == [value for _, value in calls]
        assert [int(layer[at][0, 0]) for at in reversed(range(len(layer)))] == [
            value for _, value in reversed(calls)
        ]
        found.append(calls)
    return found


ACCIDENTS: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda shard, _: shard.unlink(),
    "empty": lambda shard, _: shard.write_bytes(b""),
    "cut off": lambda shard, _: shard.write_bytes(shard.read_bytes()[:-1]),
    "foreign": lambda shard, other: shutil.copy(other, shard),
    "of another rank": lambda shard, _: rewrite(shard, lambda about: about.update(rank=1)),
    "of another place": lambda shard, _: rewrite(shard, lambda about: about.update(shard=77)),
    "flipped": lambda shard, _: shard.write_bytes(shard.read_bytes().replace(b'"before', b'"beFore', 1)),
}  # fmt: skip


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_shard_that_is_damaged_missing_or_foreign_never_hides_or_invents_a_call(
    tmp_path: Path, accident: str
) -> None:
    expected = truth(with_a_crash(tmp_path / "r"))
    assert found_in(tmp_path / "r") == expected
    Run(tmp_path / "other").shards.write([(0, 0, torch.full((1, 2), 99))], 1)
    other = tmp_path / "other/rank-00000/000000.safetensors"
    rewrite(other, lambda about: about.update(recording="1" * 32))
    shards = sorted((tmp_path / "r").rglob("*.safetensors"))
    for number, shard in enumerate(shards):
        before = shard.read_bytes()
        ACCIDENTS[accident](shard, other)
        if accident == "missing" and shard == shards[-1]:  # as if the run had been killed before it
            found = found_in(tmp_path / "r")
            assert all(a == b[: len(a)] for a, b in zip(found, expected, strict=True))
            assert not load(tmp_path / "r").complete
        else:
            with pytest.raises(CorruptRecordingError, match=f"{number:06d}.safetensors is damaged"):
                found_in(tmp_path / "r")
            assert actrec.verify(tmp_path / "r") != []
        shard.write_bytes(before)


def numbers_of(about: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a description there are numbers and flags."""
    if isinstance(about, dict):
        return [found for key, item in about.items() for found in numbers_of(item, (*path, key))]
    if isinstance(about, list):
        return [found for at, item in enumerate(about) for found in numbers_of(item, (*path, at))]
    return [path] if isinstance(about, int) else []


def test_a_header_that_lies_and_is_signed_is_found_out_by_verify_whatever_the_lie(
    tmp_path: Path,
) -> None:
    with_a_crash(tmp_path / "r")
    folder = tmp_path / "r/rank-00000"
    for shard in sorted(folder.glob("*.safetensors"))[:-1:2]:
        before = shard.read_bytes()
        opened = Shard(Disk(folder), shard.name)
        about = json.loads(opened.container.metadata["actrec"])
        for *keys, last in numbers_of(about):
            if last == "committed":
                continue  # one pass more without a call would be as good

            def lie(said: Any, keys: Any = keys, last: Any = last) -> None:
                for key in keys:
                    said = said[key]
                said[last] = not said[last] if type(said[last]) is bool else said[last] + 1

            rewrite(shard, lie)
            assert actrec.verify(tmp_path / "r") != [], (shard.name, keys, last)
            shard.write_bytes(before)
    assert actrec.verify(tmp_path / "r") == []


def test_a_shard_that_is_another_one_than_when_it_was_opened_is_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rank, "_MOST_OPEN", 1)
    acts = load(path)
    for shard in sorted((path / "rank-00000").glob("*.safetensors"))[:-1]:
        rewrite(shard, lambda about: [layer.update(before=0, groups=[]) or layer["so_far"].update(stored=0) for layer in about["layers"]] and None)  # fmt: skip
    with pytest.raises(CorruptRecordingError, match="is another file than when it was opened"):
        acts["conv"][0]


def test_a_call_is_the_same_whoever_reads_it_first(path: Path) -> None:
    acts, again = load(path), load(path)
    forward = [acts["relu"][at] for at in range(len(acts["relu"]))]
    backward = [again["relu"][at] for at in reversed(range(len(again["relu"])))]
    assert all(map(same, forward, reversed(backward)))


def test_a_call_of_a_pass_that_its_shard_does_not_commit_is_found_out_by_verify(
    tmp_path: Path,
) -> None:
    shards = Shards(tmp_path / "r", ["a"])
    shards.write([(0, 5, torch.ones(1))], 1)
    (problem,) = actrec.verify(tmp_path / "r")
    assert "it has calls of layer 'a' of passes that do not belong into it" in problem


def test_a_structure_that_python_cannot_write_again_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many(tmp_path / "r", 1)
    acts = load(tmp_path / "r")

    def too_deep(*_: object, **__: object) -> str:
        raise RecursionError

    monkeypatch.setattr(json, "dumps", too_deep)
    with pytest.raises(CorruptRecordingError, match="a value is nested too deep"):
        acts["a"][0]
