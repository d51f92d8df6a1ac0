"""Recording into a path: the same as in memory, within a budget, and no error is lost or told twice."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import actrec
from actrec import (
    ActrecError,
    CaptureError,
    OptionError,
    RecordingExistsError,
    TransformError,
    UnlockedWarning,
    UnusedLayerWarning,
    WriteError,
    load,
    record,
)
from actrec._values.memory import memory
from actrec._values.snapshot import snapshot
from actrec.store import Folder
from actrec.store import disk as _disk
from actrec.store import held as _held
from actrec.store import lock as _lock
from actrec.store import new_file as _new_file
from actrec.store import writer as _writer
from tests.conftest import own_hooks
from tests.made import made
from tests.stored import Net, assert_same, batches, bits, opened_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


KIB = 1024


def recorded(count: int, **options: Any) -> Any:
    """A run of the net, recorded in memory unless ``into`` says otherwise."""
    torch.manual_seed(0)
    net = Net()
    with record(net, **options) as acts:
        for step, batch in enumerate(batches(count)):
            net(batch)
            acts.add("step", step)
            acts.add("label", {"odd": torch.tensor([step % 2])})
    return acts


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes its time."""
    write, finish = _new_file.Unfinished.write, _new_file.Unfinished.finish

    def slowly(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: (time.sleep(0.005), function(*args))[1]

    monkeypatch.setattr(_new_file.Unfinished, "write", slowly(write))
    monkeypatch.setattr(_new_file.Unfinished, "finish", slowly(finish))


class Gate:
    """Holds the writer's thread before it writes, until the test lets it go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        write = _writer.Writer._write

        def gated(writer: Any, batch: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            return write(writer, batch)

        monkeypatch.setattr(_writer.Writer, "_write", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int = 0) -> None:
    """Let the writing of shard ``at``, and of all after it, fail."""
    write = _writer.new_shard.write

    def fail(file: Any, heading: Any, **calls: Any) -> None:
        write(file, heading, **calls)
        if heading.shard >= at:
            raise error

    monkeypatch.setattr(_writer.new_shard, "write", fail)


# --- The same as in memory ---------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("shard_bytes", [1, 30 * KIB, 10**9])
@pytest.mark.parametrize("inputs", [False, True])
def test_what_is_streamed_is_what_memory_would_have_held_bit_for_bit(
    tmp_path: Path, shard_bytes: int, *, inputs: bool
) -> None:
    expected = recorded(6, inputs=inputs)
    budget = 2 * shard_bytes
    acts = recorded(6, inputs=inputs, into=Folder(tmp_path / "r", shard_bytes, budget))
    assert_same(load(tmp_path / "r"), expected)
    assert_same(acts, expected)
    assert load(tmp_path / "r").complete
    assert actrec.verify(tmp_path / "r") == []


def test_a_pass_that_is_larger_than_a_shard_is_written_in_parts(tmp_path: Path) -> None:
    acts = recorded(3, into=Folder(tmp_path / "r", 20 * KIB, 40 * KIB))
    parts = [shard.heading.is_part for shard in opened_shards(load(tmp_path / "r"))]
    assert parts.count(True) > 3
    assert parts[-1] is False
    assert_same(acts, recorded(3))


def test_the_recording_says_what_it_is_while_it_is_made_and_is_read_afterwards(
    tmp_path: Path,
) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=tmp_path / "r") as acts:
        assert repr(acts[""]) == "Layer '' (Linear): 0 calls, 0 B"
        net(torch.ones(2, 4))
        net(torch.ones(5, 4))
        assert repr(acts[""]) == "Layer '' (Linear): 2 calls, (2-5, 3) float32, 84 B"
        assert (len(acts[""]), acts[""].passes, acts.num_passes) == (2, [0, 1], 2)
        for read in (lambda: acts[""][0], lambda: list(acts[""]), acts[""].cat, acts[""].stack):
            with pytest.raises(ActrecError, match=r"acts\[''\]: its values are being written to"):
                read()  # type: ignore[operator]
        with pytest.raises(ActrecError, match="what was written to a path stays there"):
            acts.clear()
    assert acts[""].cat().shape == (7, 3)
    assert acts[""][-1].shape == (5, 3)
    assert [t.shape[0] for t in acts[""][:]] == [2, 5]
    assert repr(acts[""]) == "Layer '' (Linear): 2 calls, (2-5, 3) float32, 84 B"
    assert acts.nbytes == 84


def test_writing_in_place_right_after_the_call_does_not_reach_the_disk(
    tmp_path: Path, gate: Gate
) -> None:
    net = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Identity())
    nn.init.ones_(net[0].weight)
    with record(net, "0", into=Folder(tmp_path / "r", 1, 10**9)) as acts:
        for step in range(6):
            net(torch.full((64, 64), float(step))).fill_(-1)  # while nothing is written yet
        assert gate.reached.wait(60)
        gate.open.set()
    assert [t.unique().tolist() for t in acts["0"]] == [[64.0 * step] for step in range(6)]


def test_memory_can_be_read_while_the_model_writes_to_its_side() -> None:
    for _ in range(50):
        original = torch.randn(256, 256)
        expected = bits(original[:4])
        shared = snapshot(original)
        owner, view = memory(shared)
        writer = threading.Thread(target=original.fill_, args=(0,))
        writer.start()
        seen = [bytes(view[: len(expected)]) for _ in range(20)]
        writer.join()
        assert set(seen) == {expected}
        assert bytes(view[: len(expected)]) == expected
        assert original.sum() == 0
        del owner


def test_reading_memory_does_not_end_the_sharing() -> None:
    is_shared = torch._C._is_cow_tensor  # type: ignore[attr-defined]
    original = torch.randn(128, 128)
    shared = snapshot(original)
    assert is_shared(shared)
    _, view = memory(shared[3:5])
    assert bytes(view) == bits(original[3:5].clone())
    assert is_shared(shared)
    assert is_shared(original)
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 0


def test_without_the_private_address_memory_is_a_copy_of_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actrec._values.memory, "data_address", None)
    original = torch.randn(128, 128)
    owner, view = memory(snapshot(original))
    assert bytes(view) == bits(original)
    assert owner is not original


def test_added_values_that_nobody_can_store_are_refused_at_the_call(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    with record(net, "", into=tmp_path / "r") as acts:
        net(torch.ones(1, 1))
        with pytest.raises(CaptureError, match=r"acts.add\('x'\): a value of type set cannot be"):
            acts.add("x", {1})
        acts.add("x", [1])
    assert list(acts["x"]) == [[1]]


def test_a_layer_whose_values_nobody_can_store_is_refused_from_the_call_of_the_model(
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    told = r"record\(\) cannot keep call 1 of layer '0': a sparse_coo tensor cannot be stored"
    with (
        pytest.raises(CaptureError, match=told),
        record(
            net, "0", into=tmp_path / "r", transform=lambda t: t.to_sparse() if len(t) == 2 else t
        ),
    ):
        net(torch.ones(1, 3))
        net(torch.ones(2, 3))
    assert not own_hooks(net[0])
    assert load(tmp_path / "r").num_passes == 1


def test_threads_record_into_one_path(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity())
    nn.init.ones_(model[0].weight)

    def work(number: int) -> None:
        for step in range(50):
            model(torch.full((1, 1), float(number * 50 + step)))

    with record(model, inputs=True, into=Folder(tmp_path / "r", 99 * KIB, 200 * KIB)) as acts:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert acts.num_passes == 400
    found = load(tmp_path / "r")
    assert found["0"].passes == found["1"].passes == list(range(400))
    assert sorted(map(float, found["0"])) == [float(i) for i in range(400)]
    assert list(map(float, found["0"])) == list(map(float, found["1"]))
    given = [float(call["input"]) for call in found.inputs["1"]]
    assert given == list(map(float, found["0"]))


def test_a_pass_is_complete_when_nothing_can_be_added_to_it() -> None:
    passes = actrec._calls.passes.Passes()
    module, other = nn.Identity(), nn.Identity()
    seen = [passes.count_complete()]
    for _ in range(2):
        passes.begin(module, is_root=True)
        seen.append(passes.count_complete())
        passes.end(module, None, None)
        seen.append(passes.count_complete())
    passes.begin(module, is_root=False)  # the third, which goes on

    def overtake() -> None:
        for _ in range(2):
            passes.begin(other, is_root=True)
            passes.end(other, None, None)

    thread = threading.Thread(target=overtake)
    thread.start()
    thread.join()
    seen.append(passes.count_complete())
    passes.end(module, None, None)
    seen.append(passes.count_complete())
    assert seen == [0, 0, 0, 1, 1, 2, 4]


# --- The budget --------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """For each call that was kept: the bytes in use afterwards, and its own."""
    seen: list[tuple[int, int]] = []
    keep = _writer.Writer.keep

    def watch(writer: Any, call: Any) -> None:
        add = writer._held.add
        writer._held.add = lambda call: (add(call), seen.append((writer.used, call.look.size)))
        keep(writer, call)
        del writer._held.add

    monkeypatch.setattr(_writer.Writer, "keep", watch)
    return seen


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("budget", [30, 60, 100, 1000])
def test_what_waits_never_exceeds_the_budget(
    tmp_path: Path, watched: list[tuple[int, int]], budget: int
) -> None:
    acts = recorded(10, into=Folder(tmp_path / "r", 50 * KIB, budget * KIB))
    assert len(watched) == 10 * 9
    assert all(used <= budget * KIB or used == size for used, size in watched)
    assert max(used for used, _ in watched) > min(budget, 30) * KIB / 2
    assert_same(acts, recorded(10))


@pytest.mark.usefixtures("slow")
def test_a_value_that_is_larger_than_the_budget_is_written_on_its_own(
    tmp_path: Path, watched: list[tuple[int, int]]
) -> None:
    net = nn.Identity()
    sizes = [1, 100_000, 1, 1, 200_000, 300_000, 1]
    with record(net, "", into=Folder(tmp_path / "r", 10**6, 10_000)) as acts:
        for size in sizes:
            net(torch.full((size,), float(size)))
    assert all(used <= 10_000 or used == size for used, size in watched)
    assert [len(t) for t in acts[""]] == sizes


def test_what_waits_is_counted_as_what_is_going_to_be_written_and_small_values_count_their_objects(
    tmp_path: Path, watched: list[tuple[int, int]]
) -> None:
    net = nn.Sequential(nn.Linear(64, 128), nn.Dropout(), nn.Flatten()).eval()
    with record(net, into=Folder(tmp_path / "r")) as acts:
        net(torch.ones(64, 64))
        acts.add("one", 1)
    sizes = [size for _, size in watched]
    overhead = 2 * 1024 + len('{"tensor":0}')
    assert sizes[:3] == [64 * 128 * 4 + overhead] * 3, "shared with the model, not on the disk"
    assert sizes[3] == 1024 + 1


def test_a_full_queue_makes_the_model_wait_and_can_be_interrupted(
    tmp_path: Path, gate: Gate
) -> None:
    # A run in the background of a shell may have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    net = nn.Identity()
    state: list[str] = []

    def interrupt() -> None:
        assert gate.reached.wait(60)
        state.append("waiting")
        time.sleep(0.3)
        state.append("interrupted")
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.3, gate.open.set).start()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with (
        pytest.raises(KeyboardInterrupt),
        record(net, "", into=Folder(tmp_path / "r", 1, 10_000)) as acts,
    ):
        for step in range(1000):
            net(torch.full((1000,), float(step)))
        state.append("never full")
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert state == ["waiting", "interrupted"]
    assert 1 <= load(tmp_path / "r").num_passes == acts.num_passes <= 3
    assert not load(tmp_path / "r").complete


def test_what_is_complete_is_committed_after_a_while_however_little_it_is(tmp_path: Path) -> None:
    net = nn.Identity()
    with record(net, "", into=Folder(tmp_path / "r", seconds=0)):
        for _ in range(5):
            net(torch.ones(1))
    assert len(list((tmp_path / "r/rank-00000").glob("*.safetensors"))) == 5
    with record(net, "", into=tmp_path / "s"):
        for _ in range(5):
            net(torch.ones(1))
    assert len(list((tmp_path / "s/rank-00000").glob("*.safetensors"))) == 1


def test_very_many_calls_are_cut_into_shards_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_held, "MAX_HEADER", 10_000)
    net = nn.Identity()
    with record(net, "", into=tmp_path / "r") as acts:
        for step in range(100):
            net(torch.tensor([step]))
            acts.add("many", f"{step}" * 50)
    assert len(list((tmp_path / "r/rank-00000").glob("*.safetensors"))) > 5
    assert acts[""].cat().tolist() == list(range(100))


# --- Errors ------------------------------------------------------------------------------------------


def test_an_error_of_the_writer_is_raised_once_from_the_next_call_with_path_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError(28, "No space left on device"), at=1)
    net = nn.Sequential(nn.Linear(4, 3))
    errors: list[WriteError] = []
    with record(net, "0", into=Folder(tmp_path / "r", seconds=0)) as acts:
        for step in range(200):
            try:
                net(torch.full((2, 4), float(step)))
            except WriteError as error:
                errors.append(error)
            if not errors:
                time.sleep(0.005)
    (error,) = errors
    assert str(tmp_path / "r") in str(error)
    assert "000001.safetensors could not be written: [Errno 28] No space left on device" in str(
        error
    )
    assert "Committed and safe: 1 pass." in str(error)
    assert isinstance(error.__cause__, OSError)
    found = load(tmp_path / "r")
    assert (found.num_passes, acts.num_passes, found.complete) == (1, 1, False)
    assert len(acts["0"]) == 1
    assert {path.name for path in (tmp_path / "r/rank-00000").iterdir()} == {
        "000000.safetensors",
        "rank.json",
        "writer.lock",
    }


def test_a_shard_is_written_while_the_disk_has_yet_to_confirm_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = threading.Event()
    finish, write = _new_file.Unfinished.finish, _writer.new_shard.write

    def confirm(unfinished: Any) -> None:
        if unfinished._name == "000000.safetensors":
            assert second.wait(60)
        finish(unfinished)

    def written(file: Any, heading: Any, **calls: Any) -> None:
        write(file, heading, **calls)
        if heading.shard == 1:
            assert load(tmp_path / "r").num_passes == 0
            second.set()

    monkeypatch.setattr(_new_file.Unfinished, "finish", confirm)
    monkeypatch.setattr(_writer.new_shard, "write", written)
    net = nn.Linear(4, 3)
    with record(net, "", into=Folder(tmp_path / "r", seconds=0)):
        for _ in range(4):
            net(torch.ones(2, 4))
        assert second.wait(60)
    assert load(tmp_path / "r").num_passes == 4


@pytest.mark.parametrize("also", [False, True])
def test_where_the_disk_refuses_a_shard_the_one_behind_it_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, also: bool
) -> None:
    refused = threading.Event()
    fsync, write = os.fsync, _writer.new_shard.write
    fds: list[int] = []

    def refuse(fd: int) -> None:
        if fd in fds:
            assert refused.wait(60)
            raise OSError("broken")
        fsync(fd)

    def written(file: Any, heading: Any, **calls: Any) -> None:
        if heading.shard == 1:
            fds.append(file.fd)
        write(file, heading, **calls)
        if heading.shard == 2:
            refused.set()
            if also:
                raise OSError("and that one too")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(_writer.new_shard, "write", written)
    net = nn.Linear(4, 3)
    with (
        pytest.raises(
            WriteError, match=r"000001\.safetensors could not be written: broken.*safe: 1 pass"
        ),
        record(net, "", into=Folder(tmp_path / "r", seconds=0)),
    ):
        for _ in range(4):
            net(torch.ones(2, 4))
            time.sleep(0.005)
        assert refused.wait(60)
    assert {path.name for path in (tmp_path / "r/rank-00000").iterdir()} == {
        "000000.safetensors",
        "rank.json",
        "writer.lock",
    }
    assert load(tmp_path / "r").num_passes == 1


def test_an_error_that_no_call_has_raised_is_raised_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError("broken"))
    net = nn.Linear(4, 3)
    with pytest.raises(WriteError, match="broken"), record(net, "", into=tmp_path / "r"):
        net(torch.ones(2, 4))
    assert not own_hooks(net)
    assert load(tmp_path / "r").num_passes == 0


def test_an_error_at_the_very_end_is_raised_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = _writer.new_shard.write

    def fail(file: Any, heading: Any, **calls: Any) -> None:
        if heading.ended is not None:
            raise OSError("broken")
        write(file, heading, **calls)

    monkeypatch.setattr(_writer.new_shard, "write", fail)
    net = nn.Linear(4, 3)
    with pytest.raises(WriteError, match="broken"), record(net, "", into=tmp_path / "r"):
        net(torch.ones(2, 4))
    assert not load(tmp_path / "r").complete


def test_the_models_own_error_is_not_masked_by_the_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError("broken"))
    net = nn.Linear(4, 3)
    with pytest.raises(ZeroDivisionError) as caught, record(net, "", into=tmp_path / "r"):
        for _ in range(2):
            net(torch.ones(2, 4))
        raise ZeroDivisionError
    assert "broken" in "".join(traceback.format_exception(caught.value))


def test_an_error_of_the_writer_that_the_model_swallows_is_raised_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError("broken"))

    class Swallows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()
            self.caught = 0

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.layer(x)
            except WriteError:
                self.caught += 1
                return x

    net = Swallows()
    with (
        pytest.raises(WriteError, match="broken"),
        record(net, "layer", into=Folder(tmp_path / "r", seconds=0)),
    ):
        while not net.caught:
            net(torch.ones(1))
            time.sleep(0.005)
        net(torch.ones(1))
    assert net.caught == 1


def test_a_failed_writer_lets_go_of_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError("broken"))
    kept: list[weakref.ref[Tensor]] = []
    keep = _writer.Writer.keep

    def watch(writer: Any, call: Any) -> None:
        kept.extend(map(weakref.ref, call.tensors))
        keep(writer, call)

    monkeypatch.setattr(_writer.Writer, "keep", watch)
    net = nn.Linear(4, 3)
    gc.disable()
    try:
        with record(net, "", into=Folder(tmp_path / "r", seconds=0)) as acts:
            with contextlib.suppress(WriteError):
                while True:
                    net(torch.ones(2, 4))
                    time.sleep(0.005)
            net(torch.ones(2, 4))
            writer = acts._layers[""]._stream._writer  # type: ignore[attr-defined]
            assert writer.used == 0
            # but for the value of the call that raised, in the traceback
            assert sum(ref() is not None for ref in kept) <= 1 < len(kept)
    finally:
        gc.enable()


def test_an_interrupt_while_calls_become_a_shard_is_told_as_a_failure_of_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    net = nn.Linear(4, 3)
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        record(net, "", into=Folder(tmp_path / "r", shard_bytes=1)),
    ):
        net(torch.ones(2, 4))
        monkeypatch.setattr(_writer, "give_back", interrupt)
        net(torch.ones(2, 4))
    assert "could not be written: KeyboardInterrupt" in caught.value.__notes__[0]
    found = load(tmp_path / "r")
    assert (found.num_passes, found.complete) == (0, False)
    assert actrec.verify(tmp_path / "r") == []


def test_an_error_outside_of_the_system_reaches_the_caller_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, MemoryError("no more"))
    net = nn.Linear(4, 3)
    with pytest.raises(WriteError, match="no more"), record(net, "", into=tmp_path / "r"):
        net(torch.ones(2, 4))


def test_a_header_that_is_beyond_the_format_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actrec.store.safetensors, "MAX_HEADER", 100)
    net = nn.Linear(4, 3)
    with pytest.raises(WriteError, match="is the limit"), record(net, "", into=tmp_path / "r"):
        net(torch.ones(2, 4))


# --- Ways out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_leaving_by_an_exception_commits_what_is_complete(
    tmp_path: Path, error: type[BaseException]
) -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(error), record(net, "", into=tmp_path / "r") as acts:
        for _ in range(4):
            net(torch.ones(2, 4))
        raise error
    found = load(tmp_path / "r")
    assert (found.num_passes, len(found[""]), found.complete) == (3, 3, False)
    assert acts.num_passes == 3, "the last pass may lack what would have been added to it"
    assert "stored Linear (incomplete): 1 layer, 3 passes" in repr(found)
    assert "(interrupted, partial)" in repr(acts)
    assert found._ranks[0].info.error == f"left by {error.__name__}"
    assert not own_hooks(net)


def test_passes_without_a_call_are_counted(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor, *, use: bool) -> Tensor:
            return self.layer(x) if use else x

    net = Branch()
    for name, error in (("r", None), ("s", ZeroDivisionError)):
        with contextlib.suppress(ZeroDivisionError), record(net, "layer", into=tmp_path / name):
            for use in (True, False, False):
                net(torch.ones(1), use=use)
            if error:
                raise error
    assert (load(tmp_path / "r").num_passes, load(tmp_path / "s").num_passes) == (3, 2)


def test_a_run_without_any_call_counts_its_passes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    with record(net, "0", into=tmp_path / "r"):
        net(torch.ones(2, 4))
    net.forward = lambda x: x  # type: ignore[method-assign]
    with record(net, "0", into=tmp_path / "r", resume=True) as acts:
        net(torch.ones(2, 4))
    assert acts.num_passes == load(tmp_path / "r").num_passes == 2


def test_a_transforms_error_commits_what_came_before(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with (
        pytest.raises(TransformError),
        record(net, "", into=tmp_path / "r", transform=lambda t: t if len(t) < 3 else t.nope),
    ):
        for size in (1, 2, 3):
            net(torch.ones(size, 4))
    assert load(tmp_path / "r")[""].passes == [0, 1]


def test_a_dropped_generator_and_a_dropped_block_commit_what_is_complete(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)

    def steps() -> Iterator[Any]:
        with record(net, "", into=tmp_path / "r") as acts:
            while True:
                net(torch.ones(2, 4))
                yield acts

    generator = steps()
    next(generator)
    next(generator)
    del generator
    assert load(tmp_path / "r").num_passes == 1

    block = record(net, "", into=tmp_path / "s")
    acts = block.__enter__()
    net(torch.ones(2, 4))
    net(torch.ones(2, 4))
    del block, acts
    assert load(tmp_path / "s").num_passes == 1
    (rank,) = load(tmp_path / "s").ranks
    assert rank.error == "the recorder was garbage-collected before the block ended"
    assert not [t for t in threading.enumerate() if t.name == "actrec-writer"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_writes_nothing_and_holds_no_lock(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)

    def child() -> None:
        with contextlib.suppress(BaseException):
            net(torch.ones(9, 4))
            block.__exit__(None, None, None)
            os._exit(0)
        os._exit(1)

    block = record(net, "", into=tmp_path / "r")
    with block as acts:
        net(torch.ones(2, 4))
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0
        net(torch.ones(2, 4))
    assert [len(t) for t in acts[""]] == [2, 2]
    assert load(tmp_path / "r").complete


def test_nothing_of_the_store_is_left_when_the_block_has_ended(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    gc.disable()
    try:
        with record(net, "", into=tmp_path / "r") as acts:
            net(torch.ones(2, 4))
        dying = [weakref.ref(thing) for thing in (acts, acts[""], acts[""]._stream)]  # type: ignore[attr-defined]
        del acts
        assert [ref() for ref in dying] == [None] * 3
    finally:
        gc.enable()
    assert not [t for t in threading.enumerate() if t.name == "actrec-writer"]


# --- Options -----------------------------------------------------------------------------------------


def test_a_path_that_is_taken_is_refused_and_not_touched(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=tmp_path / "r"):
        net(torch.ones(2, 4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name, told in (
        ("r", r"there is a recording already. Continue it: record\(..., resume=True\)"),
        ("other", r"that folder has other things in it \('notes.txt'\). Choose another path"),
        ("file", "that is a file. Choose another path"),
    ):
        with (
            pytest.raises(RecordingExistsError, match=told),
            record(net, "", into=tmp_path / name),
        ):
            pass
        with pytest.raises(FileExistsError, match=told):
            actrec.load(tmp_path / "r").save(tmp_path / name)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not own_hooks(net)
    (tmp_path / "empty").mkdir()
    with record(net, "", into=tmp_path / "empty"):
        net(torch.ones(2, 4))


def test_two_runs_into_one_path_at_a_time_are_refused(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=tmp_path / "r"):
        with (
            pytest.raises(RecordingExistsError, match="another run is recording there now"),
            record(net, "", into=tmp_path / "r", resume=True),
        ):
            pass
        net(torch.ones(2, 4))
    assert load(tmp_path / "r").num_passes == 1


def test_of_two_runs_that_begin_together_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=tmp_path / "r"):
        for locked in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(_disk.Disk, "names", lambda _: [])  # as it was a moment ago
                if not locked:
                    patch.setattr(fcntl, "flock", lambda *_: None)
                with (
                    pytest.raises(
                        RecordingExistsError, match=r"another run|there is a recording already"
                    ),
                    record(net, "", into=tmp_path / "r"),
                ):
                    pass
        net(torch.ones(2, 4))


def test_a_file_system_without_locks_will_do_and_it_is_said_that_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    net = nn.Linear(4, 3)
    told = r"rank-00000 cannot be locked: .* not supported. So another run could record"
    with pytest.warns(UnlockedWarning, match=told), record(net, "", into=tmp_path / "r"):
        net(torch.ones(2, 4))
    assert load(tmp_path / "r").complete


def test_options_that_make_no_sense_with_a_path_are_refused(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(OptionError, match=r"detach=False.*a graph cannot be stored"):
        record(net, "", into=tmp_path / "r", detach=False)
    with pytest.raises(OptionError, match="only a recording into a path can be resumed"):
        record(net, "", resume=True)
    with pytest.raises(OptionError, match=r"Folder\(budget=0\): expected a number greater than 0"):
        Folder(tmp_path, budget=0)
    with pytest.raises(OptionError, match=r"Folder\(seconds=nan\): expected a number"):
        Folder(tmp_path, seconds=float("nan"))
    with pytest.raises(OptionError, match="or a path to record into"):
        record(net, "", into=3)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 3, b"runs/a", ["runs/a"], ""])
def test_what_is_no_path_is_refused_by_name(path: Any) -> None:
    for use in (actrec.load, actrec.verify, made().save, Folder):
        with pytest.raises(OptionError, match=re.escape(f"{path!r} is not a path")):
            use(path)


def test_a_layer_without_a_call_warns_and_is_empty(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    with pytest.warns(UnusedLayerWarning), record(net, into=str(tmp_path / "r")) as acts:
        net[0](torch.ones(2, 4))
    assert (len(acts["0"]), len(acts["1"])) == (1, 0)
    assert list(load(tmp_path / "r")) == ["0", "1"]


def test_the_store_needs_no_other_library(tmp_path: Path) -> None:
    script = f"""
import sys, torch, actrec
net = torch.nn.Linear(2, 2)
with actrec.record(net, "", into={str(tmp_path / "r")!r}):
    net(torch.ones(1, 2))
assert actrec.verify({str(tmp_path / "r")!r}) == []
assert actrec.load({str(tmp_path / "r")!r})[""].cat().shape == (1, 2)
foreign = {{"safetensors", "transformers", "h5py", "zarr"}} & set(sys.modules)
assert not foreign, foreign
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_forked_process_lets_go_of_locks(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=tmp_path / "r"):
        net(torch.ones(2, 4))
        own = _disk.Disk(tmp_path / "r/rank-00000")
        with pytest.raises(BlockingIOError):
            own.lock()
        _lock._release_all()  # what runs in the child
        own.lock().close()


def test_closing_twice_does_nothing(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=tmp_path / "r") as acts:
        net(torch.ones(2, 4))
    stream = acts[""]._stream  # type: ignore[attr-defined]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    stream.error = "ZeroDivisionError"
    stream.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)  # as in a process that was forked off
        stream.close()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")} == before


