"""Metrics of torchmetrics reduce what layers return, as they are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
import torchmetrics
from torch import nn

from actrec import OptionError, _torch, load, record
from actrec.store import Folder

if TYPE_CHECKING:
    from pathlib import Path


def test_a_metric_of_torchmetrics_reduces_the_calls_of_a_layer() -> None:

    model, xs = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(3, 5, 4)
    with torch.no_grad(), record(model) as kept:
        for x in xs:
            model(x)
    for make, expected in {
        torchmetrics.MeanMetric: kept["1"].cat().mean(),
        torchmetrics.MaxMetric: kept["1"].cat().max(),
        partial(torchmetrics.CatMetric, nan_strategy="error"): kept["1"].cat(),
    }.items():
        with torch.no_grad(), record(model, "1", into=make) as acts:
            for x in xs:
                model(x)
        assert torch.allclose(acts["1"].compute(), expected)
        assert acts["1"].passes == [0, 1, 2]


def test_a_metric_of_torchmetrics_goes_to_a_path_and_those_of_all_ranks_are_merged(
    tmp_path: Path,
) -> None:
    model, xs = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(4, 5, 4)
    metrics = {"0": torchmetrics.MeanMetric(), "1": torchmetrics.CatMetric}
    with torch.no_grad(), record(model, metrics) as whole:
        for x in xs:
            model(x)
    for rank in range(2):
        folder = Folder(tmp_path / "run", rank=rank, world_size=2, run="a")
        with torch.no_grad(), record(model, metrics, into=folder) as acts:
            for x in xs[2 * rank :][:2]:
                model(x)
                acts["0"].compute()
        assert len(acts["0"]) == 2
    found = load(tmp_path / "run")
    mean = found["0"].merge_into(torchmetrics.MeanMetric())
    assert torch.allclose(mean.compute(), whole["0"].compute())
    joined = found["1"].merge_into(torchmetrics.CatMetric())
    assert torch.equal(joined.compute(), whole["1"].compute())


def test_what_torchmetrics_cannot_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"reduced by .*merge_state.*full_state_update"):
        record(nn.ReLU(), {"": torchmetrics.MaxMetric}, into=tmp_path / "run")


def test_how_metrics_are_merged_and_that_they_were_updated() -> None:
    metric = torchmetrics.MeanMetric()
    assert _torch.reductions_of(metric) == {"mean_value": "dim_zero_sum", "weight": "dim_zero_sum"}
    assert _torch.reductions_of(torchmetrics.CatMetric()) == {"value": "dim_zero_cat"}
    with pytest.warns(UserWarning, match="was called before"):
        metric.compute()
    metric = torchmetrics.MeanMetric()
    for _ in range(2):
        _torch.count_an_update(metric)
    assert metric.update_count == 1
    metric.compute()  # without a warning
