"""A dataset reduced to one tensor for each layer: the time that it takes, and the memory at its peak.

The reduction is a mean over positions, or none at all, when every value is kept and joined in the end. Memory is
that of a process of its own, beyond what it had when its model was ready; it is given in multiples of the bytes of
the result, below which nobody can come who has the result in memory.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actrec import record

from .memory import most_during, printed_by
from .models import GPT
from .networks import pool
from .timing import Row, ratios, seconds, take_turns
from .usual import classic_hook, clone_hook, pooling_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Result = dict[str, Tensor]

MOST_MEMORY = 1.1  # times the bytes of the result
AT_MOST_AS_LONG = 1.0  # as a hook that is right
BATCHES, BATCH, LENGTH = 24, 8, 128


class Work:
    """A model and the batches of a dataset."""

    def __init__(self, *, quick: bool) -> None:
        torch.manual_seed(0)
        width = 16 if quick else 256
        self.model = GPT(2 if quick else 6, width, heads=2, length=LENGTH).eval()
        self.batches = torch.randint(1000, (2 if quick else BATCHES, BATCH, LENGTH))

    def run(self) -> None:
        for batch in self.batches:
            self.model(batch)


@torch.no_grad()
def _actrec_whole(work: Work) -> Result:
    with record(work.model) as acts:
        work.run()
    return {name: acts[name].cat(release=True) for name in acts}


@torch.no_grad()
def _actrec_pooled(work: Work) -> Result:
    with record(work.model, transform=pool) as acts:
        work.run()
    return {name: acts[name].cat(release=True) for name in acts}


@torch.no_grad()
def _classic_whole(work: Work) -> Result:
    with classic_hook(work.model) as store:
        work.run()
    return {name: torch.cat(values) for name, values in store.items()}


@torch.no_grad()
def _clone_whole(work: Work) -> Result:
    with clone_hook(work.model) as store:
        work.run()
    return {name: torch.cat(values) for name, values in store.items()}


@torch.no_grad()
def _hook_pooled(work: Work) -> Result:
    with pooling_hook(work.model, pool) as store:
        work.run()
    return {name: torch.cat(values) for name, values in store.items()}


WAYS: dict[str, dict[str, Callable[[Work], Result]]] = {
    "whole": {
        "actrec": _actrec_whole,
        "classic hook": _classic_whole,
        "clone hook": _clone_whole,
    },
    "pooled": {"actrec": _actrec_pooled, "a hook that pools": _hook_pooled},
}


def measure(*, quick: bool) -> Iterator[Row]:
    work = Work(quick=quick)
    for what, ways in WAYS.items():
        reference = ways["actrec"](work)
        size = sum(tensor.nbytes for tensor in reference.values())
        where = f"GPT shape, {BATCHES * BATCH} texts, every leaf, {what} ({size / 1e6:,.0f} MB)"
        variants = {name: partial(_time, way, work) for name, way in ways.items()}
        times = take_turns(variants, rounds=1 if quick else 7)
        for name in list(ways)[1:]:
            target = None if name == "classic hook" else AT_MOST_AS_LONG
            took = ratios(times, "actrec", name)
            yield Row.of(f"dataset: actrec / {name}, {where}", took, target)
        for name in ways:
            memory = [_memory_in_a_process_of_its_own(what, name, quick=quick)]
            target = MOST_MEMORY if name == "actrec" and what == "whole" else None
            yield Row.of(
                f"dataset: peak of memory / bytes of the result, {name}, {where}", memory, target
            )


def _time(way: Callable[[Work], Result], work: Work) -> float:
    return seconds(lambda: way(work))


# --- Memory ------------------------------------------------------------------------------------------


def _memory_in_a_process_of_its_own(what: str, name: str, *, quick: bool) -> float:
    (memory,) = printed_by(__name__, f"print_memory({what!r}, {name!r}, quick={quick})")
    return memory


def print_memory(what: str, name: str, *, quick: bool) -> None:
    """Print the most memory that one way takes, in multiples of the bytes of its result."""
    torch.set_num_threads(1)
    work = Work(quick=quick)
    with torch.no_grad():
        work.model(work.batches[0])  # what the libraries under PyTorch need once
    result, most = most_during(lambda: WAYS[what][name](work))
    print(most / sum(tensor.nbytes for tensor in result.values()))
