"""What a type checker says of the public API. Checked by mypy, not run by pytest.

``assert_type`` says what an expression is; an ignored error says that a mistake is one, for mypy also
complains about an ignore that nothing needs.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import ItemsView, Iterator, KeysView, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, assert_type

import torch
from torch import Tensor, nn

import actrec
from actrec import (
    Comparison,
    Layer,
    Opaque,
    Recorder,
    Recording,
    Stats,
    UnusedLayerWarning,
    record,
    reduce,
)
from actrec.store import Folder, RankInfo, StoredRecording

if TYPE_CHECKING:
    from collections.abc import Mapping

model: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
batch = torch.zeros(2, 4)


def pooled(t: Tensor) -> Tensor:
    return t.mean(1)


def is_relu(name: str, module: nn.Module) -> bool:
    return bool(name) and isinstance(module, nn.ReLU)


def what_record_returns() -> None:
    assert_type(record(model), AbstractContextManager[Recorder])
    with record(model) as acts:
        assert_type(acts, Recorder)
        assert_type(acts.add("label", batch), None)
        assert_type(acts.add("tokens", ["a", "b"]), None)
        assert_type(acts.clear(), None)
        with acts.pause() as nothing:
            assert_type(nothing, None)
        with acts.unit("a") as nothing:
            assert_type(nothing, None)
        assert_type(acts.remaining(enumerate([batch])), Iterator[tuple[int, Tensor]])
        named: list[tuple[str, int]] = []
        assert_type(acts.remaining(named, divide=True), Iterator[tuple[str, int]])
        acts.unit(1.0)  # type: ignore[arg-type]
    assert_type(acts.inputs, Recording[dict[str, Any]])
    assert_type(acts.inputs["0"][0]["input"], Any)
    assert_type(acts.grads, Recording)


def a_block_that_returns_is_left_by_its_return() -> Tensor:
    with record(model) as acts:
        model(batch)
        return acts["0"].cat()


def every_kind_of_query() -> None:
    record(model, None)
    record(model, "0")
    record(model, re.compile(r"\d"))
    record(model, nn.Linear)
    record(model, model)
    record(model, is_relu)
    record(model, lambda name, module: name == "0" and isinstance(module, nn.Linear))
    record(model, ["0", nn.ReLU, re.compile("1"), model, is_relu])
    record(model, ("0", "1"))
    record(model, {"0", "1"})
    record(model, (str(i) for i in range(2)))
    record(model, {"0": pooled, "1": None})
    record(model, {nn.ReLU: torch.sum, "0": lambda t: t[0]})
    record(model, {"0": reduce.Norms(), "1": reduce.TopK, nn.ReLU: (torch.abs, reduce.Moments())})
    record(model, (), inputs="0")
    record(model, [], inputs={nn.Linear: lambda received: received["input"]}, grads=["0", nn.ReLU])
    record(model, "0", inputs=True, grads={"1": pooled})
    record(model, (), inputs=nn.Linear, into=partial(reduce.Norms, ord=1))
    record(model, into=reduce.Moments)


def every_option() -> None:
    record(
        model,
        transform=pooled,
        inputs=True,
        detach=False,
        device="cpu",
        dtype=torch.float16,
        into=partial(deque, maxlen=10),
    )
    record(model, transform=None, device=None, dtype=None, into=list)
    record(model, device=torch.device("cpu"), into=deque)
    record(model, device=0)


def what_a_recording_is(acts: Recording) -> None:
    assert_type(acts["0"], Layer)
    assert_type(acts.get("0"), Layer | None)
    assert_type(list(acts), list[str])
    assert_type(acts.keys(), KeysView[str])
    assert_type(acts.items(), ItemsView[str, Layer])
    assert_type(len(acts), int)
    assert_type("0" in acts, bool)
    assert_type(acts.num_passes, int)
    assert_type(acts.units, Sequence[int | str])
    assert_type(acts.missing(range(3)), list[int | str])
    assert_type(acts.nbytes, int)
    assert_type(acts["0"].merge_into(reduce.Norms()), reduce.Norms)
    acts["0"].compute()
    mapping: Mapping[str, Layer] = acts
    assert_type(mapping["0"], Layer)


def what_a_layer_is(layer: Layer) -> None:
    # What most layers return. Who knows better says so: see below.
    assert_type(layer[0], Tensor)
    assert_type(layer.cat(), Tensor)
    assert_type(layer.stack(dim=1, release=True), Tensor)
    assert_type(layer.nth(0), Layer)
    assert_type(layer[1:], Sequence[Tensor])
    assert_type(iter(layer), Iterator[Tensor])
    assert_type(len(layer), int)
    assert_type(layer.passes, Sequence[int])
    assert_type(layer.units, Sequence[int | str | None])
    assert_type(layer.nbytes, int)
    assert_type(layer.name, str)
    assert_type(layer.type, str)
    assert_type(layer.clear(), None)
    values: Sequence[Tensor] = layer
    torch.cat(list(values))
    torch.cat([value.mean(1) for value in layer])


class Output(NamedTuple):
    """What the layers of another model return."""

    hidden: Tensor
    weights: Tensor | None


def what_a_user_knows_better() -> None:
    block: AbstractContextManager[Recorder[Output]] = record(model)
    with block as acts:
        assert_type(acts["0"], Layer[Output])
    assert_type(acts["0"][0].hidden, Tensor)
    assert_type(acts["0"].cat().weights, Tensor | None)
    assert_type([*acts["0"]], list[Output])
    stored: StoredRecording[Output] = actrec.load("runs/a")
    assert_type(stored["0"].nth(-1)[0], Output)
    assert_type(stored.rank(1)["0"].stack(), Output)
    assert_type(hidden(acts), Tensor)
    anything: AbstractContextManager[Recorder[Any]] = record(model)
    with anything as acts_of_any_kind:
        assert_type(acts_of_any_kind["0"][0], Any)
    assert_type(hidden(acts_of_any_kind), Tensor)


def hidden(acts: Recording[Output]) -> Tensor:
    return torch.cat([output.hidden for output in acts["0"]])


def what_takes_any_recording(acts: Recorder[Output], other: StoredRecording) -> None:
    comparison = actrec.compare(acts, other)
    assert_type(comparison, Comparison)
    assert_type(comparison[:3], Comparison)
    assert_type(comparison[0].max_abs, float)
    assert_type(acts.stats()[1:], Stats)
    assert_type(acts.stats()[-1].mean, float)
    assert_type(actrec.save(acts, "runs/b"), None)
    assert_type(actrec.save(other, "runs/b", overwrite=True), None)


def recording_to_the_disk() -> None:
    assert_type(record(model, into="runs/a"), AbstractContextManager[Recorder])
    assert_type(record(model, into=Path("runs/a"), resume=True), AbstractContextManager[Recorder])
    record(model, into=Folder("runs/a", shard_bytes=2**20, budget=2**22, seconds=1.5))
    record(model, into=Folder(Path("runs/a")))
    stored = actrec.load("runs/a")
    assert_type(stored, StoredRecording)
    assert_type(stored.complete, bool)
    assert_type(stored.ranks, tuple[RankInfo, ...])
    assert_type(stored.rank(0), StoredRecording)
    assert_type(actrec.load("runs/a", rank=1, check=True), StoredRecording)
    record(model, into=Folder("runs/a", rank=0, world_size=4))
    assert_type(actrec.load(Folder("runs/a"))["0"], Layer)
    assert_type(actrec.verify(Path("runs/a")), list[str])
    recording: Recording = stored
    assert_type(recording.save("runs/b"), None)
    assert_type(recording.save(Path("runs/b"), overwrite=True), None)


def a_recorder_is_a_recording(acts: Recorder) -> Recording:
    return acts


def what_stands_for_an_object() -> None:
    assert_type(Opaque("Cache").type, str)


def the_tree_of_errors() -> None:
    errors: list[type[actrec.ActrecError]] = [
        actrec.CaptureError,
        actrec.JoinError,
        actrec.OptionError,
        actrec.SelectionError,
        actrec.TransformError,
        actrec.UnknownLayerError,
        actrec.UnsupportedModelError,
    ]
    values: list[type[ValueError]] = [actrec.OptionError, actrec.SelectionError, actrec.JoinError]
    keys: type[KeyError] = actrec.UnknownLayerError
    types: type[TypeError] = actrec.UnsupportedModelError
    runtime: list[type[RuntimeError]] = [actrec.TransformError, actrec.CaptureError]
    warning: type[UserWarning] = UnusedLayerWarning
    assert_type((errors, values, keys, types, runtime, warning), Any)  # type: ignore[assert-type]


def mistakes() -> None:
    record()  # type: ignore[call-arg]
    record("resnet50")  # type: ignore[arg-type]
    record(nn.Linear)  # type: ignore[arg-type]
    record(model, 3)  # type: ignore[arg-type]
    record(model, ["0", 3])  # type: ignore[list-item]
    record(model, "0", pooled)  # type: ignore[arg-type]
    record(model, layer="0")  # type: ignore[call-arg]
    record(model, transform=3)  # type: ignore[arg-type]
    record(model, dtype="float16")  # type: ignore[arg-type]
    record(model, device=1.5)  # type: ignore[arg-type]
    record(model, into=[])  # type: ignore[arg-type]
    record(model, into=3)  # type: ignore[arg-type]
    record(model, into="a", resume="yes")  # type: ignore[arg-type]
    actrec.load(3)  # type: ignore[arg-type]
    Folder("a", 1, 2, 3, 4)  # type: ignore[call-arg]
    record(model)["0"]  # type: ignore[index]
    with record(model) as acts:
        acts["0"] = []  # type: ignore[index]
        del acts["0"]  # type: ignore[attr-defined]
        acts.num_passes = 3  # type: ignore[misc]
        acts["0"].cat("0")  # type: ignore[arg-type]
        acts.add(3, batch)  # type: ignore[arg-type]
