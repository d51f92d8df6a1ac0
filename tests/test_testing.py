"""What users test with: the check that nothing is left on a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from actrec import OptionError, record, testing
from actrec.testing import assert_unhooked
from tests.models import ConvNet


def test_a_model_that_was_never_recorded_is_unhooked() -> None:
    assert_unhooked(ConvNet())


def test_only_a_model_can_be_checked() -> None:
    with pytest.raises(
        OptionError, match=r"assert_unhooked\('model'\): expected the model, .* got a str"
    ):
        assert_unhooked("model")  # type: ignore[arg-type]


def test_hooks_that_are_there_are_told_by_module() -> None:
    model = ConvNet()
    with record(model, "conv1", inputs=True):
        model(model.example())
        with pytest.raises(
            AssertionError, match=r"are on '', 'conv1' of this ConvNet\. Is a record"
        ):
            assert_unhooked(model)
    assert_unhooked(model)


def test_a_module_with_only_a_hook_on_inputs_is_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with record(model, "0", inputs=True):
        model(torch.ones(1, 2))
        model._forward_hooks.clear()
        model._forward_pre_hooks.clear()
        model[0]._forward_hooks.clear()
        with pytest.raises(AssertionError, match="are on '0' of"):
            assert_unhooked(model)


def test_hooks_of_others_do_not_matter() -> None:
    model = ConvNet()
    handle = model.conv1.register_forward_hook(lambda *_: None)
    assert_unhooked(model)
    handle.remove()


def test_a_copy_made_while_recording_is_unhooked() -> None:
    model = ConvNet()
    with record(model):
        other = copy.deepcopy(model)
        assert_unhooked(other)
        model(model.example())


def test_the_usual_hook_is_wrong_on_the_convnet_and_actrec_is_right() -> None:
    model = ConvNet()
    kept = {}
    handle = model.conv1.register_forward_hook(lambda *a: kept.update(conv1=a[2].detach().cpu()))
    with record(model, "conv1") as acts:
        model(model.example())
    handle.remove()
    assert (acts["conv1"][0] < 0).any()
    assert not (kept["conv1"] < 0).any()


def test_the_public_names_are_these() -> None:
    assert testing.__all__ == ["assert_unhooked"]
