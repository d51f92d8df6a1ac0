"""Entering and leaving the block, on a model of 5,000 modules."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from actrec import record

from .models import many
from .timing import Row, ratios, seconds, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET = 60.0  # microseconds for each selected module


def measure(*, quick: bool) -> Iterator[Row]:
    model = many(blocks=2 if quick else 263)
    modules = list(model.modules())
    queries = {"all": "**", "the leaves": None, "a few": "1.*.*"}
    for what, query in queries.items():
        chosen = _chosen(model, query)
        variants = {
            "record": partial(_enter_and_leave, model, query),
            "plain": partial(_register_and_remove, chosen),
        }
        times = take_turns(variants, rounds=2 if quick else 15)
        where = f"{what} ({len(chosen):,} of {len(modules):,} modules)"
        each = [time / len(chosen) * 1e6 for time in times["record"]]
        target = None if what == "a few" else TARGET
        yield Row.of(f"entry and exit: for each selected module, {where}", each, target, "us")
        name = f"entry and exit: actrec / registering and removing plain hooks, {where}"
        yield Row.of(name, ratios(times, "record", "plain"))


def _chosen(model: nn.Module, query: str | None) -> list[nn.Module]:
    with record(model, query) as acts:
        model(torch.ones(1))
        return [model.get_submodule(name) for name in acts]


def _enter_and_leave(model: nn.Module, query: str | None) -> float:
    def enter() -> None:
        block.append(record(model, query))
        acts.append(block[0].__enter__())

    block, acts = [], []
    entering = seconds(enter)
    model(torch.ones(1))  # nothing to warn about
    return entering + seconds(lambda: block[0].__exit__(None, None, None))


def _register_and_remove(modules: list[nn.Module]) -> float:
    def work() -> None:
        handles = [module.register_forward_hook(hook) for module in modules]
        for handle in handles:
            handle.remove()

    def hook(*_: object) -> None:
        pass

    return seconds(work)
