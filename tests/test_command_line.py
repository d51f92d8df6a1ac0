"""The command line: what people expect of one."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actrec import record
from actrec.__main__ import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recordings "a" and "b", which differ a little."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for name in "ab":
        with record(model, into=tmp_path / name):
            model(torch.ones(2, 4))
        with torch.no_grad():
            model[0].bias.add_(1e-3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_is_printed_where_nothing_was_asked_for_and_little_is_imported() -> None:
    # Imports are counted, for they are what takes the time, and repeat where seconds scatter.
    code = (
        "import sys; before = {*sys.modules}; from actrec.__main__ import main; main([]);"
        "print(*({*sys.modules} - before), sep='|')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, last = run.stdout.splitlines()
    for command in ("show", "stats", "compare", "verify", "report", "--version"):
        assert command in "\n".join(text)
    imported = last.split("|")
    assert "actrec.__main__" in imported
    assert not {"torch", "numpy", "tqdm"} & {*imported}
    assert len(imported) < 150


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["show", "--help"], ["compare", "-h"]], ids=str
)
def test_help_and_version_end_well(command: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert "actrec" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["shwo"], ["show"], ["compare", "a"], ["compare", "a", "b", "--rtol", "x"]], ids=str
)
def test_what_is_no_command_says_how_it_is_used(command: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "usage: actrec" in capsys.readouterr().err


def test_show_prints_the_table_and_statistics_where_asked_for(runs: Path, capsys: Any) -> None:
    assert main(["show", "a"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("stored Sequential: 2 layers, 1 pass")
    assert main(["stats", "a"]) == 0
    stats = capsys.readouterr().out
    assert stats.startswith("statistics of 2 layers")
    assert main(["show", "a", "--stats"]) == 0
    assert capsys.readouterr().out == f"{table}\n{stats}"
    assert runs.exists()


def test_compare_ends_as_diff_does(runs: Path, capsys: Any) -> None:
    assert main(["compare", "a", "a"]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(["compare", str(runs / "a"), "b"]) == 1
    told = capsys.readouterr()
    assert "different: first in 0, pass 0" in told.out
    assert told.err == f"{runs / 'a'} and b differ\n"
    assert main(["compare", "a", "b", "--atol", "1", "--rtol=0"]) == 0
    assert main(["compare", "a", "b", "--atol", "-1"]) == 1
    assert "expected a number that is not negative" in capsys.readouterr().err


def test_compare_leaves_out_what_a_mask_leaves_out(tmp_path: Path, capsys: Any) -> None:
    model = nn.Sequential(nn.Embedding(4, 3))
    ids = torch.tensor([[1, 2, 3, 0]])
    for name, padding in (("a", 0.0), ("b", 5.0)):
        with torch.no_grad():
            model[0].weight[0] = padding
        with record(model, into=tmp_path / name) as acts:
            model(ids)
            acts.add("mask", ids != 0)
    paths = [str(tmp_path / name) for name in "ab"]
    assert main(["compare", *paths]) == 1
    assert main(["compare", *paths, "--mask", "mask"]) == 0
    capsys.readouterr()
    assert main(["stats", paths[1]]) == 0
    assert "5" in capsys.readouterr().out
    assert main(["stats", paths[1], "--mask", "mask"]) == 0
    assert " 5 " not in capsys.readouterr().out
    assert main(["compare", *paths, "--mask", "musk"]) == 1
    assert "mask='musk'" in capsys.readouterr().err


def test_a_path_that_is_no_recording_is_named(runs: Path, capsys: Any) -> None:
    for command in (["show"], ["stats"], ["compare", "a"], ["verify"]):
        assert main([*command, "nothing"]) == 1
        assert "nothing" in capsys.readouterr().err
    assert runs == Path.cwd()


def test_the_script_of_the_package_is_there() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["actrec"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "verify" in capsys.readouterr().out
