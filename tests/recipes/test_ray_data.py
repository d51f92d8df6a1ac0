"""docs/how-to/ray-data.md on a local Ray: what the actors record is exact, and nothing is lost when one dies."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray
import torch

import actrec
from tests.recipes.pages import blocks, run

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = "ray-data.md"
HEADINGS = [None, "Activations as columns", "Activations on disk"]

# Ray warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the code of the page has left behind, and Ray running."""
    folder = tmp_path_factory.mktemp("run")
    own = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets are short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(own))  # where Ray keeps a token
        patch.setenv("RAY_TMPDIR", str(own))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        code = [block for heading in HEADINGS for block in blocks(PAGE, heading)]
        try:
            yield run(PAGE, code, folder)
        finally:
            ray.shutdown()
            shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What plain hooks see, in batches of eight."""
    model = recipe["ConvNet"]().eval()
    seen: dict[str, list[torch.Tensor]] = {"conv1": [], "conv2": [], "head": []}
    for name, values in seen.items():
        keep = values.append
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, keep=keep: keep(output.clone())
        )
    with torch.inference_mode():
        for batch in torch.tensor(recipe["images"]).split(8):
            model(batch)
        return {name: torch.cat(values) for name, values in seen.items()}


def test_the_columns_are_what_plain_hooks_see(recipe, expected):
    table = recipe["table"]
    assert [row["id"] for row in table] == list(range(48))
    columns = {
        name: torch.tensor(np.stack([row[name] for row in table])) for name in ("conv2", "head")
    }
    assert torch.equal(columns["conv2"], expected["conv2"].mean((2, 3)))
    assert torch.equal(columns["head"], expected["head"])


def test_the_recordings_are_what_plain_hooks_see(recipe, expected):
    recordings = recipe["recordings"]
    assert all(recording.complete for recording in recordings)
    for name in ("conv1", "conv2"):
        assert torch.equal(torch.cat([r[name].cat() for r in recordings]), expected[name])
    assert torch.cat([r["id"].cat() for r in recordings]).tolist() == list(range(48))


def test_a_batch_whose_actor_died_is_recorded_once(recipe, expected, tmp_path):
    class Dying(recipe["Recordings"]):
        def __call__(self, batch):
            done = super().__call__(batch)
            if 16 in batch["id"] and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os._exit(1)
            return done

    folder = tmp_path / "recordings"
    compute = recipe["ActorPoolStrategy"](size=1)
    rows = (
        recipe["dataset"]
        .map_batches(Dying, fn_constructor_args=[str(folder)], batch_size=8, compute=compute)
        .take_all()
    )
    assert (tmp_path / "died").exists()
    assert len(rows) == len(set(folder.iterdir())) == 6
    recordings = [actrec.load(row["path"]) for row in rows]
    assert [recording.num_passes for recording in recordings] == [1] * 6
    assert torch.equal(torch.cat([r["conv2"].cat() for r in recordings]), expected["conv2"])


def test_an_error_of_actrec_reaches_the_one_who_started_the_run(recipe):
    class Mistaken(recipe["Features"]):
        layers = ("conv3",)

    compute = recipe["ActorPoolStrategy"](size=1)
    features = recipe["dataset"].map_batches(Mistaken, batch_size=8, compute=compute)
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        features.take_all()
    assert "SelectionError" in str(raised.value)
    assert "Did you mean 'conv1' or 'conv2'?" in str(raised.value)
