"""Reductions: what the calls of a layer come to, computed while they are recorded."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import ActrecError, CaptureError, OptionError, record, reduce

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KINDS: dict[str, Callable[..., reduce.Reduction]] = {
    "moments": reduce.Moments,
    "covariance": partial(reduce.Moments, covariance=True),
    "norms": reduce.Norms,
    "absolute": partial(reduce.Norms, ord=1),
    "largest": partial(reduce.Norms, ord=math.inf),
    "cubes": partial(reduce.Norms, ord=3),
    "histogram": partial(reduce.Histogram, edges=[-1.0, 0.0, 0.5, 2.0]),
    "histograms": partial(reduce.Histogram, edges=[-1.0, 0.0, 0.5, 2.0], dim=-1),
    "top": partial(reduce.TopK, k=3),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], expected[k]) for k in found)
    return torch.allclose(found.double(), expected.double(), rtol=1e-12, atol=1e-12, equal_nan=True)


class Mean:
    """A metric with the protocol of torchmetrics."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def update(self, value: Tensor) -> None:
        self.total += (value.float() @ torch.eye(value.shape[-1])).sum()
        self.count += value.numel()

    def compute(self) -> Tensor:
        return self.total / self.count

    def __iter__(self) -> Any:
        raise NotImplementedError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, width: int = 3) -> Tensor:
        return self.down(self.up(x).relu_().view(*x.shape[:-1], width))


# --- Laws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_however_rows_are_portioned_and_merged_the_result_is_that_of_all(
    kind: str, sizes: list[int], cut: int
) -> None:
    values = [numbers(size, 3, seed=at) for at, size in enumerate(sizes)]
    whole, parts = KINDS[kind](), [KINDS[kind](), KINDS[kind]()]
    whole.update(torch.cat(values))
    for at, value in enumerate(values):
        parts[at >= cut].update(value)
    parts[0].merge(parts[1])
    found, expected = parts[0].compute(), whole.compute()
    if kind == "top":  # places are those of the portions
        found, expected = (
            found.get("values", torch.zeros(0)),
            expected.get("values", torch.zeros(0)),
        )
    assert close(found, expected)
    assert parts[0].rows == sum(sizes) * (3 if kind == "histogram" else 1)
    assert close(reduce.KINDS[type(whole).__name__].of(whole.state()).compute(), whole.compute())


def test_each_reduction_is_what_torch_computes_of_all_rows() -> None:
    x = numbers(2, 5, 3)
    rows = x.reshape(-1, 3).double()
    made = {name: make() for name, make in KINDS.items()}
    for one in made.values():
        one.update(x)
    moments = made["covariance"].compute()
    assert close(moments["mean"], rows.mean(0))
    assert close(moments["var"], rows.var(0))
    assert close(moments["std"], rows.std(0))
    assert close(moments["cov"], rows.T.cov())
    for name, order in {"norms": 2, "absolute": 1, "largest": math.inf, "cubes": 3}.items():
        assert close(made[name].compute(), torch.linalg.vector_norm(rows, order, dim=0))
    edges = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    assert close(made["histogram"].compute(), torch.histogram(x.flatten(), edges).hist)
    assert close(
        made["histograms"].compute(),
        torch.stack([torch.histogram(x[..., c].flatten(), edges).hist for c in range(3)]),
    )
    top = made["top"].compute()
    for at in range(3):
        for channel in range(3):
            place = top["sample"][at, channel], top["position"][at, channel]
            assert top["values"][at, channel] == x[*place, channel]
    assert torch.equal(top["values"], x.reshape(-1, 3).sort(0, descending=True).values[:3])


def test_the_largest_values_know_the_rank_that_counted_their_passes() -> None:
    tops = [reduce.TopK(k=2), reduce.TopK(k=2)]
    for rank, top in enumerate(tops):
        top.of_rank(rank)
        top.update(torch.tensor([[float(rank)]]), number=5)
        top.of_rank(rank)
    tops[0].merge(tops[1])
    assert tops[0].compute()["rank"].tolist() == [[1], [0]]
    assert tops[0].compute()["pass"].tolist() == [[5], [5]]


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x = numbers(1000, 2).double() + 1e8
    moments = reduce.Moments()
    for part in x.split(7):
        moments.update(part)
    assert torch.allclose(moments.compute()["var"], x.var(0), rtol=1e-6)


