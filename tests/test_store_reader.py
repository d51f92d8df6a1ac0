"""Opening a stored recording: lazily, as the same kind of object; damaged files are named, never obeyed."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import actrec
from actrec import (
    ActrecError,
    CorruptRecordingError,
    JoinError,
    Recording,
    RecordingNotFoundError,
    UnknownLayerError,
    load,
    record,
)
from actrec.__main__ import main
from actrec._recordings.layer import ListLayer
from actrec.data import rows
from actrec.store import (
    Folder,
    _checksums,
    _container,
    _disk,
    _format,
    _index,
    _reader,
    _shard,
    _tree,
)
from tests.stored import Net, assert_same, batches, opened_shards, same

if TYPE_CHECKING:
    from collections.abc import Callable

KIB = 1024


def make(path: Path, passes: int = 6, **options: Any) -> Any:
    """A recording of a few shards, with inputs and added values, and the same in memory."""
    made = []
    for into in (Folder(path, 200 * KIB), list):
        torch.manual_seed(0)
        net = Net()
        with record(net, inputs=True, into=into, **options) as acts:
            for step, batch in enumerate(batches(passes)):
                net(batch)
                acts.add("nested", {"step": step, "pair": (torch.tensor([step]), None)})
        made.append(acts)
    return made[1]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("stored") / "r"
    return path, make(path)


@pytest.fixture
def path(stored: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(stored[0], tmp_path / "r"))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("rank-*/*.safetensors"))


# --- Reading -----------------------------------------------------------------------------------------


def test_a_stored_recording_is_a_recording(stored: tuple[Path, Any]) -> None:
    path, expected = stored
    acts = load(str(path))
    assert isinstance(acts, Recording)
    assert_same(acts, expected)
    assert acts.complete
    lines = repr(acts).splitlines()
    told = repr(expected).splitlines()
    assert lines[0].startswith("stored Net: 7 layers, 6 passes")
    assert [line[:60] for line in lines[1:]] == [line[:60] for line in told[1:]]
    with pytest.raises(UnknownLayerError):
        acts["cnov"]
    assert (
        load(Folder(path)).nbytes
        == acts.nbytes
        <= sum(shard.stat().st_size for shard in shards(path))
    )


def test_a_stored_recording_is_looked_at_and_compared_as_one_in_memory(
    stored: tuple[Path, Any],
) -> None:
    path, expected = stored
    acts = load(path)
    rows = zip(acts.stats(), expected.stats(), strict=True)
    assert [(a.layer, a.count, a.mean, a.std, a.max) for a, _ in rows] == [
        (b.layer, b.count, b.mean, b.std, b.max) for b in expected.stats()
    ]
    assert actrec.compare(expected, acts).first_difference is None
    assert [row.equal for row in actrec.compare(acts, expected)] == [True] * len(acts.stats())
    changed = copy.deepcopy(expected)
    changed["head"][2][0, 0] += 1
    difference = actrec.compare(changed, acts).first_difference
    assert difference is not None
    assert difference.layer == "head"
    html = acts._repr_html_()
    assert html.count("stored Net: 7 layers, 6 passes") == 2, "as text and as a table"
    for name in acts:
        assert f">{name}<" in html
    assert "Layer &#x27;conv&#x27; (Conv2d): 6 calls" in acts["conv"]._repr_html_()


class Ragged(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"a": x, "b": [x[:1], None]} if len(x) % 2 else x


@pytest.mark.parametrize("shard_bytes", [1, 10**6])
def test_the_form_of_each_call_is_known_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    sizes = [2, 2, 4, 3, 2, 5, 5, 1]
    found = []
    for into in (Folder(tmp_path / "r", shard_bytes), list):
        net = Ragged()
        with record(net, "", into=into) as acts:
            for size in sizes:
                net(torch.ones(size, 3))
            different = [*acts[""]._different_forms()]
        found.append([*acts[""]._forms()])
        assert different == [*dict.fromkeys(found[-1])]
    monkeypatch.setattr(_disk.Disk, "map", None)
    found.append([*load(tmp_path / "r")[""]._forms()])
    assert found[0] == found[1] == found[2]
    assert len(found[-1]) == len(sizes)


def test_a_layer_is_a_sequence(stored: tuple[Path, Any]) -> None:
    path, expected = stored
    layer, plain = load(path)["relu"], expected["relu"]
    assert same(layer[-1], plain[-1])
    assert [same(a, b) for a, b in zip(layer[1:6:2], plain[1:6:2], strict=True)] == [True] * 3
    assert same(next(reversed(layer)), plain[-1])
    assert len(layer) == 12
    for index in (12, -13):
        with pytest.raises(IndexError, match=rf"acts\['relu'\]\[{index}\]: there are 12 calls"):
            layer[index]
    for method in (lambda: layer.keep(1, 0), layer.clear):
        with pytest.raises(ActrecError, match="a stored recording, which can only be read"):
            method()


def test_opening_and_showing_touch_no_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("data was mapped")

    reads: list[int] = []
    read = _disk.Disk.read
    monkeypatch.setattr(_disk.Disk, "map", refuse)
    monkeypatch.setattr(
        _disk.Disk, "read", lambda disk, name, n: reads.append(n) or read(disk, name, n)
    )
    acts = load(path)
    assert len(shards(path)) > 2
    read_bytes = sum(n for n in reads if n != _format.MAX_JSON)
    headers = sum(
        min(extent.begin for extent in opened.container.tensors.values())
        for opened in opened_shards(acts)
    )
    assert read_bytes == headers + 8 * len(shards(path)), "and each header once"
    repr(acts)
    repr(acts.inputs)
    repr(acts["nested"])
    assert acts["conv"].passes == [0, 1, 2, 3, 4, 5]
    with pytest.raises(AssertionError, match="data was mapped"):
        acts["conv"][0]


def test_writing_to_a_call_does_not_reach_the_file_and_does_not_crash(path: Path) -> None:
    before = [shard.read_bytes() for shard in shards(path)]
    acts = load(path)
    for layer in acts.values():
        for value in layer:
            for tensor in actrec._values.nested.tensors(value):
                tensor.zero_()
    assert [shard.read_bytes() for shard in shards(path)] == before
    assert load(path)["conv"][0].any()


def test_a_call_takes_no_more_than_itself_when_it_is_saved_copied_or_pickled(
    stored: tuple[Path, Any],
) -> None:
    tensor = load(stored[0])["conv"][1]
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert len(pickle.dumps(tensor)) < tensor.nbytes + 1000
    assert same(copy.deepcopy(tensor), tensor)


def test_recordings_on_disk_can_be_copied_and_pickled(path: Path) -> None:
    net = nn.Linear(2, 2)
    with record(net, "", inputs=True, into=path / "../new") as acts:
        net(torch.ones(300, 2))
    for recording in (load(path), load(path / "../new"), acts):
        next(iter(recording.values()))[0]  # something is mapped
        for twin in (copy.deepcopy(recording), pickle.loads(pickle.dumps(recording))):
            assert_same(twin, recording)
        assert len(pickle.dumps(recording)) < 100_000, "the values stay where they are"


def test_the_execution_order_comes_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with record(net, ["", "1", "0"], into=tmp_path / "a") as acts:
        for _ in range(2):
            net(torch.ones(1, 2))
            acts.add("x", 1)
    found = load(tmp_path / "a")
    assert list(found) == ["", "1", "0", "x"]
    found.save(tmp_path / "b")
    for recording in (acts, found, load(tmp_path / "b")):
        assert recording.execution_order == ["0", "1", "", "x"]
    assert [row.layer for row in found.stats()] == ["0", "1", "", "x"]


def test_a_call_outlives_the_recording_and_its_files(path: Path) -> None:
    expected = load(path)["conv"][0].clone()
    acts = load(path)
    call = acts["conv"][0]
    del acts
    shutil.rmtree(path)
    assert same(call, expected)


def test_a_relative_path_means_the_same_after_the_working_directory_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with record(model, "", into=Folder("run", shard_bytes=1)) as acts:
        model(torch.ones(1, 2))
        monkeypatch.chdir(tmp_path / "elsewhere")
        expected = [model(torch.ones(1, 2)), model(torch.ones(1, 2))]
    assert not list(Path().iterdir())
    monkeypatch.chdir(tmp_path)
    found = load("run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for recording in (acts, found):
        assert torch.equal(recording[""].cat()[1:], torch.cat(expected))


@pytest.mark.parametrize("how", ["cat", "stack"])
def test_calls_are_joined_as_in_memory(tmp_path: Path, how: str) -> None:
    values: dict[str, list[Any]] = {
        "same": [torch.randn(3, 4) for _ in range(6)],
        "rows": [torch.randn(n, 4) for n in (3, 3, 0, 1)],
        "scalars": [torch.tensor(float(n)) for n in range(4)],
        "nested": [(torch.randn(2, 3), {"a": torch.randn(2)}) for _ in range(3)],
        "changing": [torch.randn(2, 3), torch.randn(2, 4)],
        "dtypes": [torch.randn(2, 3), torch.randn(2, 3).double(), torch.randn(2, 3)],
        "expanded": [torch.randn(1, 3).expand(5, 3), torch.randn(1, 3).expand(2, 3)],
        "kinds": [torch.randn(2, 3), (torch.randn(2, 3),)],
        "none": [None, None],
        "packed": [pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]) for _ in range(2)],
        "arrays": [(torch.randn(2, 3), np.ones(2)) for _ in range(2)],
        "changing arrays": [(torch.randn(2, 3), np.full(2, n)) for n in range(2)],
        "numbers": [(torch.randn(2, 3), np.float32(n)) for n in range(2)],
        "names of kinds": [{"array": torch.randn(2, 3)}, {"array": torch.randn(1, 3)}],
        "empty": [],
    }
    memory = Recording("Net", {k: ListLayer(k, v) for k, v in values.items()}, {})
    memory.save(Folder(tmp_path / "r", shard_bytes=3000))
    assert len(shards(tmp_path / "r")) > 2
    found = load(tmp_path / "r")
    for name, layer in memory.items():
        for dim in (0, 1, -1, 5):
            try:
                expected = getattr(layer, how)(dim)
            except JoinError as error:
                with pytest.raises(JoinError, match=re.escape(str(error))):
                    getattr(found[name], how)(dim)
            else:
                assert same(getattr(found[name], how)(dim, release=True), expected), name
    assert_same(found, memory)


def test_joined_calls_are_a_new_tensor(path: Path) -> None:
    layer = load(path)["head"]
    layer.cat().zero_()
    layer.stack().zero_()
    assert layer.cat().any()


def test_what_several_ranks_wrote_is_merged_by_pass_then_rank(path: Path, stored: Any) -> None:
    other = path / "rank-00001"
    shutil.copytree(path / "rank-00000", other)
    for shard in shards(path):
        if shard.parent == other:
            rewrite(shard, lambda about: about.update(rank=1))
    acts = load(path)
    assert acts["conv"].passes == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    expected = stored[1]["conv"]
    assert all(same(acts["conv"][i], expected[i // 2]) for i in range(12))
    assert same(acts["conv"].cat(), torch.cat([t for t in expected for _ in range(2)]))
    assert acts.num_passes == 6
    assert acts.complete
    (other / "end.json").unlink()
    assert not load(path).complete


def test_gradients_are_saved_and_stay_aligned(tmp_path: Path) -> None:
    net = nn.LSTM(4, 3)
    with record(net, "", grads=True) as acts:
        for step in range(3):
            out, _ = net(torch.randn(2, 1, 4))
            if step != 1:
                out.sum().backward()
    acts.save(tmp_path / "r")
    grads = load(tmp_path / "r").grads[""]
    assert grads.passes == [0, 1, 2]
    assert grads[1] == (None, (None, None))
    assert torch.equal(grads[2][0], acts.grads[""][2][0])
    with record(net, "") as acts:
        net(torch.randn(2, 1, 4))
    acts.save(tmp_path / "s")
    with pytest.raises(AttributeError, match="gradients were not recorded"):
        _ = load(tmp_path / "s").grads


def test_inputs_that_were_not_recorded_are_not_there(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    with record(net, "", into=tmp_path / "r"):
        net(torch.ones(1, 2))
    with pytest.raises(AttributeError, match="inputs were not recorded"):
        _ = load(tmp_path / "r").inputs


@pytest.mark.parametrize(
    "change", [lambda shard: shard.write_bytes(b"x"), lambda shard: shard.unlink()]
)
def test_a_shard_that_is_gone_or_cut_off_after_opening_is_named(path: Path, change: Any) -> None:
    found = load(path)
    change(shards(path)[0])
    for use in (lambda layer: layer[0], lambda layer: layer.cat()):
        with pytest.raises(CorruptRecordingError, match=r"000000.safetensors is damaged: it"):
            use(found["conv"])


def test_a_path_without_a_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingNotFoundError, match=r"no recording there \(no such folder\)"):
        load(tmp_path / "r")
    with pytest.raises(FileNotFoundError, match=r"no recording there \(no actrec.json in"):
        load(tmp_path)
    with pytest.raises(RecordingNotFoundError):
        actrec.verify(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecordingNotFoundError):
        load(tmp_path / "file")


# --- Command line ------------------------------------------------------------------------------------


def test_the_command_line_shows_and_verifies(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out == repr(load(path)) + "\n"
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no problems found\n"
    data = bytearray(shards(path)[1].read_bytes())
    data[-1] ^= 1
    shards(path)[1].write_bytes(data)
    assert main(["verify", str(path)]) == 1
    assert "the checksum of the data" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "actrec", "verify", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "000001.safetensors is damaged: the checksum of the data of layer" in done.stderr
    assert main(["show", str(path / "nothing")]) == 1
    assert "no recording there" in capsys.readouterr().err


def test_the_command_line_names_what_the_system_refuses(path: Path, capsys: Any) -> None:
    (path / "actrec.json").unlink()
    (path / "actrec.json").mkdir()
    for command in ("show", "verify"):
        assert main([command, str(path)]) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert "Is a directory" in told.err
        assert str(path / "actrec.json") in told.err


def test_the_command_line_ends_quietly_when_nobody_reads_on(path: Path, monkeypatch: Any) -> None:
    """As in ``python -m actrec show runs/minilm | head -1``."""
    run = [sys.executable, "-m", "actrec", "show", str(path)]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))  # noqa: PTH123, SIM115  # it cannot be closed
    out = sys.stdout
    assert main(["show", str(path)]) == 0
    assert sys.stdout is not out
    sys.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        out.close()


def test_the_command_line_prints_what_the_terminal_has_no_letters_for(tmp_path: Path) -> None:
    """As where the output of a Windows shell goes into a file, or PYTHONIOENCODING says so."""
    model = nn.Sequential(OrderedDict({"größe": nn.Identity()}))
    path = tmp_path / "läufe"
    with record(model, into=path):
        model(torch.ones(2))
    told = {"show": "gr\\xf6\\xdfe", "verify": "l\\xe4ufe: no problems found"}
    for command, expected in told.items():
        done = subprocess.run(
            [sys.executable, "-m", "actrec", command, str(path)],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names of files are text")
def test_a_path_that_is_no_text_is_read_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"l\xe4ufe")
    model = nn.Linear(3, 2)
    with record(model, "", into=path) as acts:
        output = model(torch.randn(4, 3))
    assert torch.equal(acts[""][0], output)
    assert torch.equal(load(path)[""].cat(), output)
    assert torch.equal(rows(load(path), "")[[1, 3]], output[[1, 3]])
    written = load(path)
    written[""][0].zero_()
    assert torch.equal(load(path)[""][0], output)


# --- Damage ------------------------------------------------------------------------------------------


def rewrite(
    shard: Path, change: Callable[[dict[str, Any]], object], *, table: Any = None, data: Any = None
) -> None:
    """Change what a shard says, and sign it: this is no accident, but somebody who knows the format."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["actrec"])
    changed = change(about)
    about = about if changed is None else changed
    header["__metadata__"]["actrec"] = json.dumps(about)
    if table is not None:
        header = table(header)
    sign(shard, json.dumps(header, separators=(",", ":")).encode(), content[8 + length :])


