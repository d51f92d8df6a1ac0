"""A report: one page that stands alone, says what was recorded, and is there whole or not at all."""

from __future__ import annotations

import copy
import gc
import math
import os
import re
import sys
import weakref
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actrec import (
    CorruptRecordingError,
    OptionError,
    RecordingExistsError,
    UnusedLayerWarning,
    WriteError,
    load,
    record,
    reduce,
    verify,
)
from actrec.__main__ import main
from actrec._recordings.in_memory import ListLayer
from actrec._report import charts, report
from actrec.store import Folder
from actrec.store.disk import Disk
from actrec.store.layers import StoredLayer
from tests.made import made, made_of


class Page(HTMLParser):
    """What a browser would see: elements, whether they nest, the text of each section."""

    VOID = frozenset({"br", "meta", "col", "wbr", "img"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = {"": ""}
        self.pictures = {"": 0}
        self.section = ""
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
            self.text[self.section], self.pictures[self.section] = "", 0
        self.pictures[self.section] += tag == "svg"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] += data


def page(acts: Any, tmp_path: Path, **given: Any) -> Page:
    acts.report(tmp_path / "run.html", **given)
    return Page(tmp_path / "run.html")


COMMIT = Disk.commit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.ReLU()
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def recorded(passes: int = 3, bad: int | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    net = Net()
    with record(net, ["b", "a"], **options) as acts:
        for number in range(passes):
            x = torch.randn(5, 4)
            x[0, 0] = math.nan if number == bad else x[0, 0]
            net(x).sum().backward()
    return acts


# --- What is on it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_page_has_everything(is_stored: bool, tmp_path: Path) -> None:
    acts = recorded(bad=1)
    if is_stored:
        acts.save(tmp_path / "run")
        acts = load(tmp_path / "run")
    seen = page(acts, tmp_path)
    sections = [
        "",
        "to-know",
        "layers",
        "values",
        "distributions",
        "drift",
        "similarity",
        "load-it",
    ]
    assert list(seen.text) == sections
    assert "first NaN: a, pass 1" in seen.text[""]
    assert repr(acts).splitlines()[0] in seen.text["layers"]
    assert "NaN or infinity in 2 tensors: 'a', 'b'." in seen.text["to-know"]
    assert repr(acts.stats()).splitlines()[3] in seen.text["values"]
    assert seen.pictures["distributions"] == 2
    assert seen.pictures["drift"] == 3
    assert seen.pictures["similarity"] == 2
    where = str(tmp_path / "run") if is_stored else "run"
    assert f"acts = actrec.load({where!r})\nacts['a'][0]" in seen.text["load-it"]
    assert ("acts.save(" in seen.text["load-it"]) != is_stored


def test_it_needs_nothing_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    seen = page(recorded(), tmp_path)
    assert not {"script", "link", "iframe", "img"} & set(seen.tags)
    assert not re.search(r"url\(|@import|https?:|javascript:|\son\w+=", seen.html)
    assert "prefers-color-scheme: dark" in seen.html


def test_what_comes_from_the_user_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    acts = made_of({evil: [torch.randn(9, 2)] * 2}, evil, evil)
    seen = page(acts, tmp_path)
    assert "script" not in seen.tags
    assert seen.html.count("&lt;script&gt;") > 5


def test_all_is_well_where_nothing_is_wrong(tmp_path: Path) -> None:
    seen = page(recorded(), tmp_path)
    assert "no NaN, no infinity" in seen.text[""]
    assert seen.text["to-know"].endswith("Nothing was warned of, and nothing is missing.")


@pytest.mark.parametrize("way", ["memory", "saved", "path"])
def test_what_was_warned_of_is_on_it(way: str, tmp_path: Path) -> None:
    net = Net()
    into: Any = tmp_path / "a" if way == "path" else list
    with pytest.warns(UnusedLayerWarning) as caught, record(net, into=into) as acts:
        net(torch.ones(2, 4))
    if way == "saved":
        acts.save(tmp_path / "a")
    shown = acts if way == "memory" else load(tmp_path / "a")
    for one in (shown, shown.select(["a", "spare"]), copy.copy(shown.select("a"))):
        assert str(caught[0].message) in page(one, tmp_path).text["to-know"]
    if way != "memory":
        assert verify(tmp_path / "a") == []
        recorded().save(tmp_path / "a", overwrite=True)
        assert [*load(tmp_path / "a")._run.warnings()] == []


def test_warnings_of_several_runs_and_ranks_are_there_once(tmp_path: Path) -> None:
    net = Net()
    for resume in (False, True):
        for rank in range(2):
            folder = Folder(tmp_path / "a", rank=rank, world_size=2, run="a")
            with pytest.warns(UnusedLayerWarning), record(net, into=folder, resume=resume):
                net(torch.ones(2, 4))
    assert len(load(tmp_path / "a")._run.warnings()) == 1


def test_a_full_disk_keeps_no_warning_and_the_block_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        Disk,
        "commit",
        lambda self, name, write: full() if "warned" in name else COMMIT(self, name, write),
    )
    with pytest.warns(UnusedLayerWarning), record(Net(), into=tmp_path / "a"):
        pass
    assert [*load(tmp_path / "a")._run.warnings()] == []


@pytest.mark.parametrize("content", ["", "[", "[3]", "{}"])
def test_a_damaged_file_of_warnings_is_named(content: str, tmp_path: Path) -> None:
    recorded(into=tmp_path / "a")
    (tmp_path / "a" / "rank-00000" / "warned-7.json").write_text(content)
    with pytest.raises(CorruptRecordingError, match=r"warned-7\.json is damaged"):
        load(tmp_path / "a").report(tmp_path / "run.html")


def test_what_is_missing_or_odd_is_on_it(tmp_path: Path) -> None:
    net = nn.Sequential(Net(), nn.Threshold(9, 0), nn.Threshold(9, 3))
    with pytest.raises(KeyError), record(net, into=tmp_path / "run") as acts:
        net(torch.ones(2, 4))
        with pytest.raises(RuntimeError):
            net(torch.ones(2, 5))
        net(torch.ones(2, 4))
        raise KeyError
    assert acts.failed_passes == [1]
    told = page(load(tmp_path / "run"), tmp_path).text["to-know"]
    for sentence in (
        "Rank 0 was not closed properly, and has 2 passes: left by KeyError.",
        "1 pass raised: 1. The calls before the error are there.",
        "1 layer never called: '0.spare'.",
        "Nothing but zeros in 1 tensor: '1'.",
        "The same number everywhere in 1 tensor: '2'.",
    ):
        assert sentence in told
    acts = made(a=[torch.ones(1)])
    acts._run.passes.raised.update(range(10))
    assert (
        "10 passes raised: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more."
        in page(acts, tmp_path).text["to-know"]
    )


def test_inputs_and_gradients_have_statistics_too(tmp_path: Path) -> None:
    acts = recorded(inputs=True, grads=True)
    seen = page(acts, tmp_path)
    assert "a['input']" in seen.text["inputs"]
    assert "statistics of 2 layers" in seen.text["gradients"]
    assert "recorded gradients of Net" in page(acts.grads, tmp_path).text[""]


def test_layers_that_were_reduced_are_left_out_and_named(tmp_path: Path) -> None:
    told = page(recorded(into=reduce.Moments), tmp_path).text
    assert "No statistics of 'a', 'b': their calls were not kept, but reduced." in told["to-know"]
    assert "No layer has a finite value." in told["distributions"]


def test_a_picture_that_would_mislead_is_not_drawn(tmp_path: Path) -> None:
    seen = page(recorded(passes=1), tmp_path)
    assert "no course to draw" in seen.text["drift"]
    assert "It needs 8 samples or more that layers have in common, and there are 5." in (
        seen.text["similarity"].replace("Not drawn: it needs", "It needs")
    )
    assert "No layer has a finite value" in page(made(a=[]), tmp_path).text["distributions"]
    assert "load-it" in page(made(), tmp_path).text


def test_a_picture_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LAYERS", "_ROWS", "_POINTS"):
        monkeypatch.setattr(sys.modules["actrec._report.report"], name, 2)
    generator = torch.Generator().manual_seed(0)
    calls = {name: [torch.randn(4, 3, generator=generator) for _ in range(5)] for name in "abc"}
    told = page(made(**calls), tmp_path).text
    assert "It shows 2 of 3 tensors." in told["distributions"]
    assert "Of up to 5 calls of each layer 2 are drawn. It shows 2 of 3 layers." in told["drift"]
    assert "It shows 2 of 3 layers." in told["similarity"]


def test_a_recording_is_never_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(passes=30, into=tmp_path / "run")
    there: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]
    read = StoredLayer._call

    def counted(self: StoredLayer, index: int) -> Any:
        value = read(self, index)
        there.add(value)
        most[0] = max(most[0], len(there))
        return value

    monkeypatch.setattr(StoredLayer, "_call", counted)
    gc.collect()
    page(load(tmp_path / "run"), tmp_path)
    assert 0 < most[0] <= 3


