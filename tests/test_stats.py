"""Statistics: exact where floats allow it, of every kind of tensor, in bounded memory."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import ActrecError, JoinError, Stats, UnusedLayerWarning, load, record
from actrec._recordings.in_memory import ListLayer
from actrec._recordings.stats import Row
from actrec._values import chunks as _blocks
from actrec._values.histogram import Bins, Histogram
from actrec._values.statistics import Statistics
from tests.made import made

if TYPE_CHECKING:
    from collections.abc import Iterator

NAN, INF = math.nan, math.inf


def only(*values: Any) -> Row:
    (row,) = made(a=list(values)).stats()
    return row


def exact(values: np.ndarray[Any, Any]) -> tuple[Fraction, Fraction]:
    """Mean and variance of a sample as they are."""
    fractions = [Fraction(float(value)) for value in values]
    mean = sum(fractions, Fraction(0)) / len(fractions)
    return mean, sum(((f - mean) ** 2 for f in fractions), Fraction(0)) / (len(fractions) - 1)


# --- Right -------------------------------------------------------------------------------------------


def test_statistics_run_over_all_calls() -> None:
    row = only(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0], [NAN, -INF]]))
    low, high, counts = (0.0, 1.0, 2.0, 5.0), (0.0, 1.0625, 2.125, 5.25), (1, 1, 1, 1)
    histogram = Histogram(low, high, counts)
    expected = Row(
        "a", "", 6, 2.0, math.sqrt(14 / 3), 0.0, 5.0, 1 / 6, 1, 1, 24, 1, "(1-2, 2)", histogram
    )
    assert row == expected


numbers = st.floats(-1e6, 1e6, width=32) | st.sampled_from([NAN, INF, -INF, 0.0, -0.0])


@settings(deadline=None)
@given(st.lists(st.lists(numbers, max_size=30), min_size=1, max_size=5), st.integers(1, 7))
def test_they_are_what_numpy_says(calls: list[list[float]], block: int) -> None:
    before, _blocks.BLOCK = _blocks.BLOCK, block
    try:
        row = only(*map(torch.tensor, calls))
    finally:
        _blocks.BLOCK = before
    data = np.array([x for call in calls for x in call])
    finite = data[np.isfinite(data)]
    assert (row.count, row.nan, row.inf) == (
        data.size, int(np.isnan(data).sum()), int(np.isinf(data).sum()),
    )  # fmt: skip
    if data.size:
        assert row.zeros == (data == 0).mean()
    else:
        assert math.isnan(row.zeros)
    if finite.size:
        assert (row.min, row.max) == (finite.min(), finite.max())
        assert row.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-9)
    if finite.size > 1:
        assert row.std == pytest.approx(finite.std(ddof=1), rel=1e-9, abs=1e-9)
    else:
        assert math.isnan(row.std), "as torch.std says of one element"
    if not finite.size:
        assert all(map(math.isnan, (row.mean, row.min, row.max)))


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8, -1e12, 1e15])
@pytest.mark.parametrize("size", [7, 40_000])
def test_a_large_mean_does_not_drown_a_small_variance(offset: float, size: int) -> None:
    data = offset + np.random.default_rng(0).normal(size=size)
    row = only(*torch.from_numpy(data).split(999))
    mean, variance = exact(data)
    assert row.mean == pytest.approx(float(mean), rel=1e-15)
    assert row.std == pytest.approx(float(variance) ** 0.5, rel=1e-12)


def test_blocks_of_very_different_size_merge_without_loss() -> None:
    data = np.concatenate([np.zeros(50_000), np.full(50_000, 1e8), [3e9], np.full(9, -1e-8)])
    row = only(torch.from_numpy(data))
    mean, variance = exact(data)
    assert row.mean == pytest.approx(float(mean), rel=1e-15)
    assert row.std == pytest.approx(float(variance) ** 0.5, rel=1e-13)


def test_equal_values_have_no_deviation() -> None:
    assert only(torch.full((100_000,), 0.1)).std == 0


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_small_floats_are_exact(dtype: torch.dtype) -> None:
    values = torch.randn(50_000).to(dtype)
    row = only(values)
    mean, variance = exact(values.double().numpy())
    assert row.mean == pytest.approx(float(mean), rel=1e-14)
    assert row.std == pytest.approx(float(variance) ** 0.5, rel=1e-14)
    assert (row.min, row.max) == (values.double().min(), values.double().max())
    assert row.nbytes == values.nbytes


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ],
    ids=str,
)
def test_integers_count(dtype: torch.dtype) -> None:
    row = only(torch.tensor([0, 1, 5], dtype=dtype))
    assert (row.count, row.mean, row.min, row.max, row.zeros) == (3, 2, 0, 5, 1 / 3)


def test_large_integers_keep_their_extremes() -> None:
    row = only(torch.tensor([2**62 + 1, -(2**62) - 1]))
    assert (row.min, row.max) == (-(2**62) - 1, 2**62 + 1)


def test_bools_count_as_zero_and_one() -> None:
    row = only(torch.tensor([True, True, False, True]))
    assert (row.mean, row.min, row.max, row.zeros, row.nbytes) == (0.75, 0, 1, 0.25, 4)


def test_complex_numbers_count_with_their_modulus() -> None:
    row = only(
        torch.tensor([3 + 4j, 0j, complex(NAN, 1), complex(0, INF)]), torch.tensor([5 + 0j]).conj()
    )
    assert row.mean == pytest.approx(10 / 3)
    assert (row.min, row.max, row.zeros, row.nan, row.inf) == (0, 5, 0.2, 1, 1)


def test_negative_zero_is_zero() -> None:
    assert only(torch.tensor([-0.0, 1.0])).zeros == 0.5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
def test_other_kinds_of_tensors_count_with_what_they_stand_for() -> None:
    dense = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    for kind in (
        dense.to_sparse(),
        torch.nested.nested_tensor(list(dense), layout=torch.strided),
        torch.nested.nested_tensor(list(dense), layout=torch.jagged),
        dense.T,
        dense.requires_grad_(),
    ):
        row = only(kind)
        assert (row.count, row.mean, row.max, row.zeros) == (4, 1.5, 4, 0.5)


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_quantized_tensors_count_with_the_numbers_that_they_stand_for() -> None:
    row = only(torch.quantize_per_tensor(torch.tensor([0.0, 1.0]), 0.5, 0, torch.qint8))
    assert (row.mean, row.max) == (0.5, 1)


def test_tensors_without_data_or_elements_count_nothing() -> None:
    for nothing in (torch.empty(3, device="meta"), torch.empty(0, 3), "text"):
        row = only(nothing)
        assert (row.count, row.nbytes, row.nan) == (0, 0, 0)
        assert math.isnan(row.mean)
        assert math.isnan(row.zeros)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 50, 60, 70).to(memory_format=torch.channels_last),
        lambda: torch.randn(1000, 100).T,
        lambda: torch.randn(1, 50).expand(3000, 50),
        lambda: torch.randn(200, 1000)[:, ::2],
        lambda: torch.randn(100_000),
        lambda: torch.tensor(1.5),
    ],
)
def test_what_lies_in_memory_in_any_order_is_read_once_in_small_blocks(make: Any) -> None:
    tensor: Tensor = make()
    seen = [block for (block,) in _blocks.blocks(tensor)]
    assert all(block.dim() == 1 and len(block) <= _blocks.BLOCK for block in seen)
    assert torch.equal(torch.cat(seen), tensor.reshape(-1))


SHAPES = st.sampled_from(
    [(40_001,), (3, 32_001), (2, 7, 9_000), (5, 3, 70, 70), (33, 1_000, 2), (2, 2, 17, 33), (1, 1)]
)


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(
    shape=SHAPES,
    order=st.randoms(use_true_random=False),
    stride=st.sampled_from([1, 1, 2]),
    expanded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
    scale=st.sampled_from([1.0, 1e4]),
)
def test_statistics_do_not_depend_on_how_a_tensor_lies_in_memory(  # noqa: PLR0917
    shape: tuple[int, ...],
    order: Any,
    stride: int,
    expanded: bool,
    dtype: torch.dtype,
    scale: float,
) -> None:
    dims = order.sample(range(len(shape)), len(shape))
    stored = [1 if expanded and dim == dims[0] else shape[dim] for dim in dims]
    stored[-1] *= stride
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(stored, generator=generator, dtype=torch.float32).mul(scale).add(scale / 3)
    tensor = tensor.to(dtype)[..., ::stride]
    tensor = tensor.permute([dims.index(dim) for dim in range(len(shape))]).expand(shape)
    here, there = (made(x=[value]).stats() for value in (tensor, tensor.contiguous()))
    with TemporaryDirectory() as folder:
        made(x=[tensor]).save(Path(folder) / "run")
        on_disk = load(Path(folder) / "run").stats()
    assert here == there == on_disk


def test_nothing_is_changed() -> None:
    values = [torch.randn(3).double(), torch.tensor([1.0, NAN]).double()]
    copies = [value.clone() for value in values]
    made(a=values).stats()
    assert all(
        torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(values, copies, strict=True)
    )


def test_one_call_is_in_memory_at_a_time() -> None:
    alive: list[int] = []

    class Lazy(ListLayer):
        def __iter__(self) -> Any:
            import weakref

            refs: list[Any] = []
            for index in range(5):
                value = torch.full((10,), float(index))
                refs.append(weakref.ref(value))
                alive.append(sum(ref() is not None for ref in refs))
                yield value
                del value

    layer = Lazy("a", range(5))
    assert made(a=layer).stats()[0].mean == 2
    assert max(alive) <= 2


# --- Rows --------------------------------------------------------------------------------------------


def test_nested_values_have_a_row_for_each_tensor() -> None:
    model = nn.LSTM(4, 2)
    with record(model, "") as acts:
        model(torch.ones(3, 4))
    assert [(row.layer, row.leaf, row.count) for row in acts.stats()] == [
        ("", "[0]", 6),
        ("", "[1][0]", 2),
        ("", "[1][1]", 2),
    ]


def test_rows_are_in_execution_order_and_layers_without_calls_come_last() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(UnusedLayerWarning), record(model, ["2", "1", "0"]) as acts:
        model[1](model[0](torch.ones(1, 4)))
    assert [row.layer for row in acts.stats()] == ["0", "1", "2"]
    assert acts.stats()[2].count == 0


def test_the_first_layer_with_a_nan_is_found_in_one_line() -> None:
    class Divide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.sum()

    model = nn.Sequential(nn.ReLU(), Divide(), nn.Tanh())
    with record(model, ["2", "1", "0"]) as acts:
        model(torch.ones(2))
        model(-torch.ones(2))
    first = acts.stats().first_nonfinite
    assert first is not None
    assert (first.layer, first.nan, first.nonfinite_pass) == ("1", 2, 1)


def test_the_unit_of_the_first_nan_is_named() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        for key, value in ((7, 1.0), ("b", NAN), ("c", NAN)):
            with acts.unit(key):
                model(torch.tensor([value]))
        model(torch.tensor([NAN]))
    first = acts.stats().first_nonfinite
    assert first is not None
    assert (first.nan, first.nonfinite_pass, first.nonfinite_unit) == (3, 1, "b")
    assert "first NaN: '', pass 1, unit 'b'" in repr(acts.stats())


def test_an_earlier_pass_comes_before_an_earlier_layer() -> None:
    fine, bad = torch.ones(1), torch.tensor([INF])
    first = made(a=[fine, fine, bad], b=[fine, bad, fine], c=[bad * 0 + 1, fine, bad]).stats()
    found = first.first_nonfinite
    assert found is not None
    assert found.layer == "c"  # inf * 0 is NaN, in pass 0
    assert made(a=[fine]).stats().first_nonfinite is None


def test_rows_make_a_data_frame() -> None:
    stats = made(a=[torch.ones(3)], b=[torch.tensor([NAN])]).stats()
    frame = pd.DataFrame(stats)
    assert list(frame["layer"]) == ["a", "b"]
    assert frame["count"].sum() == 4
    assert frame["mean"][0] == 1
    assert frame.shape == (2, 16)


def test_they_print_as_a_table() -> None:
    stats = made(
        a=[torch.tensor([0.0, 3.0])], b=[(torch.tensor([True]), torch.tensor([NAN]))], c=[]
    ).stats()
    assert isinstance(stats, Stats)
    assert repr(stats).splitlines() == [
        "statistics of 3 layers; first NaN: b[1], pass 0",
        "layer  shape  values, 0.5-99.5 %    mean    std  min  max  zeros  memory  note",
        "a      (2,)   █▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁█   1.5  2.121    0    3    50%     8 B",
        "b[0]   (1,)   █▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁     1           1    1     0%     1 B",
        "b[1]   (1,)   no finite value                                 0%     4 B  1 NaN",
        "c                                                                    0 B",
    ]
    assert isinstance(stats[1:3], Stats), "a slice prints as a table, too"
    assert repr(stats[:1]).splitlines()[0] == "statistics of 1 layer"
    assert stats[-1].layer == "c"
    assert '<td class="actrec-r">1.5</td>' in stats._repr_html_()
    assert "statistics of 3 layers" in stats._repr_html_()


def test_statistics_can_be_asked_for_inside_the_block() -> None:
    model = nn.Linear(4, 3)
    with record(model, "") as acts:
        assert acts.stats()[0].count == 0
        model(torch.ones(1, 4))
        assert acts.stats()[0].count == 3


def test_calls_that_cannot_be_read_are_named() -> None:
    class Sink:
        def append(self, value: Any) -> None: ...

    model = nn.Linear(4, 3)
    with record(model, "", into=Sink) as acts:
        model(torch.ones(1, 4))
    for read in (acts.stats, acts[""].cat, acts[""].stack, acts.cat):
        with pytest.raises(ActrecError, match="from which they cannot be read"):
            read()


def test_a_container_that_has_not_all_calls_is_not_joined() -> None:
    class First:
        def __init__(self) -> None:
            self.items: list[Any] = []

        def append(self, value: Any) -> None:
            self.items += [value] * (not self.items)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.items)

    model = nn.Linear(4, 3)
    with record(model, "", into=First) as acts:
        model(torch.ones(1, 4))
        assert acts[""].cat().shape == (1, 3)
        model(torch.ones(1, 4))
    with pytest.raises(JoinError, match=r"has 1 of 2 calls. Join its items: acts\[''\].sink"):
        acts[""].cat()


def test_moments_of_nothing_are_nan() -> None:
    moments = Statistics()
    assert all(map(math.isnan, (moments.mean, moments.std, moments.zero_share)))


# --- Histograms --------------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def histogram(*calls: list[float]) -> Histogram:
    bins = Bins()
    for call in calls:
        bins.add(torch.tensor(call, dtype=torch.float32))
    return bins.histogram()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(FLOATS, min_size=1, max_size=9), min_size=1, max_size=5), st.randoms())
def test_the_histogram_of_calls_is_that_of_all_their_elements_in_any_order(
    calls: list[list[float]], random: Any
) -> None:
    numbers = [number for call in calls for number in call]
    found = histogram(*calls)
    shuffled = list(numbers)
    random.shuffle(shuffled)
    assert histogram(shuffled) == found
    assert found.total == len(numbers)
    assert list(found.low) == sorted(found.low)
    for number in numbers:
        inside = [a <= number <= b for a, b in zip(found.low, found.high, strict=True)]
        assert any(inside) or abs(number) < 1e-38


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_is_as_exact_as_a_bin(numbers: list[float], share: float) -> None:
    ranked = sorted(numbers)
    place = min(int(share * len(ranked)), len(ranked) - 1)
    near = ranked[max(place - 1, 0)], ranked[min(place + 1, len(ranked) - 1)]
    found = histogram(numbers).quantile(share)
    slack = 0.07 * max(map(abs, near)) + 1e-37
    assert near[0] - slack <= found <= near[1] + slack


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50),
    st.floats(-2e3, 2e3),
    st.floats(0, 2e3),
    st.integers(1, 50),
)
def test_every_number_is_in_one_bar(
    numbers: list[float], low: float, width: float, many: int
) -> None:
    bars = histogram(numbers).bars(low, low + width, many)
    assert len(bars) == many
    assert sum(bars) == pytest.approx(len(numbers))
    assert min(bars) >= 0


def test_bars_follow_the_numbers() -> None:
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    bins = Bins()
    bins.add(numbers)
    expected = torch.histc(numbers, 20, -2.5, 2.5)
    bars = torch.tensor(bins.histogram().bars(-2.5, 2.5, 20))
    assert torch.allclose(bars[1:-1], expected[1:-1], rtol=0.1)


def test_a_histogram_of_nothing_has_no_quantile_and_what_is_too_large_is_in_the_last_bin() -> None:
    assert math.isnan(Histogram().quantile(0.5))
    bins = Bins()
    bins.add(torch.tensor([1e300, -1e300], dtype=torch.float64))
    assert bins.histogram().counts == (1, 1)


# --- What is seen ------------------------------------------------------------------------------------


def test_the_title_says_what_was_not_finite_first_and_where() -> None:
    fine = torch.ones(2)
    titles = {
        "statistics of 1 layer": [fine],
        "statistics of 1 layer; first NaN: a, pass 1": [fine, fine * NAN],
        "statistics of 1 layer; first infinity: a, pass 0": [fine * INF, fine],
        "statistics of 1 layer; first NaN or infinity: a, pass 1": [fine, fine * INF, fine * NAN],
    }
    for title, calls in titles.items():
        stats = made(a=calls).stats()
        assert repr(stats).splitlines()[0] == title
    assert '<span class="actrec-bad">first NaN or infinity: a, pass 1</span>' in stats._repr_html_()
    assert '<span class="actrec-bad">2 NaN, 2 inf</span>' in stats._repr_html_()


def test_html_has_a_histogram_and_bars_for_zeros_and_memory_in_each_row() -> None:
    html = made(a=[torch.randn(50)], b=[torch.zeros(5)]).stats()._repr_html_()
    assert html.count("<svg") == html.count("</svg>") == 6
    assert html.count("<svg") == html.count('role="img" aria-label="')


def test_what_sticks_out_leaves_room_for_the_others() -> None:
    values = torch.cat([torch.zeros(10_000), torch.rand(1000)])
    line = repr(made(a=[values]).stats()).splitlines()[2]
    assert line.count("▁") < 5


def test_many_rows_fold_and_rows_whose_names_collide_stay_apart() -> None:
    layers = {f"h.{i}.{part}": [torch.ones(1)] for i in range(8) for part in "abcdefgh"}
    assert "<details" in made(**layers).stats()._repr_html_()
    layers["x"] = [(torch.ones(1), torch.ones(1))]
    layers["x[0]"] = [torch.ones(1)]
    stats = made(**layers).stats()
    assert stats._repr_html_().count("<tr>") == len(stats) + 1
