"""What a new user would guess is there, or is answered with what to write instead."""

from __future__ import annotations

import copy
import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import actrec
from actrec import (
    JoinError,
    SelectionError,
    UnknownLayerError,
    UnusedLayerWarning,
    load,
    record,
)
from actrec._recordings.in_memory import ListLayer
from actrec.data import rows
from tests.made import made

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

X = torch.ones(2, 4)


class Pair(nn.Module):
    """Returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(4, 4)
        self.layer1 = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.pair = Pair()
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.layer1(self.conv1(x)))[0]


LAYERS = ["conv1", "layer1.0", "layer1.1", "pair"]


def recorded(layers: Any = LAYERS, **options: Any) -> tuple[Net, Any]:
    net = Net()
    with record(net, layers, **options) as acts:
        net(X)
        net(X)
    return net, acts


@pytest.fixture
def acts() -> Any:
    return recorded()[1]


@pytest.fixture
def stored(acts: Any, tmp_path: Path) -> Any:
    acts.save(tmp_path / "run")
    return load(tmp_path / "run")


# --- What is not there says what to write ---------------------------------------------------------------

ATTRIBUTES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "method of a tensor": (
        lambda acts: acts["conv1"].mean(),
        "acts['conv1'].mean: acts['conv1'] is a list of 2 calls: acts['conv1'].cat().mean(), or acts['conv1'][0].mean().",
    ),
    "shape": (lambda acts: acts["conv1"].shape, "acts['conv1'].cat().shape, or acts['conv1'][0].shape."),
    "NumPy": (lambda acts: acts["conv1"].numpy(), "acts['conv1'].cat().numpy()"),
    "moving": (lambda acts: acts["conv1"].to("cpu"), "acts['conv1'].cat().to()"),
    "nested": (
        lambda acts: acts["pair"].mean(),
        "a list of 2 calls, each a tuple of 2: acts['pair'].cat()[0].mean(), or acts['pair'][0][0].mean().",
    ),
    "output": (lambda acts: acts["conv1"].output, "acts['conv1'].output: write acts['conv1'].cat(), or acts['conv1'][0]."),
    "input of a layer": (lambda acts: acts["conv1"].input, "write acts.inputs['conv1'], after record(model, layers, inputs=True)."),
    "gradient of a layer": (lambda acts: acts["conv1"].grad, "write acts.grads['conv1'], after record(model, layers, grads=True)."),
    "statistics of a layer": (lambda acts: acts["conv1"].stats(), "write acts.select('conv1').stats()."),
    "histogram of a layer": (lambda acts: acts["conv1"].hist(), "write acts.select('conv1').stats()."),
    "drawing a layer": (lambda acts: acts["conv1"].plot(), "write actrec.plot.distributions(acts.select('conv1'))."),
    "saving a layer": (lambda acts: acts["conv1"].save("a"), "write acts.select('conv1').save(path)."),
    "data frame": (lambda acts: acts.to_pandas(), "write pandas.DataFrame(acts.stats())."),
    "first NaN": (lambda acts: acts.first_nan, "write acts.stats().first_nonfinite."),
    "page": (lambda acts: acts.to_html(), "write acts.report('run.html')."),
    "array": (lambda acts: acts["conv1"].to_numpy(), "write acts['conv1'].cat().numpy()."),
    "values of a layer": (lambda acts: acts["conv1"].values(), "write list(acts['conv1']), or acts['conv1'].cat()."),
    "lengths": (lambda acts: acts.lengths, "write {name: len(layer) for name, layer in acts.items()}."),
    "dataset": (lambda acts: acts.rows("conv1"), "write actrec.data.rows(acts, name)."),
    "adding later": (
        lambda acts: acts.select("conv1").add("a", 1),
        "write it inside the block: with record(model, layers) as acts: ... acts.add(...).",
    ),
    "a function": (lambda _: actrec.capture, "no attribute 'capture'. Write with actrec.record(model, layers) as acts:"),
    "a plot": (lambda _: actrec.plot.histogram, "no attribute 'histogram'. Write actrec.plot.distributions(acts)"),
    "a loader": (lambda _: actrec.data.DataLoader, "acts: actrec.data.shuffled(acts, name, batch_size=64)"),
    "nearly a plot": (lambda _: actrec.plot.distribtions, "Did you mean 'distributions'?"),
    "no attribute at all": (lambda acts: acts["conv1"].foo, "acts['conv1'].cat(), or acts['conv1'][0]."),
    "layer as an attribute": (lambda acts: acts.conv1, "layers are items of a recording: acts['conv1']."),
    "part of a name": (lambda acts: acts.layer1, "such as those in acts.select('layer1.**')."),
    "method of tensors": (lambda acts: acts.mean(), "acts['conv1'].cat().mean()."),
    "attribute of tensors": (lambda acts: acts.shape, "acts['conv1'].cat().shape."),
    "another library's word": (lambda acts: acts.activations, "acts.activations: write acts.values()."),
    "nothing known": (lambda acts: acts.foo, "a recording has no such attribute. Layers are items: acts['conv1']."),
    "inputs": (lambda acts: acts.inputs, "Record them: record(model, layers, inputs=True)."),
    "gradients": (lambda acts: acts.grads, "Record them: record(model, layers, grads=True)."),
}  # fmt: skip


@pytest.mark.parametrize(("guess", "message"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_an_attribute_that_is_not_there_says_what_to_write(
    acts: Any, stored: Any, guess: Callable[[Any], Any], message: str
) -> None:
    for recording in (acts, stored):
        with pytest.raises(AttributeError, match=re.escape(message)):
            guess(recording)


INDICES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "as of a tensor": (
        lambda acts: acts["conv1"][:, 0, ..., 1:8:2],
        "acts['conv1'][:, 0, ..., 1:8:2]: acts['conv1'] is a list of 2 calls: acts['conv1'].cat()[:, 0, ..., 1:8:2], or",
    ),
    "as of a dict": (lambda acts: acts["pair"]["a"], "acts['pair'][0][0]['a']."),
    "row of a table": (
        lambda acts: acts.stats()["conv1"],
        "[row for row in table if row.layer == 'conv1']",
    ),
    "as of an array": (lambda acts: acts["conv1"][None], "acts['conv1'].cat()[index]"),
}


@pytest.mark.parametrize(("guess", "message"), INDICES.values(), ids=INDICES)
def test_an_index_that_only_tensors_take_says_what_to_write(
    acts: Any, stored: Any, guess: Callable[[Any], Any], message: str
) -> None:
    for recording in (acts, stored):
        with pytest.raises(TypeError, match=re.escape(message)):
            guess(recording)


def test_a_call_that_is_not_there_says_how_many_there_are(acts: Any, stored: Any) -> None:
    for recording in (acts, stored):
        for index in (2, -3):
            with pytest.raises(IndexError, match=rf"acts\['conv1'\]\[{index}\]: there are 2 calls"):
                recording["conv1"][index]


def test_a_stored_layer_that_is_changed_says_which_list_may_be(stored: Any) -> None:
    with pytest.raises(AttributeError, match=r"write list\(acts\['conv1'\]\), a list of its calls"):
        stored["conv1"].append(X)


def test_adding_to_a_layer_says_what_to_add_to(acts: Any) -> None:
    assert len(acts["conv1"] + acts["pair"]) == 4
    with pytest.raises(
        TypeError, match=re.escape("acts['conv1'].cat() + ..., or acts['conv1'][0] + ...")
    ):
        acts["conv1"] + 1


def test_a_table_says_where_its_columns_are(acts: Any) -> None:
    with pytest.raises(AttributeError, match=re.escape("[row.mean for row in table]")):
        acts.stats().mean  # noqa: B018
    assert not hasattr(acts.stats(), "__array__")


NOT_IN_ACTREC = {
    "stats": "It is part of a recording: acts.stats",
    "to_pandas": "With a recording acts: pandas.DataFrame(acts.stats())",
    "recrod": "Did you mean 'record'",
    "make_hooks_now": "Recordings are made by actrec.record(model)",
}


@pytest.mark.parametrize(("name", "message"), NOT_IN_ACTREC.items())
def test_a_name_that_actrec_does_not_have_says_what_to_write(name: str, message: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(message)):
        getattr(actrec, name)
    assert not hasattr(actrec, "__wrapped__")


def test_what_no_tensor_can_be_read_from_is_said_as_it_is() -> None:
    with pytest.warns(UnusedLayerWarning):
        _, acts = recorded(["conv1", "spare"], transform=lambda _: 3)
    with pytest.raises(
        AttributeError, match=r"of 2 calls, and the first is not a tensor: acts\['conv1'\]\[0\]"
    ):
        acts["conv1"].mean()
    with pytest.raises(
        AttributeError, match="a list of 0 calls: nothing was recorded of this layer"
    ):
        acts["spare"].mean()
    with pytest.raises(AttributeError, match=re.escape("acts['name'].cat().mean()")):
        made().mean()  # type: ignore[attr-defined]


def test_what_python_itself_looks_for_is_not_there_without_a_word(acts: Any) -> None:
    for thing in (acts, acts["conv1"]):
        assert not hasattr(thing, "__array__")
        assert not hasattr(thing, "_repr_png_")


NAMES: dict[str, tuple[Any, str]] = {
    "close": ("conv2", "Did you mean 'conv1'?"),
    "glob": ("layer1.*", "A recording of the 2 layers that match is acts.select('layer1.*')."),
    "container": (
        "layer1",
        "The layers that were recorded inside it are acts.select('layer1.**').",
    ),
    "several": (["conv1", "pair"], "acts.select(['conv1', 'pair'])"),
    "type": (nn.Linear, "A recording of several layers is acts.select(...)."),
    "regex": (re.compile("conv."), "acts.select(re.compile('conv.'))"),
    "function": (lambda name, _: name, "acts.select(...)"),
    "number": (0, "layers have names: acts['conv1'], or [*acts.values()][0]."),
    "slice": (slice(2), "[*acts.values()][:2]"),
    "name and call": (("conv1", 0), "one index after the other: acts['conv1'][0]."),
    "nothing": (None, "expected the name of a layer, such as acts['conv1']"),
    "foreign module": (nn.Linear(1, 1), "this Linear was not recorded"),
}


@pytest.mark.parametrize(("name", "message"), NAMES.values(), ids=NAMES)
def test_an_item_that_is_not_there_says_what_to_write(acts: Any, name: Any, message: str) -> None:
    with pytest.raises(UnknownLayerError, match=re.escape(message)):
        acts[name]


# --- All layers at once --------------------------------------------------------------------------------


def test_all_layers_are_joined_into_what_one_forward_returns(acts: Any, stored: Any) -> None:
    for recording in (acts, stored):
        joined, stacked = recording.cat(), recording.stack()
        assert list(joined) == list(stacked) == LAYERS
        assert torch.equal(joined["conv1"], acts["conv1"].cat())
        assert stacked["conv1"].shape == (2, 2, 4)
        assert joined["pair"][1].shape == (4, 4)
        assert recording.cat(dim=1)["conv1"].shape == (2, 8)


def test_joining_leaves_no_layer_out() -> None:
    with pytest.warns(UnusedLayerWarning):
        _, acts = recorded(["conv1", "spare"])
    message = "nothing was recorded of 'spare', so there is nothing to join. The layers that have calls: acts.select(acts.execution_order).cat()"
    with pytest.raises(JoinError, match=re.escape(message)):
        acts.cat()
    assert list(acts.select(acts.execution_order).cat()) == ["conv1"]


# --- Selecting layers of a recording --------------------------------------------------------------------

SELECTIONS: dict[str, tuple[Any, list[str]]] = {
    "name": ("conv1", ["conv1"]),
    "glob": ("layer1.*", ["layer1.0", "layer1.1"]),
    "regex": (re.compile(r".*1\.\d"), ["layer1.0", "layer1.1"]),
    "type": (nn.Linear, ["conv1", "layer1.0"]),
    "base type": (nn.Module, LAYERS),
    "several, in order, once": (["pair", "conv1", "p*"], ["pair", "conv1"]),
}


@pytest.mark.parametrize(("query", "expected"), SELECTIONS.values(), ids=SELECTIONS)
def test_the_queries_of_record_select_layers_of_a_recording(
    acts: Any, stored: Any, query: Any, expected: list[str]
) -> None:
    for recording in (acts, stored):
        part = recording.select(query)
        assert list(part) == expected
        assert all(part[name] is recording[name] for name in expected)
        assert part.num_passes == 2


def test_modules_are_names_of_their_layers_where_the_recording_was_made() -> None:
    net, acts = recorded(inputs=True)
    assert acts[net.conv1] is acts["conv1"]
    assert net.layer1[1] in acts
    assert net.spare not in acts
    assert acts.inputs[net.conv1] is acts.inputs["conv1"]
    assert list(acts.select([net.pair, lambda name, module: module is net.conv1])) == [
        "pair",
        "conv1",
    ]
    assert acts.select("pair")[net.pair] is acts["pair"]


def test_a_recording_keeps_no_module_alive() -> None:
    net, acts = recorded()
    assert len(acts._run.modules) == 4
    del net
    assert len(acts._run.modules) == 0


@pytest.mark.parametrize("layers", [nn.Linear, "[0]", "module.0"], ids=str)
def test_further_names_and_types_of_a_wrapper_select_too(layers: Any, tmp_path: Path) -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 4)))
    with record(model, "module.*") as acts:
        model(X)
    acts.save(tmp_path / "run")
    for recording in (acts, load(tmp_path / "run")):
        assert list(recording.select(layers)) == ["0"]


REFUSED: dict[str, tuple[Any, str]] = {
    "name": ("conv2", "acts.select('conv2'): no recorded layer matches. Did you mean 'conv1'?"),
    "one of several": (["conv1", "x*"], "acts.select('x*'): no recorded layer matches."),
    "regex": (re.compile("x"), "no recorded layer matches. There are 'conv1', 'layer1.0'"),
    "type": (nn.Conv2d, "no recorded layer is a Conv2d; there are 'Linear', 'Pair', 'ReLU'."),
    "function": (lambda *_: False, "it is true of no recorded layer."),
    "module": (nn.ReLU(), "this ReLU was not recorded"),
    "nothing": ([], "no query was given"),
    "number": (3, "3 is not a layer query"),
}


@pytest.mark.parametrize(("query", "message"), REFUSED.values(), ids=REFUSED)
def test_a_query_that_selects_nothing_is_refused(query: Any, message: str) -> None:
    net, acts = recorded()
    assert net.conv1 in acts
    with pytest.raises(SelectionError, match=re.escape(message)):
        acts.select(query)


def test_a_loaded_recording_says_that_it_knows_no_modules(stored: Any) -> None:
    with pytest.raises(SelectionError, match="a function gets modules"):
        stored.select(lambda *_: True)
    with pytest.raises(UnknownLayerError, match="has only the names of its layers"):
        stored[nn.ReLU()]


def test_a_selection_is_the_recording_as_it_goes_on() -> None:
    net = Net()
    with record(net, LAYERS, inputs=True, grads=True) as acts:
        part = acts.select(["conv1", "pair"])
        net(X).sum().backward()
        assert repr(part).startswith("recording Net: 2 layers, 1 pass")
        with pytest.raises(RuntimeError):
            net(torch.ones(2, 5))
    assert (len(part["conv1"]), part.num_passes, part.failed_passes) == (1, 2, [1])
    assert part.grads["conv1"][0] is not None
    assert repr(part).startswith("recorded Net: 2 layers")
    assert [row.layer for row in part.stats()] == ["conv1", "pair", "pair"]


@pytest.mark.parametrize("into", ["memory", "path"])
def test_what_the_run_has_told_is_known_of_inputs_and_parts_too(tmp_path: Path, into: str) -> None:
    net = Net()
    with record(
        net, LAYERS, inputs=True, into=list if into == "memory" else tmp_path / "r"
    ) as acts:
        net(X)
        with pytest.raises(RuntimeError):
            net(torch.ones(2, 5))
    whole = acts if into == "memory" else load(tmp_path / "r")
    for one in (whole, whole.inputs, whole.select("conv1"), whole.inputs.select("conv1")):
        assert (one.num_passes, one.failed_passes) == (2, [1])
        assert (copy.deepcopy(one).failed_passes, pickle.loads(pickle.dumps(one)).num_passes) == (
            [1],
            2,
        )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_what_is_copied_of_a_selection_is_the_selection(copied: Any) -> None:
    _, acts = recorded(inputs=True)
    part = copied(acts.select("conv1"))
    assert list(part) == list(part.inputs) == ["conv1"]
    assert (part.num_passes, part["conv1"]) == (2, acts["conv1"])
    assert b"pair" not in pickle.dumps(part["conv1"])


def test_a_selection_is_saved_as_a_recording(acts: Any, tmp_path: Path) -> None:
    acts.select("layer1.*").save(tmp_path / "part")
    assert load(tmp_path / "part") == acts.select("layer1.*")


# --- Joining, stopping -------------------------------------------------------------------------------

RAGGED: dict[str, tuple[list[Any], str, str]] = {
    "tokens": ([(2, 3, 8), (2, 5, 8)], "cat", "cat(dim=1), or with a row for each position, actrec.data.rows("),
    "tokens and batches": ([(2, 3, 8), (1, 5, 8)], "cat", "They can be joined with a row for each position, actrec.data.rows("),
    "width": ([(2, 3), (2, 4)], "cat", "They can be joined along the dimension that differs, cat(dim=1)."),
    "batches, stacked": ([(2, 3), (1, 3)], "stack", "along the dimension that differs, cat(dim=0)."),
    "nothing": ([(2, 3), (1, 4)], "cat", "They can be used one by one: acts[name][i]."),
    "dimensions": ([(2, 3), (2,)], "cat", "They can be used one by one: acts[name][i]."),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "how", "message"), RAGGED.values(), ids=RAGGED)
def test_calls_that_do_not_fit_are_told_what_joins_them(
    shapes: list[Any], how: str, message: str
) -> None:
    layer = ListLayer("x", [torch.zeros(shape) for shape in shapes])
    with pytest.raises(JoinError, match=re.escape(message)):
        getattr(layer, how)()
    if "cat(dim=" in message:
        layer.cat(dim=int(message.partition("dim=")[2][0]))
    if "rows(" in message:
        assert len(rows(made(x=layer), "x", flatten=True)) > 0


def test_a_dimension_that_joins_is_named_if_it_joins_all_tensors_of_the_calls() -> None:
    layer = ListLayer("x", [(torch.zeros(2, n), torch.zeros(n, 2)) for n in (3, 4)])
    with pytest.raises(JoinError, match=re.escape("They can be used one by one: acts[name][i].")):
        layer.cat()


@pytest.mark.parametrize(
    "use", [lambda out: out.sum(), lambda out: out[0], nn.functional.relu, lambda out: [*out]]
)
def test_using_the_result_of_a_model_that_was_stopped_is_explained(use: Any) -> None:
    net = Net()
    with (
        pytest.raises((TypeError, AttributeError)) as caught,
        record(net, "conv1", stop_early=True),
    ):
        use(net(X))
    assert (
        "record(stop_early=True): the call of the model returns None" in caught.value.__notes__[0]
    )


def test_another_error_of_a_loop_is_not_explained() -> None:
    net = Net()
    with pytest.raises(TypeError) as caught, record(net, "conv1", stop_early=True):
        net(X, X)
    assert not hasattr(caught.value, "__notes__")


def test_a_query_with_an_open_parenthesis_is_no_regular_expression_and_is_refused() -> None:
    with pytest.raises(SelectionError, match=re.escape("'fc('")):
        record(nn.Sequential(nn.Linear(4, 4)), "fc(")