def test_counts_are_exact_at_edges_and_for_what_is_no_number() -> None:
    histogram = reduce.Histogram(edges=[0.0, 1.0, 2.0])
    histogram.update(torch.tensor([-math.inf, 0.0, 1.0, 2.0, 2.5, math.inf, math.nan]))
    assert histogram.compute().tolist() == [1, 2]
    assert (histogram.below, histogram.above, histogram.nan) == (1, 2, 1)


def test_a_histogram_of_nothing_has_empty_bins() -> None:
    assert reduce.Histogram(edges=[0, 1]).compute().tolist() == [0]
    assert reduce.Histogram(edges=[0, 1], dim=-1).compute().shape == (0, 1)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_dim_says_where_the_channels_are(dim: int | None) -> None:
    x = numbers(2, 3, 4)
    norms = reduce.Norms(dim=dim)
    norms.update(x)
    rows = x.reshape(-1, 1) if dim is None else x.movedim(dim, -1).reshape(-1, x.shape[dim])
    assert close(norms.compute(), rows.double().norm(dim=0))


def test_a_number_is_one_row() -> None:
    moments = reduce.Moments()
    moments.update(torch.tensor(3.0))
    assert moments.compute()["mean"].tolist() == [3.0]
    assert moments.compute()["var"].isnan().all()


def test_bits_and_integers_and_half_precision_are_computed_in_float64() -> None:
    for dtype in (torch.bool, torch.int8, torch.float16, torch.bfloat16):
        moments = reduce.Moments()
        moments.update(torch.ones(3, 2, dtype=dtype))
        assert moments.compute()["mean"].dtype is torch.float64


# --- Masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mask_leaves_out_is_as_if_it_was_never_there(kind: str, side: str) -> None:
    rows = [numbers(2, 3, seed=1), numbers(4, 3, seed=2)]
    padded = torch.full((2, 4, 3), 99.0)
    mask = torch.zeros(2, 4, dtype=torch.long)
    for at, row in enumerate(rows):
        where = slice(-len(row), None) if side == "left" else slice(0, len(row))
        padded[at, where], mask[at, where] = row, 1
    found, expected = KINDS[kind](), KINDS[kind]()
    found.update(padded, mask)
    expected.update(torch.cat(rows))
    if kind == "top":
        top = found.compute()
        places = top["sample"], top["position"], torch.arange(3).expand(3, 3)
        assert torch.equal(top["values"], padded[places])
        assert torch.equal(top["values"], expected.compute()["values"])
    else:
        assert close(found.compute(), expected.compute())


def test_a_mask_may_be_longer_flat_or_of_samples() -> None:
    x = numbers(2, 3, 4)
    mask = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    norms = [reduce.Norms() for _ in range(4)]
    norms[0].update(x, mask)
    norms[1].update(x.reshape(6, 4), mask[:, -3:])
    assert close(norms[0].compute(), norms[1].compute())
    norms[2].update(x, torch.tensor([True, False]))
    norms[3].update(x[:1])
    assert close(norms[2].compute(), norms[3].compute())


