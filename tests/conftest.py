"""What every test shares: a fixed random seed, and a guard that finds hooks left behind."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from actrec._hooks import Hook

if TYPE_CHECKING:
    from collections.abc import Iterator


def own_hooks() -> list[tuple[nn.Module, object]]:
    """Every hook of actrec that is on some module of this process."""
    return [
        (module, hook)
        for module in gc.get_objects()
        if isinstance(module, nn.Module)
        for table in (vars(module).get("_forward_hooks"), vars(module).get("_forward_pre_hooks"))
        for hook in (table or {}).values()
        if isinstance(hook, Hook)
    ]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_hook_stays_behind() -> Iterator[None]:
    yield
    left = own_hooks()
    assert not left, f"{len(left)} hooks of actrec were left behind: {left[:3]}"
