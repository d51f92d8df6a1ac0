"""Comparing recordings: the layer where they part is found, whatever else does not match."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import (
    Comparison,
    Opaque,
    OptionError,
    Recording,
    UnknownLayerError,
    UnusedLayerWarning,
    compare,
    load,
    record,
    reduce,
)
from actrec._values import chunks as _blocks
from tests.made import made
from tests.models import ConvNet, TinyTransformer

if TYPE_CHECKING:
    from pathlib import Path

    from actrec._recordings.comparison import Row

NAN, INF = math.nan, math.inf


def only(a: Any, b: Any, **options: Any) -> Row:
    (row,) = compare(made(x=[a]), made(x=[b]), **options)
    return row


def recorded(model: nn.Module, *inputs: Tensor, layers: Any = None, **options: Any) -> Recording:
    with record(model, layers, **options) as acts:
        for x in inputs:
            model(x)
    return acts


# --- What is found -----------------------------------------------------------------------------------


def test_a_recording_equals_itself() -> None:
    model = TinyTransformer()
    acts = recorded(model, model.example())
    result = compare(acts, recorded(model, model.example()))
    assert len(result) == len(acts)
    assert all(row.equal and row.close and row.max_abs == 0 and row.cosine == 1 for row in result)
    assert result.first_difference is None
    assert (result.only_a, result.only_b) == ((), ())


def test_a_model_in_a_wrapper_is_compared_layer_by_layer_with_the_bare_one() -> None:
    model = TinyTransformer()
    wrapped = nn.DataParallel(model)
    for query in (None, nn.Linear, "**", lambda _, module: isinstance(module, nn.Linear)):
        runs = [recorded(one, model.example(), layers=query) for one in (model, wrapped)]
        result = compare(*runs)
        assert (result.only_a, result.only_b) == ((), ())
        assert len(result) == len(runs[0])


def test_the_layer_with_another_eps_is_found() -> None:
    model = TinyTransformer()
    ported = copy.deepcopy(model)
    ported.blocks[1].norm1.eps = 1e-2
    a, b = (recorded(m, m.example()) for m in (model, ported))
    first = compare(a, b).first_difference
    assert first is not None
    assert first.layer == "blocks.1.norm1"


def test_the_layer_with_a_transposed_weight_is_found_under_its_new_name() -> None:
    class Ported(nn.Module):
        def __init__(self, model: TinyTransformer) -> None:
            super().__init__()
            self.transformer = copy.deepcopy(model)
            query = self.transformer.blocks[0].attention.query
            query.weight.data = query.weight.data.T.clone()

        def forward(self, ids: Tensor) -> Tensor:
            return self.transformer(ids)

    model = TinyTransformer()
    a, b = recorded(model, model.example()), recorded(Ported(model), model.example())
    assert len(compare(a, b)) == 0
    first = compare(a, b, lambda name: f"transformer.{name}").first_difference
    assert first is not None
    assert (first.layer, first.other) == (
        "blocks.0.attention.query",
        "transformer.blocks.0.attention.query",
    )


def test_first_means_the_earliest_pass_and_there_execution_order() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    a = made(x=[one, one], y=[one, one], z=[one, one])
    b = made(x=[one, two], y=[two, one], z=[two, one])
    first = compare(a, b).first_difference
    assert first is not None
    assert (first.layer, first.different_pass) == ("y", 0)


def test_rows_are_in_the_execution_order_of_the_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    a = recorded(model, torch.ones(1, 4), layers=["1", "0"])
    assert [row.layer for row in compare(a, recorded(model, torch.ones(1, 4)))] == ["0", "1"]


floats = st.floats(-1e3, 1e3, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=40), st.integers(1, 9))
def test_errors_are_what_numpy_says(pairs: list[tuple[float, float]], block: int) -> None:
    before, _blocks.BLOCK = _blocks.BLOCK, block
    try:
        row = only(*(torch.tensor(side) for side in zip(*pairs, strict=True)))
    finally:
        _blocks.BLOCK = before
    a, b = np.array(pairs, dtype=np.float64).T
    error = np.abs(a - b)
    assert row.max_abs == error.max()
    assert row.count == len(pairs)
    if error.max() == 0:
        assert row.max_rel == 0
    elif np.abs(b).max() == 0:
        assert row.max_rel == INF
    else:
        assert row.max_rel == error.max() / np.abs(b).max()
    assert row.close == bool((error <= 1e-5 + 1.3e-6 * np.abs(b)).all())
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    if lengths > 1e-100:
        assert row.cosine == pytest.approx(a @ b / lengths, abs=1e-12)


def test_close_is_between_equal_and_different() -> None:
    one = torch.ones(3)
    rows = [only(one, one + delta) for delta in (0, 1e-6, 1e-3)]
    assert [(row.equal, row.close) for row in rows] == [(True, True), (False, True), (False, False)]


def test_tolerances_can_be_given() -> None:
    one, other = torch.ones(3), torch.ones(3) * 1.01
    assert not only(one, other).close
    assert only(one, other, rtol=0.1).close
    assert only(one, other, atol=0.1).close
    assert not only(one, one + 1e-7, rtol=0, atol=0).close


@pytest.mark.parametrize(
    ("dtype", "near", "far"),
    [
        (torch.float16, 5e-4, 5e-3),
        (torch.bfloat16, 8e-3, 0.1),
        (torch.float64, 5e-8, 5e-7),
        (torch.float8_e4m3fn, 0, 0.25),
    ],
)
def test_the_tolerance_is_that_of_the_less_precise_dtype(
    dtype: torch.dtype, near: float, far: float
) -> None:
    one = torch.ones(2, dtype=torch.float64)
    assert only(one, (one + near).to(dtype)).close
    assert not only(one, (one + far).to(dtype)).close
    assert only((one + near).to(dtype), one).close


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("number", [1, 7, 8, 33_000])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.complex128])
def test_one_bit_is_seen_wherever_a_tensor_begins_and_ends(
    dtype: torch.dtype, number: int, start: int
) -> None:
    whole = torch.ones(number + 9, dtype=dtype)
    x, y = whole[start:][:number], torch.ones(number, dtype=dtype)
    assert only(x, y).equal
    y.view(torch.uint8)[-1] += 1
    assert not only(x, y).equal


def test_equal_means_bits_so_minus_zero_is_another_zero() -> None:
    row = only(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (row.equal, row.close, row.max_abs, row.max_rel, row.cosine) == (False, True, 0, 0, 1)


def test_nan_agrees_with_nan_and_an_infinity_with_its_like() -> None:
    odd = torch.tensor([NAN, INF, -INF, 1.0])
    row = only(odd, odd.clone())
    assert (row.equal, row.close, row.max_abs, row.cosine) == (True, True, 0, 1)
    row = only(odd.double(), odd)
    assert (row.equal, row.close, row.max_abs, row.cosine) == (False, True, 0, 1)


@pytest.mark.parametrize(
    ("one", "other"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF), (NAN, INF)]
)
def test_finite_against_not_is_infinitely_wrong(one: float, other: float) -> None:
    row = only(torch.tensor([one, 2.0]), torch.tensor([other, 2.0]))
    assert (row.max_abs, row.close, row.max_rel) == (INF, False, INF)
    assert row.cosine == 1  # of what is finite in both
    alone = only(torch.tensor([one]), torch.tensor([other]))
    assert alone.max_abs == INF
    assert math.isnan(alone.cosine), "nothing is finite in both"


def test_a_zero_against_something_has_no_angle() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert only(zero, one).cosine == 0
    assert only(one, -one).cosine == -1
    assert only(zero, zero.clone()).cosine == 1
    assert only(one, zero).max_rel == INF


def test_integers_and_bools_are_close_only_if_they_are_equal() -> None:
    for dtype in (torch.int32, torch.bool, torch.uint8):
        one = torch.tensor([0, 1], dtype=dtype)
        assert only(one, one.clone()).equal
        assert not only(one, torch.tensor([1, 1], dtype=dtype)).close
    large = torch.tensor([2**60])
    assert not only(large, large + 1).close
    assert only(torch.tensor([3]), torch.tensor([3], dtype=torch.int32)).close


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.uint32])
def test_integers_are_as_close_as_tolerances_that_are_given_say(dtype: torch.dtype) -> None:
    one, other = torch.tensor([0, 100]).to(dtype), torch.tensor([1, 98]).to(dtype)
    assert only(one, other, atol=2).close
    assert not only(one, other, atol=1).close
    assert only(one[1:], other[1:], rtol=0.1).close
    large = torch.tensor([2**60])
    assert not only(large, large + 1, rtol=0, atol=0).close
    assert only(large, large + 1, atol=1).close


def test_complex_numbers_differ_by_the_modulus() -> None:
    row = only(torch.tensor([3 + 4j]), torch.tensor([0j]))
    assert (row.max_abs, row.cosine) == (5, 0)
    assert only(torch.tensor([1j]), torch.tensor([1 + 0j])).cosine == 0
    assert only(torch.tensor([1j]), torch.tensor([1j]).conj().conj()).equal


def test_a_real_number_is_a_complex_one_without_an_imaginary_part() -> None:
    real, other = torch.tensor([3.0, 0.0]), torch.tensor([3.0 + 4.0j, 0.0])
    for row in (only(real, other), only(other, real)):
        assert (row.max_abs, row.close, row.cosine) == (4.0, False, pytest.approx(3 / 5))
    row = only(real.double(), real.to(torch.complex64))
    assert (row.equal, row.close, row.note) == (False, True, "float64 and complex64")


def test_nested_values_have_a_row_for_each_tensor() -> None:
    model = nn.LSTM(4, 2)
    a, b = (recorded(m, torch.ones(3, 4), layers="") for m in (model, copy.deepcopy(model)))
    assert [row.leaf for row in compare(a, b)] == ["[0]", "[1][0]", "[1][1]"]


def test_all_calls_count() -> None:
    xs = torch.randn(3, 2, 4)
    model = nn.Linear(4, 4)
    a, b = (recorded(m, *xs, layers="") for m in (model, model))
    (row,) = compare(a, b)
    assert (row.calls, row.count) == (3, 24)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantiz")
def test_other_kinds_of_tensors_are_compared_by_what_they_stand_for() -> None:
    dense = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    assert only(dense.to_sparse(), dense).equal
    assert not only(dense.to_sparse(), dense + 1).close
    ragged = torch.nested.nested_tensor([dense, dense[:1]], layout=torch.strided)
    assert only(ragged, ragged.clone()).equal
    other = torch.nested.nested_tensor([dense, dense[:1].T], layout=torch.strided)
    assert only(ragged, other).note == "call 0: nested in different ways, or only one has data"
    quantized = torch.quantize_per_tensor(dense, 1.0, 0, torch.qint8)
    assert only(quantized, dense).close


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors_are_equal_if_their_parts_are() -> None:
    def jagged(*lengths: int, add: float = 0.0) -> Tensor:
        parts = [torch.arange(3.0 * length).view(length, 3) + add for length in lengths]
        return torch.nested.nested_tensor(parts, layout=torch.jagged)

    assert only(jagged(2, 1), jagged(2, 1)).equal
    row = only(jagged(2, 1), jagged(2, 1, add=1.0))
    assert (row.max_abs, row.count, row.close, row.note) == (1.0, 9, False, "")
    row = only(jagged(2, 1), jagged(1, 2))
    assert (row.equal, row.note) == (
        False,
        "call 0: nested in different ways, or only one has data",
    )
    assert (
        only(jagged(2, 1), jagged(2, 1, 1)).note == "call 0: (2, 'ragged', 3) and (3, 'ragged', 3)"
    )
    acts = made(x=[jagged(2, 1), jagged(3, 1)])
    assert "(2, ragged, 3)" in repr(acts)


def test_memory_order_does_not_matter() -> None:
    images = torch.randn(4, 30, 40, 50)
    assert only(images, images.to(memory_format=torch.channels_last)).equal
    assert not only(images, images.to(memory_format=torch.channels_last) + 1).close
    assert only(torch.ones(1, 50).expand(2000, 50), torch.ones(2000, 50)).equal
    assert only(torch.ones(1).expand(4), torch.ones(8)[::2]).equal
    assert only(torch.ones(2, dtype=torch.float64)[::2], torch.ones(1).double().expand(1)).equal
    assert only(
        torch.ones(2, dtype=torch.complex128)[::2], torch.ones(1, dtype=torch.complex128)
    ).equal


# --- What does not match is told, not raised ---------------------------------------------------------


def test_other_shapes_are_told() -> None:
    ones = [torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2)]
    others = [torch.ones(2), torch.ones(3), torch.ones(1, 2), torch.ones(4)]
    (row,) = compare(made(x=ones), made(x=others))
    assert (row.equal, row.close, row.calls, row.different_pass) == (False, False, 1, 1)
    assert row.note == "call 1: (2,) and (3,); call 2: (2,) and (1, 2); 1 more"


def test_other_numbers_of_calls_are_told() -> None:
    one = torch.ones(2)
    for a, b, note in (([one], [one, one], "1 and 2 calls"), ([one, one], [one], "2 and 1 call")):
        (row,) = compare(made(x=a), made(x=b))
        assert (row.note, row.calls, row.close, row.different_pass) == (note, 1, False, 1)
    (row,) = compare(made(x=[]), made(x=[one]))
    assert (row.note, row.calls, row.different_pass) == ("0 and 1 call", 0, 0)
    assert math.isnan(row.max_abs)


def test_another_dtype_is_told_and_compared_all_the_same() -> None:
    row = only(torch.ones(2), torch.ones(2, dtype=torch.float16))
    assert (row.note, row.equal, row.close, row.max_abs) == ("float32 and float16", False, True, 0)


def test_another_structure_is_told() -> None:
    one = torch.ones(2)
    result = compare(made(x=[(one, one)]), made(x=[(one, [one])]))
    assert [(row.leaf, row.close, row.note) for row in result] == [
        ("[0]", True, ""),
        ("[1]", False, "call 0 only in a"),
        ("[1][0]", False, "call 0 only in b"),
    ]


def test_layers_that_only_one_has_are_listed() -> None:
    one = [torch.ones(2)]
    result = compare(made(a=one, both=one), made(b=one, both=one))
    assert (result.only_a, result.only_b) == (("a",), ("b",))
    assert [row.layer for row in result] == ["both"]
    assert "only in a: 'a'; only in b: 'b'" in repr(result)


def test_layers_that_were_never_called_have_nothing_to_compare() -> None:
    with pytest.warns(UnusedLayerWarning), record(nn.Linear(1, 1), "") as acts:
        pass
    (row,) = compare(acts, acts)
    assert (row.note, row.close, row.different_pass) == ("nothing to compare", True, None)
    assert math.isnan(row.cosine)
    (row,) = compare(made(x=[None]), made(x=[torch.float32]))
    assert row.note == "nothing to compare"


def test_tensors_without_elements_are_equal() -> None:
    row = only(torch.empty(0, 3), torch.empty(0, 3))
    assert (row.equal, row.calls, row.count) == (True, 1, 0)


# --- Names -------------------------------------------------------------------------------------------


def test_names_can_be_mapped_and_those_that_are_not_stay() -> None:
    one = [torch.ones(2)]
    result = compare(made(conv=one, fc=one), made(features=one, fc=one), {"conv": "features"})
    assert [(row.layer, row.other) for row in result] == [("conv", "features"), ("fc", "fc")]
    assert repr(result).splitlines()[2].startswith("conv -> features ")


def test_a_function_may_leave_layers_out() -> None:
    one = [torch.ones(2)]
    acts = made(a=one, b=one)
    result = compare(acts, acts, lambda name: None if name == "a" else name)
    assert [row.layer for row in result] == ["b"]
    assert (result.only_a, result.only_b) == ((), ("a",))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"cnov": "fc"}, r"compare\(names=.*: a has no layer 'cnov'. Did you mean 'conv'"),
        ({"conv": "fcc"}, r"compare\(names=.*: b has no layer 'fcc'. Did you mean 'fc'"),
    ],
)
def test_a_misspelled_name_in_a_mapping_is_an_error(names: dict[str, str], message: str) -> None:
    one = [torch.ones(2)]
    with pytest.raises(UnknownLayerError, match=message):
        compare(made(conv=one), made(fc=one), names)


def test_an_alias_is_the_layer_that_it_stands_for() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    acts = recorded(model, torch.ones(1, 4), layers="0")
    result = compare(acts, acts, {"1": "1"})
    assert [(row.layer, row.other) for row in result] == [("0", "0")]
    assert result.only_b == ()


def test_anything_but_a_recording_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"expected two recordings, .* got 'str'.* load\('"):
        compare("runs/a", made())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "value"), [("names", 5), ("names", "conv"), ("rtol", "1e-3"), ("atol", -1)]
)
def test_what_cannot_be_meant_is_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"compare\({argument}={value!r}\): expected"):
        compare(made(), made(), **{argument: value})


# --- Shown -------------------------------------------------------------------------------------------


def test_it_prints_as_a_table() -> None:
    a = made(a=[torch.tensor([1.0, 2.0])], b=[torch.ones(1)], c=[torch.ones(1)], d=[])
    b = made(a=[torch.tensor([1.0, 4.0])], b=[torch.ones(1)], c=[torch.ones(1).half()], d=[])
    result = compare(a, b)
    assert isinstance(result, Comparison)
    assert repr(result).splitlines() == [
        "compared 4 tensors of 4 layers: 1 equal, 1 close, 1 different, 1 with nothing to compare; different: first in a, pass 0",
        "layer  calls  count  max abs  max rel    cosine  verdict           note",
        "a          1      2        2      0.5  0.976187  different, first",
        "b          1      1        0        0  1.000000  equal",
        "c          1      1        0        0  1.000000  close             float32 and float16",
        "d          0      0                                                nothing to compare",
    ]
    assert "different: first in a, pass 0" in result._repr_html_()
    assert "<span>float32 and float16</span>" in result._repr_html_()


def test_a_slice_is_a_comparison_too() -> None:
    a, b = made(a=[torch.ones(2)], b=[torch.ones(1)], only=[]), made(a=[], b=[])
    some = compare(a, b)[:2]
    assert isinstance(some, Comparison)
    assert some.only_a == ("only",)
    assert [row.layer for row in some] == ["a", "b"]
    assert repr(some[1:]).splitlines()[0] == (
        "compared 1 tensor of 1 layer: 1 different; only in a: 'only'; different: first in b, pass 0"
    )
    assert some[0].layer == "a"


def test_nothing_in_common_is_a_table_too() -> None:
    assert (
        repr(compare(made(), made())).splitlines()[0]
        == "compared 0 tensors of 0 layers; no layer is in both"
    )


def test_rows_make_a_data_frame() -> None:
    model = ConvNet()
    acts = recorded(model, model.example())
    frame = pd.DataFrame(compare(acts, acts))
    assert list(frame["layer"]) == acts.execution_order
    assert frame["equal"].all()


def test_nothing_is_changed() -> None:
    values = [torch.tensor([1.0, NAN]).double(), torch.tensor([2.0, INF]).double()]
    copies = [value.clone() for value in values]
    only(*values)
    assert all(
        torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(values, copies, strict=True)
    )


# --- What is seen ------------------------------------------------------------------------------------

ONE = torch.ones(2)
VERDICTS: dict[str, tuple[Any, Any, str, tuple[bool, bool]]] = {
    "equal": (made(x=[ONE]), made(x=[ONE]), "compared 1 tensor of 1 layer: 1 equal; equal", (True, True)),
    "close": (made(x=[ONE]), made(x=[ONE + 1e-6]), "1 close; close", (False, True)),
    "different": (made(x=[ONE], y=[ONE]), made(x=[ONE], y=[-ONE]), "1 equal, 1 different; different: first in y, pass 0", (False, False)),
    "one is missing": (made(x=[ONE], y=[]), made(x=[ONE]), "only in a: 'y'; layers are missing", (False, False)),
    "nothing in common": (made(x=[ONE]), made(y=[ONE]), "; no layer is in both", (False, False)),
    "nothing to compare": (made(x=[ONE], y=[]), made(x=[ONE], y=[]), "1 equal, 1 with nothing to compare; equal", (True, True)),
}  # fmt: skip


@pytest.mark.parametrize(("a", "b", "title", "truths"), VERDICTS.values(), ids=VERDICTS)
def test_the_title_has_the_verdict_in_words_and_counts_every_row(
    a: Recording, b: Recording, title: str, truths: tuple[bool, bool]
) -> None:
    found = compare(a, b)
    assert repr(found).splitlines()[0].endswith(title)
    assert (found.equal, found.close, found.different) == (*truths, not truths[1])
    tone = "good" if truths[1] else "bad"
    assert f'<span class="actrec-{tone}">' in found._repr_html_()


def test_a_comparison_is_neither_true_nor_false() -> None:
    with pytest.raises(TypeError, match=r"use \.equal, \.close or \.different"):
        bool(compare(made(x=[ONE]), made(x=[ONE])))


def test_nan_is_called_nan() -> None:
    bad = torch.tensor([1.0, NAN, NAN])
    result = compare(made(x=[bad]), made(x=[bad.nan_to_num()]))
    assert (result[0].nan, result[0].max_abs, result[0].note) == (2, INF, "2 NaN in a alone")
    assert repr(result).splitlines()[2].split()[3] == "NaN"
    result = compare(made(x=[bad.nan_to_num()]), made(x=[bad]))
    assert result[0].note == "2 NaN in b alone"
    assert only(torch.tensor([INF]), torch.tensor([1.0])).nan == 0


def test_the_first_difference_has_a_frame_and_runs_of_equal_rows_are_one_line() -> None:
    layers = {name: [ONE] for name in "abcdefgh"}
    found = compare(made(**layers), made(**{**layers, "f": [-ONE]}))
    lines = repr(found).splitlines()
    assert lines[2] == "... 5 equal: a to e ..."
    assert [line.split()[0] for line in lines[3:]] == ["f", "g", "h"]
    assert "different, first" in lines[3]
    html = found._repr_html_()
    assert html.count('<tr class="actrec-first">') == 1
    assert "<summary" in html
    assert "5 equal: a to e" in html
    assert html.count("<tr") == 9


def test_recordings_of_one_layer_are_compared_by_selecting_them() -> None:
    acts = made(x=[ONE], y=[ONE])
    with pytest.raises(OptionError, match=r"A recording of one layer is acts\.select\('x'\)"):
        compare(acts["x"], acts["x"])  # type: ignore[arg-type]
    assert [row.layer for row in compare(acts.select("x"), acts.select("x"))] == ["x"]


# --- What is no tensor, and what belongs together ----------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.1, 0.2),
        (1, 2),
        (10**30, 10**31),
        (True, False),
        (1j, 2j),
        (np.float32(1), np.float32(2)),
        (np.arange(3), np.arange(1, 4)),
        ("a", "b"),
        (b"a", b"b"),
        ("a" * 30, "a" * 31),
        ("a", 1),
        ({"loss": 1.0}, {"loss": 2.0}),
    ],
)
def test_numbers_arrays_and_texts_are_compared(one: Any, other: Any) -> None:
    assert only(one, one).equal
    assert only(one, copy.deepcopy(one)).calls == 1
    row = only(one, other)
    assert not row.equal
    assert not row.close
    assert row.different_pass == 0


def test_numbers_are_close_within_the_tolerances() -> None:
    assert only(1.0, 1.0 + 1e-9).close
    assert not only(1.0, 1.01).close
    assert only(1.0, 1.01, rtol=0.1).close


@pytest.mark.parametrize("value", [None, torch.float32, np.array(["a"]), Opaque("x")])
def test_other_objects_are_not_compared(value: Any) -> None:
    row = only(value, value)
    assert (row.calls, row.note) == (0, "nothing to compare")


def of_units(keys: list[int | str], model: nn.Module, values: dict[Any, Tensor]) -> Recording:
    with torch.no_grad(), record(model, "") as acts:
        for key in keys:
            with acts.unit(key):
                for part in values[key].split(2):
                    model(part)
                acts.add("mask", torch.ones(1, 1))
    return acts


def test_calls_of_units_belong_together_in_whatever_order_these_were_worked_off(
    tmp_path: Path,
) -> None:
    model = nn.Linear(3, 2)
    values = {key: torch.randn(4, 3) for key in (1, "b", 3)}
    acts, others = of_units([1, "b", 3], model, values), of_units([3, 1, "b"], model, values)
    others.save(tmp_path / "others")
    assert compare(acts, others).equal
    assert compare(acts, load(tmp_path / "others")).equal
    values["b"] = values["b"] + 1
    found = compare(acts, of_units([3, 1, "b"], model, values)).first_difference
    assert found is not None
    assert (found.layer, found.different_pass, found.calls) == ("", 1, 6)


def test_units_that_one_has_alone_are_named() -> None:
    model = nn.Linear(3, 2)
    values = {key: torch.randn(4, 3) for key in (1, "b", 3)}
    acts = of_units([1, "b", 3], model, values)
    assert [row.note for row in compare(acts, of_units([3, 1], model, values))] == [
        "2 and 0 calls of unit 'b'",
        "1 and 0 calls of unit 'b'",
    ]
    row = compare(of_units([3, 1], model, values), acts)[0]
    assert (row.note, row.calls, row.different_pass) == ("0 and 2 calls of unit 'b'", 4, 1)


def test_a_layer_that_only_one_recording_has_reduced_differs() -> None:
    model = nn.Linear(2, 2)
    found = []
    for layers in ({"": reduce.Moments()}, {"": None}):
        with torch.no_grad(), record(model, layers) as acts:
            for _ in range(3):
                model(torch.ones(2, 2))
        found.append(acts)
    reduced, kept = found
    for a, b, note in (
        (reduced, kept, "reduced in a alone"),
        (kept, reduced, "reduced in b alone"),
    ):
        row = compare(a, b)[0]
        assert (row.note, row.calls, row.equal, row.different_pass) == (note, 0, False, 0)
    assert compare(reduced, reduced).equal