def test_a_mask_that_fits_nothing_is_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"mask of shape \(2, 2\) does not fit rows of shape \(2, 3\)"
    ):
        reduce.Norms().update(numbers(2, 3, 4), torch.ones(2, 2))


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reduce.Moments(dim="last"), "dim='last'"),
        (lambda: reduce.Moments(mask=torch.ones(2)), "mask=Tensor.*the name"),
        (lambda: reduce.Norms(ord=0), "ord=0.*above 0"),
        (lambda: reduce.Norms(ord="fro"), "ord='fro'"),
        (lambda: reduce.TopK(k=0), "k=0"),
        (lambda: reduce.Histogram(edges=[1.0]), "two numbers or more"),
        (lambda: reduce.Histogram(edges=[1.0, 0.0]), "ascending"),
        (lambda: reduce.Norms().merge(reduce.Moments()), "different kinds"),
        (lambda: reduce.Norms().merge(reduce.Norms(ord=1)), "different kinds or settings"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((numbers(2), numbers(2)), "this value has 2; choose one with a transform"),
        (numbers(2).to(torch.complex64), "complex"),
        (numbers(2, 5), "5 channels came after one with 3"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_do_not_fit_are_refused(kind: str, value: Any, message: str) -> None:
    one = KINDS[kind]()
    one.update(numbers(2, 3))
    if message.startswith("5") and kind == "histogram":
        return  # of all elements
    with pytest.raises(CaptureError, match=message):
        one.update(value)
    assert one.rows == (6 if kind == "histogram" else 2)


def test_a_dimension_that_is_not_there_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"shape \(2, 3\) has no dimension 2"):
        reduce.Norms(dim=2).update(numbers(2, 3))


# --- While recording ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_a_metric_is_updated_by_each_call_in_a_clean_room(autocast: bool) -> None:
    model, xs = Net(), numbers(3, 2, 5, 4)
    with torch.autocast("cpu", enabled=False), record(model, "up") as kept:
        for x in xs:
            model(x)
    with (
        torch.autocast("cpu", enabled=autocast),
        record(model, "up", dtype=torch.float32, into=Mean) as acts,
    ):
        for x in xs:
            model(x)
    assert acts["up"].total.dtype is torch.float32
    assert torch.allclose(
        acts["up"].compute(), kept["up"].cat().mean(), atol=2e-2 if autocast else 1e-6
    )
    assert acts["up"].passes == [0, 1, 2]
    assert isinstance(acts["up"].sink, Mean)
    assert "Mean" in repr(acts)
    acts["up"].clear()
    assert len(acts["up"]) == acts["up"].sink.count == 0


@torch.no_grad()
def test_a_metric_gets_the_one_tensor_of_a_value_or_the_value() -> None:
    class Seen(Mean):
        def update(self, value: Any) -> None:
            self.total = value

    model = Net()
    with record(model, {"up": lambda t: (t, t + 1)}, inputs="down", into=Seen) as acts:
        model(numbers(2, 4))
    assert isinstance(acts["up"].total, tuple)
    assert acts.inputs["down"].total.shape == (2, 3)


@torch.no_grad()
def test_inputs_are_reduced_by_query() -> None:
    model, xs = Net(), numbers(3, 2, 5, 4)
    with record(model, (), inputs=nn.Linear) as kept:
        for x in xs:
            model(x)
    with record(model, (), inputs=nn.Linear, into=reduce.Norms) as acts:
        for x in xs:
            model(x)
    for name, layer in acts.inputs.items():
        rows = kept.inputs[name].cat()["input"].reshape(-1, layer.compute().numel())
        assert close(layer.compute(), rows.double().norm(dim=0))


@torch.no_grad()
def test_a_mask_is_that_which_is_added_in_the_same_pass() -> None:
    model = Net()
    make = partial(reduce.Moments, mask="mask")
    masks = torch.tensor([[[0, 1, 1], [1, 1, 1]], [[0, 0, 1], [0, 1, 1]]])
    xs = numbers(2, 2, 3, 4)
    with record(model, "up", into=make) as acts:
        for x, mask in zip(xs, masks, strict=True):
            model(x)
            assert len(acts["up"]) == len(acts.get("mask", ()))
            acts.add("ids", torch.zeros(2, 3))
            acts.add("mask", mask)
    assert close(
        acts["up"].compute()["mean"],
        torch.stack([model.up(x) for x in xs])[masks.bool()].double().mean(0),
    )
    assert acts["up"].passes == [0, 1]


def test_a_mask_that_was_never_added_is_missed() -> None:
    model = Net()
    with (
        pytest.raises(CaptureError, match=r"no value 'mask' was added in pass 0.*acts.add\('mask'"),
        record(model, "up", into=partial(reduce.Norms, mask="mask")) as acts,
    ):
        model(numbers(2, 4))
    assert len(acts["up"]) == 0


def test_a_pass_that_raised_needs_no_mask() -> None:
    model = Net()
    with record(model, "up", into=partial(reduce.Norms, mask="mask")) as acts:
        with pytest.raises(RuntimeError):
            model(numbers(2, 3, 4), width=5)
        model(numbers(2, 3, 4))
        acts.add("mask", torch.ones(2, 3))
    assert acts["up"].passes == [acts.num_passes - 1]


def test_calls_cannot_be_read_and_the_message_says_what_can() -> None:
    model = Net()
    with record(model, "up", into=reduce.Norms) as acts:
        model(numbers(2, 4))
    for read in (
        lambda layer: layer[0],
        list,
        lambda layer: layer.cat(),
        lambda layer: layer._of([0]),
    ):
        with pytest.raises(
            ActrecError, match=r"reduced by Norms. The result is acts\['up'\].compute\(\)"
        ):
            read(acts["up"])
    with pytest.raises(AttributeError):
        acts["up"].nothing_of_that_name  # noqa: B018


def test_calls_that_were_kept_have_no_result_and_the_message_says_how_to_get_one() -> None:
    model = Net()
    with record(model, "up") as acts:
        model(numbers(2, 4))
    for ask in (acts["up"].compute, lambda: acts["up"].merge_into(reduce.Norms())):
        with pytest.raises(ActrecError, match=r"were kept.*record\(model, \{'up': actrec.reduce"):
            ask()

    class Calls(list[Any]):
        def compute(self) -> int:
            return len(self)

    with record(model, "up", into=Calls) as acts:
        model(numbers(2, 4))
    assert acts["up"].compute() == 1


@pytest.mark.parametrize("into", [reduce.Norms, reduce.Norms()])
def test_gradients_are_not_reduced_as_they_come(into: Any) -> None:
    with pytest.raises(OptionError, match=r"the gradient of 'up' .* cannot be reduced as it comes"):
        record(Net(), "up", grads=True, into=into)


def test_what_was_reduced_can_be_copied() -> None:
    model = Net()
    with record(model, "up", into=reduce.Norms) as acts:
        model(numbers(2, 4))
    copied = copy.deepcopy(acts)
    acts["up"].update(numbers(2, 3))
    assert copied["up"].rows == 2
    copied["up"]._keep(numbers(2, 3), 7)
    assert copied["up"].passes == [0, 7]


# --- Several calls of a unit -----------------------------------------------------------------------------------


def unit(masks: list[Tensor], calls: list[Tensor], *, mask: str | None = "mask") -> Any:
    """A layer that has had the calls of one unit."""
    from actrec._calls.reduced import ReducedLayer

    undecided = {3}
    make = partial(reduce.TopK, k=100, mask=mask)
    layer = ReducedLayer("up", make, "Linear", undecided)
    for call in calls:
        layer._keep(call, 3)
    for one in masks:
        layer.add("mask", one, 3)
    assert len(layer) == 0
    return layer


def settle(layer: Any) -> None:
    """The unit ends."""
    layer._settle(3)
    layer._undecided.discard(3)


def test_the_calls_of_a_unit_are_joined_along_the_positions() -> None:
    x = numbers(2, 5, 3)
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    parts = list(x.split([3, 1, 1], dim=1))
    whole = reduce.TopK(k=100)
    whole.update(x, mask, number=3)
    layer = unit([mask], parts)
    settle(layer)
    assert close(layer.compute(), whole.compute())
    assert layer.passes == [3, 3, 3]
    layer = unit(list(mask.split([3, 1, 1], dim=1)), parts)
    settle(layer)
    assert close(layer.compute(), whole.compute())


def test_one_entry_for_each_sample_holds_for_all_calls() -> None:
    x = numbers(2, 3)
    layer = unit([torch.tensor([1, 0])], [x, x])
    settle(layer)
    assert layer.rows == 2


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([], "no value 'mask' was added in pass 3"),
        ([torch.ones(2, 4)], "too short for the 5 positions of 3 calls"),
        ([torch.ones(2, 4)] * 2, "2 masks and 3 calls"),
    ],
)
def test_a_mask_that_does_not_fit_a_unit_is_refused_and_nothing_is_taken_in(
    masks: list[Tensor], message: str
) -> None:
    layer = unit(masks, list(numbers(2, 5, 3).split([3, 1, 1], dim=1)))
    with pytest.raises(ActrecError, match=message):
        layer._settle(3)
    assert len(layer) == layer.rows == 0


