"""The trainers of docs/how-to/trainers.md: exact, without a trace, and the training as it would have been."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import actrec
from actrec.testing import assert_unhooked
from tests.recipes.pages import blocks, run
from tests.recipes.plain import differing, nothing, plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

PAGE = "trainers.md"

# What the libraries warn of, here and unasked.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def launch(command: list[str], folder: Path) -> str:
    """Run a command that starts several processes, and return what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


# --- Hugging Face Trainer ----------------------------------------------------------------------------


@pytest.fixture
def hugging_face(tmp_path: Path) -> Any:
    code = blocks(PAGE, "Hugging Face Trainer")
    return lambda record: run(PAGE, code, tmp_path, record=record)


def test_trainer_records_what_plain_hooks_see_and_trains_as_without(hugging_face):
    recorded, expected = hugging_face(actrec.record), hugging_face(plain)
    unrecorded = hugging_face(nothing)
    assert not differing(recorded["acts"], expected["acts"])
    assert not differing(weights(recorded["model"]), weights(unrecorded["model"]))
    assert recorded["trainer"].state.log_history[0]["eval_loss"] > 0  # it did evaluate
    assert_unhooked(recorded["model"])


def test_every_other_step_of_trainer_is_recorded_and_no_evaluation(hugging_face):
    acts = hugging_face(actrec.record)["acts"]
    assert torch.stack([*acts["step"]]).tolist() == [1, 3, 5]
    assert acts["step"].passes == [1, 3, 5]  # two passes to a step
    assert acts["model.layers.1"].passes == [0, 1, 2, 3, 4, 5]
    assert acts["model.layers.1"][0].shape == (4, 16)
