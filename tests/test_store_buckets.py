"""Object stores: the same recordings as on disk, nothing half there, nothing lost, and a server that fails is told."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import uuid
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

from actrec import (
    ActrecError,
    CorruptRecordingError,
    OptionError,
    ReadError,
    RecordingExistsError,
    RecordingNotFoundError,
    WriteError,
    load,
    record,
    verify,
)
from actrec.__main__ import main
from actrec.data import between as _between
from actrec.data import rows, shuffled
from actrec.data import shuffling as _shuffled
from actrec.store import Folder
from actrec.store import blocks as _blocks
from actrec.store import bucket as _bucket
from actrec.store import new_file as _new_file
from actrec.store import objects as _objects
from actrec.store import upload as _upload
from actrec.store.bucket import Bucket
from actrec.store.disk import Disk
from actrec.store.place import place
from tests.object_store import Stand, s3_server
from tests.stored import Net, assert_same, batches, same
from tests.sweep import WHOLE, only_in_sweeps, some

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSES = 8
SECRET = "a-secret-of-nobody"  # noqa: S105  # of nobody


def run(into: Any = list, passes: int = PASSES, *, resume: bool = False) -> Any:
    """The run of all tests here: what it records depends on nothing but the number of the pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    with record(net, inputs=True, into=into, resume=resume) as acts:
        for step in range(acts.num_passes, passes):
            net(torch.full((2, 4), float(step)) - 3)
            acts.add("step", {"number": step, "label": torch.tensor([step])})
    return acts


def small(url: str, **options: Any) -> Folder:
    """A folder in which each pass or two become a shard."""
    return Folder(url, shard_bytes=4 * 1024, **options)


def added(*values: Any, into: Any = list) -> Any:
    """A recording with these values, one for each pass."""
    net = nn.Identity()
    with record(net, "", into=into) as acts:
        for value in values:
            net(torch.ones(1))
            acts.add("x", value)
    return acts


@pytest.fixture(scope="module")
def whole() -> Any:
    return run()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing waits before it tries again, and files on their way are in the folder of the test."""
    monkeypatch.setattr(_upload, "WAITS", (0.0, 0.0))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Stand.begin()


@pytest.fixture
def url() -> str:
    return f"stand://{uuid.uuid4().hex}/run"


@pytest.fixture(scope="session")
def server() -> Iterator[dict[str, Any]]:
    with s3_server() as options:
        yield options


@pytest.fixture
def s3(server: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The URL of a folder in a new bucket on the server, and what is needed to reach it."""
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3", **server).mkdir(bucket)
    return f"s3://{bucket}/run", server


def objects(url: str, **options: Any) -> list[str]:
    """What there is below a URL."""
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    return sorted(name.partition("/run/")[2] for name in fs.find(path))


def spooled(folder: Path) -> list[str]:
    """The files that are on their way, by the names that they will have."""
    return sorted(path.name.split("-", 2)[-1] for path in folder.rglob("actrec-*"))


def assert_is_the_beginning(found: Any, whole: Any) -> None:
    """``found`` has exactly the first passes of ``whole``."""
    for mine, theirs in ((found, whole), (found.inputs, whole.inputs)):
        for name in theirs:
            expected = list(theirs[name])[: found.num_passes]
            layer = list(mine.get(name, []))
            assert len(layer) == len(expected)
            assert all(map(same, layer, expected))


# --- The same as on disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["memory", "stand"])
def test_a_recording_in_an_object_store_is_the_one_in_memory(scheme: str) -> None:
    where = f"{scheme}://{uuid.uuid4().hex}/run"
    torch.manual_seed(0)
    net, expected = Net(), []
    for into in (list, Folder(where, shard_bytes=100_000)):
        torch.manual_seed(0)
        with record(net, inputs=True, into=into) as acts:
            for step, batch in enumerate(batches(6)):
                net(batch)
                acts.add("step", (step, {"half": torch.tensor([step]).half(), "name": "a"}))
        expected.append(acts)
    assert_same(expected[1], expected[0])
    found = load(where)
    assert_same(found, expected[0])
    assert found.complete
    assert verify(where) == []
    assert repr(found) == repr(expected[1]).replace("recorded", "stored")


def test_what_is_on_an_s3_server_is_what_was_recorded(
    s3: tuple[str, dict[str, Any]], whole: Any
) -> None:
    where, options = s3
    acts = run(small(where, storage_options=options))
    assert_same(acts, whole)
    assert_same(load(where, storage_options=options), whole)
    assert_same(load(small(where, storage_options=options)), whole)
    assert verify(where, storage_options=options) == []
    names = objects(where, **options)
    shards = [f"rank-00000/{number:06d}.safetensors" for number in range(len(names) - 1)]
    assert names == [*shards, "rank-00000/rank.json"]
    assert len(names) > 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool])
def test_saved_recordings_come_back(url: str, dtype: torch.dtype, tmp_path: Path) -> None:
    acts = added(*([torch.ones(n, 2).to(dtype), np.arange(n), None] for n in (3, 0, 2)))
    acts.save(url)
    assert_same(load(url), acts)
    load(url).save(tmp_path / "disk")
    assert_same(load(tmp_path / "disk"), acts)
    with pytest.raises(RecordingExistsError, match="there is a recording already"):
        acts.save(url)


