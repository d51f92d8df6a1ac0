"""What is read of a stored recording: few files are mapped, whatever is read and kept, and none that is small."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from actrec import CorruptRecordingError, load, record
from actrec.data import rows
from actrec.store import Folder
from actrec.store import rank as _rank
from actrec.store import shard as _shard
from tests.stored import same

if TYPE_CHECKING:
    from collections.abc import Callable

    from actrec import Recording

PASSES = 12
FEW = 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recording of a shard for each pass."""
    recorded(Folder(tmp_path / "r", seconds=0))
    return tmp_path / "r"


def recorded(into: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with torch.no_grad(), record(net, into=into) as acts:
        for _ in range(PASSES):
            net(torch.randn(16, 8))
    return acts


@pytest.fixture
def _all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shard, "_SMALL", 1)
    monkeypatch.setattr(_rank, "_MOST_OPEN", FEW)


def maps_of(path: Path) -> int:
    """How many files of a folder are mapped into this process."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def same_layers(found: Recording, expected: Recording) -> bool:
    return all(same(list(found[name]), list(expected[name])) for name in expected)


READS: dict[str, Callable[[Recording], Any]] = {
    "iterating": lambda acts: [float(value.sum()) for layer in acts.values() for value in layer],
    "cat": lambda acts: acts["0"].cat(),
    "stack": lambda acts: acts["1"].stack(),
    "stats": lambda acts: acts.stats(),
    "all rows": lambda acts: rows(acts, "0", "1")[:],
    "some rows": lambda acts: rows(acts, "0")[list(range(0, 16 * PASSES, 7))],
}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not on this system")
@pytest.mark.usefixtures("_all_is_large")
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_all_of_many_shards_leaves_few_of_them_mapped(path: Path, read: Any) -> None:
    acts = load(path)
    kept = rows(acts, "0", "1")
    before = maps_of(path)
    found = read(acts)
    kept[:]
    kept[[3, 100]]
    assert len(list((path / "rank-00000").glob("*.safetensors"))) > 2 * FEW
    assert maps_of(path) <= max(before, FEW)
    del found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not on this system")
def test_small_values_that_are_kept_keep_nothing_mapped(path: Path) -> None:
    acts = load(path)
    values = [value for layer in acts.values() for value in layer]
    assert maps_of(path) == 0
    assert len(values) == 2 * PASSES


@pytest.mark.usefixtures("_all_is_large")
def test_mapped_or_read_the_values_are_the_same(path: Path) -> None:
    expected = recorded(list)
    acts = load(path)
    assert same_layers(acts, expected)
    assert torch.equal(acts["0"].cat(), expected["0"].cat())
    assert torch.equal(rows(acts, "0")[[5, 1]], expected["0"].cat()[[5, 1]])


@pytest.mark.usefixtures("_all_is_large")
def test_where_nothing_more_can_be_mapped_values_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: Any, **__: Any) -> None:
        message = "unable to mmap 1000 bytes: Cannot allocate memory (12)"
        raise RuntimeError(message)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", without)
    assert same_layers(load(path), recorded(list))


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_is_cut_short_while_it_is_in_use_is_found_and_does_not_end_the_process(
    path: Path, large: bool, request: pytest.FixtureRequest
) -> None:
    if large:
        request.getfixturevalue("_all_is_large")
    acts = load(path)
    dataset = rows(acts, "0", "1")
    value = acts["0"][0]
    expected = value.clone()
    everything = dataset[[3, 4]]
    kept = value.clone() if large else value
    for file in path.rglob("*.safetensors"):
        os.truncate(file, 500)
    for read in (
        lambda: acts["0"][0],
        acts["1"].cat,
        lambda: dataset[[3, 4]],
        lambda: dataset[3:4],
    ):
        with pytest.raises(CorruptRecordingError, match=r"has 500 now|bec[ao]me shorter|claims a"):
            read()
    assert torch.equal(kept, expected), "what is small is in memory"
    assert len(everything) == 2


@pytest.mark.usefixtures("_all_is_large")
def test_a_file_that_was_replaced_by_one_with_the_same_content_is_mapped_anew(path: Path) -> None:
    acts = load(path)
    first = acts["0"][0].clone()
    file = path / "rank-00000/000000.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert torch.equal(acts["0"][0], first)