@pytest.mark.parametrize(
    ("owner", "method"), [(_writer.Writer, "_write"), (_new_file.Unfinished, "finish")]
)
def test_a_block_that_the_writers_own_threads_collect_is_closed_without_a_deadlock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    function = getattr(owner, method)
    collected = threading.Event()
    stream: list[Any] = []

    def collect(*args: Any) -> Any:
        if threading.current_thread().name.startswith("actrec"):
            while not stream:
                time.sleep(0.001)
            stream[0]._writer.close(1)
            collected.set()
        return function(*args)

    monkeypatch.setattr(owner, method, collect)
    net = nn.Linear(4, 3)
    with record(net, "", into=Folder(tmp_path / "r", seconds=0)) as acts:
        stream.append(acts[""]._stream)  # type: ignore[attr-defined]
        for _ in range(2):
            net(torch.ones(2, 4))
        assert collected.wait(60)
    assert load(tmp_path / "r").num_passes == 1


def test_a_call_that_comes_after_the_end_is_dropped(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=tmp_path / "r") as acts:
        net(torch.ones(2, 4))
    acts[""]._keep(torch.ones(1), 1)
    assert len(acts[""]) == 1


# --- Saving ------------------------------------------------------------------------------------------


def test_saving_a_recording_and_what_was_loaded_gives_the_same(tmp_path: Path) -> None:
    acts = recorded(5, inputs=True)
    acts.save(tmp_path / "a")
    load(tmp_path / "a").save(Folder(tmp_path / "b", 50 * KIB))
    assert_same(load(tmp_path / "a"), acts)
    assert_same(load(tmp_path / "b"), acts)
    assert len(list((tmp_path / "b/rank-00000").iterdir())) > 3
    acts.inputs.save(tmp_path / "c")
    assert_same(load(tmp_path / "c"), acts.inputs)


def test_saving_says_when_it_fails_and_what_is_there_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = recorded(5)
    failing(monkeypatch, OSError("broken"), at=1)
    with pytest.raises(WriteError, match="broken"):
        acts.save(Folder(tmp_path / "a", 100 * KIB))
    assert not load(tmp_path / "a").complete
    with monkeypatch.context() as patch:
        patch.setattr(_writer.Writer, "keep", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            acts.save(tmp_path / "b")
    assert not load(tmp_path / "b").complete
    assert load(tmp_path / "b").num_passes == 0


def test_saving_keeps_what_a_bounded_container_has_kept(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    with record(net, "", into=partial(deque, maxlen=2)) as acts:
        for size in range(1, 6):
            net(torch.ones(size, 4))
    acts.save(tmp_path / "r")
    assert load(tmp_path / "r")[""].passes == [3, 4]
    assert [len(t) for t in load(tmp_path / "r")[""]] == [4, 5]


def test_folders_above_that_this_process_may_not_open_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    model = nn.Identity()
    with record(model, "", into=tmp_path / "r"):
        model(torch.ones(2))
    assert torch.equal(load(tmp_path / "r")[""].cat(), torch.ones(2))