def sign(shard: Path, header: bytes, data: bytes) -> None:
    before, mark, rest = header.partition(b'"header_crc32":"')
    if mark:
        checksum = zlib.crc32(before + mark + b"00000000" + rest[8:])
        header = before + mark + f"{checksum:08x}".encode() + rest[8:]
    shard.write_bytes(struct.pack("<Q", len(header)) + header + data)


def first(about: dict[str, Any]) -> dict[str, Any]:
    """The first tensor of the first group."""
    return about["layers"][0]["groups"][0]["tensors"][0]  # type: ignore[no-any-return]


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Put the last of ``keys`` in the place that the others lead to."""

    def change(about: Any) -> None:
        *path, last, value = keys
        for key in path:
            about = about[key]
        about[last] = value

    return change


GROUP = ("layers", 0, "groups", 0)
TENSOR = (*GROUP, "tensors", 0)


def many_calls(about: dict[str, Any]) -> None:
    put("layers", 0, "calls", [[131072, 0], [131072, 0]])(about)
    put("layers", 0, "passes", [[0, 1, 131072], [0, 1, 131072]])(about)


def expanded(about: dict[str, Any]) -> None:
    put(*TENSOR, "shape", [1 << 40] * 3)(about)
    put(*TENSOR, "expanded", [0, 1, 2, 3])(about)


def empty_rows(about: dict[str, Any]) -> None:
    first(about)["rows"].insert(0, [0, 1])


HOSTILE: dict[str, tuple[Any, str]] = {
    "list": (lambda _: [1], "the description is [1], which is no object"),
    "version": (put("version", 2), "it is of another version of the format"),
    "part": (put("part", 1), "'part' is neither true nor false"),
    "recording": (put("recording", "x"), "it says that it belongs to recording x, not"),
    "rank": (put("rank", 7), "it says that it belongs to rank 7, not 0"),
    "shard": (put("shard", 1), "it says that it belongs to shard 1, not 0"),
    "negative": (put("committed", -1), "the number of committed passes is -1"),
    "no layers": (lambda about: about.pop("layers") and None, "has no 'layers'"),
    "role": (put("layers", 0, "role", "x"), "a layer is of an unknown role"),
    "name": (put("layers", 0, "name", 3), "the name of a layer is 3, which is no text"),
    "calls": (put("layers", 0, "calls", [[10**15, 0]]), "a number of calls is 1000000000000000"),
    "many calls": (many_calls, "it claims more than 131072 calls"),
    "calls of no group": (put("layers", 0, "calls", [[1, 9]]), "the number of a group is 9"),
    "no calls": (put("layers", 0, "calls", []), "a group has no calls"),
    "odd calls": (put("layers", 0, "calls", [[1]]), "a run of calls is not how many and of which"),
    "passes": (put("layers", 0, "passes", [[0, 1, 131072]]), "and passes for another number"),
    "odd pass": (put("layers", 0, "passes", [[0, 1]]), "not first, step and how many"),
    "big step": (put("layers", 0, "passes", [[0, 2, 1]]), "the step from pass to pass is 2"),
    "structure": (put(*GROUP, "structure", 99), "the number of a structure is 99"),
    "tensor": (put(*TENSOR, "tensor", "x"), "there is no tensor 'x'"),
    "dtype": (put(*TENSOR, "dtype", "qint8"), "has an unknown dtype"),
    "dtype list": (put(*TENSOR, "dtype", []), "has an unknown dtype"),
    "other dtype": (put(*TENSOR, "dtype", "int32"), "is not of dtype int32"),
    "huge": (put(*TENSOR, "shape", [10**9, 10**9]), "take more bytes than tensor"),
    "beyond": (put(*TENSOR, "offset", 1 << 40), "take more bytes than tensor"),
    "odd offset": (put(*TENSOR, "offset", 3), "an offset is not a whole number of elements"),
    "overflow": (put(*TENSOR, "shape", [0, 1 << 62, 1 << 62]), "has an impossible shape"),
    "expanded": (expanded, "has an impossible shape"),
    "expanded too far": (put(*TENSOR, "expanded", [9]), "a dimension is expanded that is not there"),
    "dimensions": (put(*TENSOR, "shape", [1] * 100), "the shape of a tensor has 100 entries"),
    "float": (put(*TENSOR, "shape", [1.5]), "the shape of a tensor is 1.5, which is no number"),
    "bool": (put(*TENSOR, "shape", [True]), "the shape of a tensor is True, which is no number"),
    "rows": (put(*TENSOR, "rows", [[9, 1]]), "a tensor has not as many rows as calls"),
    "odd rows": (put(*TENSOR, "rows", [[1]]), "a run of rows is not how many and rows"),
    "empty rows": (empty_rows, "a number of calls is 0"),
    "no rows": (lambda about: first(about).pop("rows")[:0] or None, "the rows of a tensor is None"),
    "huge number": (put("committed", 10**400), "which is no number from 0 to"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_shard_claims_is_checked_before_it_is_used(path: Path, name: str) -> None:
    change, told = HOSTILE[name]
    shard = shards(path)[0]
    rewrite(shard, change)
    with pytest.raises(CorruptRecordingError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{shard} is damaged: ")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(caught.value) in actrec.verify(path)


def entry(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in header if name != "__metadata__")
        header[name].update(changes)
        return header

    return change


def said(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(header: dict[str, Any]) -> dict[str, Any]:
        about = header["__metadata__"]
        about[key] = change(about.get(key))
        return header

    return changed


TABLES: dict[str, tuple[Any, str]] = {
    "terabytes": (entry(shape=[1 << 40]), "takes"),
    "impossible": (entry(shape=[1 << 40, 1 << 40]), "has the impossible shape"),
    "overlap": (entry(data_offsets=[8, 8 + 4 * 8]), ""),
    "backwards": (entry(data_offsets=[8, 0]), "its offsets span -8"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), "has 3 offsets"),
    "dtype": (entry(dtype="X"), "is of the unknown dtype 'X'"),
    "dimensions": (entry(shape=[1] * 70), "has 70 dimensions"),
    "negative": (entry(shape=[-1]), "a dimension of tensor"),
    "no object": (lambda header: {**header, "x": []}, "checksums for"),
    "checksum": (said("data_crc32", lambda old: "z" + old[1:]), "is no number"),
    "no checksums": (said("data_crc32", lambda _: ""), "0 checksums for"),
    "metadata": (said("x", lambda _: 1), "'x' in the metadata is 1"),
    "no metadata": (lambda _: {}, "the header has no '__metadata__'"),
    "no description": (said("actrec", lambda _: "null"), "the description is None"),
    "description": (said("actrec", lambda _: "{"), "its description is no JSON"),
    "deep": (said("actrec", lambda _: "[" * 100_000), "its description is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_what_a_hostile_table_of_tensors_claims_is_checked(path: Path, name: str) -> None:
    change, told = TABLES[name]
    shard = shards(path)[0]
    rewrite(shard, lambda _: None, table=change)
    with pytest.raises(CorruptRecordingError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{shard} is damaged: ")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_whose_checksum_cannot_be_found_is_refused(path: Path) -> None:
    shard = shards(path)[0]
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length])).encode()  # with other spaces
    shard.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(
        CorruptRecordingError, match="the header's checksum is not where it should be"
    ):
        load(path)


STRUCTURES = {
    "unknown": ('{"pickle":"x"}', "of no known kind"),
    "two": ('{"list":[],"dict":[]}', "of no known kind"),
    "no object": ("[1]", "which is no object"),
    "no JSON": ("{", "cannot be made of its description"),
    "tensor": ('{"list":[{"tensor":9}]}', "cannot be made of its description"),
    "deep": ('{"list":[' * 100 + "]}" * 100, "nested more than 64 deep"),
    "abyss": ('{"list":[' * 100_000 + "]}" * 100_000, "nested more than 64 deep"),
    "key": ('{"dict":[[{"list":[]},1]]}', "cannot be made of its description"),
    "pair": ('{"dict":[[1]]}', "cannot be made of its description"),
    "named": ('{"named_tuple":"x","fields":["a"],"items":[]}', "not as many values as fields"),
    "packed": ('{"packed_sequence":true,"items":[1]}', "other than four parts"),
    "return": ('{"return_type":"__import__","items":[1]}', "an unknown return type"),
    "return parts": ('{"return_type":"max","items":[1]}', "cannot be made of its description"),
    "dtype": ('{"dtype":"load"}', "an unknown constant of PyTorch"),
    "dunder": ('{"dtype":"__class__"}', "an unknown constant of PyTorch"),
    "device": ('{"device":"nowhere"}', "an unknown device"),
    "float": ('{"float":"1e400"}', "an unknown floating-point number"),
    "attribute": ('{"object":"x","items":[],"more":[["__class__",1]]}', "an impossible name"),
    "type": ('{"object":"x","items":[],"more":[["_type",1]]}', "an impossible name"),
    "nameless": ('{"opaque":"a."}', "the type of an object has no name"),
    "method": ('{"object":"x","items":[],"more":[["items",1]]}', "an impossible name"),
    "scalar": ('{"list":[{"scalar":0}]}', "a NumPy scalar has dimensions"),
    "bytes": ('{"bytes":"%"}', "cannot be made of its description"),
    "slice": ('{"slice":[1]}', "cannot be made of its description"),
    "int": ('{"int":"zz"}', "cannot be made of its description"),
    "long": ('{"list":[' + "1" * 5000 + "]}", "cannot be made of its description"),
    "maxlen": ('{"deque":[],"maxlen":-1}', "a deque's maxlen is -1"),
    "size": ('{"size":[-1]}', "a size is -1"),
    "range": ('{"range":[1,2,0]}', "cannot be made of its description"),
}


def test_a_name_in_a_file_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__getattr__", importlib.import_module)
    for name in ("this", "antigravity"):
        with pytest.raises(_format.Defect, match="an unknown constant of PyTorch"):
            _tree.decode(f'{{"dtype":"{name}"}}', [].__getitem__)
        assert name not in sys.modules


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_describes_no_value_is_refused_when_the_value_is_asked_for(
    path: Path, name: str
) -> None:
    text, told = STRUCTURES[name]
    shard = shards(path)[0]
    rewrite(shard, put("structures", 0, text))
    acts = load(path)
    with pytest.raises(CorruptRecordingError) as caught:
        acts["conv"][0]
    assert str(caught.value).startswith(f"{shard} is damaged: ")
    assert told in str(caught.value)
    assert any(told in problem for problem in actrec.verify(path))


def test_a_named_tuple_of_impossible_names_becomes_a_harmless_one() -> None:
    made = _tree.decode(
        '{"named_tuple":"__import__(\'os\')","fields":["a b","x","x"],"items":[1,2,3]}', lambda _: 0
    )  # type: ignore[arg-type,return-value]
    assert made == (1, 2, 3)
    assert type(made).__name__ == "namedtuple"
    assert made._fields == ("_0", "x", "_2")


def test_a_truncated_file_is_found_when_it_is_opened_and_when_it_is_used(path: Path) -> None:
    shard = shards(path)[0]
    content = shard.read_bytes()
    acts = load(path)
    for size, told in (
        (0, "it has 0 bytes, too few for a header"),
        (7, "it has 7 bytes, too few for a header"),
        (8, "it claims a header of"),
        (200, "it claims a header of"),
        (len(content) - 1, "and the file at"),
    ):
        shard.write_bytes(content[:size])
        with pytest.raises(CorruptRecordingError, match=told):
            load(path)
        with pytest.raises(CorruptRecordingError, match=f"and has {size} now"):
            acts["conv"][0]
    shard.unlink()
    with pytest.raises(CorruptRecordingError, match="it is missing"):
        load(path)
    with pytest.raises(CorruptRecordingError, match="and is gone"):
        acts["conv"][0]


def test_swapped_and_foreign_shards_are_found(path: Path, tmp_path: Path) -> None:
    one, two = shards(path)[:2]
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    problems = actrec.verify(path)
    assert any(
        "000000.safetensors is damaged: it says that it belongs to shard 1" in p for p in problems
    )
    assert any(
        "000001.safetensors is damaged: it says that it belongs to shard 0" in p for p in problems
    )
    make(tmp_path / "other")
    shutil.copy(shards(tmp_path / "other")[0], one)
    with pytest.raises(CorruptRecordingError, match="it says that it belongs to recording"):
        load(path)


def test_missing_shards_are_found_the_last_one_too(path: Path) -> None:
    *_, middle, last = shards(path)
    last.unlink()
    with pytest.raises(CorruptRecordingError, match=rf"{last.name} is damaged: it is missing"):
        load(path)
    middle.rename(path / "rank-00000/000099.safetensors")
    problems = actrec.verify(path)
    assert any(f"{middle.name} is damaged: it is missing" in problem for problem in problems)
    (path / "rank-00000/000099.safetensors").rename(middle)
    shutil.copy(middle, path / "rank-00000/999999999999999999.safetensors")
    assert len(actrec.verify(path)) < 20


def test_shards_that_contradict_each_other_are_found(path: Path) -> None:
    rewrite(shards(path)[1], put("committed", 0))
    with pytest.raises(
        CorruptRecordingError, match="it commits fewer passes than the shard before"
    ):
        load(path)
    shutil.rmtree(path / "rank-00000")
    (path / "rank-00000").mkdir()
    assert not load(path).complete


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("actrec.json", "[", "it is no JSON"),
        ("actrec.json", "[" * 100_000, "it is no JSON"),
        ("actrec.json", "[]", "the file is [], which is no object"),
        ("actrec.json", b"\xff", "it is no JSON"),
        ("actrec.json", ("format", "zip"), "it does not describe a recording of actrec"),
        ("actrec.json", ("version", 99), "it is of version 99 of the format, and this actrec reads"),
        ("actrec.json", ("layers", 3), "the layers is 3, which is no list"),
        ("actrec.json", ("layers", [{"name": 1}]), "a layer has no 'type'"),
        ("actrec.json", ("layers", [0] * 200_000), "the layers are 200000, and 131072 is the limit"),
        ("actrec.json", ("names", {"a": 1}), "a name is 1, which is no text"),
        ("end.json", "{", "it is no JSON"),
        ("end.json", ("recording", "x"), "it belongs to another recording"),
        ("end.json", ("passes", -1), "the number of passes is -1"),
        ("end.json", ("passes", 99), "it speaks of other passes than there are"),
        ("end.json", ("shards", 1), "it speaks of other passes than there are"),
        ("end.json", ("error", 1), "the error is 1, which is no text"),
    ],
)  # fmt: skip
def test_damaged_descriptions_are_named(path: Path, name: str, change: Any, told: str) -> None:
    (file,) = path.rglob(name)
    if isinstance(change, tuple):
        content = json.loads(file.read_text())
        content[change[0]] = change[1]
        change = json.dumps(content)
    file.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(CorruptRecordingError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{file} is damaged: ")
    assert told in str(caught.value)
    assert str(caught.value) in actrec.verify(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in this file system")
@pytest.mark.parametrize("name", ["actrec.json", "rank-00000/end.json", "rank-00000/rank.json"])
def test_a_description_that_is_a_pipe_is_not_waited_for(path: Path, name: str) -> None:
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(CorruptRecordingError, match=f"{name} is damaged: it is empty"):
        load(path)
    assert any(f"{name} is damaged: it is empty" in problem for problem in actrec.verify(path))


def test_a_recording_that_begins_while_it_is_opened_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description is written before the first shard, but here it is looked for before, and the shards after."""
    read = _reader.read_manifest

    def too_early(_: object) -> Any:
        monkeypatch.setattr(_reader, "read_manifest", read)
        raise FileNotFoundError

    monkeypatch.setattr(_reader, "read_manifest", too_early)
    assert load(path).num_passes == 6


