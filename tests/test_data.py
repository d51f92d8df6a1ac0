"""``actrec.data``: rows by number are those of ``cat()``, and shuffled ones come each exactly once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import actrec
from actrec import (
    AlignmentError,
    CorruptRecordingError,
    OptionError,
    ResumeError,
    load,
    record,
)
from actrec.data import Shuffled, rows, shuffled
from actrec.data import kept as _kept
from actrec.data import shuffling as _shuffled
from actrec.data import sources as _sources
from actrec.data import window as _window
from actrec.data.ahead import ahead
from actrec.data.sources import Files
from actrec.store import Folder
from actrec.store import disk as _disk
from tests.stored import Operations, same

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MIB = 2**20
WIDTH = 3


class Ready(nn.Module):
    """Its layers return what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Identity()
        self.pooled = nn.Identity()

    def forward(self, x: Tensor) -> None:
        self.hidden(x)
        self.pooled(x[:, 0].half())


def made(sizes: Sequence[tuple[int, int]], into: Any = list) -> Any:
    """A recording of calls of (samples, tokens), in which every number occurs once."""
    model, samples, places = Ready(), 0, 0
    with torch.no_grad(), record(model, ["hidden", "pooled"], into=into) as acts:
        for many, tokens in sizes:
            count = many * tokens
            ids = torch.arange(places, places + count).view(many, tokens)
            model(ids[..., None] + torch.arange(WIDTH) / WIDTH)
            acts.add("label", torch.arange(samples, samples + many))
            acts.add("id", ids)
            acts.add("mask", (ids % 3 > 0) & (ids % 7 < 5))
            samples, places = samples + many, places + count
    return acts


EVEN = [(5, 4)] * 7
UNEVEN = [(5, 4), (3, 4), (0, 4), (1, 4), (9, 4), (1, 4), (16, 4), (2, 4)]
RAGGED = [(5, 4), (3, 7), (3, 2), (8, 1), (2, 7), (4, 3), (6, 7)]


