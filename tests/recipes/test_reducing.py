"""Metrics of torchmetrics reduce what layers return, as they are."""

from __future__ import annotations

from functools import partial

import torch
import torchmetrics
from torch import nn

from actrec import record


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