# --- Charts ------------------------------------------------------------------------------------------


def test_a_line_is_broken_where_a_number_is_nan() -> None:
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5)]
    html = charts.lines("mean", [charts.Line("a", points), charts.Line("b", [(0, 1.0)])])
    assert 'd="M0 120.0L333 0.0h0M1000 60.0h0"' in html
    assert charts.lines("mean", [charts.Line("a", [(0, math.nan)])]) == ""


def test_layers_of_different_size_share_an_axis_that_bends() -> None:
    small, large = (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.0, 0.0, 10.0, 1000.0)
    html = charts.boxes([charts.Box("a", small), charts.Box("b", small), charts.Box("c", large)])
    assert "linear from -1 to 1, and logarithmic beyond" in html
    assert 'd="M0.0 10H400.0"' in html  # from -1 to 1 is as wide as from 1 to 100
    assert "logarithmic" not in charts.boxes([charts.Box("a", (2.0,) * 5)])


def test_a_cell_without_a_number_stays_empty() -> None:
    html = charts.heat(["a", "b"], [[1.0, math.nan], [0.0, 0.5]])
    assert html.count("<rect") == 3
    assert 'fill="#fde725"' in html
    assert "<title>b, a: 0.00</title>" in html


# --- Where it goes -------------------------------------------------------------------------------------

