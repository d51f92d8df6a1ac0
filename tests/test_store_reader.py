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
from hypothesis import given
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
    reduce,
)
from actrec.__main__ import main
from actrec._values.spec import tensors
from actrec.data import rows
from actrec.store import (
    Folder,
)
from actrec.store import (
    check as _check,
)
from actrec.store import (
    decoding as _decoding,
)
from actrec.store import (
    disk as _disk,
)
from actrec.store import (
    format as _format,
)
from actrec.store import (
    safetensors as _container,
)
from tests.damage import MUTATIONS, many_mutations, mutated, rewrite, sign, use
from tests.made import made, made_of
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
    assert actrec.compare(acts, expected).equal
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
def test_what_the_calls_look_like_is_known_without_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    found = []
    for into in (Folder(tmp_path / "r", shard_bytes), list):
        net = Ragged()
        with record(net, "", into=into) as acts:
            for size in [2, 2, 4, 3, 2, 5, 5, 1]:
                net(torch.ones(size, 3))
            found.append(acts[""]._seen()[0])
    for method in ("map", "reading"):
        monkeypatch.setattr(_disk.Disk, method, None)
    found.append(load(tmp_path / "r")[""]._seen()[0])
    assert found[0] == found[1] == found[2]
    assert (list(found[2].kinds), found[2].shape) == (["", "dict of 2"], "(2-4, 3)")


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
    for method in (lambda: layer._keep(1, 0), lambda: layer._drop(0), layer.clear):
        with pytest.raises(ActrecError, match="a stored recording, which can only be read"):
            method()


def test_opening_and_showing_touch_no_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(_disk.Disk, "map", refuse)
    monkeypatch.setattr(_disk.Disk, "reading", refuse)
    acts = load(path)
    assert len(shards(path)) > 2
    repr(acts)
    repr(acts.inputs)
    repr(acts["nested"])
    assert acts["conv"].passes == [0, 1, 2, 3, 4, 5]
    with pytest.raises(AssertionError, match="data was read"):
        acts["conv"][0]


def test_writing_to_a_call_does_not_reach_the_file_and_does_not_crash(path: Path) -> None:
    before = [shard.read_bytes() for shard in shards(path)]
    acts = load(path)
    for layer in acts.values():
        for value in layer:
            for tensor in tensors(value):
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


