"""Recordings that were written when the second format was new are read by every version, with exactly the values they had.

They and what is in them were made by ``tests/frozen/make.py`` and are never made again: where one of these tests fails, the
reader is wrong.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actrec
from actrec import load, record
from tests.frozen.described import described, value

FOLDER = Path(__file__).parent / "frozen/version-2"
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
NAMES = ["crashed", "kinds", "ranks", "roles", "units"]


def about(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def plain(found: Any) -> Any:
    """As it is in a file of JSON."""
    return json.loads(json.dumps(found))


def test_there_is_a_recording_of_each_kind() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_with_them(name: str) -> None:
    assert actrec.verify(FOLDER / name) == []
    load(FOLDER / name, check=True)


@pytest.mark.parametrize("name", ["crashed", "roles"])
def test_layers_of_all_roles_have_what_the_model_had(name: str) -> None:
    found = load(FOLDER / name)
    assert plain(described(found, stored=False)) == about(name)
    assert found.complete == (name == "roles")


def test_a_name_of_a_layer_that_has_another_one_leads_to_it() -> None:
    found = load(FOLDER / "roles")
    assert found["again"] is found["relu"]


def test_what_was_not_committed_when_a_run_was_killed_is_not_there() -> None:
    (rank,) = load(FOLDER / "crashed")._ranks
    assert rank.heading.void, "a run was left within a pass"
    assert rank.heading.parts, "and the next one was killed within another"
    assert [rank.info.error, rank.info.num_passes] == ["killed or still recording", 3]


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FOLDER / "kinds", tmp_path / "r"))
    net = nn.Identity()
    with record(net, "", into=path, resume=True) as acts:
        net(torch.ones(2))
        acts.add("value", "more")
    assert [value(v) for v in acts["value"]] == [*about("kinds")["values"], value("more")]
    assert actrec.verify(path) == []


def test_values_of_every_kind_and_dtype_come_back() -> None:
    found = load(FOLDER / "kinds")["value"]
    expected = about("kinds")["values"]
    assert plain([value(v) for v in found]) == expected
    assert plain([value(found[at]) for at in range(len(found))]) == expected
    same, again = found[expected.index(next(v for v in expected if len(v.get("list", [])) == 2))]
    assert same is again, "a tensor that stands in two places is one"


def test_ranks_are_merged_and_parts_of_tensors_made_whole() -> None:
    found, expected = load(FOLDER / "ranks"), about("ranks")
    assert list(found) == expected["names"]
    assert (found.num_passes, found.complete) == (expected["num_passes"], expected["complete"])
    assert [[r.number, r.num_passes, r.complete, r.error] for r in found.ranks] == expected["ranks"]
    for name in ("a", "parts"):
        layer = found[name]
        calls = [[*who, value(v)] for *who, v in zip(layer.passes, layer.ranks, layer, strict=True)]
        assert plain(calls) == expected[name]
    assert len(found["b"]) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_units_functions_gradients_and_reductions_of_a_rank_come_back(rank: int) -> None:
    found, expected = load(FOLDER / "units", rank=rank), about("units")["ranks"][rank]
    assert {name: list(found[name].units) for name in expected["units"]} == expected["units"]
    layers = {name: [value(one) for one in found[name]] for name in expected["layers"]}
    assert plain(layers) == expected["layers"]
    assert plain([value(one) for one in found.grads["linear"]]) == expected["grads"]
    moments = value(found["relu"].compute())
    assert plain(moments) == expected["reduced"]["relu"]
    assert found.failed_passes == [1]


def test_units_and_reductions_of_all_ranks_are_merged() -> None:
    found = load(FOLDER / "units")
    one, other = (load(FOLDER / "units", rank=rank) for rank in range(2))
    assert list(found.units) == ["a0", "a1", "c0", "c1"]
    assert found.missing(["a0", "b0"]) == ["b0"]
    counts = [acts["relu"].compute()["count"] for acts in (one, other, found)]
    assert counts[0] + counts[1] == counts[2]
    best = torch.stack([acts["rnn"].compute()["values"][0] for acts in (one, other)]).amax(0)
    assert torch.equal(found["rnn"].compute()["values"][0], best)