@pytest.mark.parametrize("method", ["size", "read"])
def test_a_recording_that_is_gone_on_with_while_it_is_opened_is_one_that_still_records(
    path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The writer removes what says how the run before has ended before it is read, or has done so after."""
    asked = getattr(_disk.Disk, method)

    def go_on(disk: Any, name: str, *most: int) -> Any:
        if name != _format.END:
            return asked(disk, name, *most)
        monkeypatch.undo()
        found = asked(disk, name, *most) if method == "read" else None
        net = Net()
        with record(net, inputs=True, into=path, resume=True):
            net(batches(1)[0])
        (disk.path / name).unlink()  # and records still
        return asked(disk, name) if found is None else found

    monkeypatch.setattr(_disk.Disk, method, go_on)
    acts = load(path)
    assert acts.num_passes == len(acts["conv"]) == 7
    assert acts.ranks[0].error == "killed or still recording"


def test_an_absurdly_large_description_is_not_even_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actrec.store.description, "MAX_JSON", 10)
    with pytest.raises(CorruptRecordingError, match="and 10 is the limit"):
        load(path)


def test_a_header_that_shrinks_while_it_is_read_is_found() -> None:
    with pytest.raises(_format.Defect, match="it became shorter while it was read"):
        _container.parse(1000, lambda n: (500).to_bytes(8, "little")[:n])


def test_verify_lists_every_shard_whose_data_is_damaged_and_the_layer(path: Path) -> None:
    hit = []
    for number, shard in enumerate(shards(path)):
        extents = opened_shards(load(path))[number].container.tensors
        content = bytearray(shard.read_bytes())
        content[extents["output.00000.00000.0"].begin + 17] ^= 0x40
        hit.append(content)
    for shard, content in zip(shards(path), hit, strict=True):
        shard.write_bytes(content)
    problems = actrec.verify(path)
    assert len(problems) == len(shards(path))
    assert all("the checksum of the data of layer 'conv' is" in problem for problem in problems)
    assert load(path).complete, "opening reads no data"
    with pytest.raises(CorruptRecordingError) as caught:
        load(path, check=True)
    assert str(caught.value) in problems


def test_a_recording_that_is_checked_when_it_is_opened_is_whole_wherever_a_bit_was_flipped(
    tmp_path: Path,
) -> None:
    model = nn.Identity()
    for rank in range(2):
        with record(model, "", into=Folder(tmp_path / "r", rank=rank, world_size=2, run="a")):
            model(torch.arange(6.0))
    shard = tmp_path / "r/rank-00001/000000.safetensors"
    content = shard.read_bytes()
    assert load(tmp_path / "r", check=True).complete
    for at in range(0, len(content), 7):
        shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(
            CorruptRecordingError, match=r"rank-00001/000000.safetensors is damaged"
        ):
            load(tmp_path / "r", check=True)
        assert load(tmp_path / "r", rank=0, check=True)[""][0].tolist() == list(range(6))


# --- Fuzzing -----------------------------------------------------------------------------------------

MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 10**9), st.integers(0, 7)),
        st.tuples(st.just("set"), st.integers(0, 10**9), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.integers(0, 10**9), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 10**9), st.integers(1, 64)),
        st.tuples(st.just("double"), st.integers(0, 10**9), st.integers(1, 64)),
        st.tuples(st.just("digit"), st.integers(0, 10**9), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=4,
)


#: How many; "nox -s crash" asks for thousands, and for others each time.
MANY = int(os.environ.get("ACTREC_MUTATIONS", "120"))
many_mutations = settings(
    max_examples=MANY, deadline=None, derandomize=MANY == 120,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def mutated(content: bytes, mutations: list[tuple[str, int, int]], within: int) -> bytes:
    """The content with some bytes changed, most of them in its first part."""
    changed = bytearray(content)
    for kind, place, amount in mutations:
        if not changed:
            break
        at = place % min(len(changed), within)
        match kind:
            case "flip":
                changed[at] ^= 1 << amount
            case "set":
                changed[at] = amount
            case "cut":
                del changed[at:]
            case "drop":
                del changed[at : at + amount]
            case "double":
                changed[at:at] = changed[at : at + amount]
            case "digit":
                digits = [i for i, byte in enumerate(changed[:within]) if chr(byte).isdigit()]
                if digits:
                    changed[digits[place % len(digits)]] = ord(str(amount))
    return bytes(changed)


def use(path: Path) -> bool:
    """Do everything that can be done with a recording; whether it was found to be damaged."""
    try:
        acts = load(path)
        repr(acts)
        for recording in (acts, acts.inputs):
            for layer in recording.values():
                for value in layer:
                    for tensor in actrec._values.nested.tensors(value):
                        tensor.numel() < 10**6 and tensor.clone()
    except CorruptRecordingError:
        return True
    except AttributeError as error:  # "inputs" may have become false
        assert "inputs were not recorded" in str(error)  # noqa: PT017
    return False


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "r"
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    into = Folder(path, seconds=0, rank=0, world_size=2, run="a")
    with record(net, inputs=True, into=into) as acts:
        for step in range(3):
            net(torch.ones(2, 3))
            acts.add("x", {"a": [step, (torch.ones(1).expand(3), None)]})
    with record(
        net, "1", into=Folder(path, rank=1, world_size=2, run="a")
    ):  # with a description of its own
        net(torch.ones(2, 3))
    return path


@many_mutations
@given(st.integers(0, 20), MUTATIONS)
def test_mutated_files_are_found_by_verify_and_never_crash(
    small: Path, tmp_path: Path, which: int, mutations: list[tuple[str, int, int]]
) -> None:
    path = tmp_path / "r"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(small, path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[which % len(files)]
    content = file.read_bytes()
    file.write_bytes(mutated(content, mutations, 10**9))
    found = use(path)
    if file.suffix == ".safetensors" and file.read_bytes() != content:
        assert actrec.verify(path) != []
    if found:
        assert actrec.verify(path) != []


@many_mutations
@given(MUTATIONS)
def test_mutated_headers_that_were_signed_afterwards_never_crash(
    small: Path, tmp_path: Path, mutations: list[tuple[str, int, int]]
) -> None:
    path = tmp_path / "r"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(small, path)
    shard = shards(path)[1]
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = mutated(content[8 : 8 + length], mutations, length)
    sign(shard, header, content[8 + length :])
    use(path)
    actrec.verify(path)


def test_a_file_that_shrinks_while_it_is_verified_is_found(path: Path) -> None:
    disk = _disk.Disk(path / "rank-00000")
    opened = _index.open_shard(disk, "000000.safetensors")
    content = shards(path)[0].read_bytes()
    shards(path)[0].write_bytes(content[:-10])
    problems = list(_checksums.shard_problems(disk, opened))
    assert "the checksum of the data of layer" in problems[0]


def test_runs_of_passes_are_told_apart() -> None:
    assert list(_index.numbers([(0, 1, 3), (5, 0, 2)])) == [0, 1, 2, 5, 5]
    for numbers in ([], [3], [0, 1, 2, 2, 2, 3], [5, 4, 4, 9, 10]):
        runs = [tuple(run) for run in _shard.runs(numbers)]
        assert list(_index.numbers(runs)) == numbers  # type: ignore[arg-type]