class Case(NamedTuple):
    """A recording in memory, and what is to be read."""

    memory: Any
    acts: Any


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Recordings in memory, of one shard, of many, and of two ranks."""
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for name, sizes in (("even", EVEN), ("uneven", UNEVEN), ("ragged", RAGGED)):
        memory = made(sizes)
        found[f"{name}, in memory"] = Case(memory, memory)
        for shards, size in (("one shard", MIB), ("shards", 30_000)):
            path = folder / f"{name} {shards}"
            made(sizes, Folder(path, shard_bytes=size))
            found[f"{name}, {shards}"] = Case(memory, load(path))
    found["ranks"] = of_ranks(folder)
    return found


def of_ranks(folder: Path) -> Case:
    """The same as if two ranks had recorded it."""
    path = folder / "ranks"
    for rank in range(2):
        made(UNEVEN, Folder(path, shard_bytes=30_000, rank=rank, world_size=2, run="one"))
    return Case(made(UNEVEN), load(path))


NAMES = [
    f"{sizes}, {where}"
    for sizes in ("even", "uneven", "ragged")
    for where in ("in memory", "one shard", "shards")
]
WHOLE = [name for name in NAMES if "ragged" not in name]  # rows of all calls have one shape
names = st.sampled_from(NAMES)


def flat(acts: Any, layer: str, *, masked: bool = False) -> Tensor:
    """All rows of a flattened layer, made in another way."""
    columns = []
    for call in range(len(acts["id"])):
        ids, value = acts["id"][call], acts[layer][call]
        if layer == "hidden":
            value = value.reshape(-1, WIDTH)
        elif layer == "pooled":
            value = value.repeat_interleave(ids.shape[1], 0)
        else:
            value = (value if value.dim() > 1 else value[:, None]).expand(ids.shape).reshape(-1)
        columns.append(value[acts["mask"][call].reshape(-1)] if masked else value)
    return torch.cat(columns)


# --- rows() ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WHOLE, "ranks"])
def test_row_i_is_row_i_of_all_calls_joined(cases: Any, name: str) -> None:
    acts = cases[name].acts
    for layer in ("hidden", "pooled", "label", "mask"):
        whole, dataset = acts[layer].cat(), rows(acts, layer)
        assert len(dataset) == len(whole)
        assert same(torch.stack([dataset[i] for i in range(len(dataset))]), whole)
        assert same(dataset[:], whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_flattened_rows_are_those_of_every_position(cases: Any, name: str, masked: bool) -> None:
    memory, acts = cases[name]
    layers = ["hidden", "label", "id", "pooled"]
    dataset = rows(acts, *layers, flatten=True, mask="mask" if masked else None)
    for found, layer in zip(dataset[:], layers, strict=True):
        assert same(found, flat(memory, layer, masked=masked))


@given(name=names, masked=st.booleans(), data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_rows_are_those_of_all_rows(cases: Any, name: str, masked: bool, data: Any) -> None:
    dataset = rows(
        cases[name].acts, "hidden", "label", flatten=True, mask="mask" if masked else None
    )
    whole, many = dataset[:], len(dataset)
    indices = data.draw(st.lists(st.integers(-many, many - 1), max_size=20))
    cut = data.draw(st.slices(many))
    for column, part in enumerate(whole):
        assert same(dataset[indices][column], part[torch.tensor(indices, dtype=torch.int64)])
        assert same(dataset[torch.tensor(indices, dtype=torch.int64)][column], part[indices])
        assert same(dataset[cut][column], part[list(range(many))[cut]])
    fetched = dataset.__getitems__(indices)
    assert len(fetched) == len(indices)
    assert all(same(row, dataset[i]) for row, i in zip(fetched, indices, strict=True))


def test_rows_are_copies(cases: Any) -> None:
    for name in ("even, in memory", "even, shards"):
        dataset = rows(cases[name].acts, "label", "hidden")
        for rows_of in (dataset[3:5], dataset[[3, 4]], dataset[3]):
            for tensor in rows_of:
                tensor.zero_()
        assert dataset[3][0] == 3
        assert dataset[3][1].any()
        assert dataset[3][1].untyped_storage().nbytes() == 3 * 4 * 4


def test_a_number_too_many_is_an_index_error_so_that_iterating_ends(cases: Any) -> None:
    dataset = rows(cases["even, in memory"].acts, "label")
    assert [int(row) for row in dataset] == list(range(35))
    for index in (35, -36, [0, 35]):
        with pytest.raises(IndexError, match="there are 35 rows"):
            dataset[index]
    wanted = torch.zeros(35, dtype=torch.bool)
    wanted[[3, 9]] = True
    for mask in (wanted, wanted.numpy(), wanted.tolist()):
        assert dataset[mask].tolist() == [3, 9]
        with pytest.raises(IndexError, match="the mask has 34 elements, and there are 35 rows"):
            dataset[mask[:34]]
    for index in (2.7, [0.0, 1.5], torch.tensor([1.5]), "label", None, [None]):
        with pytest.raises(TypeError, match="rows are numbered by integers"):
            dataset[index]
    assert dataset[np.int64(3)] == dataset[torch.tensor(3)] == 3
    assert dataset[[]].shape == (0,)
    assert repr(dataset) == "35 rows of 'label' () int64"


def test_a_loader_fetches_batches_of_rows(cases: Any) -> None:
    dataset = rows(cases["uneven, shards"].acts, "hidden", "label")
    label = cases["uneven, shards"].memory["label"].cat()
    batches = list(DataLoader(dataset, batch_size=8, shuffle=True))
    assert torch.cat([batch[1] for batch in batches]).sort()[0].equal(label)
    assert all(hidden[:, 0, 0].equal(label.float() * 4) for hidden, label in batches)
    sampler = BatchSampler(RandomSampler(dataset), 8, drop_last=False)
    ready = list(DataLoader(dataset, batch_size=None, sampler=sampler))
    assert torch.cat([batch[1] for batch in ready]).sort()[0].equal(label)


def test_a_stored_dataset_is_small_when_it_is_sent(tmp_path: Path) -> None:
    made([(10, 10)] * 200, tmp_path / "r")
    acts = load(tmp_path / "r")
    by_number = rows(acts, "hidden", "id", flatten=True)
    by_number[[0, 1]]
    batches = shuffled(acts, "hidden", batch_size=4)
    next(iter(batches))
    for dataset in (by_number, batches):
        assert len(pickle.dumps(dataset)) < 8000
    again = pickle.loads(pickle.dumps(rows(acts, "hidden", flatten=True)))
    assert same(again[:], flat(acts, "hidden"))


# --- Which layers ------------------------------------------------------------------------------------


def test_a_tuple_says_which_tensor_of_a_value(tmp_path: Path) -> None:
    recordings: list[Any] = []
    for into in (list, tmp_path / "r"):
        torch.manual_seed(0)
        net = nn.LSTM(4, WIDTH)
        with record(net, "", inputs=True, into=into) as acts:
            for _ in range(3):
                net(torch.randn(5, 2, 4))
        recordings.append(acts)
    for acts in (*recordings, load(tmp_path / "r")):
        dataset = rows(acts, ("", 0), (acts.inputs[""], "input"))
        assert same(dataset[:][0], torch.cat([value[0] for value in recordings[0][""]]))
        assert same(dataset[:][1], torch.cat([v["input"] for v in recordings[0].inputs[""]]))
        for wrong in (("", 2), ("", "h"), ("", 0, "x")):
            with pytest.raises(AlignmentError, match=r"has no \["):
                rows(acts, wrong)
        with pytest.raises(
            AlignmentError,
            match=r"of '' is tuple of 2, and rows are cut out of plain tensors. Name what is in it",
        ):
            rows(acts, "")


def test_calls_of_several_structures_keep_their_order(tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=tmp_path / "r") as acts:
        for number in range(6):
            value = torch.full((2, 3), float(number))
            model((value, value) if number % 3 else (value,))
    for found in (acts, load(tmp_path / "r")):
        dataset = rows(found, ("", 0))
        assert dataset[:][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert same(dataset[[9, 1, 4]], dataset[:][[9, 1, 4]])


def test_what_is_expanded_has_all_its_rows(tmp_path: Path) -> None:
    def expanded(module: Any, args: Any, output: Tensor) -> Tensor:
        return output[:, :, :1].expand(2, 3, 4)

    model = nn.Identity()
    model.register_forward_hook(expanded)
    value = torch.arange(24.0).view(2, 3, 4)
    with record(model, "", into=tmp_path / "r"):
        model(value)
        model(value + 100)
    acts = load(tmp_path / "r")
    assert same(rows(acts, "")[:], acts[""].cat())
    dataset = rows(acts, "", flatten=True)
    assert same(dataset[:], acts[""].cat().reshape(-1, 4))
    assert same(dataset[[11, 0]], dataset[:][[11, 0]])
    batches = list(shuffled(acts, "", flatten=True, batch_size=5))
    assert same(torch.cat(batches)[:, 0].sort()[0], dataset[:][:, 0])


def test_values_of_any_dtype_and_order_in_memory_come_as_they_are() -> None:
    values = [
        torch.randn(4, 6).t(),
        torch.randn(6, 2, dtype=torch.complex64).conj(),
        torch.randn(6, 1).to(torch.float8_e5m2),
        torch.randn(6, 0),
        torch.arange(6).to(torch.uint16),
        torch.randn(6, requires_grad=True),
        torch.randn(6).as_strided((6, 1), (1, 0)),
    ]
    model = nn.Identity()
    for value in values:
        with record(model, "", detach=not value.requires_grad) as acts:
            model(value)
            model(value)
        both = [value.detach().resolve_conj()] * 2
        assert same(rows(acts, "")[:], torch.cat(both))
        assert same(rows(acts, "")[[7, 2]], torch.stack([both[0][1], both[0][2]]))
        batches = list(shuffled(acts, "", batch_size=5))
        assert [batch.dtype for batch in batches] == [value.dtype] * 3
        assert [len(batch) for batch in batches] == [5, 5, 2]


def test_a_tensor_that_stands_for_two_calls_has_its_rows_twice() -> None:
    acts = made(EVEN)
    acts["label"][3] = acts["label"][2]
    expected = acts["label"].cat()
    assert same(rows(acts, "label")[:], expected)
    (batch,) = list(shuffled(acts, "label", batch_size=35))
    assert same(batch.sort()[0], expected.sort()[0])


def test_rows_without_width_are_rows(tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=tmp_path / "r") as acts:
        model(torch.randn(6, 0))
        acts.add("label", torch.arange(6))
    dataset = rows(acts, "", "label")
    assert [part.shape for part in dataset[:]] == [(6, 0), (6,)]
    assert [part.shape for part in dataset[[3, 1]]] == [(2, 0), (2,)]
    batches = list(shuffled(acts, "", "label", batch_size=4))
    assert [batch[0].shape for batch in batches] == [(4, 0), (2, 0)]


def test_flattened_rows_without_width_are_as_many_as_positions(tmp_path: Path) -> None:
    for into in (list, tmp_path / "r"):
        model = nn.Identity()
        with record(model, "", into=into) as acts:
            model(torch.randn(3, 5, 0))
        dataset = rows(acts, "", flatten=True)
        assert dataset[:].shape == dataset[list(range(15))].shape == (15, 0)


def test_beside_a_tensor_there_may_be_whatever_else_can_be_stored(tmp_path: Path) -> None:
    values = [(np.float32(n), torch.randn(2, 3), np.ones(2)) for n in range(2)]
    model = nn.Identity()
    with record(model, "", into=tmp_path / "r") as acts:
        for value in values:
            model(value)
    assert same(rows(acts, ("", 1))[:], torch.cat([value[1] for value in values]))
    with pytest.raises(AlignmentError, match=r"rows are cut out of plain tensors. Record with a"):
        rows(acts, ("", 0))


@pytest.mark.parametrize("into", [list, "path"])
def test_what_was_added_is_no_column_unless_it_is_a_tensor(into: Any, tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=tmp_path / "r" if into == "path" else into) as acts:
        model(torch.randn(2, 3))
        acts.add("label", 3)
    with pytest.raises(AlignmentError, match=r"acts.add\('label', torch.tensor\(...\)\)"):
        rows(acts, "", "label")


def test_a_recording_without_calls_has_no_rows() -> None:
    with pytest.warns(actrec.UnusedLayerWarning), record(Ready(), "hidden") as acts:
        pass
    assert len(rows(acts, "hidden")) == 0
    assert rows(acts, "hidden")[:].shape == (0,)
    assert list(shuffled(acts, "hidden", batch_size=3)) == []


def added(**values: Any) -> Any:
    """A recording of added values."""
    model = nn.Identity()
    with record(model, "") as acts:
        for call in range(max(map(len, values.values()))):
            model(torch.zeros(2))
            for name, calls in values.items():
                if call < len(calls):
                    acts.add(name, calls[call])
    return acts


z = torch.zeros
A = [z(4, 3), z(4, 3)]
REFUSED: dict[str, tuple[Any, list[Any], dict[str, Any], type[Exception], str]] = {
    "none": ({"a": A}, [], {}, OptionError, r"no layer was named. Write rows\(recording, ''\)"),
    "number": ({"a": A}, [3], {}, OptionError, "3 is not a layer. Give the name of one"),
    "nothing": ({"a": A}, [()], {}, OptionError, r"\(\) is not a layer. Give the name of one"),
    "calls": ({"a": A, "b": A[:1]}, ["a", "b"], {}, AlignmentError, "'a' has 2, 'b' has 1, and call 1 is in pass 1 of 'a' and missing of 'b'"),
    "rows": ({"a": A, "b": [z(4), z(5)]}, ["a", "b"], {}, AlignmentError, r"call 1 \(pass 1\) of 'b' has shape \(5,\).* those of \(4,\).*transform"),
    "lead": ({"a": A, "b": [z(5), z(5)]}, ["a", "b"], {"flatten": True}, AlignmentError, r"call 0 .* first dimensions must be the same"),
    "shape": ({"a": [z(4, 3), z(4, 2)]}, ["a"], {}, AlignmentError, r"call 1 .* has rows of shape \(2,\), .* \(3,\).*flatten=True, or record with"),
    "width": ({"a": [z(4, 3), z(4, 2)]}, ["a"], {"flatten": True}, AlignmentError, "cannot be batched: record with"),
    "dtype": ({"a": [z(4), z(4).half()]}, ["a"], {}, AlignmentError, "call 1 .* is of torch.float16, .* torch.float32. Record with dtype="),
    "scalar": ({"a": [z(())]}, ["a"], {}, AlignmentError, "is a single number"),
    "mask": ({"a": A, "m": A}, ["a"], {"mask": "m"}, AlignmentError, r"has shape \(4, 3\), more than one number for each row.*flatten=True makes"),
    "flat mask": ({"a": [z(4, 2, 3)], "m": [z(4, 2, 3)]}, ["a"], {"mask": "m", "flatten": True}, AlignmentError, r"'m' has shape \(4, 2, 3\), more than one number"),
    "sparse": ({"a": [z(4, 3).to_sparse()]}, ["a"], {}, AlignmentError, "is a tensor of layout torch.sparse_coo"),
    "text": ({"a": ["x"]}, ["a"], {}, AlignmentError, "call 0 of 'a' is str"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rows_that_line_up_is_refused_with_what_to_do(name: str) -> None:
    values, layers, options, error, message = REFUSED[name]
    acts = added(**values)
    with pytest.raises(error, match=message):
        rows(acts, *layers, **options)


def test_a_path_is_no_recording() -> None:
    for other in ("runs/a", None):
        with pytest.raises(OptionError, match=r"expected a recording, such as actrec.load\(path\)"):
            rows(other, "a")  # type: ignore[arg-type]


def test_ranks_are_compared_where_a_layer_knows_them(
    cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = cases["even, in memory"].acts
    monkeypatch.setattr(acts["hidden"], "ranks", [0] * 7, raising=False)
    monkeypatch.setattr(acts["label"], "ranks", [0] * 6 + [1], raising=False)
    with pytest.raises(
        AlignmentError, match=r"call 6 is in pass 6, rank 0, of 'hidden' and in pass 6, rank 1, of"
    ):
        rows(acts, "hidden", "label")


# --- shuffled() --------------------------------------------------------------------------------------


def in_workers(dataset: Shuffled, workers: int) -> list[Any]:
    """The batches as a DataLoader takes them from its workers, in turn."""
    if not workers:
        return list(dataset)
    iterators = []
    for number in range(workers):
        info = mock.Mock(id=number, num_workers=workers)
        with mock.patch.object(_shuffled, "get_worker_info", lambda info=info: info):
            iterators.append(iter(pickle.loads(pickle.dumps(dataset))))
    found = []
    while iterators:
        for iterator in list(iterators):
            batch = next(iterator, None)
            if batch is None:
                iterators.remove(iterator)
            else:
                found.append(batch)
    return found


class Options(NamedTuple):
    batch_size: int
    buffer: int
    seed: int
    masked: bool
    drop_last: bool


options = st.builds(
    Options,
    st.integers(1, 40),
    st.sampled_from([1, 300, 1000, 5000, MIB]),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)


def dataset_of(acts: Any, chosen: Options, **more: Any) -> Shuffled:
    mask = "mask" if chosen.masked else None
    numbers = {**chosen._asdict(), **more}
    del numbers["masked"]
    return shuffled(acts, "hidden", "id", "label", flatten=True, mask=mask, **numbers)


def ids(batches: list[Any]) -> list[list[int]]:
    """The rows in each batch, after a look at whether the layers still belong together."""
    for hidden, number, _ in batches:
        assert hidden[:, 0].equal(number.float())
    return [number.tolist() for _, number, _ in batches]


@given(name=st.sampled_from([*NAMES, "ranks"]), chosen=options, world=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_every_row_comes_exactly_once(cases: Any, name: str, chosen: Options, world: int) -> None:
    memory, acts = cases[name]
    parts = [ids(list(dataset_of(acts, chosen, rank=r, world_size=world))) for r in range(world)]
    expected = flat(memory, "id", masked=chosen.masked).tolist() * (2 if name == "ranks" else 1)
    counts = [sum(map(len, part)) for part in parts]
    came = sorted(i for part in parts for batch in part for i in batch)
    if chosen.drop_last:
        assert len({len(part) for part in parts}) == 1
        assert all(len(batch) == chosen.batch_size for part in parts for batch in part)
        assert len(expected) - len(came) < world * (chosen.batch_size + 1)
        assert all(came.count(i) <= expected.count(i) for i in set(came))
    else:
        assert came == sorted(expected)
        assert max(counts) - min(counts) <= 1
        assert all(len(batch) == chosen.batch_size for part in parts for batch in part[:-1])
    datasets = [dataset_of(acts, chosen, rank=r, world_size=world) for r in range(world)]
    assert [len(dataset) for dataset in datasets] == [len(part) for part in parts]


@given(name=names, chosen=options, workers=st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_the_order_is_the_same_for_any_number_of_workers(
    cases: Any, name: str, chosen: Options, workers: int
) -> None:
    alone = ids(list(dataset_of(cases[name].acts, chosen)))
    assert ids(in_workers(dataset_of(cases[name].acts, chosen), workers)) == alone


@given(name=names, chosen=options, data=st.data(), workers=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_what_goes_on_from_a_state_is_the_rest(
    cases: Any, name: str, chosen: Options, data: Any, workers: int
) -> None:
    acts = cases[name].acts
    dataset = dataset_of(acts, chosen)
    dataset.set_epoch(2)
    alone = ids(list(dataset))
    had = data.draw(st.integers(0, len(alone)))
    dataset.set_epoch(2)
    iterator = iter(dataset)
    for _ in range(had):
        next(iterator)
    state = json.loads(json.dumps(dataset.state_dict()))
    counted = dataset.state_dict(batches=had)  # as who has workers says it
    assert counted["first"] == state["first"] + state["done"] == had
    state = data.draw(st.sampled_from([state, counted]))
    again = dataset_of(acts, chosen)
    again.load_state_dict(state)
    again.set_epoch(2)  # as training loops do
    assert ids(in_workers(again, workers)) == alone[had:]
    if not workers:
        assert again.state_dict()["epoch"] == 2
        following = ids(list(again))
        assert again.state_dict()["epoch"] == 3
        again.set_epoch(3)
        assert ids(list(again)) == following


def test_workers_go_on_each_from_a_state_of_its_own(cases: Any) -> None:
    acts = cases["uneven, shards"].acts
    alone = [batch.tolist() for batch in shuffled(acts, "label", batch_size=2)]
    infos = [mock.Mock(id=number, num_workers=2) for number in range(2)]
    states = []
    for info, had in zip(infos, (5, 4), strict=True):
        with mock.patch.object(_shuffled, "get_worker_info", lambda info=info: info):
            dataset = shuffled(acts, "label", batch_size=2)
            iterator = iter(dataset)
        for _ in range(had):
            next(iterator)
        states.append(dataset.state_dict())
    for info, had, state in zip(infos, (5, 4), states, strict=True):
        dataset = shuffled(acts, "label", batch_size=2)
        dataset.load_state_dict(state)
        with mock.patch.object(_shuffled, "get_worker_info", lambda info=info: info):
            rest = [batch.tolist() for batch in dataset]
        assert rest == alone[info.id :: 2][had:]
    assert dataset.state_dict()["done"] == 9  # of 19, all that there are for it
    dataset.load_state_dict(states[0])
    with pytest.raises(ResumeError, match="worker 0 of 2, and this is worker 0 of 1"):
        iter(dataset)


def test_another_epoch_seed_or_rank_has_another_order(cases: Any) -> None:
    acts = cases["even, shards"].acts
    dataset = shuffled(acts, "label", batch_size=35)
    orders = [tuple(batch.tolist()) for _ in range(3) for batch in dataset]
    assert repr(dataset) == "1 batches of 35 shuffled rows of 'label'"
    orders += [tuple(b.tolist()) for b in shuffled(acts, "label", batch_size=35, seed=1)]
    assert len(set(orders)) == 4
    assert tuple(range(35)) not in orders


def test_the_numbers_of_numpy_are_numbers(cases: Any) -> None:
    """Or else an epoch would go on in another order than it had begun in: a state has Python's numbers."""
    acts, orders = cases["even, shards"].acts, []
    for number in (int, np.int64):
        dataset = shuffled(
            acts, "label", batch_size=5, seed=number(3), rank=number(1), world_size=number(2)
        )
        dataset.set_epoch(number(1))
        orders.append(torch.cat(list(dataset)))
    assert torch.equal(*orders)
    with pytest.raises(TypeError):
        dataset.set_epoch("1")  # type: ignore[arg-type]


