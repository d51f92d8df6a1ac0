"""Progress: shown where it was asked for, and nowhere else; the results are the same."""

from __future__ import annotations

import io
import shutil
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from actrec import _progress, compare, load, record, save, verify
from actrec.__main__ import main
from tests.house import imports, modules, room_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def acts() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with record(model) as acts:
        for _ in range(3):
            model(torch.ones(2, 4))
    return acts


@pytest.fixture
def without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(_progress, "_OFTEN", 0.0)
    monkeypatch.setattr(_progress, "_SELDOM", 0.0)


WORK: dict[str, tuple[Callable[..., Any], str]] = {
    "stats": (lambda acts, _, **given: acts.stats(**given), "statistics: 100%, 6 of 6, 0:00 left"),
    "compare": (lambda acts, _, **given: compare(acts, acts, **given), "compare: 100%, 6 of 6"),
    "save": (lambda acts, path, **given: acts.save(path / "b", **given), "save: 50%, 3 of 6"),
    "verify": (lambda _, path, **given: verify(path / "a", **given), "verify: 100%, 1 of 1"),
    "load": (lambda _, path, **given: load(path / "a", check=True, **given), "check: 100%, 1 of 1"),
}


@pytest.mark.parametrize(("work", "line"), WORK.values(), ids=WORK)
@pytest.mark.usefixtures("without_tqdm")
def test_progress_is_a_line_of_text_where_it_was_asked_for(
    acts: Any, work: Callable[..., Any], line: str, tmp_path: Path, capsys: Any
) -> None:
    save(acts, tmp_path / "a")
    work(acts, tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "b", ignore_errors=True)
    work(acts, tmp_path, progress=True)
    told = capsys.readouterr()
    assert line in told.err
    assert told.out == ""


@pytest.mark.usefixtures("without_tqdm")
def test_the_result_is_the_same(acts: Any, capsys: Any) -> None:
    assert repr(acts.stats(progress=True)) == repr(acts.stats())
    assert compare(acts, acts, progress=True) == compare(acts, acts)
    assert capsys.readouterr().err.count("statistics") == 6


def test_on_a_terminal_the_line_is_written_over_and_leaves_nothing(
    without_tqdm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert without_tqdm is None
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with _progress.showing("adding", 2, progress=True) as each:
        assert [*each("ab")] == ["a", "b"]
    first, second, nothing, end = terminal.getvalue().split("\r")
    assert (first, second.rstrip()) == (
        "adding: 50%, 1 of 2, 0:00 left",
        "adding: 100%, 2 of 2, 0:00 left",
    )
    assert (nothing.strip(), end) == ("", "")


def test_a_line_is_not_written_more_often_than_it_can_be_read(
    capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    clock = iter([0.0, 1.0, 9.0, 11.0, 12.0])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    with _progress.showing("adding", 400, progress=True) as each:
        assert sum(each([1, 2, 3, 4])) == 10
    assert capsys.readouterr().err == "adding: 1%, 3 of 400, 24:16 left\n"
    assert _progress._clock(4000.4) == "1:06:40"


def test_a_bar_of_tqdm_is_shown_where_it_is_installed(acts: Any, monkeypatch: Any) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, **given: Any) -> None:
            bars.append(self)
            self.given, self.done, self.is_closed = given, 0, False

        def update(self, many: int) -> None:
            self.done += many

        def close(self) -> None:
            self.is_closed = True

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Bar))
    acts.stats(progress=True)
    (bar,) = bars
    assert (bar.given["desc"], bar.given["total"], bar.done) == ("statistics", 6, 6)
    assert bar.is_closed


def test_the_bar_is_closed_after_an_error(capsys: Any) -> None:
    def broken() -> Any:
        with _progress.showing("adding", 2, progress=True) as each:
            return [1 / item for item in each([1, 0])]

    with pytest.raises(ZeroDivisionError):
        broken()
    assert "adding" in capsys.readouterr().err


@pytest.mark.usefixtures("without_tqdm")
def test_a_command_shows_progress_on_a_terminal_alone(
    acts: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(acts, tmp_path / "a")
    path = str(tmp_path / "a")
    for command in (["stats", path], ["compare", path, path], ["verify", path]):
        main(command)
        assert capsys.readouterr().err == ""
        terminal = Terminal()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", terminal)
            main(command)
        assert "of" in terminal.getvalue()


def test_nothing_that_runs_in_a_hook_shows_progress() -> None:
    known = modules()
    users = {room_of(name) for name in known if "_progress" in imports(name, known)}
    assert "_recordings" in users  # the test can fail
    assert not {"_block", "_calls", "_record", "_selection", "_values"} & users
