"""Tensors of which each rank has a part: recorded without a word to the others, whole when they are read."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
from itertools import cycle, product
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import actrec
from actrec import (
    CaptureError,
    CorruptRecordingError,
    ResumeError,
    compare,
    load,
    record,
)
from actrec._selection.names import type_name
from actrec._values.spec import tensors
from actrec.reduce import Moments
from actrec.store import Folder
from actrec.store import dtensor as _parts
from actrec.store import rank as _rank
from actrec.store.decoding import decode
from actrec.store.dtensor import Spread
from actrec.store.encoding import encode
from actrec.store.format import Defect
from tests.damage import MUTATIONS, many_mutations, mutated, rewrite, use
from tests.ranked import (
    Communication,
    Same,
    as_rank,
    distributed,
    mesh_of,
    on_every_rank,
    parts_of,
    write,
)
from tests.stored import same
from tests.test_grads import process_group

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUM, AVG, MAX, MIN, PRODUCT = (("partial", how) for how in ("sum", "avg", "max", "min", "product"))
REPLICATE = ("replicate",)


def shard(dim: int) -> tuple[Any, ...]:
    return ("shard", dim)


# --- Made whole --------------------------------------------------------------------------------------


@st.composite
def spreads(draw: st.DrawFn) -> tuple[Spread, Tensor]:
    shape = draw(st.lists(st.integers(0, 7), min_size=0, max_size=3))
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    kinds = [st.just(REPLICATE), st.sampled_from([SUM, AVG, MAX, MIN, PRODUCT])]
    kinds += [st.integers(0, len(shape) - 1).map(shard)] if shape else []
    # One kind of reduction: the sum of maxima is not the maximum of sums.
    placements = draw(st.lists(st.one_of(kinds), min_size=len(mesh), max_size=len(mesh)))
    partial = next((p for p in placements if p[0] == "partial"), None)
    placements = [partial if p[0] == "partial" else p for p in placements]
    ranks = draw(st.permutations(range(math.prod(mesh))))
    whole = torch.randint(-9, 9, shape)
    return Spread(tuple(shape), tuple(placements), tuple(mesh), None, tuple(ranks)), whole  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(spreads())
def test_the_parts_of_a_tensor_make_the_tensor(case: tuple[Spread, Tensor]) -> None:
    found, whole = case
    parts = dict(zip(found.ranks, parts_of(whole, found.mesh, found.placements), strict=True))
    assert found.enough(parts)
    assert same(found.whole(parts, parts.__getitem__), whole)
    assert Spread.parsed(json.loads(json.dumps(found.node()))) == found


@settings(max_examples=200, deadline=None)
@given(spreads(), st.data())
def test_a_tensor_is_whole_if_of_every_part_there_is_a_replica(
    case: tuple[Spread, Tensor], data: st.DataObject
) -> None:
    found, whole = case
    parts = dict(zip(found.ranks, parts_of(whole, found.mesh, found.placements), strict=True))
    there = data.draw(st.sets(st.sampled_from(sorted(parts))))
    if found.enough(there):
        assert same(found.whole(there, parts.__getitem__), whole)
    else:
        with pytest.raises(Defect, match="make another one"):
            found.whole(there, parts.__getitem__)
    replicas = REPLICATE in found.placements and max(found.mesh) > 1
    assert replicas or found.enough(there) == (there == set(parts) or not parts)


def test_of_replicas_one_is_read() -> None:
    found = Spread((2,), (REPLICATE, shard(0)), (2, 2), ("dp", "tp"), (0, 1, 2, 3))
    read = []
    found.whole(range(4), lambda rank: read.append(rank) or torch.ones(1))  # type: ignore[func-returns-value]
    assert read == [0, 1]


# --- Recorded ----------------------------------------------------------------------------------------

SPREAD: dict[str, tuple[tuple[int, ...], list[tuple[Any, ...]]]] = {
    "rows": ((4,), [shard(0)]),
    "columns": ((4,), [shard(1)]),
    "replicas": ((4,), [REPLICATE]),
    "terms": ((4,), [SUM]),
    "means": ((4,), [AVG]),
    "rows of columns": ((2, 2), [shard(0), shard(1)]),
    "rows of rows": ((2, 2), [shard(0), shard(0)]),
    "replicas of rows": ((2, 2), [REPLICATE, shard(0)]),
    "rows of terms": ((2, 2), [shard(1), SUM]),
}


def spread_out(
    path: Path, values: list[Tensor], mesh: tuple[int, ...] = (4,), placements: Any = (("shard", 0),),
    *, missing: Any = (), wrap: Any = lambda t: t, **options: Any,
) -> None:  # fmt: skip
    """Record each value as a pass, in parts, on every rank."""
    torch.manual_seed(1)
    every = [parts_of(value, mesh, placements) for value in values]

    def work(rank: int) -> None:
        if rank in missing:
            return
        there = mesh_of(mesh)
        pairs = zip(values, every, strict=True)
        write(path, rank, math.prod(mesh), [wrap(distributed(parts[rank], value, there, placements)) for value, parts in pairs], **options)  # fmt: skip

    on_every_rank(math.prod(mesh), work)


@pytest.mark.parametrize("how", SPREAD)
def test_parts_are_recorded_as_they_are_and_read_as_a_whole(tmp_path: Path, how: str) -> None:
    mesh, placements = SPREAD[how]
    values = [torch.randint(-9, 9, (rows, 6)).float() for rows in (8, 5, 1)]
    spread_out(tmp_path / "r", values, mesh, placements)
    acts = load(tmp_path / "r")
    layer = acts["layer"]
    assert acts.complete
    assert (len(layer), layer.passes, layer.ranks) == (3, [0, 1, 2], [0, 0, 0])
    assert all(type(found) is Tensor for found in layer)
    assert all(same(*pair) for pair in zip(layer, values, strict=True))
    assert same(layer.cat(), torch.cat(values))
    assert acts.nbytes == layer.nbytes == sum(value.nbytes for value in values)
    assert repr(layer) == f"Layer 'layer' (Identity): 3 calls, (1-8, 6) float32, {layer.nbytes} B"
    torch.manual_seed(1)
    every = [parts_of(value, mesh, placements) for value in values]
    for rank in range(4):
        own = acts.rank(rank)["layer"]
        assert all(same(*pair) for pair in zip(own, (parts[rank] for parts in every), strict=True))
    assert actrec.verify(tmp_path / "r") == []


def test_parts_of_a_unit_belong_together_whatever_the_numbers_of_its_passes_are(
    tmp_path: Path,
) -> None:
    values = {key: torch.randn(4, 3) for key in ("a", "b", "c")}
    every = {key: parts_of(value, (2,), (("shard", 0),)) for key, value in values.items()}

    def work(rank: int) -> None:
        model, there = Same(), mesh_of((2,))
        into = Folder(tmp_path / "r", rank=rank, world_size=2, run="of the test")
        with record(model, "layer", into=into) as acts:
            for key in ("a", "b", "c") if rank else ("b", "c", "a"):
                part = distributed(every[key][rank], values[key], there, (("shard", 0),))
                if rank:  # where each unit has failed once
                    with contextlib.suppress(MemoryError), acts.unit(key):
                        raise MemoryError
                with acts.unit(key):
                    model(part)

    on_every_rank(2, work)
    acts = load(tmp_path / "r")
    assert acts.complete
    assert sorted(acts["layer"].units) == ["a", "b", "c"]
    for found in (acts, saved(acts, tmp_path / "saved")):
        assert sorted(found.units) == sorted(values) or found is acts
        for key, value in zip(found["layer"].units, found["layer"], strict=True):
            assert same(value, values[key])


def saved(acts: Any, path: Path) -> Any:
    acts.save(path)
    return load(path)


@pytest.mark.parametrize(
    ("shape", "mesh", "placements"),
    [
        ((7, 3), (4,), [Shard(0)]), ((2, 3), (4,), [Shard(0)]), ((3, 10), (2, 2), [Shard(1), Shard(1)]),
        ((5, 5), (2, 2), [Shard(1), Shard(0)]), ((5, 1), (4,), [Shard(-1)]), ((9,), (2, 2), [Replicate(), Shard(0)]),
    ],
)  # fmt: skip
def test_a_tensor_is_cut_where_pytorch_cuts_it(shape: Any, mesh: Any, placements: Any) -> None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole = torch.arange(math.prod(shape)).reshape(shape)
    found, parts = [], {}
    for rank in range(4):
        with as_rank(rank, 4):
            there = mesh_of(mesh)
            sizes, offsets = compute_local_shape_and_global_offset(shape, there, placements)
            part = whole
            for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
                part = part.narrow(dim, offset if size else 0, size)
            parts[rank] = part.clone()
            tensor = DTensor.from_local(part, there, placements, run_check=False, shape=whole.shape, stride=whole.stride())  # fmt: skip
            found.append(_parts.spread(tensor))
    assert len(set(found)) == 1
    assert same(found[0].whole(parts, parts.__getitem__), whole)


def test_parts_in_a_nested_value_are_made_whole_there(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    spread_out(tmp_path / "r", [whole], wrap=lambda t: {"twice": [t, t], "plain": (torch.ones(2), 3)})  # fmt: skip
    acts = load(tmp_path / "r")
    (value,) = acts["layer"]
    assert same(value["twice"][0], whole)
    assert value["twice"][0] is value["twice"][1]
    assert same(value["plain"], (torch.ones(2), 3))
    assert acts["layer"].nbytes == whole.nbytes + 8
    assert (
        repr(acts["layer"])
        == "Layer 'layer' (Identity): 1 call, {twice: [(6, 4) x 2], plain: ((2,), int)} float32, 104 B"
    )
    assert same(acts.rank(1)["layer"][0]["twice"][1], whole[2:4])


def test_everything_that_can_be_done_with_a_layer_can_be_done_with_a_whole_one(
    tmp_path: Path,
) -> None:
    values = list(torch.randn(3, 8, 6))
    spread_out(tmp_path / "r", values, inputs=True)
    acts = load(tmp_path / "r")
    model = Same()
    with record(model, "layer", inputs=True) as memory:
        for value in values:
            model(value)
    assert acts.stats() == memory.stats()
    assert all(row.max_abs == 0 for row in compare(memory, acts))
    assert repr(acts).splitlines()[1:] == repr(memory).splitlines()[1:]
    layer = acts["layer"]
    assert same(layer.stack(), torch.stack(values))
    assert same(layer.cat(1), torch.cat(values, 1))
    assert same(layer.cat(release=True), torch.cat(values))
    assert same(layer[-1], values[-1])
    assert same(layer[1:], values[1:])
    assert same(acts.inputs["layer"][2]["input"], values[2])
    assert acts.inputs["layer"].cat()["input"].shape == (24, 6)  # type: ignore[index]
    with pytest.raises(IndexError, match=r"acts\['layer'\]\[3\]: there are 3 calls"):
        layer[3]
    for refuse in (layer.clear, lambda: layer._keep(values[0], 0)):
        with pytest.raises(actrec.ActrecError, match="which can only be read"):
            refuse()
    acts.save(tmp_path / "whole")
    assert same(list(load(tmp_path / "whole")["layer"]), values)
    acts.rank(1).save(tmp_path / "part")
    assert same(load(tmp_path / "part")["layer"][0], values[0][2:4])


def test_rows_of_tensors_in_parts_are_rows_of_the_whole_and_made_when_they_are_asked_for(
    tmp_path: Path,
) -> None:
    from actrec.data import rows, shuffled

    values = list(torch.randn(3, 8, 6))
    spread_out(tmp_path / "r", values, wrap=lambda t: [t, 7])
    acts = load(tmp_path / "r")
    with mock.patch.object(Spread, "whole", side_effect=AssertionError("it was read")):
        dataset = rows(acts, ("layer", 0))
    assert len(dataset) == 24
    assert same(dataset[[0, 9, 23]], torch.cat(values)[[0, 9, 23]])
    again = pickle.loads(pickle.dumps(dataset))
    assert same(again[:], torch.cat(values))
    batches = shuffled(acts, ("layer", 0), batch_size=5, buffer=200)
    found = torch.cat(list(batches))
    assert sorted(found.tolist()) == sorted(torch.cat(values).tolist())
    with pytest.raises(ResumeError):
        shuffled(acts.rank(1), ("layer", 0), batch_size=5).load_state_dict(batches.state_dict())


def test_parts_are_told_apart_though_their_shards_are_closed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rank, "_MOST_BYTES", 1)
    values = [torch.arange(24.0).reshape(6, 4) + number for number in range(12)]
    wraps = cycle([lambda t: t, lambda t: [t, 1], lambda t: [torch.ones(2), t]])

    def wrap(tensor: Tensor) -> Any:
        return next(wraps)(tensor)

    spread_out(tmp_path / "r", values, wrap=wrap, folder={"shard_bytes": 1})
    acts = load(tmp_path / "r")
    assert acts._ranks[0].count > 2
    assert acts.complete
    layer = acts["layer"]
    assert layer.passes == list(range(12))
    for number, whole in enumerate(values):
        expected = [whole, [whole, 1], [torch.ones(2), whole]][number % 3]
        assert same(layer[number], expected)
    kinds = [spec.kind for spec, _ in layer.outlines()]
    assert kinds == ["", "list of 2", "list of 2"] * 4


def test_several_calls_in_a_pass_are_matched_in_their_order(tmp_path: Path) -> None:
    one, two = torch.ones(4, 1), torch.full((4, 1), 2.0)
    parts = [parts_of(t, (2,), [shard(0)]) for t in (one, two)]

    def work(rank: int) -> None:
        a, b = (distributed(p[rank], one, mesh_of((2,)), [shard(0)]) for p in parts)
        write(tmp_path / "r", rank, 2, [(a, b), torch.full((1,), rank), (b, a)])

    on_every_rank(2, work)
    layer = load(tmp_path / "r")["layer"]
    assert layer.passes == [0, 0, 1, 1, 2, 2]
    assert layer.ranks == [0, 0, 0, 1, 0, 0]
    found = [value.flatten().tolist() for value in layer]
    assert found == [[1] * 4, [2] * 4, [0], [1], [2] * 4, [1] * 4]


def test_each_row_of_a_grid_of_ranks_has_passes_of_its_own(tmp_path: Path) -> None:
    whole = torch.ones(4, 1)

    def work(rank: int) -> None:
        mesh = mesh_of((2, 2), ("dp", "tp"))["tp"]
        write(tmp_path / "r", rank, 4, [distributed(whole[:2], whole, mesh, [shard(0)])] * 3)

    on_every_rank(4, work)
    acts = load(tmp_path / "r")
    assert acts["layer"].ranks == [0, 2, 0, 2, 0, 2]
    assert "per pass" not in repr(acts)


def test_calls_of_which_parts_are_missing_are_left_out_and_the_recording_says_so(
    tmp_path: Path,
) -> None:
    whole = torch.arange(8.0)
    spread_out(tmp_path / "r", [whole, whole], (2, 2), [shard(0), REPLICATE], missing=[1])
    acts = load(tmp_path / "r")
    assert acts["layer"].ranks == [0, 0], "rank 0 has what rank 1 had"
    assert same(acts["layer"][1], whole)
    assert repr(acts).startswith(
        "stored Same (incomplete: rank 1 wrote nothing): 1 layer, 2 passes"
    )

    spread_out(tmp_path / "s", [whole, whole], (2, 2), [shard(0), REPLICATE], missing=[2, 3])
    acts = load(tmp_path / "s")
    assert (len(acts["layer"]), acts["layer"].passes, acts.num_passes) == (0, [], 2)
    assert "ranks 2 and 3 wrote nothing; 2 calls left out, with missing parts" in repr(acts)
    assert same(acts.rank(1)["layer"][0], whole[:4])


def test_a_rank_with_fewer_passes_makes_a_recording_incomplete(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    parts = parts_of(whole, (2,), [shard(0)])

    def work(rank: int) -> None:
        part = distributed(parts[rank], whole, mesh_of((2,)), [shard(0)])
        write(tmp_path / "r", rank, 2, [part] * (rank + 1))

    on_every_rank(2, work)
    acts = load(tmp_path / "r")
    assert all(info.complete for info in acts.ranks)
    assert not acts.complete
    assert repr(acts).startswith("stored Same (incomplete: 1 call left out, with missing parts): ")
    assert len(acts["layer"]) == 1


def test_in_memory_a_dtensor_stays_one_of_its_own_and_cannot_be_saved(tmp_path: Path) -> None:
    with as_rank(1, 2):
        part = torch.ones(2, 3)
        value = distributed(part, torch.ones(4, 3), mesh_of((2,)), [shard(0)])
        model = Same()
        with record(model, "layer") as acts:
            model(value)
            value.add_(1)
            model(DTensor.from_local(part, mesh_of((2,)), [Odd("sum")], run_check=False))
        with record(model, "layer", dtype=torch.float16) as cast:
            model(DTensor.from_local(part, mesh_of((2,)), [Odd("sum")], run_check=False))
        kept, odd = acts["layer"]
        assert type(kept) is DTensor
        assert kept.placements == (Shard(0),)
        assert type(odd.placements[0]) is type(cast["layer"][0].placements[0]) is Odd
        assert cast["layer"][0].dtype == torch.float16
        assert same(kept.to_local(), torch.ones(2, 3))
        with pytest.raises(CaptureError, match=r"save\(\): call 0 of 'layer' .* a DTensor cannot be stored"):  # fmt: skip
            acts.save(tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_nothing_is_communicated_when_a_part_is_recorded(tmp_path: Path) -> None:
    with as_rank(1, 2):
        mesh = mesh_of((2,))
        values = [
            distributed(part, torch.ones(4, 3), mesh, placements)
            for part, placements in (
                (torch.ones(2, 3), [shard(0)]),
                (torch.ones(4, 3), [SUM]),
                (torch.ones(1, 3).expand(2, 3), [shard(0)]),
            )
        ]
        whole = DTensor.from_local(torch.ones(1, 1), mesh, [Replicate()], run_check=False)
        values.append(whole.expand(4, 3))
        values = [value.detach().requires_grad_() for value in values]
        model = Same()
        every = [{}, {"dtype": torch.float16}, {"detach": False}, {"into": tmp_path / "r"}, {"transform": lambda t: t}]  # fmt: skip
        for options in every:
            with Communication() as communication, record(model, "layer", **options) as acts:
                for value in values:
                    model(value)
            assert communication.heard == [], options
            assert len(acts["layer"]) == 4
        with Communication() as communication:
            values[1].full_tensor()
        assert communication.heard, "as it would be if there were any"


def test_what_is_on_its_way_is_waited_for(tmp_path: Path) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

    with as_rank(0, 2):
        mesh = mesh_of((2,))
        arriving = all_reduce(torch.ones(2, 3), "sum", mesh)
        assert type(arriving) is AsyncCollectiveTensor
        part = DTensor.from_local(arriving, mesh, [Shard(0)], run_check=False)
        acts = write(tmp_path / "r", 0, 2, [(arriving, part)])
        assert type(_parts.local(part)) is Tensor
        model = Same()
        with record(model, "layer") as memory:
            model(arriving)
        assert type(memory["layer"][0]) is Tensor
    assert same(list(acts["layer"]), [torch.ones(2, 3)] * 2)


# --- Refused -----------------------------------------------------------------------------------------


class Odd(Partial):  # type: ignore[misc]
    pass


def test_what_the_format_has_no_words_for_is_refused_when_it_is_recorded(tmp_path: Path) -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    model = Same()
    with as_rank(0, 4):
        mesh = mesh_of((2, 2))
        for number, placements in enumerate([
            [_StridedShard(0, split_factor=2), Replicate()], [Odd("sum"), Replicate()], [Partial("band"), Replicate()],
        ]):  # fmt: skip
            value = DTensor.from_local(torch.ones(2, 2), mesh, placements, run_check=False)
            with (
                pytest.raises(
                    CaptureError,
                    match=r"DTensor .* cannot be stored. Let a transform redistribute it",
                ),  # fmt: skip
                record(model, "layer", into=tmp_path / str(number)),
            ):
                model(value)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"transform": lambda t: t}])
def test_a_tensor_that_is_sharded_out_of_order_is_refused(options: dict[str, Any]) -> None:
    class Entry:
        mesh_dims = (1, 0)

    class Spec:
        shard_order = (Entry(),)

        def __init__(self, spec: Any) -> None:
            self.spec = spec

        def __getattr__(self, name: str) -> Any:
            return getattr(self.spec, name)

    model = Same()
    with as_rank(0, 4):
        value = DTensor.from_local(torch.ones(2), mesh_of((2, 2)), [Shard(0), Shard(0)], run_check=False)  # fmt: skip
        with record(model, "layer", **options):
            model(value)
        value._spec = Spec(value._spec)
        with (
            pytest.raises(CaptureError, match="sharded in another order than that of its mesh"),
            record(model, "layer", **options),
        ):
            model(value)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"transform": lambda t: t}])
def test_an_operator_of_a_dtensor_that_would_communicate_is_never_called(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch 2.14 adds up an embedding's _MaskPartial in detach(), 2.13 every Partial in clone().
    def communicates(*_: object, **__: object) -> None:
        pytest.fail("this may communicate")

    model = Same()
    with as_rank(1, 2):
        value = DTensor.from_local(torch.ones(2), mesh_of((2,)), [Partial()], run_check=False)
        for name in ("clone", "detach", "to"):
            monkeypatch.setattr(DTensor, name, communicates)
        with record(model, "layer", **options) as acts:
            model(value)
    assert acts["layer"][0].placements == (Partial(),)


def test_tensors_of_one_value_on_different_ranks_are_refused(tmp_path: Path) -> None:
    model = Same()
    with as_rank(0, 4):
        meshes = mesh_of((2, 2), ("dp", "tp"))
        value = [DTensor.from_local(torch.ones(2), m, [Shard(0)], run_check=False) for m in (meshes["dp"], meshes["tp"])]  # fmt: skip
        assert _parts.spread(value[0]).names == ("dp",)
        assert _parts.spread(value[1]).ranks == (0, 1)
        with (
            pytest.raises(CaptureError, match="spread over different ranks"),
            record(model, "layer", into=tmp_path / "r"),
        ):
            model(value)


# --- Damaged -----------------------------------------------------------------------------------------

NODE = {
    "dtensor": 0, "shape": [4, 3], "placements": [["shard", 0]], "mesh": [2], "names": ["tp"], "ranks": [0, 1]
}  # fmt: skip

HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"dtensor": -1}, "the number of a tensor is -1"),
    ({"dtensor": 7}, "a value does not use all of its tensors"),
    ({"shape": 3}, "a tensor in parts.shape is 3"),
    ({"shape": [-1]}, "a tensor in parts.shape[0] is -1"),
    ({"shape": [1 << 40, 1 << 40]}, "a tensor in parts has an impossible shape"),
    ({"shape": None}, "a tensor in parts has no 'shape'"),
    ({"placements": [["shard", 2]]}, "the unknown placement ['shard', 2]"),
    ({"placements": [["shard"]]}, "the unknown placement ['shard']"),
    ({"placements": [["partial", "xor"]]}, "the unknown placement ['partial', 'xor']"),
    ({"placements": [["partial", ["sum"]]]}, "the unknown placement ['partial', ['sum']]"),
    ({"placements": [3]}, "the unknown placement 3"),
    ({"placements": []}, "a mesh needs as many placements as dimensions"),
    ({"names": []}, "a mesh needs as many names as dimensions"),
    ({"names": [3]}, "names[0] is 3"),
    ({"mesh": [3]}, "a mesh does not have as many different ranks as its shape says"),
    (
        {"mesh": [2, *[1] * 5000], "placements": [["replicate"]] * 5001, "names": ["x"] * 5001},
        "a mesh has 5001 dimensions",
    ),
    ({"ranks": [1, 1]}, "a mesh does not have as many different ranks as its shape says"),
    ({"ranks": [0, 10**6]}, "a mesh has a rank 1000000"),
    ({"shape": [5, 3]}, "the parts of a tensor of shape [5, 3] make another one"),
    ({"placements": [["shard", 1]]}, "the parts of a tensor of shape [4, 3] make another one"),
]


def rewritten(path: Path, change: Any) -> None:
    for file in path.rglob("*.safetensors"):
        rewrite(file, change)


def _group(about: dict[str, Any]) -> dict[str, Any]:
    """The first group of the first layer."""
    return about["layers"][0]["groups"][0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("halves") / "r"
    spread_out(path, [torch.arange(12.0).reshape(4, 3)], (2,))
    return path


@pytest.mark.parametrize(
    ("change", "told"), HOSTILE, ids=[str(change)[:60] for change, _ in HOSTILE]
)
def test_what_a_hostile_file_says_of_parts_is_checked(
    halves: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    path = shutil.copytree(halves, tmp_path / "r")
    node = {key: value for key, value in (NODE | change).items() if value is not None}
    rewritten(path, lambda about: _group(about).update(structure=node))
    with pytest.raises(CorruptRecordingError, match="safetensors is damaged: ") as caught:
        list(load(path)["layer"])
    assert told in str(caught.value)
    assert any(told in problem for problem in actrec.verify(path))
    if "make another" not in told:
        with pytest.raises(CorruptRecordingError):
            load(path, rank=0)["layer"][0]


def test_parts_of_different_dtypes_or_shapes_are_refused() -> None:
    parts = [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 2)]
    found = Spread((4, 3), (shard(0),), (2,), None, (0, 1))
    for one, other, told in ((0, 1, "are of different dtypes"), (0, 2, "do not fit together")):
        both = [parts[one], parts[other]]
        with pytest.raises(Defect, match=told):
            found.whole((0, 1), both.__getitem__)


@many_mutations
@given(MUTATIONS)
def test_mutated_descriptions_of_parts_never_crash(
    halves: Path, tmp_path: Path, mutations: list[tuple[str, int, int]]
) -> None:
    path = tmp_path / "r"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(halves, path)
    with contextlib.suppress(ValueError, RecursionError):  # else it is no JSON, which others try
        node = json.loads(mutated(json.dumps(NODE).encode(), mutations, 200))
        rewritten(path, lambda about: _group(about).update(structure=node))
    use(path)
    actrec.verify(path)


def test_text_that_looks_like_a_part_is_text(tmp_path: Path) -> None:
    write(tmp_path / "r", 0, 1, [{'"dtensor":': '{"dtensor":0}', "dtensor": torch.ones(1)}])
    layer = load(tmp_path / "r")["layer"]
    assert type(layer).__name__ == "StoredLayer"
    assert same(layer[0], {'"dtensor":': '{"dtensor":0}', "dtensor": torch.ones(1)})


def test_a_value_without_parts_is_decoded_as_ever() -> None:
    structure, found = encode((torch.ones(2), 1), parts=True)
    assert same(decode(structure).spec.fill(found), (torch.ones(2), 1))
    (local,) = tensors(decode(json.dumps(NODE)).spec.fill([torch.ones(2)]))
    assert local.shape == (2,)


# --- Wrapped models ----------------------------------------------------------------------------------


def test_a_sharded_module_has_the_type_that_its_author_gave_it(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    plain = type_name(model), type_name(model[0])
    with as_rank(0, 1):
        fully_shard(model[0])
        fully_shard(model)
        assert type(model[0]).__name__ == "FSDPLinear"
        with record(model, nn.Linear, into=tmp_path / "r") as acts:
            model(torch.ones(2, 4))
    assert plain == (type_name(model), type_name(model[0])) == ("Sequential", "Linear")
    assert repr(acts).startswith("recorded Sequential: 1 layer")
    assert acts["0"].type == load(tmp_path / "r")["0"].type == "Linear"


class Weight(nn.Module):
    """Returns its weight, or something that lies in the memory of it."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.how = how

    def forward(self) -> Tensor:
        return self.how(self.weight)


