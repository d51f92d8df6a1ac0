"""A table of a recording is quick where it was looked at before, and right whatever was done to its lists since."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from actrec import Recording, record
from actrec._recordings import look
from actrec._recordings.in_memory import ListLayer
from actrec._recordings.look import Look
from tests.made import made

if TYPE_CHECKING:
    from collections.abc import Callable

VALUES: dict[str, Callable[[], Any]] = {
    "small": lambda: torch.zeros(2),
    "large": lambda: torch.zeros(3, 4),
    "half": lambda: torch.zeros(2, dtype=torch.float16),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "pair": lambda: (torch.zeros(2), torch.zeros(3, 4)),
    "twice": lambda: (torch.zeros(2),) * 2,
    "absent": lambda: torch.zeros(2, device="meta"),
    "tuple": lambda: (torch.zeros(5), (torch.zeros(1), None)),
    "dict": lambda: {"h": torch.zeros(7)},
    "number": lambda: 3,
}
#: What a user may do to a list: with a number from 0 to 3, and a value.
CHANGES: dict[str, Callable[[Any, int, Any], object]] = {
    "append": lambda layer, _, value: layer.append(value),
    "extend": lambda layer, _, value: layer.extend([value, value]),
    "add": lambda layer, _, value: layer.__iadd__([value]),
    "times": lambda layer, at, _: layer.__imul__(at),
    "insert": lambda layer, at, value: layer.insert(at, value),
    "pop": lambda layer, at, _: layer.pop(at % len(layer)) if layer else None,
    "del": lambda layer, at, _: layer.__delitem__(slice(at, None)),
    "set": lambda layer, at, value: layer.__setitem__(at % len(layer), value) if layer else None,
    "set some": lambda layer, at, value: layer.__setitem__(slice(at, None), [value]),
    "sort": lambda layer, *_: layer.sort(key=id),
    "reverse": lambda layer, *_: layer.reverse(),
    "clear": lambda layer, *_: layer.clear(),
    "keep": lambda layer, at, value: layer._keep(value, at),
    "drop": lambda layer, at, _: layer._drop(at),
    "look": lambda layer, *_: repr(layer),
}
STEP = st.tuples(st.sampled_from([*CHANGES]), st.integers(0, 3), st.sampled_from([*VALUES]))


def fresh(layer: ListLayer[Any]) -> ListLayer[Any]:
    """The same list, which was never looked at."""
    found = ListLayer(layer.name, layer, layer.type)
    found._passes[:] = layer.passes
    return found


@settings(max_examples=60)
@given(steps=st.lists(STEP, max_size=12))
def test_a_table_is_that_of_the_list_as_it_is(steps: list[tuple[str, int, str]]) -> None:
    layer: ListLayer[Any] = ListLayer("a", [VALUES["small"]()])
    other: ListLayer[Any] = ListLayer("b", layer)
    acts = made(a=layer, b=other)
    for how, at, value in steps:
        CHANGES[how](layer, at, VALUES[value]())
        del layer[20:]
        repr(acts)
    new = Recording(acts._run, {"a": fresh(layer), "b": other})
    assert repr(acts) == repr(new)
    assert repr(layer) == repr(fresh(layer))
    assert acts.nbytes == new.nbytes


def test_a_call_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: ListLayer[Any] = ListLayer("a", [torch.zeros(2), torch.zeros(3), (torch.zeros(4), None)])
    acts = made(a=layer)
    looked: list[Any] = []
    taken_apart = look.flatten
    monkeypatch.setattr(look, "flatten", lambda value: looked.append(value) or taken_apart(value))
    for show in (acts.__repr__, acts._repr_html_, layer.__repr__):
        show()
    layer.append((torch.zeros(5), None))
    for show in (acts.__repr__, acts._repr_html_, layer.__repr__):
        show()
    assert len(looked) == 4
    layer.pop()
    repr(acts)
    assert len(looked) == 7


def test_memory_is_added_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = made(a=[torch.zeros(2)], b=[torch.zeros(2)])
    shared = acts["a"][0]
    assert repr(acts).startswith("recorded Net: 2 layers, 1 pass, 16 B")
    acts["b"][0] = shared  # type: ignore[index]
    assert repr(acts).startswith("recorded Net: 2 layers, 1 pass, 8 B")
    monkeypatch.setattr("actrec._recordings.look.sum", None, raising=False)
    assert repr(acts).startswith("recorded Net: 2 layers, 1 pass, 8 B")


@given(kinds=st.lists(st.sampled_from([*VALUES]), max_size=6), many=st.integers(1, 3))
def test_calls_that_are_looked_at_together_look_as_they_do_one_by_one(
    kinds: list[str], many: int
) -> None:
    values = [VALUES[kind]() for kind in kinds for _ in range(many)]
    together, alone = Look(), Look()
    together.at(values[: len(values) // 2])
    together.at(values)
    for value in values:
        alone._at_value(value)
    assert together.summary == alone.summary
    assert together.places == alone.places
    assert together.can_change == alone.can_change


@pytest.mark.parametrize(
    "value", [{"h": torch.zeros(2)}, [torch.zeros(2)], (1, {"h": torch.zeros(2)})]
)
def test_what_can_get_other_items_is_looked_at_again(value: Any) -> None:
    layer: ListLayer[Any] = ListLayer("a", [value])
    assert "8 B" in repr(layer)
    inner = value[1] if isinstance(value, tuple) else value
    inner[0 if isinstance(inner, list) else "h"] = torch.zeros(100)
    assert "400 B" in repr(layer)


def test_memory_that_a_write_has_taken_apart_is_counted_where_it_is_asked_for() -> None:
    layer: ListLayer[Any] = ListLayer("a", [torch.zeros(2), torch.zeros(2)])
    acts = made(a=layer)
    layer[1].set_(layer[0])
    assert (layer.nbytes, acts.nbytes) == (8, 8)
    layer[1].set_(torch.zeros(2))
    assert (layer.nbytes, acts.nbytes) == (16, 16)
    assert repr(acts).startswith("recorded Net: 1 layer, 2 passes, 16 B")


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_a_copy_is_looked_at_as_what_it_is(copied: Callable[[Any], Any]) -> None:
    acts = made(a=[torch.zeros(2)])
    assert "8 B" in repr(acts)
    other = copied(acts["a"])
    other.append(torch.zeros(2))
    assert "16 B" in repr(other)
    assert "8 B" in repr(acts["a"])
    assert repr(copied(acts)) == repr(acts)


def test_a_look_that_another_thread_goes_on_with_begins_anew() -> None:
    layer: ListLayer[Any] = ListLayer("a", [torch.zeros(2)])

    class Meanwhile(Look):
        def at(self, calls: Any) -> None:
            super().at(calls)
            if not others:
                others.append(layer._look)  # nobody else may add to the same look
                layer[0] = torch.zeros(3)

    others: list[Any] = []
    layer._look = Meanwhile(), layer._edits
    repr(layer)
    assert others == [None]
    assert "(3,) float32, 12 B" in repr(layer)


def test_a_call_that_was_taken_away_past_the_layer_is_not_counted() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        model(torch.ones(2, 3))
        model(torch.ones(5, 3))
    assert "2 calls" in repr(acts[""])
    list.pop(acts[""])
    assert "1 call, (2, 3)" in repr(acts[""])
