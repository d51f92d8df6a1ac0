"""Nested values in tables: their structure with the shapes in it, the same in memory and on disk; and notes."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from actrec import Opaque, OptionError, load, record, verify
from actrec._recordings.in_memory import ListLayer
from actrec._values.outline import LONGEST, drawn
from actrec.reduce import Moments
from actrec.store.format import Defect
from actrec.store.ledger import SoFar
from tests.made import made

if TYPE_CHECKING:
    from pathlib import Path

T = torch.zeros
Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024  # users have such, too


@dataclasses.dataclass
class Out:
    hidden: torch.Tensor
    rest: Any = None


class Output(collections.OrderedDict[str, Any]):
    """Has its items as attributes, too."""


def output(**items: Any) -> Output:
    made = Output(items)
    vars(made).update(items)
    return made


OUTLINES: dict[str, tuple[list[Any], str]] = {
    "LSTM": ([(T(8, 12, 96), (T(4, 8, 48), T(4, 8, 48)))], "(8, 12, 96), ((4, 8, 48) x 2)"),
    "other sizes": ([(T(2, 3), [T(4)]), (T(5, 3), [T(1)])], "(2-5, 3), [(1-4,)]"),
    "other sizes of equals": ([(T(2), T(2)), (T(3), T(1))], "(2-3,), (1-2,)"),
    "one": ([(T(2),)], "((2,),)"),
    "number": ([(T(()), 3, None, "a")], "(), int, None, str"),
    "dict": ([{"h": T(2), 3: {"#": T(1)}}], "{h: (2,), 3: {?: (1,)}}"),
    "dataclass": ([Out(T(2, 2))], "Out(hidden: (2, 2), rest: None)"),
    "output": ([output(logits=T(2), past=Opaque("a.Cache"))], "Output(logits: (2,), past: Cache)"),
    "named tuple": ([Pair(T(2), T(2))], "Pair((2,) x 2)"),
    "list, empty": ([[[], ()]], "[list of 0, tuple of 0]"),
    "same tensor": ([[one := T(3), one]], "[(3,) x 2]"),
    "array": ([np.zeros((2, 3)), np.zeros((4, 3))], "ndarray(2-4, 3)"),
    "array inside": ([{"a": np.zeros(2)}], "{a: ndarray(2,)}"),
    "two kinds": ([(T(2), 1), [T(2)], T(7)], "(7,) | (2,), int | [(2,)]"),
    "four kinds": ([[T(2)] * many for many in (1, 2, 3)] + [(1, T(1))], "list of 1 | list of 2 | list of 3 | tuple of 2"),
    "long": ([[T(n) for n in range(20)]], "list of 20"),
    "too long": ([[T(n, 1, 1) for n in range(400)]], "list of 400"),
    "long name": ([{"a" * LONGEST: T(2)}], "dict of 1"),
    "odd name": ([{"\1": T(2), " ": T(2)}], r"{'\x01': (2,), ' ': (2,)}"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "text"), OUTLINES.values(), ids=OUTLINES)
def test_a_nested_value_is_shown_with_its_shapes(
    values: list[Any], text: str, tmp_path: Path
) -> None:
    acts = made(a=values)
    acts.save(tmp_path / "run")
    stored = load(tmp_path / "run")
    for recording in (acts, stored):
        shown = recording["a"]._seen()[0].what
        # A class that is not PyTorch's or Python's comes back from the disk as a stand-in.
        assert shown == (re.sub(r"Out(put)?\(", "Fields(", text) if recording is stored else text)
    assert verify(tmp_path / "run") == []


def test_many_structures_are_called_by_what_they_are() -> None:
    values = [[T(1)] * many for many in range(1, 40)]
    layer = ListLayer("a", values, "X")
    shown = layer._seen()[0]
    assert shown.nested is None
    assert shown.what.endswith("| list of 15 | list of 16 | ...")


def test_what_an_earlier_version_wrote_has_no_outlines_and_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = SoFar.node

    def earlier(self: SoFar) -> dict[str, Any]:
        return {key: value for key, value in node(self).items() if key != "nested"}

    model = nn.LSTM(3, 2)
    with monkeypatch.context() as patched:
        patched.setattr(SoFar, "node", earlier)
        with record(model, "", into=tmp_path / "run"):
            model(T(4, 2, 3))
    for calls in (1, 2):
        assert verify(tmp_path / "run") == []
        acts = load(tmp_path / "run")
        assert (len(acts[""]), acts[""]._seen()[0].what) == (calls, "tuple of 2")
        if calls == 1:
            with record(model, "", into=tmp_path / "run", resume=True):
                model(T(4, 2, 3))


@pytest.mark.parametrize(
    "outline",
    [["(#)", [1], [1, 2]], ["(#)", [], []], ["\3", [], []], ["a\1", [3], [3]]],
    ids=["ranges", "missing", "not begun", "too many"],
)
def test_an_outline_that_was_damaged_is_refused(outline: Any) -> None:
    node = SoFar().node() | {"nested": [outline]}
    with pytest.raises(Defect, match="an outline of nested values is damaged"):
        SoFar.of(node)
    with pytest.raises(Defect, match="the outlines of nested values"):
        SoFar.of(node | {"nested": 3})


def test_an_outline_that_never_ends_is_shown_all_the_same() -> None:
    assert drawn("(\1#\2", [1], [2]) == "(1-2"


# --- Notes -------------------------------------------------------------------------------------------


def pooled(value: Any) -> Any:
    return value.mean(0)


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_transform_leaves_a_note(is_stored: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    layers = {"0": pooled, "1": lambda value: value[0], "": None}
    with record(model, layers) as acts:
        for _ in range(2):
            model(T(2, 4))
    shown = acts
    if is_stored:
        acts.save(tmp_path / "a")
        with record(model, layers, into=tmp_path / "b"):
            model(T(2, 4))
        shown = load(tmp_path / "a")
        assert "transform pooled" in repr(load(tmp_path / "b"))
    notes = [line.partition(" B")[2].strip() for line in repr(shown).splitlines()[2:]]
    assert notes == ["transform pooled", "transform <lambda>", ""]
    assert "transform pooled" in repr(shown.select("0"))


def test_reduced_calls_and_what_did_not_fit_leave_notes() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(relu, relu)
    with record(model, "0", into=Moments, transform=pooled) as acts:
        model(T(2, 4))
    assert repr(acts).splitlines()[2].endswith("2 per pass, reduced, transform pooled")
    with pytest.warns(match="too large"), record(model, "0", dtype=torch.float16) as acts:
        model(torch.full((2, 2), 1e6))
    assert repr(acts).splitlines()[2].endswith("8 values too large for float16, 2 per pass")


# --- Several layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            ("b",),
            "record(model, 'a', 'b'): pass several layers as one list, record(model, ['a', 'b'])",
        ),
        ((nn.ReLU, torch.relu), "record(model, ['a', ReLU, relu])"),
        ((3,), "and options by name, such as transform=... and into=..."),
    ],
)
def test_several_layers_are_one_list(others: Any, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        record(nn.ReLU(), "a", *others)