class Gathered(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.layer = Weight(how), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.weight()


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (lambda w: w, {}),
        (lambda w: w, {"transform": torch.neg}),
        (Tensor.t, {"detach": False}),
        (Tensor.detach, {}),
    ],
)
@pytest.mark.parametrize("part", [False, True])
def test_a_gathered_weight_that_a_layer_returns_is_recorded_and_training_goes_on(
    how: Callable[[Tensor], Tensor], options: dict[str, Any], part: bool
) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(Gathered(how), Gathered(how))
    weight = model[0].weight.weight.detach().clone()
    x = torch.ones(2, 4)
    expected = model(x)
    with process_group():
        for block in model:
            fully_shard(block)
        fully_shard(model)
        recorded, name = (model[0].weight, "") if part else (model, "0.weight")
        with record(recorded, name, **options) as acts:
            outputs = [model(x) for _ in range(3)]
            outputs[-1].sum().backward()
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(acts[name]) == 3
    for value in acts[name]:
        assert torch.equal(value, how(-weight if "transform" in options else weight))


def test_a_weight_that_fsdp_has_freed_already_cannot_be_kept() -> None:
    from torch.distributed.fsdp import fully_shard

    class Idle(Gathered):
        def forward(self, x: Tensor) -> Tensor:
            self.weight()
            return self.layer(x)

    model = Idle(lambda w: w)
    with process_group():
        fully_shard(model.weight)
        fully_shard(model)
        with pytest.raises(CaptureError, match="its memory is freed"), record(model, "weight"):
            model(torch.ones(2, 4))