def test_the_command_line_shows_and_verifies_what_is_in_an_object_store(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(url)
    assert main(["show", url]) == 0
    assert "stored Sequential: 3 layers, 8 passes" in capsys.readouterr().out
    assert main(["verify", url]) == 0
    (shard,) = (path for path in Stand.store if url[8:] in path and path.endswith("s"))
    data = bytearray(Stand.store[shard].getvalue())
    data[-1] ^= 1
    fsspec.filesystem("stand").pipe_file(shard, bytes(data))
    assert main(["verify", url]) == 1
    assert f"{url}/rank-00000/000000.safetensors is damaged: the checksum of the data of layer" in (
        capsys.readouterr().err
    )


def test_a_path_is_a_url_only_if_it_is_text_with_a_scheme(tmp_path: Path) -> None:
    assert isinstance(place(Path("s3://bucket/run")), Disk)
    assert isinstance(place("runs/a"), Disk)
    assert isinstance(place("memory://a"), Bucket)
    assert str(place((tmp_path / "a b").as_uri())) == str(tmp_path / "a b")
    assert str(place("local:///x")) == "/x"
    assert str(place("file://localhost/x")) == "/x"
    assert str(place("file:///runs/a#1?b")) == "/runs/a#1?b"
    assert str(place("file:////x%23")) == "/x#"
    run((tmp_path / "a b").as_uri())
    assert (tmp_path / "a b" / "rank-00000/rank.json").exists()


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("stand://", {}, "nothing after the ://"),
        ("nobody://bucket/run", {}, "Protocol not known: nobody"),
        ("abfs://bucket/run", {}, "needs a package that is not installed"),
        ("s3://me:password@bucket/run", {}, "there is a password in that URL"),
    ],
)
def test_what_fsspec_cannot_open_is_refused_before_anything_happens(
    where: str, options: dict[str, Any], message: str
) -> None:
    for refused in (
        lambda: load(where, storage_options=options),
        lambda: run(Folder(where, storage_options=options)),
        lambda: record(nn.Identity(), "", into=where, resume=True).__enter__(),
    ):
        with pytest.raises(OptionError, match=message) as caught:
            refused()
        assert "password@" not in str(caught.value)


def test_a_file_url_of_a_relative_path_is_refused_and_not_taken_for_one_of_the_root() -> None:
    for where in ("file://runs/a", "local://runs/a", "file://"):
        with pytest.raises(OptionError, match="three slashes"):
            place(where)


def test_a_cache_has_a_size(url: str) -> None:
    for size in (0, -1, float("nan"), "1 GB"):
        with pytest.raises(OptionError, match="cache_bytes"):
            load(url, cache_bytes=size)  # type: ignore[arg-type]


def test_fsspec_is_imported_for_a_url_alone() -> None:
    script = """
import sys, tempfile, torch, actrec
path = tempfile.mkdtemp() + "/run"
model = torch.nn.Linear(2, 2)
with actrec.record(model, "", into=path):
    model(torch.ones(3, 2))
actrec.load(path)
assert "fsspec" not in sys.modules
try:
    actrec.load("memory://nothing/here")
except actrec.RecordingNotFoundError:
    assert "fsspec" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_secret_is_shown_or_stored(s3: tuple[str, dict[str, Any]]) -> None:
    where, options = s3
    folder = small(where, storage_options=options)
    acts = run(folder)
    fs = fsspec.filesystem("s3", **options)
    texts = [repr(folder), repr(acts), repr(load(folder)), repr(place(folder))]
    texts += [fs.cat_file(f"{where}/{name}").decode("latin1") for name in objects(where, **options)]
    wrong = {
        **options,
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    for refused in (
        lambda: run(folder),
        lambda: run(Folder("s3://there-is-none/run", storage_options=options)),
        lambda: load(where, storage_options=wrong),
    ):
        with pytest.raises(ActrecError) as caught:
            refused()
        texts.append(str(caught.value))
    assert not [text for text in texts if SECRET in text]


# --- Reading -----------------------------------------------------------------------------------------


def test_opening_reads_one_header_of_each_rank_however_many_shards_there_are(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(4, 64 * 1024)
    with record(net, "", into=Folder(url, shard_bytes=300_000)):
        for _ in range(20):
            net(torch.randn(1, 4))
    shards = [name for name in objects(url) if name.endswith(".safetensors")]
    assert len(shards) >= 10
    for head in (_bucket._HEAD, 64):  # which is shorter than a header
        monkeypatch.setattr(_bucket, "_HEAD", head)
        Stand.begin()
        found = load(url)
        assert "20 passes" in repr(found)
        headers = {path for kind, path in Stand.log if kind == "cat" and path.endswith("s")}
        assert len(headers) == 1
        assert len(Stand.log) <= (8 if head == 64 else 6)
        assert max(Stand.fetched) <= _bucket._HEAD or head == 64
        _ = found[""][13]
        headers = {path for kind, path in Stand.log if kind == "cat" and path.endswith("s")}
        assert len(headers) <= 2 + (20).bit_length()
    assert found[""].passes == list(range(20))


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_objects, "BLOCK", 4096)
    monkeypatch.setitem(_blocks.CACHED, "block_size", 4096)


@pytest.mark.usefixtures("_small_blocks")
def test_a_call_is_fetched_alone_and_those_that_follow_in_blocks_and_only_once(
    url: str, whole: Any
) -> None:
    run(url)
    found = load(url)
    repr(found)
    Stand.begin()
    assert same(found["0"][5], whole["0"][5])
    assert Stand.fetched == [64, whole["0"][5].nbytes], (
        "whether it is the same object, and the call"
    )
    assert same(found["0"][6], whole["0"][6])
    assert [kind for kind, _ in Stand.log] == ["cat", "cat", "info", "cat"]
    assert max(Stand.fetched) <= 4096
    values = list(found["0"])
    joined = found["0"].cat()
    assert len(Stand.log) <= 6
    assert same(joined, whole["0"].cat())
    values[0].fill_(7)  # reaches no object
    assert_same(load(url), whole)


def test_what_is_kept_has_a_limit_and_values_outlive_it(url: str) -> None:
    net = nn.Linear(4, 1000)
    into = [Folder(url, shard_bytes=6000, rank=rank, world_size=2, run="a") for rank in (0, 1)]
    for folder in into:
        with record(net, "", into=folder), torch.no_grad():
            for step in range(20):
                net(torch.full((1, 4), float(step)))
    for limit in (3 * (_blocks.BLOCK * _blocks._EACH), 1):  # of what is larger, one is kept
        found = load(url, cache_bytes=limit)
        kept = found.place._blocks._opened().objects
        values = list(found[""])
        assert len(kept) == (3 if limit > 1 else 1), "of all ranks together"
        assert all(map(same, values[::2], values[1::2]))
        assert same(values[38], net(torch.full((1, 4), 19.0)).detach())
        Stand.begin()
        assert same(found[""][0], values[0])
        assert Stand.fetched, "it is fetched again"


@pytest.mark.usefixtures("_small_blocks")
def test_what_is_large_is_fetched_in_few_steps_and_not_kept(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_objects, "_MOST", 1 << 19)
    values = [torch.randn(size) for size in (50_000, 400_000)]
    added(*values).save(url)
    found = load(url)
    assert len(found["x"]) == 2
    for value, steps in zip(values, (1, 4), strict=True):
        Stand.begin()
        assert same(found["x"][steps > 1], value)
        assert sum(size > 4096 for size in Stand.fetched) == steps
    assert not found.place._blocks._opened().objects


def replaced(url: str, change: Any) -> None:
    """Change the first shard behind everybody's back."""
    path = fsspec.core.url_to_fs(url)[1] + "/rank-00000/000000.safetensors"
    fs = fsspec.filesystem("stand")
    data = fs.cat_file(path)
    fs.rm_file(path)
    if change is not None:
        fs.pipe_file(path, change(data))


