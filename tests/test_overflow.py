"""A cast by ``dtype=`` that cannot hold a value is never silent, and no fault of the layer."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import actrec
from actrec import OverflowWarning, record
from actrec._recordings import overflow as _overflow

if TYPE_CHECKING:
    from collections.abc import Callable

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
SMALLER = [torch.float16, torch.bfloat16, *FLOAT8]


class Calls(nn.Module):
    """Calls a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().isfinite()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(SMALLER),
    st.sampled_from(
        [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
    ),
    st.lists(
        st.sampled_from(
            [
                0.0,
                1.0,
                239.0,
                247.9,
                448.0,
                500.0,
                57344.0,
                61439.0,
                65504.0,
                65519.0,
                65520.0,
                3.39e38,
                3.4e38,
                1e300,
                float("inf"),
                float("nan"),
            ]
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_what_a_cast_makes_of_finite_values_is_counted(
    dtype: torch.dtype, source: torch.dtype, numbers: list[float], nested: bool
) -> None:
    x = torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.float64).to(source)
    net = nn.Sequential(Calls(lambda t: (t, {"x": t.clone()}) if nested else t))
    with warnings.catch_warnings(record=True) as caught, record(net, "0", dtype=dtype) as acts:
        warnings.simplefilter("always")
        net(x)
    cast = x.to(dtype)
    if cast.dtype != source and not torch.tensor(float("inf")).to(dtype).float().isfinite():
        made = int((_finite(x) & ~_finite(cast)).sum())
    else:
        made = int((_finite(x) & (x.double().abs() > torch.finfo(dtype).max)).sum())
    made *= 1 + nested
    assert acts["0"]._overflows is not None
    assert sum(acts["0"]._overflows.counts().values()) == made
    assert len(caught) == (made > 0)
    assert (f"{made} value" in repr(acts)) == (made > 0)
    told = acts.stats().first_nonfinite
    if dtype not in FLOAT8:
        assert (told is not None) == (not _finite(x).all())


def test_the_warning_names_layers_and_numbers() -> None:
    net = nn.Sequential(Calls(lambda t: t * 2), Calls(lambda t: t / 2), Calls(lambda t: t / 1e9))
    message = (
        r"record\(dtype=torch.float16\): finite values of this Sequential are too large for it, and are infinite.*"
        r"bfloat16.*\n  '0': 2 values.\n  the input of '0': 1 value.\n  '1': 1 value.\n  the input of '1': 2 values.\n  the input of '2': 1 value.$"
    )
    with (
        pytest.warns(OverflowWarning, match=message) as caught,
        record(net, inputs=True, dtype=torch.float16) as acts,
    ):
        net(torch.tensor([1e5, 4e4, 1.0]))
    assert caught[0].filename == __file__
    assert "2 values too large for float16" in repr(acts)
    assert "2 values too large for float16" in acts._repr_html_()
    assert acts.stats().first_nonfinite is None


def test_of_many_layers_the_warning_names_some() -> None:
    net = nn.Sequential(*[nn.Identity() for _ in range(20)])
    with (
        pytest.warns(OverflowWarning, match=r"and 12 more layers.$"),
        record(net, dtype=torch.float16),
    ):
        net(torch.full((2,), 1e6))


def test_gradients_that_do_not_fit_are_counted() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with (
        pytest.warns(OverflowWarning, match="the gradient of '0': "),
        record(net, "0", grads=True, dtype=torch.float16) as acts,
    ):
        (net(torch.ones(3, 2)).exp() * 1e9).sum().backward()
    assert "too large for float16" in repr(acts.grads)


@pytest.mark.parametrize("numbers", [(1e5, 3e4), (3e4, 1e5)])
def test_the_first_layer_with_an_infinity_of_its_own_is_found(numbers: tuple[float, float]) -> None:
    net = nn.Sequential(nn.Identity(), Calls(lambda t: t / 0 if t[0] < 5e4 else t))
    with pytest.warns(OverflowWarning), record(net, dtype=torch.float16) as acts:
        for number in numbers:
            net(torch.full((3,), number))
    row = acts.stats().first_nonfinite
    assert row is not None
    assert (row.layer, row.nonfinite_pass) == ("1", numbers.index(3e4))


@pytest.mark.parametrize(
    "options", [{"detach": False}, {"transform": lambda t: t * 1e6}, {"inputs": True}]
)
def test_it_is_counted_whatever_else_is_asked_for(options: dict[str, Any]) -> None:
    net = nn.Linear(4, 4)
    nn.init.constant_(net.weight, 1e5)
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.warns(OverflowWarning), record(net, "", dtype=torch.float16, **options) as acts:
        net(x)
    assert "8 values too large" in repr(acts)
    assert acts[""][0].requires_grad == (options.get("detach") is False)


@pytest.mark.parametrize(
    ("make", "many"),
    [
        (lambda t: t.to_sparse(), 3),
        (lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged), 4),
        (lambda t: t[:0], 0),
        (lambda t: t.to("meta"), 0),
        (lambda t: t.long(), 0),
        (lambda t: t.as_subclass(Special), 0),
    ],
    ids=["sparse", "nested", "empty", "meta", "integers", "a type of somebody's"],
)
def test_tensors_of_any_kind_are_counted(make: Callable[[Tensor], Tensor], many: int) -> None:
    net = Calls(make)
    with (
        warnings.catch_warnings(action="ignore"),
        record(net, "", device=None, dtype=torch.float16) as acts,
    ):
        net(torch.tensor([[1e5, 1.0], [2e5, -3e5]]))
    assert acts[""]._overflows is not None
    assert acts[""]._overflows.total == many


class Special(Tensor):
    """A tensor of another type."""


def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_overflow, "_answers_at_once", lambda _: False)
    monkeypatch.setattr(_overflow, "MOST_WAITING", 4)
    net = nn.Identity()
    with (
        pytest.warns(OverflowWarning, match="6 values"),
        record(net, "", dtype=torch.float16) as acts,
    ):
        for _ in range(6):
            net(torch.tensor([1e5, 1.0]))
            assert len(acts[""]._overflows._waiting) < 4  # type: ignore[union-attr]
        net(torch.ones(2))
    assert acts[""]._overflows.counts() == dict.fromkeys(range(6), 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda acts: pickle.loads(pickle.dumps(acts))])
@pytest.mark.parametrize("into", [list, deque], ids=["list", "container"])
def test_a_copy_knows_it_too(again: Callable[[Any], Any], into: Callable[[], Any]) -> None:
    net = nn.Identity()
    with pytest.warns(OverflowWarning), record(net, "", dtype=torch.float16, into=into) as acts:
        net(torch.tensor([1e5, 1.0]))
    copied = again(acts)
    assert "1 value too large for float16" in repr(copied)
    assert copied.stats().first_nonfinite is None


def test_after_clear_the_table_speaks_of_what_is_there() -> None:
    net = nn.Identity()
    with (
        pytest.warns(OverflowWarning, match="1 value"),
        record(net, "", dtype=torch.float16) as acts,
    ):
        net(torch.tensor([1e5, 1.0]))
        acts.clear()
        net(torch.tensor([1.0, 1.0]))
    assert "too large" not in repr(acts)


def test_what_is_recorded_to_a_path_is_counted(tmp_path: Any) -> None:
    net = nn.Identity()
    path = tmp_path / "run"
    with (
        pytest.warns(OverflowWarning, match="1 value"),
        record(net, "", dtype=torch.float16, into=path) as acts,
    ):
        net(torch.tensor([1e5, 1.0]))
    assert acts.stats().first_nonfinite is None
    assert actrec.load(path)[""][0].isinf().sum() == 1
