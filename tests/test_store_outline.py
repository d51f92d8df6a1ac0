"""However many shards there are: little is kept of each, and every call is found in it."""

from __future__ import annotations

import gc
import json
import os
import pickle
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actrec import CorruptRecordingError, load, record
from actrec.store import (
    Folder,
)
from actrec.store import (
    outline as _outline,
)
from actrec.store import (
    reader as _reader,
)
from actrec.store import (
    safetensors as _container,
)
from actrec.store.disk import Disk
from actrec.store.format import Slot
from actrec.store.index import open_shard
from actrec.store.shard import Call, Heading
from actrec.store.shard import write as write_shard
from actrec.store.stream import encoded
from tests.stored import Net, assert_same, batches, opened_shards

if TYPE_CHECKING:
    from pathlib import Path

    from actrec import Recording

PASSES = 12


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


def room_for(most: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many shards be open."""
    each = max(opened.memory for opened in opened_shards(load(path)))
    monkeypatch.setattr(_reader, "_OPEN_BYTES", most * each)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_few_shards_are_kept_open_and_all_calls_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    room_for(most, path, monkeypatch)
    acts = load(path)
    (rank,) = acts._ranks
    assert rank.count > most
    assert_same(acts, recorded(list))
    assert_same(acts.inputs, recorded(list).inputs)
    assert len(rank._opened) == most


def test_the_shard_that_was_not_used_for_longest_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(2, path, monkeypatch)
    (rank,) = load(path)._ranks
    for number in (0, 1, 0, 2):
        rank.opened(number)
    assert list(rank._opened) == [0, 2]


def test_all_ranks_together_keep_few_shards_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(3):
        recorded(Folder(tmp_path / "r", shard_bytes=1, rank=rank, world_size=3, run="a"))
    room_for(5, tmp_path / "r", monkeypatch)
    acts = load(tmp_path / "r")
    assert all(rank.count > 1 for rank in acts._ranks)
    assert len(acts["conv"].cat()) == 3 * len(recorded(list)["conv"].cat())
    assert [len(rank._opened) for rank in acts._ranks] == [1, 1, 1]


def test_a_call_is_read_though_its_shard_is_closed_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reader, "_OPEN_BYTES", 1)
    acts = load(path)
    values = list(acts["conv"])
    assert all(map(torch.equal, values, recorded(list)["conv"]))


def test_what_is_closed_is_gone_without_waiting_for_the_collector(path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        opened = open_shard(Disk(path / "rank-00000"), "000000.safetensors")
        shard = weakref.ref(opened.shard)
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
    with acts._ranks[0]._opening:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a process that was forked off now
        found: list[Any] = []
        reading = threading.Thread(target=lambda: found.append(acts["conv"].cat()), daemon=True)
        reading.start()
        reading.join(20)
    assert torch.equal(found[0], expected)


def test_a_shard_that_is_another_one_than_when_it_was_opened_is_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reader, "_OPEN_BYTES", 1)
    acts = load(path)
    first, *_ = sorted((path / "rank-00000").glob("*.safetensors"))
    heading = opened_shards(acts)[0].shard.heading
    with first.open("wb") as file:
        write_shard(_Plain(file), heading, [])
    with pytest.raises(CorruptRecordingError, match="is another file than when it was opened"):
        acts["conv"][0]


class _Plain:
    def __init__(self, file: Any) -> None:
        self.write = file.write
        self.file = file

    def write_at_start(self, data: bytes) -> None:
        self.file.seek(0)
        self.file.write(data)


def test_a_header_that_lists_a_layer_twice_is_refused(path: Path) -> None:
    first, *_ = sorted((path / "rank-00000").glob("*.safetensors"))
    (opened, *_) = opened_shards(load(path))
    about = json.loads(opened.container.metadata["actrec"])
    about["layers"].append(about["layers"][0])
    size = sum(extent.end - extent.begin for extent in opened.container.tensors.values())
    data = first.read_bytes()[-size:]
    tensors = [
        _container.Tensor(
            name,
            extent.code,
            extent.shape,
            extent.end - extent.begin,
            partial(_one, data, extent),
            8,
        )
        for name, extent in opened.container.tensors.items()
    ]
    with first.open("wb") as file:
        _container.write(_Plain(file), {"actrec": json.dumps(about)}, tensors)
    with pytest.raises(CorruptRecordingError, match="it lists a layer twice"):
        load(path)


def _one(data: bytes, extent: Any) -> Any:
    return iter([(data, memoryview(data)[: extent.end - extent.begin])])


# --- What is kept in outline says the same as the headers ------------------------------------------


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_outline_says_what_the_headers_say(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("r")
    rows = st.integers(0, 3)
    base = torch.arange(64.0).reshape(16, 4)
    values: st.SearchStrategy[Any] = st.one_of(
        rows.map(lambda n: torch.full((n, 2), 1.0)),
        rows.map(lambda n: (torch.full((n, 2), 1), torch.full((2, n), 2.0))),
        st.integers(0, 12).map(lambda n: base[n : n + 4]),  # which share memory
        st.just(torch.zeros(1).expand(5, 3)),
        st.sampled_from(["text", None]),
    )
    shards = data.draw(st.lists(st.lists(st.tuples(st.sampled_from("abc"), values)), min_size=1))
    outline, everything = _outline.Outline(), []
    for number, calls in enumerate(shards):
        name = f"{number:06d}.safetensors"
        found = [encoded(value) for _, value in calls]
        made = [
            Call(
                Slot("output", "abc".index(layer), layer, "Identity"),
                number,
                one.structure,
                one.tensors,
                0,
            )
            for (layer, _), one in zip(calls, found, strict=True)
        ]
        with (folder / name).open("wb") as file:
            write_shard(_Plain(file), Heading("", 0, number, number + 1), made)
        everything.append(open_shard(Disk(folder), name))
        outline.add(everything[-1])
    assert outline.count == outline.committed == len(shards)
    assert outline.nbytes == sum(_bytes_of(opened.parts) for opened in everything)
    for (role, name), held in outline.held.items():
        parts = [opened.part(role, name) for opened in everything]
        there = [number for number, part in enumerate(parts) if part is not None]
        assert list(held.shards) == there
        calls = [sum(many for _, _, many in parts[number].passes) for number in there]
        assert list(held.starts) == [sum(calls[:at]) for at in range(len(calls) + 1)]
        assert list(held.passes) == [
            n for n, many in zip(there, calls, strict=True) for _ in range(many)
        ]
        assert held.ordered
        assert held.nbytes == sum(_bytes_of([parts[number]]) for number in there)
        expected = [
            (group.structure, tuple((leaf.dtype, leaf.shape(at)) for leaf in group.leaves))
            for number in there
            for group, at in map(parts[number].place, range(calls[there.index(number)]))
        ]
        assert set(held.looks) == set(expected)


def test_parts_of_passes_wait_until_their_own_pass_is_committed(tmp_path: Path) -> None:
    outline = _outline.Outline()
    for number, (committed, part, calls) in enumerate(
        [(0, True, [0]), (0, True, [1, 1]), (1, False, []), (2, False, [1])]
    ):
        name = f"{number:06d}.safetensors"
        slot, one = Slot("output", 0, "a", "Identity"), encoded(torch.ones(2))
        made = [Call(slot, at, one.structure, one.tensors, 0) for at in calls]
        with (tmp_path / name).open("wb") as file:
            write_shard(_Plain(file), Heading("", 0, number, committed, part), made)
        outline.add(open_shard(Disk(tmp_path), name))
        held = outline.held.get(("output", "a"))
        expected = {0: ([], [0]), 1: ([], [0, 1]), 2: ([0], [1]), 3: ([0, 1, 1, 1], [])}[number]
        assert ([] if held is None else list(held.passes), outline.leftovers) == expected


def test_while_it_is_recorded_a_recorder_knows_its_bytes(tmp_path: Path) -> None:
    net = torch.nn.Identity()
    with record(net, "", into=tmp_path / "r") as acts:
        net(torch.ones(2, 3))
        assert acts.nbytes == acts[""].nbytes == 24
    assert acts.nbytes == acts[""].nbytes == load(tmp_path / "r").nbytes == 24


def _bytes_of(parts: Any) -> int:
    """The bytes of the file that any of the parts' tensors lie in, counted one by one."""
    leaves = [leaf for part in parts for group in part.groups for leaf in group.leaves]
    return len({at for leaf in leaves for at in range(leaf.begin, leaf.begin + leaf.nbytes)})


def test_a_table_is_made_without_opening_a_shard(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = load(path)
    expected = repr(recorded(list)).splitlines()[1:]

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was opened")

    monkeypatch.setattr(_reader.Rank, "opened", refuse)
    assert [line.split() for line in repr(acts).splitlines()[1:]] == [
        line.split() for line in expected
    ]
    assert acts.nbytes > 0
    assert len(acts["conv"]) == len(acts["conv"].passes) == PASSES


def test_a_structure_that_is_none_is_found_when_the_table_is_made(path: Path) -> None:
    (layer, *_) = load(path).values()
    look = ("{", ())
    with pytest.raises(CorruptRecordingError, match="rank-00000 is damaged"):
        layer._form(look)


def test_what_is_kept_of_a_shard_does_not_grow_with_its_calls(tmp_path: Path) -> None:
    sizes = []
    for calls in (2, 200):
        folder = tmp_path / str(calls)
        net = torch.nn.Identity()
        with torch.no_grad(), record(net, "", into=folder):
            for _ in range(calls):
                net(torch.zeros(1, 2))
        (rank,) = load(folder)._ranks
        held = rank.outline.held["output", ""]
        sizes.append([len(held.shards), len(held.starts), len(held.triples), len(held.looks)])
    assert sizes == [[1, 2, 3, 1]] * 2
