"""The benchmarks run, and their table is a table. What they measure, only their own session says."""

from __future__ import annotations

import contextlib
import io
import math
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch

from tests.benchmarks import dataset, report, run
from tests.benchmarks.timing import Row, added, ratios, take_turns
from tests.sweep import WHOLE

if TYPE_CHECKING:
    from tests.benchmarks.timing import Times


def printed_here(module: str, call: str) -> list[float]:
    """What a process of its own would print."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        eval(call, vars(import_module(module)))  # noqa: S307  # code of this project's own
    return [float(number) for number in printed.getvalue().split()]


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own imports
@pytest.mark.parametrize("name", run.BENCHMARKS if WHOLE else ["calls", "gradients", "looking"])
def test_every_benchmark_runs_and_measures_something_with_a_target(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It asks five processes, as others ask one or two: those show that this works.
    monkeypatch.setattr(dataset, "printed_by", printed_here)
    rows = list(run.BENCHMARKS[name](quick=True))
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert any(row.target for row in rows)
    for row in rows:
        assert math.isfinite(row.median), row
        assert row.low <= row.median <= row.high, row


def test_a_median_up_to_the_target_meets_it() -> None:
    assert Row.of("a", [1.2, 1.3, 9.0], target=1.3).met is True
    assert Row.of("a", [1.2, 1.31, 1.32], target=1.3).met is False
    assert Row.of("a", [1.2]).met is None


def test_variants_take_turns_and_the_first_round_does_not_count() -> None:
    asked: list[str] = []

    def variant(name: str, seconds: float) -> float:
        asked.append(name)
        return seconds

    times = take_turns({"a": lambda: variant("a", 1), "b": lambda: variant("b", 2)}, rounds=4)
    assert times == {"a": [1] * 4, "b": [2] * 4}
    assert asked[2:] == ["a", "b", "b", "a", "b", "a", "a", "b"]


def test_a_ratio_is_taken_round_by_round_and_added_cost_leaves_the_work_out() -> None:
    times: Times = {"bare": [1.0, 1.0], "usual": [2.0, 3.0], "ours": [3.0, 3.0]}
    assert ratios(times, "ours", "usual") == [1.5, 1.0]
    assert added(times, "ours", "usual", without="bare") == [2.0, 1.0]


def test_the_tables_name_the_command_the_machine_and_what_was_missed() -> None:
    rows = [Row.of("import", [1.5], target=1.3, exact="both"), Row.of("entry", [20.0], unit="us")]
    text = report.text(rows, "the command")
    markdown = report.markdown(rows, "the command")
    for table in (text, markdown):
        assert "the command" in table
        assert torch.__version__ in table
    assert text.splitlines()[-2:] == [
        "import  1.500 x  1.500 - 1.500  <= 1.3 x   no   both",
        "entry   20.0 us    20.0 - 20.0",
    ]
    assert markdown.splitlines()[-2:] == [
        "| import | 1.500 x | 1.500 - 1.500 | <= 1.3 x | no | both |",
        "| entry | 20.0 us | 20.0 - 20.0 |  |  |  |",
    ]


def test_chosen_benchmarks_run_alone_and_leave_the_threads_as_they_were(
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    run.main(["--quick", "--markdown", "entry"])
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "`python tests/benchmarks/run.py --quick --markdown entry`"
    assert all(line.startswith("| entry and exit") for line in lines[6:])


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["imports"])
    assert "there is no benchmark 'imports'" in capsys.readouterr().err