def test_a_unit_that_is_dropped_leaves_nothing() -> None:
    layer = unit([torch.ones(2, 5)], [numbers(2, 5, 3)])
    layer._drop(3)
    layer._settle(3)
    assert layer.rows == 0
    assert layer.unmasked(()) is None


def test_a_unit_that_is_dropped_because_of_another_layer_leaves_nothing() -> None:
    layer = unit([torch.ones(2, 5)], [numbers(2, 5, 3)])
    layer._settle(3)
    assert layer.rows == len(layer) == 0  # the unit has not ended
    layer._drop(3)
    layer._undecided.discard(3)
    assert layer.rows == len(layer) == 0
    layer._keep(numbers(2, 5, 3), 4)
    layer.add("mask", torch.ones(2, 5), 4)
    assert layer.rows == 10


@torch.no_grad()
def test_units_are_reduced_whole_or_not_at_all() -> None:
    model, xs = Net(), numbers(3, 2, 5, 4)
    masks = [torch.ones(2, 5), torch.ones(2, 2), torch.ones(2, 5)]
    with record(model, ["up", "down"], into=partial(reduce.Moments, mask="mask")) as acts:
        for key, (x, mask) in enumerate(zip(xs, masks, strict=True)):
            fails = mask.shape[1] < 5
            with (
                pytest.raises(CaptureError, match="too short") if fails else nullcontext(),
                acts.unit(key),
            ):
                model(x[:, :3])
                model(x[:, 3:])
                acts.add("mask", mask)
    assert acts["up"].units == acts["down"].units == [0, 0, 2, 2]
    rows = torch.cat(
        [model.up(xs[at][:, part]) for at in (0, 2) for part in (slice(3), slice(3, 5))], dim=1
    )
    assert close(acts["up"].compute()["mean"], rows.reshape(-1, 3).double().mean(0))


