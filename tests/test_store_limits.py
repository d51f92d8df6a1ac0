"""Limits hold in bytes: for what a file may ask of a reader, for what a reader keeps, and for what a run keeps of its calls."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import CaptureError, load, record
from actrec._recordings import (
    pass_numbers as _runs,
)
from actrec.store import (
    Folder,
)
from actrec.store import (
    encoding as _encoding,
)
from actrec.store import (
    format as _format,
)
from actrec.store import (
    held as _held,
)
from actrec.store import (
    new_shard as _new_shard,
)
from actrec.store import (
    safetensors as _container,
)
from actrec.store import (
    shard as _shard,
)
from actrec.store import (
    stream as _live,
)
from actrec.store.call import Call
from actrec.store.disk import Disk
from actrec.store.format import Slot
from actrec.store.ledger import Commit, Heading, Ledger
from tests.stored import opened_shards, same

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# --- Headers -----------------------------------------------------------------------------------------


def test_a_header_of_more_bytes_than_the_limit_is_refused_before_it_is_read() -> None:
    asked: list[int] = []

    def read(most: int) -> bytes:
        asked.append(most)
        return (_format.MAX_HEADER + 1).to_bytes(8, "little")

    with pytest.raises(_format.Defect, match="it claims a header of"):
        _container.parse(1 << 40, read)
    assert asked == [8]


@st.composite
def _values(draw: st.DrawFn) -> Any:
    """Values that take much of a header and little data."""
    names = st.text(max_size=20)
    shape = st.lists(st.sampled_from([0, 1, 10**17]), max_size=12)

    def tensor(sizes: list[int]) -> Tensor:
        whole = [0, *sizes] if 10**17 in sizes else sizes
        return torch.zeros((), dtype=torch.float64).expand(whole)

    leaves = st.builds(tensor, shape) | names | st.integers(0, 2**52) | st.none()
    return draw(st.dictionaries(names, st.lists(leaves, max_size=4), max_size=4))


@given(values=st.lists(_values(), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_header_takes_little_more_than_twice_what_was_counted_for_its_calls(
    values: list[Any],
) -> None:
    """So that, of what is cut at a quarter of the limit, no header exceeds it."""
    slot = Slot("gradient", 99_999, "layer", "Module")
    calls, counted = [], 0
    for number, value in enumerate(values):
        calls.append(Call.of(slot, 10**6 + 2 * number, value))
        counted += calls[-1].look.header
    written = bytearray()

    class File:
        write = written.extend

        def write_at_start(self, data: bytes) -> None:
            pass

    ledger = Ledger(Heading("0" * 32, 99_999, 100_000, 10**18, 10**6, 10**7))
    parts, entries = _new_shard.lay_out(calls)
    _new_shard.write(File(), ledger.next(parts, Commit(10**7)), ledger.layers, parts, entries)
    assert int.from_bytes(written[:8], "little") <= 2 * counted + 4096


def test_what_would_not_fit_into_a_header_is_refused_when_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_encoding, "MAX_STRUCTURE", 10_000)
    net = nn.Identity()
    with record(net, "", into=tmp_path / "r") as acts:
        net(torch.ones(1))
        acts.add("few", [torch.zeros(1)] * 20)
        with pytest.raises(CaptureError, match="it has too many parts"):
            acts.add("many", [torch.zeros(1) for _ in range(40)])
    assert list(load(tmp_path / "r")) == ["", "few"]


# --- What is kept ------------------------------------------------------------------------------------


class Ragged(nn.Module):
    def forward(self, x: Tensor, rows: int) -> Tensor:
        return x[:rows] * 1


def many_layers(_: Path) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(100)))
    yield net, (torch.ones(2, 3),)


def many_calls(_: Path) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    net = Ragged()
    yield from ((net, (torch.ones(9, 3), number * 7919 % 9 + 1)) for number in range(3000))


@pytest.mark.filterwarnings("ignore::actrec.UnusedLayerWarning")
@pytest.mark.parametrize("kind", [many_layers, many_calls])
def test_what_an_open_shard_is_counted_as_is_about_what_it_takes(tmp_path: Path, kind: Any) -> None:
    runs = list(kind(tmp_path))
    with torch.no_grad(), record(runs[0][0], into=tmp_path / "r"):
        for net, args in runs:
            net(*args)
    gc.collect()
    tracemalloc.start()
    try:
        shard = _shard.Shard(Disk(tmp_path / "r/rank-00000"), "000000.safetensors")
        for layer in shard.layers:
            shard.part(*layer)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 2 <= shard.nbytes <= taken * 2


def test_a_run_keeps_nothing_of_its_calls_but_what_waits_to_be_written(tmp_path: Path) -> None:
    """Neither of calls that are alike, nor of values whose numbers make each of them another one."""
    net = nn.Sequential(nn.Identity(), nn.Identity())

    def held(snapshot: tracemalloc.Snapshot) -> int:
        files = [tracemalloc.Filter(True, module.__file__) for module in (_live, _runs)]
        return sum(found.size for found in snapshot.filter_traces(files).statistics("filename"))

    with record(net, into=Folder(tmp_path / "r", shard_bytes=10_000, budget=20_000)) as acts:
        seen = []
        tracemalloc.start()
        try:
            for number in range(300):
                net(torch.ones(1, 1))
                acts.add("number", {"number": number})
                if number % 100 == 99:
                    gc.collect()
                    seen.append(held(tracemalloc.take_snapshot()))
        finally:
            tracemalloc.stop()
    assert seen[2] - seen[0] < 2000, "of 600 calls"
    assert acts["number"].passes == list(range(300))


def test_of_a_pass_that_is_written_in_parts_no_value_is_kept_until_it_is_committed() -> None:
    ledger = Ledger(Heading("0" * 32, 0, 1, 1, shard=-1, committed=0))
    value = torch.ones(3)
    kept = weakref.ref(value)
    calls = [Call.of(Slot("output", 0, "a", "A"), 0, value)]
    parts, _ = _new_shard.lay_out(calls)
    ledger.next(parts, Commit(0, part_of=0))
    del calls, value, _
    gc.collect()
    assert kept() is None
    assert ledger.next([], Commit(1)).committed == 1
    (so_far,) = ledger.layers.values()
    assert (so_far.calls, so_far.nbytes) == (1, 12)


@given(calls=st.lists(st.integers(0, 5), max_size=60), ordered=st.booleans())
def test_the_passes_of_calls_are_those_that_were_added(calls: list[int], *, ordered: bool) -> None:
    calls = sorted(calls) if ordered else calls
    runs = _runs.PassRuns()
    for number in calls:
        runs.add(number)
    assert (list(runs), len(runs)) == (calls, len(calls))


def test_shards_are_read_again_that_were_cut_for_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_held, "MAX_HEADER", 48_000)
    values = [[torch.full((1,), i) for i in range(number % 12)] for number in range(60)]
    net = nn.Identity()
    with record(net, "", into=tmp_path / "r") as acts:
        for value in values:
            net(torch.ones(1))
            acts.add("value", value)
    found = load(tmp_path / "r")
    assert len(opened_shards(found)) > 5
    assert all(map(same, found["value"], values))
