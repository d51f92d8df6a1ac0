"""``inputs=`` and ``grads=`` take what ``layers`` takes: what is recorded of which layer, and nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import actrec
from actrec import (
    OptionError,
    ResumeError,
    SelectionError,
    TransformError,
    UnknownLayerError,
    UnusedLayerWarning,
    record,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
NAMES = ["0", "1", "2"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))


def run(model: nn.Module) -> None:
    for x in X:
        model(x).square().sum().backward()


def total(value: Any) -> Tensor:
    """A transform of outputs and gradients."""
    return value.sum(1)


def of_input(received: Mapping[str, Tensor]) -> Tensor:
    """A transform of inputs."""
    return received["input"].sum(1)


# --- What is chosen -------------------------------------------------------------------------------------


@given(*[st.none() | st.lists(st.sampled_from(NAMES), min_size=1, unique=True) for _ in range(3)])
@settings(max_examples=20, deadline=None)
def test_each_kind_has_the_layers_of_its_own_queries_in_their_order(
    outputs: list[str] | None, inputs: list[str] | None, grads: list[str] | None
) -> None:
    model = net()
    with record(model, NAMES, inputs=True, grads=True) as everything:
        run(model)
    asked = {"inputs": inputs or False, "grads": grads or False}
    if not (outputs or inputs or grads):
        return
    with record(model, outputs or (), **asked) as acts:  # type: ignore[arg-type]
        run(model)
    assert list(acts) == (outputs or [])
    assert all(acts[name] == everything[name] for name in acts)
    for what, names in {"inputs": inputs, "grads": grads}.items():
        assert hasattr(acts, what) == (names is not None)
        if names is not None:
            found, expected = getattr(acts, what), getattr(everything, what)
            assert list(found) == names
            assert all(found[name] == expected[name] for name in names)
            assert all(found[name].passes == [0, 1] for name in names)
            assert found.execution_order == sorted(names)


def test_true_means_the_layers_that_are_recorded() -> None:
    model = net()
    with record(model, {"1": total}, inputs=True, grads=True) as acts:
        run(model)
    assert list(acts) == list(acts.inputs) == list(acts.grads) == ["1"]
    assert acts.inputs["1"][0]["input"].shape == (5, 3)  # the transform is that of outputs
    assert acts.grads["1"][0].shape == (5,)  # and of gradients


@pytest.mark.also_compiled
def test_each_query_has_its_own_transform() -> None:
    model = net()
    with record(
        model, {"2": total}, inputs={"2": of_input, "1": None}, grads={"2": torch.abs}
    ) as acts:
        run(model)
    assert acts["2"][0].shape == (5,)
    assert acts.inputs["2"][0].shape == (5,)
    assert acts.inputs["1"][0]["input"].shape == (5, 3)
    assert acts.grads["2"][0].shape == (5, 2)
    assert (acts.grads["2"][0] >= 0).all()


def test_the_transform_of_the_call_is_for_outputs_and_gradients() -> None:
    model = net()
    with record(model, (), transform=total, inputs="0", grads="0") as acts:
        run(model)
    assert acts.inputs["0"][0]["input"].shape == (5, 4)
    assert acts.grads["0"][0].shape == (5,)


def test_a_gradient_that_has_not_arrived_is_nested_as_what_it_belongs_to() -> None:
    model = nn.Sequential(nn.LSTM(4, 3))
    with record(model, {"0": lambda v: v[0]}, grads="0") as acts:
        model(X[0])
    assert acts.grads["0"][0] == (None, (None, None))
    with record(model, {"0": lambda v: v[0]}, grads={"0": lambda v: v[0]}) as acts:
        model(X[0])[0].sum().backward()
    assert acts.grads["0"][0].shape == (5, 3)


@pytest.mark.also_compiled
def test_a_call_that_one_transform_skips_is_skipped_whole() -> None:
    model = net()
    skips: list[Any] = [None, total]

    def second(received: Mapping[str, Tensor]) -> Tensor | None:
        return None if skips.pop(0) is None else received["input"]

    with record(model, "2", inputs={"2": second}, grads=True) as acts:
        run(model)
    assert acts["2"].passes == acts.inputs["2"].passes == acts.grads["2"].passes == [1]
    assert torch.equal(acts["2"][0], model(X[1]))


def test_heads_of_an_attention_layer_are_taken_apart_before_they_are_mixed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj, self.o_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.o_proj(self.v_proj(x))

    model = nn.Sequential(Attention(), Attention())
    with record(
        model, (), inputs={"**.o_proj": lambda given: given["input"].unflatten(-1, (2, 2))}
    ) as acts:
        model(X)
    assert list(acts.inputs) == ["0.o_proj", "1.o_proj"]
    assert torch.equal(acts.inputs["0.o_proj"][0].flatten(-2), model[0].v_proj(X))


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        checkpoint_wrapper,
        lambda model: nn.DataParallel(checkpoint_wrapper(model)),
        lambda model: torch.compile(model, backend="eager"),
    ],
)
def test_what_a_wrapper_receives_is_named_as_what_it_wraps_names_it(wrap: Any) -> None:
    model = wrap(Scaled())
    with record(model, "", inputs=True) as acts:
        model(torch.ones(2, 3), scale=2.0)
    assert list(acts.inputs[""][0]) == ["x", "scale"]


def test_a_module_has_one_key_whatever_it_was_chosen_for() -> None:
    model = net()
    with record(nn.Sequential(model), model[0], inputs="0.0") as acts:
        model(X[0])
    assert list(acts) == list(acts.inputs) == ["0.0"]


# --- What is refused --------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({"layers": ()}, SelectionError, r"\(\) is empty.*inputs='conv1'"),
    "inputs of none": (
        {"layers": [], "inputs": True},
        SelectionError,
        "inputs=True.*there are none",
    ),
    "gradients of none": (
        {"layers": [], "inputs": "0", "grads": True},
        SelectionError,
        "Name them: grads='conv1'",
    ),
    "an empty list": ({"inputs": []}, SelectionError, r"inputs=\[\].*False means none"),
    "None": (
        {"grads": None},
        OptionError,
        r"grads=None.*expected False for none, True for the layers",
    ),
    "no such layer": ({"grads": "3"}, SelectionError, "'3' matches no layer"),
    "no transform": ({"inputs": {"2": 3}}, OptionError, "gives '2' 3; expected a transform"),
    "a graph that ends": (
        {"layers": (), "grads": "0", "stop_early": True},
        OptionError,
        "stop_early=True",
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_refused_before_a_hook_is_placed(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = net()
    with pytest.raises(kind, match=message):
        record(model, **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_transform_that_takes_a_tensor_is_told_that_it_gets_a_dict() -> None:
    model = net()
    with (
        pytest.raises(TransformError, match=r"in call 0: .* gets a dict .*, here of 'input'"),
        record(model, (), inputs={"1": total}),
    ):
        model(X[0])


def test_outputs_that_were_not_recorded_are_not_there_and_the_message_says_what_is() -> None:
    model = net()
    with record(model, (), inputs="0", grads=["0", "1"]) as acts:
        run(model)
    with pytest.raises(UnknownLayerError, match=r"acts.inputs\['0'\] and acts.grads\['0'\]\."):
        acts["0"]
    with pytest.raises(UnknownLayerError, match=r"there is acts.grads\['1'\]\."):
        acts["1"]


def test_a_layer_whose_inputs_alone_were_asked_for_and_that_was_not_called_is_warned_of() -> None:
    model = net()
    with (
        pytest.warns(UnusedLayerWarning, match="nothing was recorded of 1 of 2 layers"),
        record(model, "0", inputs="2"),
    ):
        model[0](X[0])


# --- Looking, clearing, keeping ---------------------------------------------------------------------------


def test_the_table_has_rows_for_what_else_was_recorded() -> None:
    model = net()
    with record(model, "0", inputs=["0", "2"], grads="2") as acts:
        run(model)
    lines = repr(acts).splitlines()
    assert lines[0].startswith("recorded Sequential: 2 layers, 2 passes, ")
    assert lines[0].endswith(" with inputs and gradients")
    assert [line.split()[0] for line in lines[2:]] == ["0", "2", "2"]
    assert [line.split()[-1] for line in lines[3:]] == ["inputs", "gradients"]
    assert acts.nbytes == 4 * 2 * (5 * 3 + 5 * 4 + 5 * 3 + 5 * 2)


def test_layers_of_which_only_inputs_were_recorded_can_be_selected() -> None:
    model = net()
    with record(model, "0", inputs="2") as acts:
        run(model)
    part = acts.select(["2", "0"])
    assert (list(part), list(part.inputs)) == (["0"], ["2"])
    assert part.inputs["2"] == acts.inputs["2"]


def test_clear_forgets_what_layers_received_too() -> None:
    model = net()
    with record(model, (), inputs="2", grads="0") as acts:
        run(model)
        acts.clear()
        assert len(acts.inputs["2"]) == len(acts.grads["0"]) == 0
        run(model)
    assert acts.inputs["2"].passes == acts.grads["0"].passes == [0, 1]


def test_a_value_cannot_be_added_by_the_name_of_a_layer_whose_inputs_are_recorded() -> None:
    model = net()
    with record(model, (), inputs="2") as acts:
        model(X[0])
        with pytest.raises(actrec.ActrecError, match="name of a recorded layer"):
            acts.add("2", 1)


# --- On disk ----------------------------------------------------------------------------------------------


def same_besides(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for what in ("inputs", "grads"):
        one, other = getattr(found, what, None), getattr(expected, what, None)
        assert (one is None) == (other is None)
        if one is not None:
            assert list(one) == list(other)
            assert all(one[n] == other[n] and one[n].passes == other[n].passes for n in other)
            assert one.execution_order == other.execution_order


def test_what_was_recorded_by_query_is_saved_and_loaded(tmp_path: Path) -> None:
    model = net()
    with record(model, "1", inputs={"2": of_input}, grads=["2", "0"]) as acts:
        run(model)
    acts.save(tmp_path / "run")
    same_besides(actrec.load(tmp_path / "run"), acts)
    with record(model, (), inputs="2") as acts:
        run(model)
    acts.save(tmp_path / "inputs")
    same_besides(actrec.load(tmp_path / "inputs"), acts)
    assert repr(actrec.load(tmp_path / "inputs"))[8:] == repr(acts)[10:]


def test_inputs_by_query_are_recorded_into_a_path_and_resumed(tmp_path: Path) -> None:
    model = net()
    with record(model, "1", inputs={"2": of_input}) as expected:
        run(model)
        run(model)
    for _ in range(2):
        with record(model, "1", inputs={"2": of_input}, into=tmp_path / "run", resume=True) as acts:
            run(model)
    same_besides(acts, expected)
    same_besides(actrec.load(tmp_path / "run"), expected)
    for other, what in {
        "1": r"'input of 2'.*'input of 1'",
        "2": "transform of layer 'input of 2'",
    }.items():
        with pytest.raises(ResumeError, match=what):
            record(model, "1", inputs=other, into=tmp_path / "run", resume=True).__enter__()


def test_a_recording_whose_layers_have_no_roles_has_inputs_of_all_or_of_none(
    tmp_path: Path,
) -> None:
    model = net()
    with record(model, ["0", "2"], inputs=True, into=tmp_path / "run") as acts:
        run(model)
    file = tmp_path / "run" / "rank-00000" / "rank.json"
    about = json.loads(file.read_text())
    about["layers"] = [layer for layer in about["layers"] if layer.pop("role") == "output"]
    file.write_text(json.dumps(about))
    same_besides(actrec.load(tmp_path / "run"), acts)
    about["layers"][0]["role"] = "shape"
    file.write_text(json.dumps(about))
    with pytest.raises(actrec.CorruptRecordingError, match="role 'shape'"):
        actrec.load(tmp_path / "run")