PATHS: dict[str, tuple[Any, str]] = {
    "no path": (3, r"acts.report\(3\): expected the path of a file, such as 'run.html'"),
    "bytes": (b"run.html", "expected the path of a file"),
    "URL": ("s3://bucket/run.html", "a report is a file on disk"),
    "folder": (".", "that is a folder. Name a file in it: 'run.html'"),
    "other suffix": ("run.pdf", "a report is an HTML page. Write 'run.pdf.html'"),
    "no folder": ("there/is/none.html", "there is no folder 'there/is'. Make it first"),
}


@pytest.mark.parametrize(("path", "message"), PATHS.values(), ids=PATHS)
def test_a_path_that_cannot_be_is_refused_before_anything_is_read(
    path: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ListLayer, "__iter__", lambda _: pytest.fail("it was read"))
    with pytest.raises(OptionError, match=message):
        made(a=[torch.ones(1)]).report(path)
    assert not [*tmp_path.iterdir()]


def test_another_file_is_left_alone_and_a_report_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    path.write_text("my thesis")
    with pytest.raises(RecordingExistsError, match="is not a report of actrec"):
        recorded().report(path)
    assert path.read_text() == "my thesis"
    path.unlink()
    made(a=[]).report(path)
    before = path.read_text()
    recorded().report(path)
    assert path.read_text() != before
    assert [*tmp_path.iterdir()] == [path]


def test_a_page_that_cannot_be_written_leaves_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.html"
    made(a=[]).report(path)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"it could not be written: .*No space left"):
        recorded().report(path)
    assert path.read_text() == before
    assert [*tmp_path.iterdir()] == [path]


def test_the_home_directory_is_meant_by_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    report(made(a=[]), "~/run.HTML")
    assert (tmp_path / "run.HTML").exists()


def test_progress_is_shown_where_it_was_asked_for(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(sys.modules["actrec._progress"], "_SELDOM", 0.0)
    page(recorded(), tmp_path, progress=True)
    told = capsys.readouterr().err
    for done in ("statistics: 100%, 6 of 6", "drift: 100%, 6 of 6", "similarity: 100%, 4 of 4"):
        assert done in told


def test_the_command_writes_a_page_of_the_name_of_the_recording(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recorded(into="run.1")
    assert main(["report", "run.1/"]) == 0
    assert capsys.readouterr().out == "run.1.html\n"
    assert main(["report", "run.1", "-o", "b.html"]) == 0
    assert Page(Path("b.html")).text.keys() == Page(Path("run.1.html")).text.keys()
    assert main(["report", "run.1", "-o", "b.txt"]) == 1
    assert "a report is an HTML page" in capsys.readouterr().err
