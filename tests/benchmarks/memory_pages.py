"""The cost of keeping memory: fresh pages, small and huge, and memory that was used before.

PyTorch reads ``THP_MEM_ALLOC_ENABLE`` at its first allocation, so there is a fresh interpreter for each
setting. In it the variants take turns, on a network without in-place layers, of which every hook keeps
the same tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file: the child
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from actrec import record
from tests.benchmarks.models import resnet
from tests.benchmarks.timing import Row, ratios, seconds, take_turns
from tests.benchmarks.usual import classic_hook, clone_hook, no_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from tests.benchmarks.timing import Times

PAGES = {"small pages": "0", "huge pages": "1"}
VARIANTS = ("classic hook", "clone hook", "actrec", "actrec after clear()")
TARGET = 0.95  # of the time with small pages


def measure(*, quick: bool) -> Iterator[Row]:
    found = {}
    for pages, setting in PAGES.items():
        times = _times(setting, quick=quick)
        found[pages] = ratios(times, "actrec", "unrecorded")
        for variant in VARIANTS:
            name = f"keeping memory: {variant} / unrecorded, {pages}"
            yield Row.of(name, ratios(times, variant, "unrecorded"))
    gain = [huge / small for huge, small in zip(*reversed(found.values()), strict=True)]
    yield Row.of("keeping memory: actrec, huge pages / small pages", gain, TARGET)


def _times(setting: str, *, quick: bool) -> Times:
    """What a fresh interpreter measures."""
    child = [sys.executable, __file__, *(["--quick"] if quick else [])]
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": setting}
    times = subprocess.run(child, check=True, capture_output=True, text=True, env=env).stdout
    return json.loads(times)


def _measured(*, quick: bool) -> Times:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks, width, side = ((1, 1), 4, 32) if quick else ((3, 4, 6, 3), 64, 128)
    model = resnet(blocks, width, in_place=False).eval()
    x = torch.randn(2 if quick else 8, 3, side, side)
    hooks = {
        "unrecorded": no_hook,
        "classic hook": classic_hook,
        "clone hook": clone_hook,
        "actrec": record,
    }
    variants: dict[str, Callable[[], float]] = {
        name: partial(_first, hooked, model, x) for name, hooked in hooks.items()
    }
    variants["actrec after clear()"] = partial(_again, model, x)
    with torch.no_grad():
        return take_turns(variants, rounds=1 if quick else 15)


def _first(hooked: Callable[..., Any], model: nn.Module, x: Tensor) -> float:
    with hooked(model):
        return seconds(lambda: model(x))


def _again(model: nn.Module, x: Tensor) -> float:
    with record(model) as acts:
        model(x)
        acts.clear()
        return seconds(lambda: model(x))


if __name__ == "__main__":
    print(json.dumps(_measured(quick="--quick" in sys.argv)))