def test_an_epoch_that_was_left_is_not_gone_on_with(cases: Any) -> None:
    dataset = shuffled(cases["even, shards"].acts, "label", batch_size=5)
    epochs = [torch.cat(list(dataset)).tolist() for _ in range(2)]
    dataset.set_epoch(0)
    next(iter(dataset))
    assert torch.cat(list(dataset)).tolist() == epochs[1]
    dataset.set_epoch(0)
    assert torch.cat(list(dataset)).tolist() == epochs[0]


def test_a_state_of_something_else_is_refused(cases: Any) -> None:
    acts = cases["even, shards"].acts
    state = shuffled(acts, "label", batch_size=5).state_dict()
    assert len(json.dumps(state)) < 400
    others = {
        "seed=0, and this dataset has seed=1": shuffled(acts, "label", batch_size=5, seed=1),
        "batch_size=5, .* batch_size=6": shuffled(acts, "label", batch_size=6),
        "buffer=": shuffled(acts, "label", batch_size=5, buffer=MIB),
        "world_size": shuffled(acts, "label", batch_size=5, rank=0, world_size=2),
        "drop_last": shuffled(acts, "label", batch_size=5, drop_last=True),
        "recording=": shuffled(acts, "pooled", batch_size=5),
        " recording=": shuffled(cases["even, in memory"].acts, "label", batch_size=5),
    }
    for message, dataset in others.items():
        with pytest.raises(ResumeError, match=message):
            dataset.load_state_dict(state)
    with pytest.raises(ResumeError, match="recording=none at all"):
        shuffled(acts, "label", batch_size=5).load_state_dict({"epoch": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"shuffled\(batch_size=0\): expected a whole number"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"batch_size": 1, "buffer": -1}, "buffer=-1"),
        ({"batch_size": 1, "seed": "a"}, r"shuffled\(seed='a'\): expected a whole number"),
        ({"batch_size": 1, "seed": 0.5}, "seed=0.5"),
        ({"batch_size": 1, "rank": 1}, "expected two integers, .* or neither"),
        ({"batch_size": 1, "world_size": 2}, "expected two integers, .* or neither"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "from 0 to world_size - 1"),
        ({"batch_size": 1, "rank": -1, "world_size": 2}, "rank=-1, world_size=2"),
        ({"batch_size": 1, "rank": "0", "world_size": 2}, "rank='0', world_size=2"),
        ({"batch_size": 1, "rank": 0.0, "world_size": 2}, "rank=0.0, world_size=2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    cases: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        shuffled(cases["even, in memory"].acts, "label", **options)


def test_ranks_are_those_of_torch_distributed_or_of_torchrun(
    cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = cases["even, in memory"].acts
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert sum(map(len, shuffled(acts, "label", batch_size=2))) == 7
    assert sum(map(len, shuffled(acts, "label", batch_size=2, rank=0, world_size=1))) == 35
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        assert sum(map(len, shuffled(acts, "label", batch_size=2))) == 35
    finally:
        distributed.destroy_process_group()


# --- Mixing ------------------------------------------------------------------------------------------

ROWS, IN_WINDOW = 20_000, 2000
IN_BLOCK = IN_WINDOW * (8 + _shuffled._BYTES_PER_NUMBER) // _shuffled._BLOCKS_PER_BUFFER // 8


@pytest.fixture(scope="module")
def orders() -> Tensor:
    """The rows in the order of each of many epochs, when a tenth of them fits into the buffer."""
    acts = added(row=[torch.arange(ROWS)])
    dataset = shuffled(
        acts, "row", batch_size=ROWS, buffer=IN_WINDOW * (8 + _shuffled._BYTES_PER_NUMBER)
    )
    return torch.stack([batch for _ in range(60) for batch in dataset])


def test_where_a_row_is_recorded_says_nothing_about_when_it_comes(orders: Tensor) -> None:
    positions = torch.arange(ROWS)
    blocks = ROWS / IN_BLOCK
    found = [torch.corrcoef(torch.stack([positions, order]).double())[0, 1] for order in orders]
    # Blocks are what is permuted: the deviation of one epoch is 1 / sqrt(blocks), as in a permutation of so many.
    assert abs(float(torch.stack(found).mean())) < 4 / (blocks * len(orders)) ** 0.5
    assert float(torch.stack(found).square().mean()) < 2 / blocks


def test_a_row_comes_at_any_time_equally_often(orders: Tensor) -> None:
    when = orders.argsort(1)
    for row in range(0, ROWS, 997):
        counts = torch.histc(when[:, row].double(), 10, 0, ROWS)
        expected = len(orders) / 10
        assert (
            float((counts - expected).square().sum() / expected) < 35
        )  # chi-squared, 9 degrees: p < 1e-4


def test_neighbours_are_as_far_apart_as_the_buffer_allows(orders: Tensor) -> None:
    when = orders.argsort(1)
    apart = (when[:, 1:] - when[:, :-1]).abs().double()
    in_block = torch.arange(1, ROWS) % IN_BLOCK != 0
    # Two places of a permutation of n are n / 3 apart on average.
    assert float(apart[:, in_block].mean()) == pytest.approx(IN_WINDOW / 3, rel=0.05)
    assert float(apart[:, ~in_block].mean()) == pytest.approx(ROWS / 3, rel=0.1)
    near = float((apart[:, in_block] < IN_WINDOW / 10).double().mean())
    assert near == pytest.approx(1 - 0.9**2, rel=0.05)


def test_a_batch_has_rows_of_many_places(orders: Tensor) -> None:
    batches = (orders // IN_BLOCK).view(len(orders), -1, 100)
    places = torch.tensor([[len(batch.unique()) for batch in order] for order in batches[:3]])
    blocks = IN_WINDOW / IN_BLOCK
    expected = blocks * (
        1 - (1 - 1 / blocks) ** 100
    )  # 100 rows, each of a random block of the window
    assert float(places.double().mean()) == pytest.approx(expected, rel=0.1)


# --- Reading -----------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    made(UNEVEN, tmp_path / "r")
    return tmp_path / "r"


def test_without_announcements_all_is_the_same(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Options(4, 1000, 0, masked=True, drop_last=False)
    expected = ids(list(dataset_of(load(stored), chosen)))
    monkeypatch.setattr(_disk, "_announce", None)
    assert ids(list(dataset_of(load(stored), chosen))) == expected


def test_rows_in_an_object_store_are_the_same() -> None:
    pytest.importorskip("fsspec")
    memory = made(UNEVEN)
    made(UNEVEN, Folder("memory://data/rows", shard_bytes=30_000))
    acts = load("memory://data/rows")
    assert same(rows(acts, "hidden", flatten=True)[:], flat(memory, "hidden"))
    assert same(rows(acts, "label")[[30, 2, 2]], memory["label"].cat()[[30, 2, 2]])
    chosen = Options(4, 1000, 0, masked=True, drop_last=False)
    came = [i for batch in ids(list(dataset_of(acts, chosen))) for i in batch]
    assert sorted(came) == flat(memory, "id", masked=True).tolist()


def test_rows_that_are_near_each_other_are_read_in_one_go_and_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made([(100, 40)] * 40, tmp_path / "r")
    dataset = rows(load(tmp_path / "r"), "hidden", "label", flatten=True)
    whole = dataset[:]
    read: list[int] = []
    into = _disk.Reading.into

    def watched(reading: Any, begin: int, view: memoryview) -> None:
        read.append(len(view))
        into(reading, begin, view)

    monkeypatch.setattr(_disk.Reading, "into", watched)
    indices = torch.tensor([159_999, 3, 4, 9, 80_000, 3])
    for column, part in zip(dataset[indices], whole, strict=True):
        assert same(column, part[indices])
    assert read[:3] == [7 * WIDTH * 4, WIDTH * 4, WIDTH * 4]  # 3, 3, 4 and 9; 80000; 159999
    read.clear()
    dataset[::2]
    assert max(read) <= MIB
    assert sum(read) < 2 * MIB


def test_each_file_is_opened_once_for_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(UNEVEN, Folder(tmp_path / "r", shard_bytes=30_000))
    dataset = shuffled(load(tmp_path / "r"), "hidden", "label", batch_size=4)
    opened: list[str] = []
    monkeypatch.setattr(
        _disk.Disk,
        "reading",
        lambda disk, name, head: opened.append(name) or _disk.Reading(disk.path / name, head),  # type: ignore[func-returns-value]
    )
    list(dataset)
    assert len(opened) == len(set(opened)) > 3


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "_MOST_OPEN", 5)
    made([(2, 2)] * 10, Folder(tmp_path / "r", seconds=0))
    with Files() as files:
        for column in rows(load(tmp_path / "r"), "label", "hidden")._columns:
            column.read(0, column.empty(len(column)), files)
            assert len(files._open) == 5
    assert not files._open


def test_a_file_that_is_gone_or_cut_short_meanwhile_is_named(stored: Path) -> None:
    acts = load(stored)
    dataset, by_number = shuffled(acts, "label", batch_size=4), rows(acts, "label")
    first = min(stored.glob("rank-00000/*.safetensors"))
    os.truncate(first, 100)
    for read in (lambda: list(dataset), lambda: by_number[[0, 3]], lambda: by_number[:]):
        with pytest.raises(
            CorruptRecordingError,
            match=f"{first.name} is damaged: it has become shorter: .* and has 100 now",
        ):
            read()
    first.unlink()
    for read in (lambda: list(dataset), lambda: by_number[[0, 3]], lambda: by_number[:]):
        with pytest.raises(
            CorruptRecordingError, match=f"{first.name} is damaged: it was there when"
        ):
            read()


def test_a_recording_that_was_made_anew_meanwhile_does_not_pass_for_the_one_that_was_opened(
    stored: Path,
) -> None:
    acts = load(stored)
    dataset, by_number = shuffled(acts, "label", batch_size=4), rows(acts, "label")
    shutil.rmtree(stored)
    made(UNEVEN, stored)
    for read in (lambda: list(dataset), lambda: acts["label"][0], lambda: by_number[[1, 9]]):
        with pytest.raises(
            CorruptRecordingError, match="it is another file than when it was opened"
        ):
            read()


def test_the_mask_is_read_in_portions(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, acts = cases["uneven, shards"]
    monkeypatch.setattr(_kept, "_MANY", 8)
    for block in (3, 8, 1000):
        mask = rows(acts, "id", "mask", "hidden", flatten=True)._columns[1]
        with Files() as files:
            kept = _kept.Kept(mask, block, files)
        assert kept.counts.tolist() == [
            int(part.sum()) for part in memory["mask"].cat().view(-1).split(block)
        ]


# --- Reading ahead -----------------------------------------------------------------------------------


def counted(many: int, made: list[int], error: Exception | None = None) -> Any:
    """Numbers; each is put into ``made`` when it is asked for."""
    try:
        for number in range(many):
            made.append(number)
            yield number
        if error is not None:
            raise error
    finally:
        made.append(-1)


def test_what_comes_next_is_made_while_one_works_with_what_there_is() -> None:
    made: list[int] = []
    items = ahead(counted(5, made))
    assert made == []  # nothing is made before it is asked for
    for number in range(5):
        assert next(items) == number
        wait_until(lambda number=number: len(made) == number + 2)  # and no more than one
    assert [*items] == []
    assert made == [0, 1, 2, 3, 4, -1]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("many", [1, 2, 3])
def test_an_error_comes_where_its_item_would_have_come(many: int) -> None:
    items = ahead(counted(2, [], ValueError("third")), many)
    assert (next(items), next(items)) == (0, 1)
    with pytest.raises(ValueError, match="third"):
        next(items)
    assert [*items] == []


def readers() -> set[threading.Thread]:
    """The threads that read ahead; an example that ran before may have left an epoch half way."""
    return {one for one in threading.enumerate() if one.name.startswith("actrec-ahead")}


LEFT = """
import torch
from actrec import record
from actrec.data import shuffled

model = torch.nn.Identity()
with record(model, "") as acts:
    model(torch.zeros(9, 2))
batches = iter(shuffled(acts, "", batch_size=2))
print(len(next(batches)))
"""


def test_a_thread_that_is_left_at_the_end_of_the_program_ends_with_it() -> None:
    command = [sys.executable, "-c", LEFT]
    child = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    assert (child.stdout, child.stderr) == ("2\n", "")


def test_garbage_that_the_thread_itself_collects_does_not_wait_for_it() -> None:
    ended: list[str] = []

    def dropping() -> Any:
        try:
            yield 1
            taken.clear()  # the last reference to what reads ahead
            yield 2
        finally:
            ended.append(threading.current_thread().name)

    taken = [ahead(dropping())]
    items = iter([next(taken[0])])
    assert next(items) == 1
    wait_until(lambda: bool(ended))
    assert ended == ["actrec-ahead"]


def test_the_next_window_is_read_evenly_while_batches_of_this_one_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made([(40, 8)] * 50, tmp_path / "r")  # 16,000 rows
    dataset = shuffled(
        load(tmp_path / "r"), "hidden", flatten=True, batch_size=100, buffer=4000 * (12 + 32)
    )
    read = 0
    into = _disk.Reading.into

    def watched(reading: Any, begin: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        into(reading, begin, view)

    monkeypatch.setattr(_disk.Reading, "into", watched)
    each = []
    monkeypatch.setattr(_shuffled, "ahead", lambda items, _: items)  # so that one can count
    for _ in dataset:
        each.append(read // 12)
        read = 0
    assert sum(each) == 16_000
    first, *others = each
    block = 4000 * (12 + 32) // 64 // 12
    assert 4000 <= first <= 4000 + 100 + block
    assert max(others) <= 100 + block, "no batch waits for a window"


def test_a_block_of_a_later_window_takes_few_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made([(40, 8)] * 50, tmp_path / "r")  # 16,000 rows
    options: Any = {"flatten": True, "batch_size": 1000, "buffer": 4000 * (12 + 8 + 32)}
    dataset = shuffled(load(tmp_path / "r"), "hidden", "label", **options)
    monkeypatch.setattr(_shuffled, "ahead", lambda items, _: items)  # of this thread
    fill, filled = _window.Window._fill, 0

    def counted(*args: Any) -> None:
        nonlocal filled
        filled += 1
        fill(*args)

    monkeypatch.setattr(_window.Window, "_fill", counted)
    with Operations() as operations:
        list(dataset)
    assert filled > 50
    assert operations.count < 40 * filled


def test_whoever_stops_early_leaves_no_thread_and_no_file(stored: Path) -> None:
    made: list[int] = []
    items = ahead(counted(5, made))
    next(items)
    items.close()
    assert made == [0, 1, -1]
    before = readers()
    batches = iter(shuffled(load(stored), "label", batch_size=2))
    next(batches)
    assert len(readers() - before) == 1
    del batches
    assert not readers() - before


def test_batches_are_plain_tensors_whatever_mode_they_are_taken_in(stored: Path) -> None:
    with torch.inference_mode():
        batch = next(iter(shuffled(load(stored), "label", batch_size=2)))
    assert not batch.is_inference()


# --- Memory ------------------------------------------------------------------------------------------


@given(name=names, chosen=options, workers=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_the_workers_hold_no_more_than_the_buffer_between_them(
    cases: Any, name: str, chosen: Options, workers: int
) -> None:
    held: dict[int, int] = {}
    begin = _window.Window.begin

    def watched(window: Any, pieces: Any, wanted: Tensor) -> None:
        begin(window, pieces, wanted)
        assert len(wanted) == len(wanted.unique())
        held[id(window)] = sum(memory.nbytes for memory in window._memory)
        keep.append(window)

    keep: list[Any] = []
    with mock.patch.object(_window.Window, "begin", watched):
        in_workers(dataset_of(cases[name].acts, chosen), workers)
    row = WIDTH * 4 + 8 + 8
    assert all(size <= max(chosen.buffer, row) for size in held.values())
    # Each has its own batches of a window and no others: a batch more or less.
    assert sum(held.values()) <= max(chosen.buffer, row) + workers * chosen.batch_size * row


CHILD = """
import json, sys, torch
import actrec
from actrec.data import shuffled

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
dataset = shuffled(actrec.load(sys.argv[1]), "", batch_size=256, buffer=8 * 2**20)
next(iter(dataset))
before = memory("VmRSS")
rows = sum(map(len, dataset))
print(json.dumps([rows, memory("VmHWM") - before]))
"""


def test_a_recording_larger_than_the_buffer_takes_the_memory_of_the_buffer(tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=Folder(tmp_path / "r", shard_bytes=32 * MIB)):
        for _ in range(64):
            model(torch.zeros(1024, 512))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "r")]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    found, taken = json.loads(child.stdout)
    assert found == 65536  # 128 MiB
    assert taken < 24 * MIB


# --- Real workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_real_workers_bring_the_same_batches(cases: Any, context: str) -> None:
    acts = cases["uneven, shards"].acts
    chosen = Options(7, 1000, 0, masked=True, drop_last=False)
    alone = ids(list(dataset_of(acts, chosen)))
    loader = DataLoader(
        dataset_of(acts, chosen), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    assert ids(list(loader)) == alone
    if context == "fork":  # which takes no time
        by_number = DataLoader(
            rows(acts, "label"), batch_size=6, num_workers=2, multiprocessing_context=context
        )
        assert torch.cat(list(by_number)).equal(acts["label"].cat())


def test_workers_that_persist_go_to_the_next_epoch(cases: Any) -> None:
    dataset = shuffled(cases["uneven, shards"].acts, "label", batch_size=5)
    epochs = [torch.cat(list(dataset)).tolist() for _ in range(2)]
    dataset.set_epoch(0)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    assert [torch.cat(list(loader)).tolist() for _ in range(2)] == epochs


KILLED = """
import json, os, signal, sys, traceback
import torch
from torch.utils.data import DataLoader
import actrec
from actrec.data import shuffled

# With file descriptors, the default, PyTorch sometimes waits for ever for that of a process that is gone.
torch.multiprocessing.set_sharing_strategy("file_system")
dataset = shuffled(actrec.load(sys.argv[1]), "label", batch_size=2)
# Under a fork server, the default of Python 3.14, the error is whatever the broken pipe gives.
options = {"multiprocessing_context": "fork", "timeout": 20}
batches = iter(DataLoader(dataset, batch_size=None, num_workers=2, prefetch_factor=1, **options))
try:
    for number, batch in enumerate(batches):
        print(json.dumps(batch.tolist()), flush=True)
        if number == 2:
            os.kill(batches._workers[1].pid, signal.SIGKILL)
except Exception:
    traceback.print_exc()
    os._exit(1)  # PyTorch goes on raising its error, wherever the program is
"""


def test_a_killed_worker_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    made(UNEVEN, tmp_path / "r")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r")]
    # The other worker may wait for ever for what the killed one had locked. So nobody waits for it in turn.
    with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            assert child.wait(timeout=180) == 1
        finally:
            with suppress(ProcessLookupError):  # it has ended as well
                os.killpg(child.pid, signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        had = [json.loads(line) for line in out]
        assert "DataLoader worker" in err.read()
    assert 3 <= len(had) < 19
    dataset = shuffled(load(tmp_path / "r"), "label", batch_size=2)
    alone = [batch.tolist() for batch in dataset]
    dataset.load_state_dict(
        shuffled(load(tmp_path / "r"), "label", batch_size=2).state_dict(batches=len(had))
    )
    rest = [batch.tolist() for batch in DataLoader(dataset, batch_size=None, num_workers=2)]
    assert had + rest == alone


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 6, 18, 19])
def test_a_stateful_loader_goes_on_in_the_middle(cases: Any, workers: int, stop: int) -> None:
    acts = cases["uneven, shards"].acts

    def loader() -> Any:
        dataset = shuffled(acts, "label", batch_size=2)
        dataset.set_epoch(1)
        return StatefulDataLoader(dataset, batch_size=None, num_workers=workers)

    alone = [batch.tolist() for batch in loader()]
    assert len(alone) == 19
    one, other = loader(), loader()
    batches = iter(one)
    had = [batch.tolist() for _, batch in zip(range(stop), batches, strict=False)]
    other.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    assert had + [batch.tolist() for batch in other] == alone
