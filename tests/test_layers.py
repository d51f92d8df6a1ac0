"""The layers of a model as a table."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from actrec import SelectionError, UnsupportedModelError, layers, record
from tests.models import TinyTransformer


def test_it_lists_what_can_be_recorded_by_name_type_and_parameters() -> None:
    model = TinyTransformer()
    table = layers(model)
    modules = dict(model.named_modules())
    assert [row.layer for row in table] == [
        name for name, one in modules.items() if not isinstance(one, nn.ModuleList)
    ]
    for row in table:
        module = modules[row.layer]
        assert row.type == type(module).__name__
        assert row.parameters == sum(p.numel() for p in module.parameters())
    with record(model, [row.layer for row in table]) as acts:
        model(model.example())
    assert list(acts) == [row.layer for row in table]


@pytest.mark.parametrize("query", ["blocks.*", nn.Linear, ["", "**.norm1"], re.compile("head.*")])
def test_with_a_query_it_lists_what_record_would_choose(query: Any) -> None:
    model = TinyTransformer()
    with record(model, query) as acts:
        model(model.example())
    assert [row.layer for row in layers(model, query)] == list(acts)


def test_a_module_in_two_places_is_one_row_with_both_names() -> None:
    relu = nn.ReLU()
    table = layers(nn.Sequential(relu, nn.Linear(2, 2), relu))
    assert [(row.layer, row.also) for row in table] == [("", ()), ("0", ("2",)), ("1", ())]
    assert "'2'" in repr(table)


def test_it_prints_shows_folds_and_makes_a_data_frame() -> None:
    table = layers(
        nn.Sequential(*[nn.Sequential(*[nn.Linear(2, 2)] * 1, nn.ReLU()) for _ in range(40)])
    )
    assert "as in the block before" in repr(table)
    assert "<table>" in table._repr_html_()
    assert list(pd.DataFrame(table)["parameters"])[:3] == [240, 6, 6]
    assert repr(table[:1]).splitlines()[0] == "1 layer of Sequential"


def test_parameters_that_are_not_there_yet_count_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.LazyLinear(3)
    assert [row.parameters for row in layers(model)] == [0]


def test_what_record_refuses_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="comes first"):
        layers("fc", nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match=r"^layers\(\): .* Did you mean '0'"):
        layers(nn.Sequential(nn.ReLU()), "1.0")
    assert torch.is_grad_enabled()