def cut_off(data: bytes) -> bytes:
    """The header of a shard, and little else."""
    return data[: 8 + int.from_bytes(data[:8], "little") + 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_off, "it has become shorter, and ends at byte"),
        (lambda _: b"x" * 9999, "it is another file than when it was opened"),
        (None, "it was there when it was opened, and is gone"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_an_object_that_changes_under_a_reader_is_found(
    url: str, change: Any, message: str, pickled: bool
) -> None:
    run(url)
    found = load(url)
    replaced(url, change)
    if pickled:  # then the header is read again, too
        found = pickle.loads(pickle.dumps(found))
        message = (
            r"000000.safetensors is damaged: (it is missing|its tensors end|it claims a header)"
        )
    for use in (lambda: found["0"][0], found["0"].cat):
        with pytest.raises(CorruptRecordingError, match=message):
            use()


def test_a_shard_that_was_cut_off_says_so_rather_than_how_the_store_puts_it(url: str) -> None:
    run(url)
    found = load(url)
    replaced(url, cut_off)

    def no_such_range(number: int, kind: str, path: str, done: bool) -> None:
        if kind == "cat":
            raise OSError(22, "the requested range is not satisfiable")

    Stand.begin(no_such_range)
    with pytest.raises(CorruptRecordingError, match="it has become shorter"):
        _ = found["0"][0]
    replaced_not = load_again(url)
    with pytest.raises(ReadError, match="not satisfiable"):
        _ = replaced_not()


def load_again(url: str) -> Any:
    other = url.replace("/run", "/other/run")
    plan, Stand.plan = Stand.plan, staticmethod(lambda *_: None)
    run(other)
    found = load(other)
    Stand.plan = staticmethod(plan)
    return lambda: found["0"][0]


def test_damaged_and_missing_objects_are_named(url: str) -> None:
    run(small(url))
    replaced(url, lambda data: data[:100])
    found = load(url)  # what is at the beginning is read when it is asked for
    with pytest.raises(
        CorruptRecordingError, match=r"run/rank-00000/000000.safetensors is damaged"
    ):
        _ = found["0"][0]
    assert "000000.safetensors is damaged" in verify(url)[0]
    replaced(url, None)
    with pytest.raises(
        CorruptRecordingError, match=r"000000.safetensors is damaged: it is missing"
    ):
        load(url)
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm_file(path + "/rank-00000/rank.json")
    with pytest.raises(
        CorruptRecordingError, match=r"run/rank-00000/rank.json is damaged: it is missing"
    ):
        load(url)
    with pytest.raises(RecordingNotFoundError, match=r"no rank.json in any folder"):
        load(url.removesuffix("/run"))
    with pytest.raises(RecordingNotFoundError, match="no such folder"):
        load(url + "/nothing")


def test_an_object_that_is_empty_is_damaged(url: str) -> None:
    run(url)
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm_file(path + "/rank-00000/rank.json")
    fs.pipe_file(path + "/rank-00000/rank.json", b"")
    with pytest.raises(CorruptRecordingError, match=r"rank.json is damaged: it is empty"):
        load(url)


def test_a_shard_that_goes_between_listing_and_opening_is_missing(url: str) -> None:
    run(url)

    def gone(number: int, kind: str, path: str, done: bool) -> None:
        if kind == "cat" and path.endswith("s"):
            raise FileNotFoundError(path)

    Stand.begin(gone)
    with pytest.raises(
        CorruptRecordingError, match=r"000000.safetensors is damaged: it is missing"
    ):
        load(url)


def test_a_store_that_refuses_or_is_not_there_is_named(
    url: str, s3: tuple[str, dict[str, Any]]
) -> None:
    run(url)

    def refuse(number: int, kind: str, path: str, done: bool) -> None:
        raise PermissionError(13, "Forbidden")

    Stand.begin(refuse)
    for refused in (lambda: load(url), lambda: verify(url), lambda: run(url)):
        Stand.log.clear()
        with pytest.raises(ReadError, match=r"could not be read: PermissionError.*Forbidden"):
            refused()
        assert len(Stand.log) == 1

    def refuse_to_write(number: int, kind: str, path: str, done: bool) -> None:
        if kind in {"put", "rm"}:
            raise PermissionError(13, "Forbidden")

    Stand.begin(refuse_to_write)
    with pytest.raises(WriteError, match=r"rank.json could not be written: .*Forbidden"):
        run(url + "2")
    with pytest.raises(WriteError, match=r"000001.safetensors could not be written: .*Forbidden"):
        run(url, resume=True)
    with pytest.raises(WriteError, match=r"x could not be removed: .*Forbidden"):
        place(url).remove("x")
    _, options = s3
    nowhere = "s3://there-is-no-such-bucket/run"
    with pytest.raises(RecordingNotFoundError, match="no such folder"):
        load(nowhere, storage_options=options)
    with pytest.raises(WriteError, match="The specified bucket does not exist"):
        run(Folder(nowhere, storage_options=options))


def test_a_read_that_fails_is_told_and_nothing_is_the_worse_for_it(url: str, whole: Any) -> None:
    """To try again is what file systems do, and are configured to do."""
    run(small(url))
    failed = set()

    def once(number: int, kind: str, path: str, done: bool) -> None:
        if (kind, path) not in failed:
            failed.add((kind, path))
            raise ConnectionError("reset")

    def again(read: Any) -> Any:
        while True:
            try:
                return read()
            except ReadError as error:
                told.append(str(error))

    told: list[str] = []
    Stand.begin(once)
    found = again(lambda: load(url))
    for name in whole:
        values = [again(lambda n=name, i=i: found[n][i]) for i in range(PASSES)]
        assert all(map(same, values, whole[name]))
    assert len(told) == len(failed) > 8
    assert all("could not be read: ConnectionError: reset" in text for text in told)


def test_rows_of_an_object_store_are_those_in_memory(url: str, whole: Any) -> None:
    run(small(url))
    dataset = rows(load(url), "0")
    assert same(dataset[:], whole["0"].cat())
    for wanted in ([4, 1, 0], [4, 1, 0, 1], [1]):  # some of them are near each other
        assert same(dataset[wanted], whole["0"].cat()[wanted])
    batches = shuffled(load(url), "0", batch_size=5, buffer=7)
    found = torch.cat(list(batches))
    assert sorted(found.tolist()) == sorted(whole["0"].cat().tolist())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """The parts of objects that are asked for: of which object, and from where to where."""
    parts: list[tuple[str, int, int]] = []
    cat = Stand.cat_file

    def noted(fs: Stand, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        parts.append((path, start or 0, end))
        return cat(fs, path, start, end, **options)

    monkeypatch.setattr(Stand, "cat_file", noted)
    return parts


def data(asked: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The parts that are no looks at whether an object still begins as it did."""
    return [part for part in asked if part[1:] != (0, 64)]


def sized(url: str, shards: int = 4) -> Any:
    """Rows of 256 bytes, 400 in each shard, and a label beside each."""
    net = nn.Identity()
    with record(net, "", into=Folder(url, shard_bytes=105_000, seconds=1e9)) as acts:
        for step in range(shards):
            net(torch.randn(400, 64))
            acts.add("label", torch.arange(400) + 400 * step)
    return load(url)


@pytest.mark.parametrize("masked", [False, True])
def test_an_epoch_fetches_each_byte_once_and_ahead_of_need(
    url: str, asked: list[tuple[str, int, int]], masked: bool
) -> None:
    acts = sized(url)
    joined = acts[""].cat()
    mask = torch.arange(1600) % 3 > 0 if masked else None
    buffer = 400 * (256 + 8 + 32)  # a quarter
    dataset = shuffled(acts, "", "label", batch_size=20, buffer=buffer, mask=mask)
    for _ in range(2):
        asked.clear()
        batches = iter(dataset)
        found = [next(batches)]
        until = time.monotonic() + 60
        while time.monotonic() < until and sum(b - a for _, a, b in data(asked)) < 420 * 264:
            time.sleep(0.001)
        assert len(asked) > 64, "what comes next is fetched before one asks for it"
        found += batches
        labels = torch.cat([label for _, label in found])
        assert (
            sorted(labels.tolist()) == torch.arange(1600)[mask if masked else slice(None)].tolist()
        )
        assert all(same(hidden, joined[label]) for hidden, label in found)
        parts = sorted(data(asked))
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(parts)), "no byte twice"
        assert sum(b - a for _, a, b in parts) <= 1600 * 264
        assert masked or sum(b - a for _, a, b in parts) == 1600 * 264
        assert len(asked) - len(parts) <= 4 * 5, "a look at each shard for each window"


@pytest.mark.parametrize("masked", [False, True])
def test_workers_fetch_each_byte_once_between_them(
    url: str,
    asked: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    masked: bool,
    tmp_path: Path,
) -> None:
    acts = sized(url)
    joined = acts[""].cat()
    mask = torch.arange(1600) % 3 > 0 if masked else None
    dataset = shuffled(acts, "", "label", batch_size=20, buffer=400 * (256 + 8 + 32), mask=mask)
    alone = [label.tolist() for _, label in dataset]
    dataset.set_epoch(0)
    asked.clear()
    of = []
    for worker in range(3):
        info = mock.Mock(id=worker, num_workers=3)
        monkeypatch.setattr(_shuffled, "get_worker_info", lambda info=info: info)
        of.append(iter(pickle.loads(pickle.dumps(dataset))))
    found = [batch for batches in zip_longest(*of) for batch in batches if batch is not None]
    assert [label.tolist() for _, label in found] == alone
    assert all(same(hidden, joined[label]) for hidden, label in found)
    parts = sorted(data(asked))
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(parts)), "no byte twice"
    assert sum(b - a for _, a, b in parts) <= 1600 * 264
    assert [*tmp_path.glob("actrec-*/*")], "they are in files"
    del dataset, of
    gc.collect()
    assert not [*tmp_path.glob("actrec-*")]


@pytest.mark.parametrize("broken", ["short", "no folder", "no room", "no locks"])
def test_a_part_that_no_other_worker_has_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    between, of = _between.Between(), bytes(range(100))
    downloaded: list[tuple[int, int]] = []

    def download(begin: int, end: int) -> bytes:
        downloaded.append((begin, end))
        return of[begin:end]

    def later(work: Any, *args: Any) -> Any:
        return work(*args)

    fetch = between.fetching("a", later)
    assert fetch(lambda: 7) == 7, "what is no part is done by everybody"
    assert fetch(download, 10, 30) == fetch(download, 10, 30) == of[10:30]
    assert downloaded == [(10, 30)]
    folder = next(tmp_path.glob("actrec-*"))
    if broken == "short":
        for path in folder.iterdir():
            path.write_bytes(b"x")
    elif broken == "no folder":
        shutil.rmtree(folder)
        folder.touch()
    elif broken == "no locks":
        monkeypatch.setattr(_between, "flock", mock.Mock(side_effect=OSError("no locks")))
    else:
        monkeypatch.setattr(_between, "_MOST", 25)
        assert fetch(download, 30, 50) == of[30:50]
        assert sum(path.stat().st_size for path in folder.iterdir()) == 20, "the oldest goes"
    assert fetch(download, 10, 30) == of[10:30]
    assert downloaded.count((10, 30)) == 2
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        del between, fetch
        gc.collect()
    assert folder.exists(), "it goes with the process that made it"


def test_what_is_fetched_at_a_time_is_many_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = shuffled(sized(url), "", batch_size=20, buffer=400 * (256 + 32))
    Stand.begin()
    cat, now, most = Stand.cat_file, 0, 0
    monkeypatch.setattr(_shuffled, "_BATCHES_AT_ONCE", 1)

    def waiting(fs: Stand, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.01)
        now -= 1
        return cat(fs, path, start, end, **options)

    monkeypatch.setattr(Stand, "cat_file", waiting)
    batches = iter(dataset)
    next(batches)
    time.sleep(0.2)  # what comes next is on its way by now
    batches.close()  # type: ignore[attr-defined]
    assert most >= 4
    assert sum(Stand.fetched) < 1600 * 256, "nothing more is fetched"
    assert not [one for one in threading.enumerate() if one.name.startswith("actrec-fetch")]


def test_two_rows_fetch_their_ranges_and_not_a_shard(
    url: str, asked: list[tuple[str, int, int]]
) -> None:
    acts = sized(url)
    joined = acts[""].cat()
    dataset = rows(acts, "", "label")
    asked.clear()
    found, label = dataset[[1203, 7]]
    assert same(found, joined[[1203, 7]])
    assert label.tolist() == [1203, 7]
    assert sorted(b - a for _, a, b in data(asked)) == [8, 8, 256, 256]
    assert len(asked) == 6


def test_single_rows_fetch_as_many_bytes_as_they_have(
    url: str, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blocks, "_NEAR", 1000)
    acts = sized(url)
    joined = acts[""].cat()
    dataset = rows(acts, "")
    asked.clear()
    for number in (1203, 7, 807, 390, 1590, 200):
        assert same(dataset[number], joined[number])
    assert [b - a for _, a, b in data(asked)] == [256] * 6
    assert len(asked) == 6


@pytest.mark.parametrize("again", [False, True])
def test_what_is_announced_and_changes_or_fails_is_told(url: str, again: bool) -> None:
    dataset = shuffled(sized(url, 1), "", batch_size=20)
    Stand.begin(refusing("reset by peer"))
    with pytest.raises(ReadError, match="ConnectionError: reset by peer"):
        next(iter(dataset))
    Stand.begin()
    if again:
        return
    replaced(url, lambda data: b"x" * len(data))
    with pytest.raises(CorruptRecordingError, match="it is another file than when it was opened"):
        next(iter(dataset))
    replaced(url, None)
    with pytest.raises(CorruptRecordingError, match="is gone"):
        next(iter(dataset))


def refusing(text: str) -> Any:
    """A plan: nothing is read."""

    def plan(number: int, kind: str, path: str, done: bool) -> None:
        if kind == "cat":
            raise ConnectionError(text)

    return plan


# --- Other processes ---------------------------------------------------------------------------------


class Calls(Dataset[Any]):
    """The calls of a layer, one by one."""

    def __init__(self, recording: Any, name: str) -> None:
        self.recording = recording
        self.name = name

    def __len__(self) -> int:
        return len(self.recording[self.name])

    def __getitem__(self, index: int) -> Any:
        return self.recording[self.name][index].clone()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.sweep
@pytest.mark.parametrize("method", some(["fork", "spawn"], 1))
def test_workers_read_from_the_server_themselves(
    s3: tuple[str, dict[str, Any]], whole: Any, method: str
) -> None:
    where, options = s3
    run(small(where, storage_options=options))
    found = load(where, storage_options=options)
    assert same(
        found["0"][0], whole["0"][0]
    )  # the connection, blocks and lock of this process are in use
    context = multiprocessing.get_context(method)
    calls = Calls(found, "0")
    loader = DataLoader(
        calls, batch_size=None, num_workers=1, multiprocessing_context=context, timeout=60
    )
    with found.place._blocks._opened().lock:  # as another thread may have it
        values = list(loader) if method == "fork" else []
    values = values or list(loader)
    assert all(map(same, values, whole["0"]))


def test_a_forked_process_begins_with_connections_and_blocks_of_its_own(
    url: str, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    run(url)
    found = load(url)
    value = found["0"][0]
    connected = []
    connect = fsspec.core.url_to_fs

    def connect_again(url: str, **options: Any) -> Any:
        connected.append(url)
        return connect(url, **options)

    monkeypatch.setattr(fsspec.core, "url_to_fs", connect_again)
    with found.place._blocks._opened().lock:  # as another thread had it
        monkeypatch.setattr(os, "getpid", lambda: -1)
        Stand.begin()
        assert same(found["0"][0], value)
    assert connected == [url + "/rank-00000"]
    assert Stand.fetched, "it is fetched again"
    assert same(value, whole["0"][0])


def test_no_thread_of_a_forked_process_has_the_connections_of_its_parent(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, connect = place(url), fsspec.core.url_to_fs
    before, begun, late = there.fs, threading.Event(), threading.Event()

    def connect_again(url: str, **options: Any) -> Any:
        if threading.current_thread() is first:
            begun.set()
            late.wait(60)
        return object(), connect(url, **options)[1]

    monkeypatch.setattr(fsspec.core, "url_to_fs", connect_again)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    first = threading.Thread(target=lambda: there.fs)
    first.start()
    begun.wait(60)
    found = there.fs  # while the other thread connects
    late.set()
    first.join()
    assert found is not before


# --- Writing -----------------------------------------------------------------------------------------


def failing(plan: Any, url: str, *, resume: bool = False) -> str | None:
    """Run with a plan for the store; how it was left, if not by its end."""
    Stand.begin(plan)
    try:
        run(small(url), resume=resume)
    except ActrecError as error:
        return str(error)
    finally:
        Stand.begin()
    return None


OPERATIONS = st.integers(1, 70)


@pytest.mark.sweep
@given(OPERATIONS, st.booleans(), st.booleans(), OPERATIONS)
@settings(max_examples=30 if WHOLE else 10, deadline=None)
def test_whatever_fails_the_committed_passes_are_there_and_resuming_completes_them(
    stop: int, done: bool, for_good: bool, again: int
) -> None:
    whole = run()
    where = f"stand://{uuid.uuid4().hex}/run"

    def outage(start: int) -> Any:
        def plan(number: int, kind: str, path: str, after: bool) -> None:
            if after == done and (number >= start if for_good else number == start):
                raise ConnectionError("the network is down")

        return plan

    for number, start in enumerate((stop, again)):
        failure = failing(outage(start), where, resume=number > 0)
        if not for_good:  # reading, at the beginning, is not tried again
            assert failure is None or "could not be read" in failure
        try:
            found = load(where)
        except RecordingNotFoundError:
            assert failure is not None
            continue
        assert verify(where) == []
        assert_is_the_beginning(found, whole)
        assert found.complete or failure is not None
        for name in objects(where):
            assert name.endswith((".safetensors", "rank.json"))
    run(small(where), resume=True)
    assert_same(load(where), whole)
    assert load(where).complete


def only(part: str, times: float = float("inf"), done: bool = False) -> Any:
    """A plan: putting an object with this in its name fails so many times."""
    left = [times]

    def plan(number: int, kind: str, path: str, after: bool) -> None:
        if kind == "put" and part in path and after == done and left[0] > 0:
            left[0] -= 1
            raise ConnectionError("reset by peer")

    return plan


@pytest.mark.parametrize("name", ["000002.safetensors", "rank.json"])
@pytest.mark.parametrize("done", [False, True])
def test_an_upload_that_fails_twice_is_done_at_the_third_time(
    url: str, whole: Any, name: str, done: bool, tmp_path: Path
) -> None:
    assert failing(only(name, 2, done), url) is None
    assert_same(load(url), whole)
    assert load(url).complete
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_always_fails_is_told_once_and_its_file_kept(
    url: str, whole: Any, tmp_path: Path
) -> None:
    failure = failing(only("000002"), url)
    assert failure is not None
    assert f"{url}/rank-00000/000002.safetensors could not be written: ConnectionError" in failure
    assert "tried 3 times at most" in failure
    (kept,) = tmp_path.iterdir()
    assert f"The file is kept as {kept}. Committed and safe: " in failure
    assert "resume=True) continues after them" in failure
    found = load(url)
    assert not found.complete
    assert_is_the_beginning(found, whole)
    assert kept.stat().st_mode & 0o777 == 0o600
    # Uploaded by hand, it counts.
    passes = found.num_passes
    fs, path = fsspec.core.url_to_fs(url)
    fs.put_file(str(kept), f"{path}/rank-00000/000002.safetensors")
    assert load(url).num_passes > passes
    assert_is_the_beginning(load(url), whole)
    assert failing(lambda *_: None, url, resume=True) is None
    assert_same(load(url), whole)
    assert list(tmp_path.iterdir()) == [kept], "it is the user's"


def test_the_error_of_an_upload_is_raised_once(url: str) -> None:
    Stand.begin(only("000001"))
    net = nn.Linear(4, 3)
    told = []
    with pytest.raises(RuntimeError, match="the block"), record(net, "", into=small(url)):
        after = 0
        until = time.monotonic() + 60
        while after < 50 and time.monotonic() < until:  # until it has failed, and on
            try:
                net(torch.randn(2, 4))
            except WriteError as error:
                told.append(str(error))
            after += len(told)
        message = "the block"
        raise RuntimeError(message)
    assert len(told) == 1


@pytest.mark.parametrize("name", ["rank.json", "000000.safetensors"])
def test_what_arrives_cut_off_is_told(url: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    put = Stand.put_file

    def truncate(fs: Stand, lpath: str, rpath: str, **options: Any) -> None:
        put(fs, lpath, rpath, **options)
        if rpath.endswith(name):
            fs.store[fs._strip_protocol(rpath)].truncate(300)

    monkeypatch.setattr(Stand, "put_file", truncate)
    failure = failing(lambda *_: None, url)
    # An object that is there is never replaced, not even by its own writer.
    assert failure is not None
    assert f"{name} could not be written" in failure
    assert "bytes were sent, and 300 have arrived" in failure


def test_two_runs_do_not_begin_in_one_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=url) as acts:
        net(torch.ones(2, 4))
        acts.add("x", 1)
        with pytest.raises(RecordingExistsError, match="there is a recording already"):
            run(url)
    assert list(load(url)["x"]) == [1]
    commit = Bucket.commit

    def late(bucket: Bucket, name: str, write: Any) -> None:
        monkeypatch.setattr(Bucket, "commit", commit)
        run(url + "2", 1)
        commit(bucket, name, write)

    monkeypatch.setattr(Bucket, "commit", late)
    with pytest.raises(RecordingExistsError, match="another run has just begun there"):
        run(url + "2")
    assert load(url + "2").complete


def test_of_two_runs_with_other_ranks_that_begin_at_the_same_moment_one_finds_out(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Bucket.commit

    def late(bucket: Bucket, name: str, write: Any) -> None:
        monkeypatch.setattr(Bucket, "commit", commit)
        run(Folder(url, rank=0, world_size=2, run="a"))
        commit(bucket, name, write)

    monkeypatch.setattr(Bucket, "commit", late)
    with pytest.raises(RecordingExistsError, match="a run of 2 ranks records there"):
        run(Folder(url, rank=1, world_size=2, run="b"))
    assert not [name for name in objects(url) if "rank-00001" in name]
    run(Folder(url, rank=1, world_size=2, run="a"))
    assert load(url).complete


def test_only_a_folder_that_is_empty_or_a_recording_is_recorded_into(url: str) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, b"x")
    with pytest.raises(RecordingExistsError, match="that is a file"):
        run(url)
    fs.pipe_file(path + "2/other", b"x")
    with pytest.raises(RecordingExistsError, match="that folder has other things in it"):
        run(url + "2")
    assert fs.cat_file(path + "2/other") == b"x"


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_was_taken_over_from_another_machine_is_stopped(
    url: str, whole: Any, tmp_path: Path, late: bool
) -> None:
    """Nothing tells the two that both live, until the first one writes."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    with (
        pytest.raises(WriteError, match="another run has written it") as caught,
        record(net, inputs=True, into=small(url, spool=tmp_path / "a")) as acts,
    ):
        for _ in range(0 if late else 3):
            net(torch.ones(2, 4))
            acts.add("step", {"number": 0, "label": torch.tensor([0])})
        writer = acts["0"]._stream._writer
        idle = 0
        while idle < 50:  # there are moments between two steps of the writer
            finishing = writer._finisher is not None and writer._finisher.is_alive()
            busy = writer._queued_bytes or finishing
            idle = 0 if busy else idle + 1
            time.sleep(0.001)
        run(small(url, spool=tmp_path / "b"), resume=True)
        net(torch.ones(2, 4))
        acts.add("step", {"number": 0, "label": torch.tensor([0])})
    assert "choose another path for this one" in str(caught.value)
    assert spooled(tmp_path) == []
    found = load(url)
    assert found.complete
    assert found.num_passes == PASSES
    assert verify(url) == []
    if late:
        assert_same(found, whole)


def test_a_resumed_run_that_comes_second_by_a_moment_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    run(small(url), 3)
    commit = Bucket.commit

    def late(bucket: Bucket, name: str, write: Any) -> None:
        monkeypatch.setattr(Bucket, "commit", commit)
        run(small(url), resume=True)
        commit(bucket, name, write)

    monkeypatch.setattr(Bucket, "commit", late)
    with pytest.raises(RecordingExistsError, match="another run is recording there now"):
        run(small(url), resume=True)
    assert_same(load(url), whole)
    assert load(url).complete


def test_the_spool_is_of_its_user_alone_and_says_where_it_is(url: str, tmp_path: Path) -> None:
    mine = place(Folder(url, spool=tmp_path / "a/b")) / "rank-00000"
    unfinished = mine.begin("000000.safetensors", lambda file: file.write(b"x"))
    (path,) = (tmp_path / "a/b").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    unfinished.discard()
    unfinished.discard()
    assert not list((tmp_path / "a/b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"the spool in .*file.*Folder\(..., spool=...\)"):
        run(Folder(url, spool=tmp_path / "file"))
    assert objects(url) == []


def test_a_spool_without_room_is_told_and_nothing_stays_in_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_new_file.FileBeingWritten, "write", full)
        failure = failing(lambda *_: None, url)
    assert failure is not None
    assert "No space left on device. Folder(..., spool=...) chooses another folder" in failure
    assert spooled(tmp_path) == []


def test_at_most_two_shards_are_in_the_spool(url: str, tmp_path: Path) -> None:
    most = 0

    def look(number: int, kind: str, path: str, done: bool) -> None:
        nonlocal most
        most = max(most, len(spooled(tmp_path)))

    assert failing(look, url) is None
    assert 1 <= most <= 2


def test_errors_that_come_again_are_not_tried_again(url: str) -> None:
    Stand.begin(lambda *_: None)
    tries = []

    def refuse(number: int, kind: str, path: str, done: bool) -> None:
        if kind == "put" and "000001" in path:
            tries.append(path)
            raise PermissionError(13, "the token has expired")

    failure = failing(refuse, url)
    assert failure is not None
    assert "the token has expired" in failure
    assert len(tries) == 1


# --- One wins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["disk", "disk without links", "bucket"])
def test_of_those_who_create_an_object_exclusively_one_wins(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    if kind == "disk without links":

        def no_links(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    where = place(url if kind == "bucket" else tmp_path / "a" / "b")
    if kind != "bucket":
        where.make()
    where.commit("x", lambda file: file.write(b"first"))
    with pytest.raises(FileExistsError):
        where.commit("x", lambda file: file.write(b"second"))
    assert where.read("x", 0, 100) == b"first"
    assert where.read("x", 1, 2) == b"ir"
    where.commit("y", lambda file: (file.write(b"...."), file.write_at_start(b"ab")))
    assert where.read("y", 0, 100) == b"ab.."
    assert sorted(where.names()) == ["x", "y"]
    if kind == "disk without links":
        return
    won = []

    def create(number: int) -> None:
        try:
            where.commit("z", lambda file: file.write(str(number).encode()))
        except FileExistsError:
            return
        won.append(number)

    lock = threading.Lock()
    put = Stand.put_file
    monkeypatch.setattr(Stand, "put_file", lambda *a, **k: locked(lock, put, *a, **k))
    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert where.read("z", 0, 100) == str(won[0]).encode()
    assert sorted(where.names()) == ["x", "y", "z"]


def test_whoever_comes_second_by_a_moment_fails_too(url: str) -> None:
    there = place(url)
    there.commit("x", lambda file: file.write(b"first"))

    def not_yet(number: int, kind: str, path: str, done: bool) -> None:
        if number == 1:
            raise FileNotFoundError(path)

    Stand.begin(not_yet)
    with pytest.raises(FileExistsError, match="another run has written it"):
        there.commit("x", lambda file: file.write(b"second"))
    assert there.read("x", 0, 100) == b"first"


def locked(lock: Any, function: Any, *args: Any, **options: Any) -> Any:
    with lock:
        return function(*args, **options)


def test_on_a_server_that_has_conditions_whoever_comes_second_fails(
    s3: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, options = s3
    bucket = place(where, options)
    bucket.commit("x", lambda file: file.write(b"first"))
    bucket.commit("x", lambda file: file.write(b"first"))  # as after an answer that was lost
    looks = iter([False])
    is_there = _upload.Upload._is_there
    monkeypatch.setattr(_upload.Upload, "_is_there", lambda one: next(looks, None) is None and is_there(one))  # fmt: skip
    with pytest.raises(FileExistsError, match="another run has written it"):
        bucket.commit("x", lambda file: file.write(b"second"))
    assert next(looks, None) is None
    assert bucket.read("x", 0, 100) == b"first"


def test_large_objects_arrive_in_parts(s3: tuple[str, dict[str, Any]]) -> None:
    where, options = s3
    data = os.urandom(1 << 16) * (36 * 16)
    bucket = place(where, options)
    bucket.commit("x", lambda file: file.write(data))
    assert bucket.size("x") == len(data)
    with bucket.open("x") as file:
        assert file.seekable()
        assert file.read() == data
        assert file.read() == b""
    fs, path = fsspec.core.url_to_fs(where, **options)
    assert fs.info(path + "/x")["ETag"].endswith('-3"')


# --- Kill --------------------------------------------------------------------------------------------

CHILD = """
import json, sys, time
from actrec.store import upload
from tests.test_store_buckets import run, small

once = upload.Upload._try

def hang(one):
    if one._name.startswith("000003"):
        print("uploading", flush=True)
        time.sleep(1000)
    once(one)

upload.Upload._try = hang
run(small(sys.argv[1], spool=sys.argv[2], storage_options=json.loads(sys.argv[3])))
"""


@only_in_sweeps
def test_after_a_kill_of_the_process_that_uploads_resuming_completes_the_run(
    s3: tuple[str, dict[str, Any]], tmp_path: Path, whole: Any
) -> None:
    where, options = s3
    command = [sys.executable, "-c", CHILD, where, str(tmp_path), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "uploading\n"
        process.kill()
    left = spooled(tmp_path)
    assert "000003.safetensors" in left
    found = load(where, storage_options=options)
    assert not found.complete
    assert 0 < found.num_passes < PASSES
    assert_is_the_beginning(found, whole)
    assert verify(where, storage_options=options) == []
    run(small(where, spool=tmp_path, storage_options=options), resume=True)
    found = load(where, storage_options=options)
    assert found.complete
    assert_same(found, whole)
    assert spooled(tmp_path) == left, "what was left behind is never taken for anything"