def test_a_reduction_is_in_the_execution_order_though_it_is_written_last(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    layers = {"2": None, "1": reduce.Moments(), "0": None}

    def go(acts: Any) -> None:
        for _ in range(3):
            with torch.no_grad():
                net(torch.ones(1, 2))
            acts.add("x", 1)

    folder = Folder(tmp_path / "a", shard_bytes=64)  # smaller than a pass
    with record(net, layers, into=folder) as acts:
        go(acts)
    load(tmp_path / "a").save(tmp_path / "b")
    with record(net, layers | {"": reduce.Moments()}) as memory:
        go(memory)
    memory.save(tmp_path / "c")
    for found in (acts, load(tmp_path / "a"), load(tmp_path / "b")):
        assert found.execution_order == ["0", "1", "2", "x"]
    for found in (memory, load(tmp_path / "c")):
        assert found.execution_order == ["0", "1", "2", "", "x"]
    with record(net, layers, into=folder, resume=True) as acts:
        go(acts)
    assert load(tmp_path / "a").execution_order == ["0", "1", "2", "x"]


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
    memory = made_of(values)
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
    for shard in shards(path):
        rewrite(shard, lambda about: about.update(ranks=2))
    acts = load(path)
    assert acts["conv"].passes == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    expected = stored[1]["conv"]
    assert all(same(acts["conv"][i], expected[i // 2]) for i in range(12))
    assert same(acts["conv"].cat(), torch.cat([t for t in expected for _ in range(2)]))
    assert acts.num_passes == 6
    assert acts.complete
    rewrite(shards(path)[-1], lambda about: about.update(ended=None))
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
    for read in (lambda layer: layer[0], lambda layer: layer.cat()):
        with pytest.raises(CorruptRecordingError, match=r"000000.safetensors is damaged: it"):
            read(found["conv"])


def test_a_path_without_a_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingNotFoundError, match=r"no recording there \(no such folder\)"):
        load(tmp_path / "r")
    with pytest.raises(
        FileNotFoundError, match=r"no recording there \(no rank.json in any folder in it"
    ):
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
    (path / "rank-00000/rank.json").unlink()
    (path / "rank-00000/rank.json").mkdir()
    for command in ("show", "verify"):
        assert main([command, str(path)]) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert "Is a directory" in told.err
        assert str(path / "rank-00000/rank.json") in told.err


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
    done = subprocess.run(
        [sys.executable, "-m", "actrec", "show", str(path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names of files are text")
@pytest.mark.parametrize("size", [4, 150_000], ids=["read", "mapped"])
def test_a_path_that_is_no_text_is_read_as_any_other(tmp_path: Path, size: int) -> None:
    path = tmp_path / os.fsdecode(b"l\xe4ufe")
    model = nn.Linear(3, 2)
    with record(model, "", into=path) as acts:
        output = model(torch.randn(size, 3))
    assert torch.equal(acts[""][0], output)
    assert torch.equal(load(path)[""].cat(), output)
    assert torch.equal(rows(load(path), "")[[1, 3]], output[[1, 3]])
    written = load(path)
    written[""][0].zero_()
    assert torch.equal(load(path)[""][0], output)


# --- Damage ------------------------------------------------------------------------------------------


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Put the last of ``keys`` in the place that the others lead to."""

    def change(about: Any) -> None:
        *path, last, value = keys
        for key in path:
            about = about[key]
        about[last] = value

    return change


def change_table(shard: Path, name: str, *changes: tuple[int, int]) -> None:
    """Put other numbers into a tensor of int64, and sign it."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = header["__metadata__"]
    names = [key for key in header if key != "__metadata__"]
    begin, end = header[name]["data_offsets"]
    numbers = bytearray(content[8 + length + begin : 8 + length + end])
    for at, number in changes:
        numbers[8 * at : 8 * at + 8] = struct.pack("<q", number)
    words = about["data_crc32"].split(" ")
    words[names.index(name)] = f"{zlib.crc32(numbers):08x}"
    about["data_crc32"] = " ".join(words)
    data = content[8 + length : 8 + length + begin] + numbers + content[8 + length + end :]
    sign(shard, json.dumps(header, separators=(",", ":")).encode(), data)


LAYER = ("layers", 0)
SO_FAR = (*LAYER, "so_far")
GROUP = (*LAYER, "groups", 0)


def hidden(about: dict[str, Any]) -> None:
    for layer in about["layers"]:
        layer["groups"] = []


#: What the last shard says, which opening reads.
HOSTILE: dict[str, tuple[Any, str]] = {
    "list": (lambda _: [1], "the description is [1], which is not a JSON object"),
    "version": (put("version", 3), "it is of another version of the format"),
    "parts": (put("parts", 1), "the description.parts is 1, which is not a list"),
    "part": (put("parts", [[1]]), "parts[0] has 1 items, and should have 2"),
    "void": (put("void", [-1]), "void[0] is -1"),
    "raised": (put("raised", ["x"]), "raised[0] is 'x'"),
    "ended": (put("ended", 3), "ended is 3, which is not a string"),
    "began": (put("began", True), "began is True"),
    "recording": (put("recording", "x"), "it says that it belongs to recording x, not"),
    "rank": (put("rank", 7), "it says that it belongs to rank 7, not 0"),
    "shard": (put("shard", 0), "it says that it belongs to shard 0, not "),
    "negative": (put("committed", -1), "committed is -1"),
    "huge number": (put("committed", 10**400), "which is not a number from 0 to"),
    "no layers": (lambda about: about.pop("layers") and None, "has no 'layers'"),
    "twice": (lambda about: about["layers"].append(about["layers"][0]), "it lists a layer twice"),
    "role": (put(*LAYER, "role", "x"), "a layer is of an unknown role"),
    "name": (put(*LAYER, "name", 3), "layers[0].name is 3, which is not a string"),
    "number": (put(*LAYER, "number", 1.5), "layers[0].number is 1.5"),
    "before": (put(*LAYER, "before", "x"), "layers[0].before is 'x'"),
    "hidden": (hidden, "has other calls than it says there are so far"),
    "no calls": (put(*LAYER, "before", 10**9), "has other calls than it says there are so far"),
    "so far": (put(*LAYER, "so_far", 1), "layers[0].so_far is 1, which is not a JSON object"),
    "stored": (put(*SO_FAR, "stored", []), "so_far.stored is []"),
    "calls": (put(*SO_FAR, "calls", -1), "so_far.calls is -1"),
    "last": (put(*SO_FAR, "last", "x"), "so_far.last is 'x'"),
    "ordered": (put(*SO_FAR, "ordered", 1), "ordered is 1, which is not a boolean"),
    "kinds": (put(*SO_FAR, "kinds", [1]), "kinds[0] is 1, which is not a string"),
    "dtypes": (put(*SO_FAR, "dtypes", {}), "dtypes is {}, which is not a list"),
    "shapes": (put(*SO_FAR, "shapes", [[[1], [1, 2]]]), "differ in their dimensions"),
    "two shapes": (put(*SO_FAR, "shapes", [[[1]]]), "shapes[0] has 1 items, and should have 2"),
    "dimensions": (put(*SO_FAR, "shapes", [[[1] * 100] * 2]), "or have too many"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_shard_claims_is_checked_before_it_is_used(path: Path, name: str) -> None:
    change, told = HOSTILE[name]
    shard = shards(path)[-1]
    rewrite(shard, change)
    with pytest.raises(CorruptRecordingError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{shard} is damaged: ")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(caught.value) in actrec.verify(path)


def more_dtypes(about: dict[str, Any]) -> None:
    about["layers"][0]["groups"][0]["dtypes"] *= 2


def idle_group(about: dict[str, Any]) -> None:
    about["layers"][0]["groups"] *= 2


def one_call_more(about: dict[str, Any]) -> None:
    for layer in about["layers"]:
        layer["so_far"]["stored"] += 1


def table(name: str, *changes: tuple[int, int]) -> Callable[[Path], None]:
    return lambda shard: change_table(shard, name, *changes)


CALLS, SHAPES = "output.00000.calls", "output.00000.0.0.shapes"

#: What any shard says of its calls, which is read when one of them is asked for.
HOSTILE_CALLS: dict[str, tuple[Callable[[Path], None], str]] = {
    "group": (lambda shard: rewrite(shard, put(*GROUP, 1)), "a group is 1, which is not a JSON object"),
    "idle": (lambda shard: rewrite(shard, idle_group), "a group has no calls"),
    "dtype": (lambda shard: rewrite(shard, put(*GROUP, "dtypes", ["qint8"])), "has an unknown dtype"),
    "dtype list": (lambda shard: rewrite(shard, put(*GROUP, "dtypes", [[]])), "dtypes[0] is [], which is not a string"),
    "other dtype": (lambda shard: rewrite(shard, put(*GROUP, "dtypes", ["int32"])), "is not of dtype int32"),
    "dtypes": (lambda shard: rewrite(shard, more_dtypes), "structure does not have as many tensors as the group"),
    "tensor": (lambda shard: rewrite(shard, put(*LAYER, "number", 9)), "there is no tensor 'output.00009.calls'"),
    "calls": (lambda shard: rewrite(shard, one_call_more), "calls, and claims"),
    "order": (table("output.00002.calls", (0, 99)), "the calls of a layer are not ordered by pass"),
    "no group": (table(CALLS, (1, 7)), "a call is in a group that is not there"),
    "negative": (table(CALLS, (0, -1)), "there is a negative number in tensor"),
    "huge": (table(SHAPES, (0, 10**9)), "does not have as many bytes as its shapes need"),
    "impossible": (table(SHAPES, (0, 1 << 40), (1, 1 << 40)), "has an impossible shape"),
    "overflow": (table(SHAPES, (0, 0), (1, 1 << 62), (2, 1 << 62)), "has an impossible shape"),
}  # fmt: skip


def test_verify_finds_a_shard_that_commits_fewer_passes_than_the_one_before_it(path: Path) -> None:
    rewrite(shards(path)[-1], put("committed", 0))
    assert any(
        "it commits fewer passes than the shard before it" in told for told in actrec.verify(path)
    )


@pytest.mark.parametrize("name", HOSTILE_CALLS)
def test_what_a_hostile_shard_claims_of_its_calls_is_checked_before_one_is_read(
    path: Path, name: str
) -> None:
    change, told = HOSTILE_CALLS[name]
    shard = shards(path)[0]
    change(shard)
    acts = load(path)
    with pytest.raises(CorruptRecordingError) as caught:
        for layer in acts.values():
            list(layer)
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
    "three offsets": (entry(data_offsets=[0, 1, 2]), "data_offsets has 3 items"),
    "dtype": (entry(dtype="X"), "is of the unknown dtype 'X'"),
    "dimensions": (entry(shape=[1] * 70), "has 70 dimensions"),
    "negative": (entry(shape=[-1]), "shape[0] is -1"),
    "no object": (lambda header: {**header, "x": []}, "checksums for"),
    "checksum": (said("data_crc32", lambda old: "z" + old[1:]), "is not a number"),
    "no checksums": (said("data_crc32", lambda _: ""), "0 checksums for"),
    "metadata": (said("x", lambda _: 1), "__metadata__.x is 1"),
    "no metadata": (lambda _: {}, "the header has no '__metadata__'"),
    "no description": (said("actrec", lambda _: "null"), "the description is None"),
    "description": (said("actrec", lambda _: "{"), "its description is not JSON"),
    "deep": (said("actrec", lambda _: "[" * 100_000), "its description is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_what_a_hostile_table_of_tensors_claims_is_checked(path: Path, name: str) -> None:
    change, told = TABLES[name]
    shard = shards(path)[-1]
    rewrite(shard, lambda _: None, table=change)
    with pytest.raises(CorruptRecordingError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{shard} is damaged: ")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_whose_checksum_cannot_be_found_is_refused(path: Path) -> None:
    shard = shards(path)[-1]
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length])).encode()  # with other spaces
    shard.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(
        CorruptRecordingError, match="the header's checksum is not where it should be"
    ):
        load(path)


STRUCTURES = {
    "unknown": ({"pickle": "x"}, "of no known kind"),
    "two": ({"list": [], "dict": []}, "of no known kind"),
    "no object": ([1], "which is not a JSON object"),
    "number": ({"list": [{"tensor": 9}]}, "does not use all of its tensors"),
    "no tensor": ({"tensor": -1}, "the number of a tensor is -1"),
    "deep": (json.loads('{"list":[' * 100 + "]}" * 100), "nested more than 64 deep"),
    "key": ({"dict": [[{"list": []}, 1]]}, "cannot be made of its description"),
    "tensor key": ({"dict": [[{"tensor": 0}, 1]]}, "a tensor is the key of an item"),
    "pair": ({"dict": [[1]]}, "[0] has 1 items"),
    "named": (
        {"named_tuple": [], "name": "x", "fields": ["a"]},
        "does not have as many values as fields",
    ),
    "packed": ({"packed_sequence": [1]}, "does not have four parts"),
    "return": ({"return_type": [1], "name": "__import__"}, "an unknown return type"),
    "return parts": (
        {"return_type": [1], "name": "max"},
        "a return type has the wrong number of parts",
    ),
    "dtype": ({"dtype": "load"}, "an unknown constant of PyTorch"),
    "dunder": ({"dtype": "__class__"}, "an unknown constant of PyTorch"),
    "device": ({"device": "nowhere"}, "an unknown device"),
    "float": ({"float": "1e400"}, "an unknown floating-point number"),
    "attribute": ({"object": [], "name": "x", "more": [["__class__", 1]]}, "an impossible name"),
    "type": ({"object": [], "name": "x", "more": [["_type", 1]]}, "an impossible name"),
    "method": ({"object": [], "name": "x", "more": [["items", 1]]}, "an impossible name"),
    "nameless": ({"opaque": "a."}, "the type of an object has no name"),
    "bytes": ({"bytes": "%"}, "cannot be made of its description"),
    "slice": ({"slice": [1]}, "a constant has other parts"),
    "int": ({"int": "zz"}, "cannot be made of its description"),
    "maxlen": ({"deque": [], "maxlen": -1}, "a maxlen is -1"),
    "size": ({"size": [-1]}, "a size[0] is -1"),
    "range": ({"range": [1, 2, 0]}, "cannot be made of its description"),
}


def test_a_name_in_a_file_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__getattr__", importlib.import_module)
    for name in ("this", "antigravity"):
        with pytest.raises(_format.Defect, match="an unknown constant of PyTorch"):
            _decoding.decode(f'{{"dtype":"{name}"}}')
        assert name not in sys.modules


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_describes_no_value_is_refused_when_the_value_is_asked_for(
    path: Path, name: str
) -> None:
    structure, told = STRUCTURES[name]
    shard = shards(path)[0]
    rewrite(shard, put(*GROUP, "structure", structure))
    acts = load(path)
    with pytest.raises(CorruptRecordingError) as caught:
        acts["conv"][0]
    assert str(caught.value).startswith(f"{shard} is damaged: ")
    assert told in str(caught.value)
    assert any(told in problem for problem in actrec.verify(path))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"list":[' + "1" * 5000 + "]}"])
def test_a_structure_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(_format.Defect, match=r"cannot be made of its description|nested more than"):
        _decoding.decode(text)


def test_a_scalar_that_has_dimensions_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    memory = made(x=[np.arange(3.0)])
    memory.save(tmp_path / "r")
    rewrite(shards(tmp_path / "r")[0], put(*GROUP, "structure", {"scalar": 0}))
    with pytest.raises(CorruptRecordingError, match="a NumPy scalar has dimensions"):
        load(tmp_path / "r")["x"][0]


def test_a_named_tuple_of_impossible_names_becomes_a_harmless_one() -> None:
    made = _decoding.decode(
        '{"named_tuple":[1,2,3],"name":"__import__(\'os\')","fields":["a b","x","x"]}'
    ).spec.fill([])
    assert made == (1, 2, 3)
    assert type(made).__name__ == "namedtuple"
    assert made._fields == ("_0", "x", "_2")


def test_a_truncated_file_is_found_when_it_is_opened_and_when_it_is_used(path: Path) -> None:
    shard = shards(path)[-1]
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
    with pytest.raises(CorruptRecordingError, match="it has become shorter"):
        for layer in acts.values():
            list(layer)
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(CorruptRecordingError, match="another file than when it was opened"):
        for layer in acts.values():
            list(layer)
    shard.unlink()
    with pytest.raises(CorruptRecordingError, match="and is gone"):
        for layer in acts.values():
            list(layer)


def test_a_large_value_of_a_file_that_is_another_one_or_gone_is_not_mapped(tmp_path: Path) -> None:
    net = nn.Identity()
    with record(net, "", into=tmp_path / "r"):
        net(torch.ones(1 << 19))
    (shard,) = shards(tmp_path / "r")
    content = shard.read_bytes()
    for change, told in (
        (lambda: shard.write_bytes(content[:-9]), f"and has {len(content) - 9} now"),
        (lambda: shard.write_bytes(b"x" * len(content)), "another file than when it was opened"),
        (shard.unlink, "and is gone"),
    ):
        shard.write_bytes(content)
        acts = load(tmp_path / "r")
        assert acts[""].passes == [0]
        change()
        with pytest.raises(CorruptRecordingError, match=told):
            acts[""][0]


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
    acts = load(path)
    for index in range(2):
        with pytest.raises(CorruptRecordingError, match="it says that it belongs to shard"):
            acts["conv"][index * 3]
    make(tmp_path / "other")
    for number, shard in enumerate(shards(path)):
        before = shard.read_bytes()
        shutil.copy(shards(tmp_path / "other")[number], shard)
        with pytest.raises(CorruptRecordingError, match="it says that it belongs to"):
            list(load(path)["conv"])
        shard.write_bytes(before)


def test_missing_shards_are_found_and_without_the_last_one_a_recording_is_not_complete(
    path: Path,
) -> None:
    *_, middle, last = shards(path)
    expected = load(path)["conv"]
    content = last.read_bytes()
    last.unlink()
    found = load(path)
    assert not found.complete
    assert found.num_passes < 6
    assert all(map(same, found["conv"], expected))
    last.write_bytes(content)
    middle.rename(path / "rank-00000/000099.safetensors")
    for look in (lambda: load(path), lambda: _raised(actrec.verify(path))):
        with pytest.raises(
            CorruptRecordingError, match=rf"{middle.name} is damaged: it is missing"
        ):
            look()
    (path / "rank-00000/000099.safetensors").rename(middle)
    shutil.copy(middle, path / "rank-00000/999999999999999999.safetensors")
    with pytest.raises(CorruptRecordingError, match="it is missing"):
        load(path)
    assert len(actrec.verify(path)) < 20


def _raised(problems: list[str]) -> None:
    raise CorruptRecordingError("; ".join(problems))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("rank.json", "[", "it is not JSON"),
        ("rank.json", "[" * 100_000, "it is not JSON"),
        ("rank.json", "[]", "the file is [], which is not a JSON object"),
        ("rank.json", b"\xff", "it is not JSON"),
        ("rank.json", ("format", "zip"), "it does not describe a recording of actrec"),
        ("rank.json", ("version", 99), "it is of version 99 of the format, and this actrec reads"),
        ("rank.json", ("layers", 3), "layers is 3, which is not a list"),
        ("rank.json", ("layers", [{"name": 1}]), "layers[0] has no 'type'"),
        ("rank.json", ("began", -1), "began is -1"),
        ("rank.json", ("ranks", 0), "it is of a run of 0 ranks"),
        ("rank.json", ("names", {"a": 1}), "names.a is 1, which is not a string"),
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
def test_a_description_that_is_a_pipe_is_not_waited_for(path: Path) -> None:
    name = "rank-00000/rank.json"
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CorruptRecordingError, match=f"{name} is damaged: it is empty"):
        load(path)
    assert any(f"{name} is damaged: it is empty" in problem for problem in actrec.verify(path))


def test_a_recording_that_begins_while_it_is_opened_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description is written before the first shard, but here it is looked for before, and the shards after."""
    size = _disk.Disk.size

    def too_early(disk: Any, name: str) -> int:
        monkeypatch.setattr(_disk.Disk, "size", size)
        raise FileNotFoundError(name)

    monkeypatch.setattr(_disk.Disk, "size", too_early)
    assert load(path).num_passes == 6


def test_a_recording_that_is_gone_on_with_while_it_is_opened_is_what_it_was_or_what_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _disk.Disk.names

    def go_on(disk: Any) -> Any:
        if disk.name != "rank-00000":
            return names(disk)
        monkeypatch.undo()
        found = names(disk)
        net = Net()
        with record(net, inputs=True, into=path, resume=True):
            net(batches(1)[0])
        return found

    monkeypatch.setattr(_disk.Disk, "names", go_on)
    for passes in (6, 7):
        acts = load(path)
        assert acts.num_passes == len(acts["conv"]) == len([*acts["conv"]]) == passes
        assert acts.complete


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
    hit, names = [], []
    for shard, opened in zip(shards(path), opened_shards(load(path)), strict=True):
        content = bytearray(shard.read_bytes())
        tensor = next(name for name in opened.container.tensors if name.endswith(".0.0"))
        key = tensor.removesuffix(".0.0")
        names += [one.slot.name for one in opened.layers.values() if one.slot.key == key]
        content[opened.container.tensors[tensor].end - 1] ^= 0x40
        hit.append(content)
    for shard, content in zip(shards(path), hit, strict=True):
        shard.write_bytes(content)
    problems = actrec.verify(path)
    assert len(problems) == len(shards(path))
    for name, problem in zip(names, problems, strict=True):
        assert f"the checksum of the data of layer {name!r} is" in problem
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
    (opened, *_) = opened_shards(load(path))
    content = shards(path)[0].read_bytes()
    shards(path)[0].write_bytes(content[:-10])
    problems = list(_check._data_problems(opened))
    assert "the checksum of the data of layer" in problems[0]