def test_every_way_to_spread_is_tested() -> None:
    both = {p for _, placements in SPREAD.values() for p in placements}
    assert {kind for kind, *_ in both} == {"shard", "replicate", "partial"}
    assert len(list(product([1], SPREAD))) == 9


# --- In memory ------------------------------------------------------------------------------------------


def test_in_memory_statistics_and_views_are_of_the_part_of_this_rank() -> None:
    with as_rank(1, 2):
        mesh, model = mesh_of((2,)), Same()
        part = torch.arange(64.0).view(2, 1, 4, 8)
        value = distributed(part, torch.ones(2, 1, 8, 8), mesh, [shard(2)])
        with record(model, "layer") as acts:
            model(value)
        said = Communication()
        with said:
            (row,) = acts.stats()
            acts["layer"]._repr_html_()
            assert compare(acts, acts).equal
            actrec.plot.distributions(acts)
        assert (row.count, row.min, row.max, row.shape) == (64, 0, 63, "(2, 1, 8, 8)")
        for asks in (
            lambda: actrec.data.rows(acts, "layer"),
            lambda: actrec.plot.feature_maps(acts["layer"]),
            lambda: actrec.plot.similarity(acts),
        ):
            with pytest.raises(actrec.ActrecError, match=r"DTensor|samples"):
                asks()
        assert said.heard == []


def test_parts_of_sums_are_no_elements() -> None:
    with as_rank(0, 2):
        model = Same()
        value = DTensor.from_local(torch.ones(2, 3), mesh_of((2,)), [Partial()], run_check=False)
        with record(model, "layer") as acts:
            model(value)
        assert not acts.stats()[0].count


def test_a_reduction_refuses_what_each_rank_has_a_part_of() -> None:
    with as_rank(0, 2):
        model = Same()
        value = DTensor.from_local(torch.ones(2, 3), mesh_of((2,)), [Shard(0)], run_check=False)
        with (
            pytest.raises(CaptureError, match=r"'layer'.*DTensor.*to_local\(\)"),
            record(model, "layer", into=Moments),
        ):
            model(value)
        with record(model, {"layer": (DTensor.to_local, Moments())}) as acts:
            model(value)
        assert acts["layer"].compute()["count"] == 2
