"""save() and its overwrite=; what load() says of a path that is no recording."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actrec
from actrec import OptionError, RecordingExistsError, RecordingNotFoundError, load, record, save
from actrec.store import Folder


def made(value: float) -> Any:
    model = nn.Identity()
    with record(model, "") as acts:
        model(torch.full((2, 3), value))
    return acts


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "writer.lock"
    }


@pytest.fixture
def there(tmp_path: Path) -> Path:
    save(made(1), tmp_path / "run")
    return tmp_path / "run"


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = nn.Identity()
    with record(model, "", into="~/a") as acts:
        model(torch.ones(2))
    acts.save(Path("~/b"))
    assert [*load("~/a")] == [*load(tmp_path / "b")] == [""]
    assert actrec.verify("~/b") == []
    with pytest.raises(OptionError, match="that home directory does not exist"):
        load("~nobody-of-that-name/run")


# --- Saving over a recording -------------------------------------------------------------------------


def test_without_overwrite_a_recording_stays(there: Path) -> None:
    before = snapshot(there)
    for write in (save, actrec.Recording.save):
        with pytest.raises(RecordingExistsError, match="there is a recording already"):
            write(made(2), there)
    assert snapshot(there) == before


def test_with_overwrite_it_is_replaced_and_nothing_is_left_beside_it(there: Path) -> None:
    save(made(2), there, overwrite=True)
    assert load(there)[""][0].unique().tolist() == [2]
    made(3).save(Folder(there), overwrite=True)
    assert load(there)[""][0].unique().tolist() == [3]
    assert [path.name for path in there.parent.iterdir()] == ["run"]
    assert actrec.verify(there) == []


def test_overwrite_writes_where_nothing_is_too(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        save(made(1), tmp_path / name, overwrite=True)
        assert len(load(tmp_path / name)[""]) == 1


def test_a_recording_can_be_saved_over_itself(there: Path) -> None:
    acts = load(there)
    acts.save(there, overwrite=True)
    assert load(there)[""][0].unique().tolist() == [1]


def test_what_a_link_leads_to_is_replaced(there: Path) -> None:
    link = there.with_name("latest")
    link.symlink_to(there)
    save(made(2), link, overwrite=True)
    assert link.is_symlink()
    assert load(there)[""][0].unique().tolist() == [2]


OTHERS = {
    "a file beside": lambda run: (run / "notes.txt").write_text("mine"),
    "a folder beside": lambda run: (run / "checkpoints").mkdir(),
    "a file inside": lambda run: (run / "rank-00000" / "notes.txt").write_text("mine"),
    "a file like a rank": lambda run: (run / "rank-00001").write_text("mine"),
    "no description": lambda run: (run / "rank-00000" / "rank.json").unlink(),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_anything_but_a_recording_is_left_alone(there: Path, change: Any) -> None:
    change(there)
    before = snapshot(there)
    with pytest.raises(RecordingExistsError, match="has other things in it"):
        save(made(2), there, overwrite=True)
    assert snapshot(there) == before
    assert [path.name for path in there.parent.iterdir()] == ["run"]


def test_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RecordingExistsError, match="that is a file"):
        save(made(2), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_that_is_recording_is_left_alone(tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=tmp_path / "run"):
        model(torch.ones(1))
        with pytest.raises(RecordingExistsError, match="a run is recording there now"):
            save(made(2), tmp_path / "run", overwrite=True)
    assert len(load(tmp_path / "run")[""]) == 1


def test_what_cannot_be_stored_replaces_nothing(there: Path) -> None:
    acts = made(2)
    acts[""].append(object())
    before = snapshot(there)
    with pytest.raises(actrec.CaptureError):
        acts.save(there, overwrite=True)
    assert snapshot(there) == before


def test_where_writing_or_renaming_fails_the_old_one_stays(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(there)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if Path(target).name == "run" and not self.name.endswith(".old.tmp"):
            raise OSError("no")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="no"):
            save(made(2), there, overwrite=True)
    assert snapshot(there) == before
    assert [path.name for path in there.parent.iterdir()] == ["run"]


def test_an_object_store_is_not_overwritten() -> None:
    url = "memory://bucket/overwritten"
    save(made(1), url, overwrite=True)
    with pytest.raises(OptionError, match="Delete what is there first"):
        save(made(2), url, overwrite=True)
    assert load(url)[""][0].unique().tolist() == [1]


# --- A path that is no recording ---------------------------------------------------------------------


def test_load_of_a_ranks_folder_says_what_to_write(there: Path) -> None:
    whole = str(there)
    with pytest.raises(RecordingNotFoundError) as caught:
        load(there / "rank-00000")
    assert f"that is the folder of rank 0 of a recording. Write load({whole!r}), or" in str(
        caught.value
    )
    assert f"load({whole!r}, rank=0)" in str(caught.value)


def test_load_of_a_file_says_what_it_is(there: Path) -> None:
    with pytest.raises(RecordingNotFoundError) as caught:
        load(there / "rank-00000" / "000000.safetensors")
    assert f"that is a file of a recording. Write load({str(there)!r})" in str(caught.value)
    other = there.with_name("acts.pt")
    other.write_bytes(b"x")
    with pytest.raises(RecordingNotFoundError, match="that is a file, and a recording is a folder"):
        load(other)


def test_load_of_a_folder_that_is_named_like_a_ranks_says_nothing_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "rank-00000").mkdir()
    with pytest.raises(RecordingNotFoundError, match=r"no rank.json in any folder in it"):
        load(tmp_path / "rank-00000")
    shutil.rmtree(tmp_path / "rank-00000")
    with pytest.raises(RecordingNotFoundError, match="no such folder"):
        load(tmp_path / "rank-00000")
