"""The lines on the page of the format, which need safetensors alone, read what actrec writes."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import actrec
from actrec.store import Folder
from tests.made import made_of
from tests.stored import same

PAGE = Path(__file__).parent.parent / "docs/reference/format.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
LINES = next(block for block in BLOCKS if "def calls(" in block)


def on_the_page() -> Any:
    """What the page defines, in a namespace of its own."""
    names: dict[str, Any] = {}
    exec(LINES, names)  # noqa: S102  # it is ours
    return names["calls"]


def read(path: Path) -> dict[tuple[str, str], dict[int, list[Any]]]:
    """A whole recording: for each role and name the values of each pass."""
    calls, found = on_the_page(), {}
    for shard in sorted(path.glob("rank-*/*.safetensors")):
        with safe_open(shard, "pt") as file:
            for layer in json.loads(file.metadata()["actrec"])["layers"]:
                mine = found.setdefault((layer["role"], layer["name"]), {})
                for number, value in calls(file, layer):
                    mine.setdefault(number, []).append(value)
    return found


def test_the_lines_are_about_twenty_and_import_nothing() -> None:
    lines = [line for line in LINES.splitlines() if line.strip()]
    assert len(lines) <= 23
    assert "import" not in LINES


def tensor(dtype: torch.dtype, sizes: list[int]) -> Tensor:
    return torch.randint(0, 2, sizes).to(dtype)


TENSORS = st.builds(
    tensor,
    st.sampled_from([
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.float8_e4m3fn,
    ]),
    st.lists(st.integers(0, 3), max_size=3),
)  # fmt: skip
VALUES = st.recursive(
    TENSORS | st.none() | st.booleans() | st.text() | st.integers(-9, 9) | st.just(0.5),
    lambda values: st.one_of(
        st.lists(values, max_size=3),
        st.lists(values, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(0, 9), values, max_size=3),
    ),
    max_leaves=6,
)


@given(
    layers=st.dictionaries(st.text(max_size=5), st.lists(VALUES, max_size=6), max_size=3),
    shard_bytes=st.sampled_from([1, 10_000, 10**6]),
)
@settings(deadline=None, max_examples=80)
def test_they_read_every_layer_of_tensors_tuples_lists_and_dicts(
    layers: dict[str, list[Any]], shard_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        made_of(layers).save(Folder(path, shard_bytes))
        assert actrec.verify(path) == []
        found = read(path)
    for name, values in layers.items():
        mine = found.get(("output", name), {})
        assert sorted(mine) == list(range(len(values)))
        assert all(same(mine[number], [value]) for number, value in enumerate(values))


def test_they_read_inputs_gradients_and_added_values(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
    with actrec.record(model, inputs=True, grads=True) as acts:
        for number in range(3):
            model(torch.ones(2, 3)).sum().backward()
            acts.add("label", {"number": number})
    acts.save(tmp_path / "run")
    found = read(tmp_path / "run")
    for role, recording in (("output", acts), ("input", acts.inputs), ("gradient", acts.grads)):
        for name in ("0", "1"):
            assert all(same(found[role, name][n], [recording[name][n]]) for n in range(3))
    assert [found["added", "label"][n] for n in range(3)] == [[{"number": n}] for n in range(3)]
