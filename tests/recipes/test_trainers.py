"""The trainers of docs/how-to/trainers.md: exact, without a trace, and the training as it would have been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import actrec
from actrec.testing import assert_unhooked
from tests.recipes.pages import blocks, run
from tests.recipes.plain import differing, nothing, plain

PAGE = "trainers.md"
HEADINGS = ["Hugging Face Trainer", "accelerate", "Lightning"]

# What the libraries warn of, here and unasked.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def launch(command: list[str], folder: Path) -> str:
    """Run a command that starts several processes, and return what it printed."""
    program, *arguments = command
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
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
    assert len(acts.units) == 3
    assert acts["model.layers.1"].passes == [0, 0, 1, 1, 2, 2]  # two calls to a step
    assert acts["model.layers.1"][0].shape == (4, 16)


def test_trainer_in_two_processes_leaves_one_recording(tmp_path):
    code = "".join(blocks(PAGE, "Hugging Face Trainer"))
    option = "transform=lambda t: t.mean(1)"
    assert option in code
    (tmp_path / "train.py").write_text(code.replace(option, f'{option}, into="run"'))
    launch(["torchrun", "--nproc-per-node", "2", "train.py"], tmp_path)
    acts = actrec.load(tmp_path / "run")
    assert acts.complete
    assert [rank.num_passes for rank in acts.ranks] == [3, 3]
    assert len(set(acts.units)) == 6


# --- accelerate --------------------------------------------------------------------------------------


@pytest.fixture
def accelerated(tmp_path: Path) -> Any:
    code = blocks(PAGE, "accelerate")
    AcceleratorState._reset_state(reset_partial_state=True)
    return lambda **of_actrec: run(PAGE, code, tmp_path, **of_actrec)


def test_accelerate_may_compile_and_cast_and_names_stay():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", dynamo_backend="eager")
    made = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    model, inputs = accelerator.prepare(made), torch.randn(2, 8)
    assert model is not made
    model(inputs)  # it is compiled by now
    with actrec.record(model, ["0", "2"]) as acts:
        output = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not differing(acts, {"0": [made[0](inputs)], "2": [made(inputs)]})
    assert torch.equal(acts["2"][0].float(), output)
    assert_unhooked(model)


def test_accelerate_records_what_plain_hooks_see_and_trains_as_without(accelerated, tmp_path):
    recorded = accelerated(record=actrec.record)
    expected = accelerated(record=plain, load=str)
    unrecorded = accelerated(record=nothing, load=str)
    assert not differing(actrec.load(tmp_path / "run"), expected["acts"])
    assert not differing(weights(recorded["model"]), weights(unrecorded["model"]))
    assert_unhooked(recorded["model"])


def test_accelerate_in_two_processes_leaves_one_recording_of_all_rows(tmp_path):
    (code,) = blocks(PAGE, "accelerate")
    (command,) = blocks(PAGE, "accelerate", "sh")
    (tmp_path / "train.py").write_text(code)
    printed = launch(command.split(), tmp_path)
    acts = actrec.load(tmp_path / "run")
    assert acts.complete
    assert str(acts) in printed
    assert sorted(path.name for path in tmp_path.glob("run/rank-*")) == ["rank-00000", "rank-00001"]
    rows = acts["rows"].cat()
    assert len(rows) == 32  # of 30: two of them twice
    assert set(rows.tolist()) == set(range(30))
    assert len(acts["0"]) == len(acts["2"]) == len(acts["rows"]) == 8


# --- Lightning ---------------------------------------------------------------------------------------


@pytest.fixture
def lightning(tmp_path: Path) -> Any:
    code = blocks(PAGE, "Lightning")[:3]
    return lambda record: run(PAGE, code, tmp_path, record=record)


def test_lightning_records_what_plain_hooks_see_and_trains_as_without(lightning):
    recorded, expected, unrecorded = map(lightning, (actrec.record, plain, nothing))
    acts, plainly = recorded["recording"].acts, expected["recording"].acts
    assert not differing(acts, plainly)
    assert not differing(acts.grads, plainly.grads)
    assert not differing(weights(recorded["module"]), weights(unrecorded["module"]))
    assert recorded["trainer"].callback_metrics["loss"] > 0  # it did validate
    assert_unhooked(recorded["module"])


def test_every_other_batch_of_lightning_is_recorded_and_no_validation(lightning):
    acts = lightning(actrec.record)["recording"].acts
    assert list(acts) == ["net.0", "net.1", "net.2"]
    assert acts["net.2"].passes == list(range(8))  # of twice eight batches
    assert all(grad is not None for grad in acts.grads["net.0"])


def test_parts_that_lightning_calls_one_by_one_are_one_pass_of_the_step(lightning):
    names = lightning(actrec.record)

    class Parts(names["Classifier"]):
        def forward(self, inputs):
            raise AssertionError

        def training_step(self, batch, index):
            inputs, targets = batch
            for part in self.net:
                inputs = part(inputs)
            return nn.functional.cross_entropy(inputs, targets)

        def validation_step(self, batch, index):
            pass

    recording = names["Recording"]("net.*")
    trainer = names["L"].Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[recording], **names["quiet"]
    )
    trainer.fit(Parts(), names["loader"], names["loader"])
    assert recording.acts["net.2"].passes == [*range(8)]  # a unit makes one pass of them


def test_lightning_leaves_no_hook_when_a_step_fails(lightning):
    names = lightning(actrec.record)

    class Failing(names["Classifier"]):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            if index == 3:
                raise KeyError
            return loss

    module, recording = Failing(), names["Recording"]("net.*")
    trainer = names["L"].Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[recording], **names["quiet"]
    )
    with pytest.raises(KeyError):
        trainer.fit(module, names["loader"], names["loader"])
    assert_unhooked(module)
    assert recording.acts["net.0"].passes == [0, 1, 2]  # the one that failed is dropped whole
    assert "interrupted" in str(recording.acts)


def test_lightning_on_two_devices_leaves_one_recording(tmp_path):
    callback, module, _, on_two_devices = blocks(PAGE, "Lightning")
    (tmp_path / "train.py").write_text(callback + module + on_two_devices)
    launch(["python", "train.py"], tmp_path)
    acts = actrec.load(tmp_path / "run")
    assert acts.complete
    assert sorted(path.name for path in tmp_path.glob("run/rank-*")) == ["rank-00000", "rank-00001"]
    assert [len(acts[name]) for name in acts] == [8, 8, 8]