@torch.no_grad()
def test_a_metric_gets_the_calls_of_a_unit_when_it_ends() -> None:
    model = Net()
    with record(model, "up", into=Mean) as acts:
        with pytest.raises(ZeroDivisionError), acts.unit("a"):
            model(numbers(2, 4))
            1 / 0  # noqa: B018
        with acts.unit("a"):
            model(numbers(2, 4))
            assert acts["up"].sink.count == 0
    assert acts["up"].sink.count == 6


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_pass_outside_of_the_units_is_not_taken_for_one_of_them(
    is_stored: bool, tmp_path: Path
) -> None:
    layer = nn.Identity()
    into = tmp_path / "r" if is_stored else list
    with record(layer, {"": reduce.TopK(k=2)}, into=into) as acts:
        with acts.unit(1):
            layer(torch.ones(1, 1))
        layer(torch.zeros(1, 1))
    assert acts[""].compute()["unit"] == [[1], [None]]
    assert acts[""].compute()["pass"].tolist() == [[0], [1]]


@pytest.mark.parametrize(
    "value", [torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2).to(torch.float8_e4m3fn)]
)
def test_what_cannot_be_ordered_is_said(value: Tensor) -> None:
    layer = nn.Identity()
    with (
        pytest.raises(CaptureError, match=r"layer '': TopK cannot order values of .*float\(\)"),
        record(layer, "", into=partial(reduce.TopK, k=2)),
    ):
        layer(value)
