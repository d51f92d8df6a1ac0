"""What is found out of a model is remembered as long as the model is the same, and keeps no module alive."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from actrec import SelectionError, record
from actrec._selection.model import Model, remembered
from actrec._selection.model import _models as known
from actrec._selection.selection import select

QUERIES: list[Any] = [None, "**", "*.*", nn.Linear, "a", "b.**", "", lambda name, _: "b" in name]


def chosen(model: nn.Module) -> list[Any]:
    """What queries choose: keys, modules, all names, and the modules around them; or what is said in place of it."""
    found: list[Any] = []
    for query in QUERIES:
        try:
            selection = select(model, query)
        except SelectionError as error:
            found.append(str(error))
        else:
            layers = [(one.key, id(one.module), one.names) for one in selection.choices]
            found.append((layers, [*map(id, selection.parents)]))
    return found


def edit(model: nn.Module, draw: random.Random) -> None:
    """Replace, delete, add, rename, share, wrap or move a module, somewhere in the model."""
    owner = draw.choice([*model.modules()])
    tables: Any = owner._modules
    segment = draw.choice("abc")
    new = draw.choice([nn.Linear(1, 1), nn.ReLU(), nn.ModuleList([nn.Linear(1, 1)]), None])
    match draw.randrange(8):
        case 0 | 1:
            owner.add_module(segment, new)
        case 2:
            tables.pop(segment, None)
        case 3:
            tables[draw.choice("abc")] = tables.pop(segment, None)
        case 4:
            owner.add_module(segment, draw.choice([*model.modules()]))  # also in a circle
        case 5 if tables.get(segment) is not None:
            tables[segment] = nn.DataParallel(tables[segment])
        case 6:
            draw.choice([*model.modules()]).add_module(segment, tables.pop(segment, None))
        case _:
            owner._modules = dict(reversed(tables.items()))


@given(st.randoms(use_true_random=False))
@settings(derandomize=True, max_examples=40, deadline=None, database=None)
def test_law_a_block_selects_what_one_would_that_had_not_seen_the_model_before(
    draw: random.Random,
) -> None:
    model = nn.Sequential()
    model.add_module("a", nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    for _ in range(8):
        edit(model, draw)
        first, again = chosen(model), chosen(model)
        del known[model]
        assert first == again == chosen(model)


def test_a_model_that_is_the_same_is_walked_once() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
    before = remembered(model)
    with torch.no_grad(), record(model) as acts:
        model(torch.ones(1, 1))
    assert remembered(model) is before
    assert remembered(copy.deepcopy(model)) is not before
    del model[1][0]
    assert remembered(model) is not before
    assert list(acts) == ["0", "1.0"]


def test_a_module_that_has_moved_has_its_new_name() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Sequential())
    assert [choice.key for choice in select(model, nn.Linear).choices] == ["0.0"]
    model[1].add_module("0", model[0][0])
    del model[0][0]
    assert [choice.key for choice in select(model, nn.Linear).choices] == ["1.0"]


def test_what_was_replaced_is_not_kept_alive_and_neither_is_the_model() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    model[1].add_module("around", model)  # in a circle
    with record(model, "0"):
        model[0](torch.ones(1, 1))
    gone = weakref.ref(model[1][0])
    model[1][0] = nn.ReLU()
    assert gone() is None
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None


def test_a_module_that_becomes_one_of_another_class_is_looked_at_again() -> None:
    model = nn.Sequential(nn.Linear(1, 1))

    class Sharded(nn.Linear):
        pass

    before = remembered(model)
    model[0].__class__ = Sharded  # as fully_shard() does
    assert remembered(model) is not before


def test_what_a_traced_graph_calls_is_read_each_time() -> None:
    graph: Any = fx.symbolic_trace(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    assert remembered(graph).inlined == frozenset()
    for node in [*graph.graph.nodes]:
        if node.target == "1":
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    assert remembered(graph).inlined == Model(graph).inlined == frozenset({"1"})
