"""``torch.set_default_device()`` is for the tensors of the user, and nothing of actrec's changes under it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _device

import actrec
from actrec import compare, data, load, record, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from actrec import Recorder, Recording

SOURCES = sorted(Path(actrec.__file__).parent.rglob("*.py"))
FACTORIES = {function.__name__ for function in _device._device_constructors()}


def _made_anywhere(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_factory = node.func.attr in FACTORIES and ast.unparse(node.func).startswith("torch.")
        if is_factory and "device" not in [keyword.arg for keyword in node.keywords]:
            yield f"{source.name}:{node.lineno}: {ast.unparse(node)}"


def test_every_tensor_that_is_made_has_its_device_named() -> None:
    assert {"zeros", "tensor", "as_tensor", "arange", "empty", "randn"} <= FACTORIES
    assert [call for source in SOURCES for call in _made_anywhere(source)] == []


def test_actrec_can_be_imported_under_another_default_device() -> None:
    code = "import torch; torch.set_default_device('meta'); from actrec._values import snapshot; assert snapshot.lazy_clone"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Net(nn.Module):
    """Returns tensors in a dict; the ReLU overwrites what the layer before it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.act(self.lin(x)), "sum": x.sum(1)}


X = torch.arange(20.0).reshape(5, 4) - 10
MODEL = Net()


def run(acts: Recorder) -> None:
    for part in X.split(2):
        out = MODEL(part)["out"]
        acts.add("label", part[:, 0].long())
        acts.add("mask", part[:, 0] > 0)
        if "gradient" in acts._beside:
            out.sum().backward()


def recordings(folder: Path) -> dict[str, Recording]:
    """The same in memory, saved, and recorded into a path."""
    with record(MODEL, ["lin", "act", ""], inputs=True, grads=True) as here:
        run(here)
    here.save(folder / "saved")
    with record(MODEL, ["lin", "act", ""], inputs=True, into=folder / "into") as acts:
        run(acts)
    with record(MODEL, ["lin", "act", ""], inputs=True, into=folder / "into", resume=True) as acts:
        assert acts.num_passes == 3
    return {"memory": here, "saved": load(folder / "saved"), "into": load(folder / "into")}


#: What can be asked of a recording.
READERS: dict[str, Callable[[Recording], Any]] = {
    "call": lambda acts: acts["lin"][1],
    "nested": lambda acts: acts[""][1]["sum"],
    "cat": lambda acts: acts["lin"].cat(),
    "nested cat": lambda acts: acts[""].cat()["out"],
    "inputs": lambda acts: acts.inputs["lin"].cat()["input"],
    "table": repr,
    "page": lambda acts: acts._repr_html_(),
    "passes": lambda acts: acts["lin"].passes,
    "statistics": lambda acts: repr(acts.stats()),
    "comparison": lambda acts: repr(compare(acts, acts)),
    "row": lambda acts: data.rows(acts, "lin", "label")[3],
    "rows": lambda acts: data.rows(acts, "lin", "label")[[3, 0, -1]],
    "range of rows": lambda acts: data.rows(acts, "lin", "label")[1:4],
    "every other row": lambda acts: data.rows(acts, "lin")[::2],
    "picked rows": lambda acts: data.rows(acts, "lin").__getitems__([0, 4]),
    "numbers": lambda acts: data.rows(acts, "lin", flatten=True)[1],
    "masked": lambda acts: data.rows(acts, "lin", mask="mask")[:],
    "shuffled": lambda acts: list(data.shuffled(acts, "lin", "label", batch_size=2)),
}


def plain(answer: Any) -> Any:
    """Something that can be compared; a tensor without data has no numbers to show."""
    if isinstance(answer, Tensor):
        return answer.tolist()
    return [plain(part) for part in answer] if isinstance(answer, (list, tuple)) else answer


@pytest.mark.parametrize("ask", READERS.values(), ids=READERS)
def test_a_recording_is_made_and_read_as_without_a_default_device(
    ask: Callable[[Recording], Any], tmp_path: Path
) -> None:
    expected = {name: plain(ask(acts)) for name, acts in recordings(tmp_path / "a").items()}
    with torch.device("meta"):
        found = {name: plain(ask(acts)) for name, acts in recordings(tmp_path / "b").items()}
        assert verify(tmp_path / "b" / "into") == verify(tmp_path / "b" / "saved") == []
    assert found == expected
