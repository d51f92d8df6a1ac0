"""Reductions that go to a path: committed with the passes that they have taken in, and merged over ranks and runs."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from actrec import (
    ActrecError,
    CaptureError,
    OptionError,
    ResumeError,
    compare,
    load,
    record,
    reduce,
    save,
    verify,
)
from actrec._recordings.pass_numbers import in_runs
from actrec._recordings.reduced import Reduced
from actrec.errors import CorruptRecordingError
from actrec.store import Folder
from actrec.store.layers import Found

if TYPE_CHECKING:
    from pathlib import Path

XS = torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def dim_zero_sum(values: Tensor) -> Tensor:
    return values.sum(0)


class Sum:
    """A metric with the protocol of torchmetrics."""

    _reductions = {"total": dim_zero_sum}  # noqa: RUF012  # as it is there
    _update_count = 0

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def update(self, value: Tensor) -> None:
        self.total = self.total + value.double().sum()

    def compute(self) -> Tensor:
        return self.total

    @property
    def metric_state(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def merge_state(self, state: dict[str, Tensor]) -> None:
        self.total = self.total + state["total"]


def units(into: Any, layers: Any, keys: Any, *, resume: bool = False, **options: Any) -> Any:
    """Record each of ``XS`` as a unit of two calls."""
    model = Net()
    with torch.no_grad(), record(model, layers, into=into, resume=resume, **options) as acts:
        for key in keys:
            with acts.unit(f"k{key}"):
                model(XS[key, :, :2])
                model(XS[key, :, 2:])
                acts.add("mask", torch.ones(2, 3))
    return acts


def rank(path: Path, number: int, ranks: int = 2) -> Folder:
    return Folder(path, rank=number, world_size=ranks, run="a")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.allclose(a, b, rtol=1e-12) if isinstance(a, Tensor) else bool(a == b)


# --- What is stored is what would be in memory ---------------------------------------------------------------

LAYERS = {
    "up": reduce.Moments(covariance=True, mask="mask"),
    "down": (torch.abs, partial(reduce.TopK, k=3)),
}
OPTIONS = {"inputs": {"down": reduce.Norms, "up": None}}


def test_a_reduction_in_a_path_is_the_one_in_memory(tmp_path: Path) -> None:
    whole = units(list, LAYERS, range(4), **OPTIONS)
    live = units(tmp_path / "run", LAYERS, range(4), **OPTIONS)
    stored = load(tmp_path / "run")
    for acts in (live, stored, pickle.loads(pickle.dumps(live)), copy.deepcopy(stored)):
        for layer, expected in (
            (acts["up"], whole["up"]),
            (acts["down"], whole["down"]),
            (acts.inputs["down"], whole.inputs["down"]),
        ):
            assert equal(layer.compute(), expected.compute())
            assert layer.passes == expected.passes
            assert layer.units == expected.units
            assert len(layer) == 8
        assert len(acts.inputs["up"][0]) == 1  # kept, beside what is reduced
        assert compare(acts, whole).equal
    assert verify(tmp_path / "run") == []
    statistics = stored.stats()
    assert {row.layer for row in statistics} == {"mask"}
    assert statistics.without == ("up", "down")
    assert "without those whose calls were not kept: 'up', 'down'" in repr(statistics)
    for acts in (whole, stored):
        assert "Moments" in repr(acts)
        assert "8 calls, Moments" in acts["up"]._repr_html_()
        assert "Moments" in acts._repr_html_()
    assert stored.nbytes > stored["up"].nbytes > 0


def test_a_histogram_may_have_more_bins_than_a_value_has_parts(tmp_path: Path) -> None:
    bins = reduce.Histogram(edges=torch.linspace(-9, 9, 70_000))
    whole, stored = units(list, {"up": bins}, [0]), units(tmp_path / "run", {"up": bins}, [0])
    assert equal(stored["up"].compute(), whole["up"].compute())
    assert int(load(tmp_path / "run")["up"].compute().sum()) == 18


def test_functions_are_reduced_into_a_path(tmp_path: Path) -> None:
    queries = {":relu": reduce.Norms(), "up": None}
    whole, stored = units(list, queries, range(2)), units(tmp_path / "run", queries, range(2))
    for acts in (stored, load(tmp_path / "run")):
        assert equal(acts[":relu"].compute(), whole[":relu"].compute())
        assert len(acts["up"]) == 4
    found = units(tmp_path / "more", queries, range(2), resume=True)
    found = units(tmp_path / "more", queries, range(2, 4), resume=True)
    assert equal(found[":relu"].compute(), units(list, queries, range(4))[":relu"].compute())


def test_passes_without_units_are_committed_too_and_can_be_looked_at_on_the_way(
    tmp_path: Path,
) -> None:
    model, folder = Net(), Folder(tmp_path / "run", seconds=0)
    with torch.no_grad(), record(model, {"up": reduce.Norms()}, into=folder) as acts:
        for number, x in enumerate(XS):
            assert len(acts["up"]) == 2 * number
            model.up(x)
            model.up(x)
            assert acts["up"].rows == 12 * (number + 1)
        with pytest.raises(ActrecError, match=r"clear\(\): what was written to a path stays"):
            acts["up"].clear()
    assert load(tmp_path / "run")["up"].passes == list(range(8))


@pytest.mark.parametrize("seconds", [0, 60])
def test_each_state_has_the_calls_of_what_is_committed_with_it_and_no_others(
    tmp_path: Path, seconds: float
) -> None:
    model, layers = Net(), {"up": reduce.Norms(mask="mask"), "down": None}
    folder = Folder(tmp_path / "run", seconds=seconds, shard_bytes=100)
    with record(model, layers, grads="down", into=folder) as acts:
        for number, x in enumerate([*XS, *XS, *XS]):
            output = model(x)
            acts.add("mask", torch.ones(2, 3))
            if number % 3:
                output.sum().backward()
    (rank,) = load(tmp_path / "run")._ranks
    states = 0
    for shard in rank.shards():
        part = shard.part("output", "up")
        if part is not None:
            (value,) = (Found(shard, *part.place(call)).value() for call in range(len(part)))
            states += 1
            assert [*in_runs(value["passes"].tolist())] == [*range(shard.heading.committed)]
    assert states > 1


def test_a_mask_of_a_pass_in_which_the_layer_was_not_called_is_forgotten() -> None:
    model = Net()
    with torch.no_grad(), record(model, {"down": reduce.Norms(mask="mask")}) as acts:
        for key in range(3):
            model.up(XS[0])  # on the way to nothing that is recorded
            model(XS[0])
            acts.add("mask", torch.ones(2, 3))
            acts.add("mask", torch.ones(2, 3))
            with acts.unit(key):
                acts.add("mask", torch.ones(2, 3))
    assert acts["down"].rows == 18
    assert not acts["down"]._masks


def test_several_calls_of_a_pass_are_one_state(tmp_path: Path) -> None:
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Linear(4, 4), relu)
    with torch.no_grad(), record(model, {"0": reduce.Norms()}, into=tmp_path / "run") as acts:
        for x in XS:
            model(x)
    assert acts["0"].passes == [0, 0, 1, 1, 2, 2, 3, 3]
    with torch.no_grad(), record(model, {"0": reduce.Norms()}) as whole:
        for x in XS:
            model(x)
    assert equal(load(tmp_path / "run")["0"].compute(), whole["0"].compute())


def test_ranks_and_runs_are_merged_and_top_rows_know_their_units(tmp_path: Path) -> None:
    whole = units(list, LAYERS, range(4))
    for number in range(2):
        units(rank(tmp_path / "run", number), LAYERS, [number])
    resumed = units(rank(tmp_path / "run", 1), LAYERS, [2, 3], resume=True)
    assert resumed["up"].rows == 18
    assert resumed["down"].compute()["rank"].unique().tolist() == [1]
    stored = load(tmp_path / "run")
    assert equal(stored["up"].compute()["cov"], whole["up"].compute()["cov"])
    found, expected = stored["down"].compute(), whole["down"].compute()
    for what in ("values", "unit", "sample", "position"):
        assert equal(found[what], expected[what])
    assert found["rank"].tolist() == [[int(key != "k0") for key in keys] for keys in found["unit"]]
    assert stored["up"].ranks == [0, 0, 1, 1, 1, 1, 1, 1]
    assert stored.complete
    # Saved, the passes of all ranks are counted anew.
    save(stored, tmp_path / "saved")
    saved = load(tmp_path / "saved")
    for what in ("values", "unit", "sample", "position"):
        assert equal(saved["down"].compute()[what], expected[what])
    assert sorted(saved["up"].units) == sorted(whole["up"].units)


def test_a_unit_that_failed_is_not_in_it_and_its_key_is_free(tmp_path: Path) -> None:
    model, folder = Net(), Folder(tmp_path / "run", shard_bytes=1)
    with torch.no_grad(), record(model, {"up": reduce.Norms()}, into=folder) as acts:
        with pytest.raises(ZeroDivisionError), acts.unit("a"):
            model(XS[0])
            1 / 0  # noqa: B018
        with acts.unit("a"):
            model(XS[1])
    assert load(tmp_path / "run")["up"].rows == acts["up"].rows == 6


def test_a_block_that_raised_keeps_what_is_complete(tmp_path: Path) -> None:
    model = Net()

    def work(acts: Any) -> None:
        for x in XS[:3]:
            model(x)
        1 / 0  # noqa: B018

    with (
        pytest.raises(ZeroDivisionError),
        record(model, {"up": reduce.Norms()}, into=tmp_path / "run") as acts,
    ):
        work(acts)
    assert acts.num_passes == 2
    assert acts["up"].passes == load(tmp_path / "run")["up"].passes == [0, 1]


def test_reductions_in_memory_are_saved(tmp_path: Path) -> None:
    whole = units(list, LAYERS, range(3), **OPTIONS)
    whole.save(tmp_path / "run")
    found = load(tmp_path / "run")
    assert compare(found, whole).equal
    assert found["down"].units == whole["down"].units
    assert verify(tmp_path / "run") == []
    found.save(tmp_path / "again")
    assert compare(load(tmp_path / "again"), whole).equal


def test_a_layer_that_was_never_called_is_empty(tmp_path: Path) -> None:
    model = Net()
    layers = {"up": reduce.Norms(), "down": reduce.TopK()}
    with (
        pytest.warns(match="nothing was recorded of 1"),
        record(model, layers, into=tmp_path / "run") as acts,
    ):
        model.up(XS[0])
    for one in (acts, load(tmp_path / "run")):
        assert len(one["down"]) == 0
        assert one["down"].passes == []
    assert acts["down"].merge_into(reduce.TopK()).compute() == {}
    with record(model, {"up": reduce.TopK()}) as none:
        assert none["up"].compute() == {}
        model.up(XS[0])
    with pytest.raises(ActrecError, match="nothing was recorded of this layer"):
        load(tmp_path / "run")["down"].compute()
    save(acts, tmp_path / "saved")
    assert len(load(tmp_path / "saved")["down"]) == 0


# --- Metrics of others -----------------------------------------------------------------------------------------


def test_a_metric_of_another_class_is_merged_by_one_of_that_class(tmp_path: Path) -> None:
    whole = units(list, {"up": Sum}, range(4))
    for number in range(2):
        acts = units(rank(tmp_path / "run", number), {"up": Sum}, [number, 2 + number])
        assert len(acts["up"]) == 4
    assert equal(acts["up"].compute(), units(list, {"up": Sum}, [1, 3])["up"].compute())
    found = load(tmp_path / "run")
    assert "Sum" in repr(found)
    with pytest.raises(ActrecError, match=r"merge_into\(Sum\(...\)\).compute\(\)"):
        found["up"].compute()
    assert equal(found["up"].merge_into(Sum()).compute(), whole["up"].compute())
    assert equal(whole["up"].merge_into(Sum()).compute(), whole["up"].compute())
    save(found, tmp_path / "saved")
    assert equal(load(tmp_path / "saved")["up"].merge_into(Sum()).compute(), whole["up"].compute())


class Mean(Sum):
    _reductions = {"total": torch.mean}  # noqa: RUF012  # as torchmetrics has it


class Stubborn(Sum):
    def merge_state(self, state: dict[str, Tensor]) -> None:
        raise RuntimeError


class Last:
    def update(self, value: Tensor) -> None:
        self.value = value

    def compute(self) -> Tensor:
        return self.value


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (Last, r"it has no metric_state and merge_state\(\)"),
        (Mean, "its state 'total' cannot be merged in any order, by sum, max, min or cat"),
        (Stubborn, r"its merge_state\(\) raised RuntimeError"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_there(
    tmp_path: Path, metric: Any, why: str
) -> None:
    with pytest.raises(OptionError, match=f"'up' is reduced by .*{why}"):
        record(Net(), {"up": metric()}, into=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_metric_without_a_state_cannot_be_saved(tmp_path: Path) -> None:
    acts = units(list, {"up": Last()}, range(1))
    assert acts["up"].compute().shape == (2, 1, 3)
    with pytest.raises(CaptureError, match="the Last of 'up' cannot be stored"):
        acts.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ({"up": reduce.Norms()}, {"grads": True}, "gradient of 'up' comes after its call"),
        ("up", {"grads": {":relu": reduce.Norms()}}, "gradient of ':relu' comes after its call"),
        ("up", {"grads": True, "into": lambda: reduce.Norms(ord=1)}, "comes after its call"),
        ("up", {"transform": reduce.Norms}, r"combines all values, and a transform changes each"),
        ({"up": (3, reduce.Norms())}, {}, "expected a transform, which is callable, a reduction"),
        ({"up": (torch.abs, torch.abs)}, {}, "expected a transform, which is callable"),
    ],
)
def test_what_cannot_be_meant_is_refused(layers: Any, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message), record(Net(), layers, **options):
        pass


def test_a_reduction_that_has_taken_in_something_is_refused() -> None:
    used = reduce.Norms()
    used.update(torch.ones(2, 3))
    with pytest.raises(OptionError, match="the Norms has 2 rows already"):
        record(Net(), {"up": used})


def test_one_reduction_given_for_several_layers_is_one_for_each() -> None:
    given = reduce.Norms()
    for options in (
        {"layers": {("up", "down"): given}},
        {"layers": ["up", "down"], "into": given},
    ):
        model = Net()
        with record(model, **options) as acts:
            model(XS[0])
        assert (len(acts["up"].compute()), len(acts["down"].compute())) == (3, 2)
        assert not given.rows


def test_a_run_goes_on_with_the_same_reduction_alone(tmp_path: Path) -> None:
    units(tmp_path / "run", {"up": reduce.TopK(k=3)}, [0])
    for other in (reduce.TopK(k=4), reduce.Norms(), None):
        with pytest.raises(ResumeError, match="the reduction of layer 'up' was 'TopK"):
            units(tmp_path / "run", {"up": other}, [1], resume=True)


# --- Damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda value: 3, "a value should be the state of a reduction, and is not"),
        (lambda value: {**value, "passes": torch.ones(3)}, "are not runs"),
        (lambda value: {**value, "passes": torch.tensor([[0, 1 << 50, 1]])}, "impossibly many"),
        (lambda value: {**value, "states": []}, "has no state"),
        (
            lambda value: {**value, "passes": torch.tensor([[0, 2, 1]])},
            "passes that are not committed",
        ),
        (lambda value: {**value, "states": [{"ord": 2.0}]}, "rows must be a tensor of 0"),
        (
            lambda value: {**value, "states": [{**value["states"][0], "ord": -1}]},
            "not one of Norms",
        ),
        (
            lambda value: {**value, "states": [{**value["states"][0], "_total": torch.ones(2, 2)}]},
            "_total must be a tensor of 1 dimension",
        ),
        (
            lambda value: {
                "reduction": "Histogram",
                "states": [
                    {"edges": [0.0, 1.0], "rows": torch.tensor(1), "_counts": torch.ones(1, 9)}
                ],
                "passes": value["passes"],
            },
            r"_counts has the shape \(1, 9\), which does not fit",
        ),
    ],
)
def test_a_state_that_is_none_is_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, why: str
) -> None:
    whole = units(list, {"up": reduce.Norms()}, [0])
    value = Reduced._value
    monkeypatch.setattr(Reduced, "_value", lambda *given: change(value(*given)))
    whole.save(tmp_path / "run")
    monkeypatch.undo()
    (problem,) = verify(tmp_path / "run")
    assert "safetensors is damaged" in problem
    with pytest.raises(CorruptRecordingError, match=why):
        load(tmp_path / "run")["up"].compute()


def test_what_is_stored_can_only_be_read(tmp_path: Path) -> None:
    units(tmp_path / "run", {"up": reduce.Norms()}, [0])
    layer = load(tmp_path / "run")["up"]
    for change in (lambda: layer._keep(XS, 0), lambda: layer._drop(0), layer.clear):
        with pytest.raises(ActrecError, match="this is a stored recording, which can only be read"):
            change()
    with pytest.raises(ActrecError, match="they were reduced by Norms"):
        layer[0]
