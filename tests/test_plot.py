"""Pictures: Axes come back, nothing is shown or changed, and what is drawn is what was recorded."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("agg")

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import nn

from actrec import OptionError, Recording, record
from actrec._recordings import course
from actrec._recordings import similarity as cka
from actrec._recordings.in_memory import ListLayer
from actrec.plot import distributions, drift, feature_maps, grid, shared, similarity
from tests.made import made
from tests.models import ConvNet, TinyTransformer

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _no_figure_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a plot called show()"))
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # whatever was drawn can be rendered without a warning
    plt.close("all")


@pytest.fixture
def acts() -> Recording:
    model = ConvNet()
    with record(model) as recorded:
        for _ in range(5):
            model(model.example(batch=8))
    return recorded


@pytest.fixture
def many() -> Recording:
    generator = torch.Generator().manual_seed(0)
    return made(
        **{
            f"blocks.{i}.{'long' * 10}": [torch.randn(8, 5, generator=generator)] * 3
            for i in range(90)
        }
    )


def fingerprint(acts: Recording) -> list[Any]:
    return [value.clone() for layer in acts.values() for value in layer]


# --- The optional dependency -------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


CORE = """
import sys, torch, actrec
model = torch.nn.Linear(2, 2)
with actrec.record(model, "") as acts:
    model(torch.ones(1, 2))
repr(acts), acts._repr_html_(), repr(acts.stats()), repr(actrec.compare(acts, acts))
{more}
print("matplotlib" in sys.modules, "actrec.plot" in sys.modules)
"""


def test_the_core_never_imports_matplotlib() -> None:
    assert run(CORE.format(more="")).stdout == "False False\n"


def test_that_would_be_seen() -> None:
    assert run(CORE.format(more="import actrec.plot")).stdout == "True True\n"


def test_without_matplotlib_the_import_says_what_to_install() -> None:
    done = run("import sys; sys.modules['matplotlib'] = None; import actrec.plot")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: actrec.plot needs matplotlib (")
    assert done.stderr.endswith("Install it with: pip install actrec[plot]\n")


def test_a_copy_of_the_module_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("actrec.plot.")]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.find_spec("actrec.plot")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install actrec\[plot\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# --- All of them -------------------------------------------------------------------------------------

DRAW = [distributions, drift, similarity, lambda acts: feature_maps(acts["conv1"])]


@pytest.mark.parametrize("draw", DRAW)
def test_a_plot_changes_neither_the_recording_nor_the_random_stream(
    draw: Any, acts: Recording
) -> None:
    values, stream = fingerprint(acts), torch.get_rng_state()
    draw(acts)
    assert all(map(torch.equal, values, fingerprint(acts)))
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    "draw", [distributions, similarity, lambda acts, ax: feature_maps(acts["conv1"], ax=ax)]
)
def test_a_plot_draws_where_it_is_told_to(draw: Any, acts: Recording) -> None:
    _, ax = plt.subplots()
    assert draw(acts, ax=ax) is ax
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize("draw", [distributions, drift, similarity])
def test_some_layers_in_a_dict_can_be_drawn(draw: Any, acts: Recording) -> None:
    assert np.size(draw({name: acts[name] for name in ("conv1", "head")}))


@pytest.mark.parametrize("draw", [distributions, drift, similarity])
def test_many_layers_with_long_names_can_be_drawn(draw: Any, many: Recording) -> None:
    axes = np.ravel(draw(many))
    labels = [
        label.get_text() for ax in axes for label in (*ax.get_yticklabels(), *ax.get_xticklabels())
    ]
    assert all(len(label) <= shared.LONGEST_NAME for label in labels)


@pytest.mark.parametrize("draw", [distributions, drift, similarity])
def test_nothing_to_draw_is_an_error(draw: Any) -> None:
    with pytest.raises(OptionError, match=r"there is nothing to|0 samples to compare"):
        draw(made(a=[]))


@given(st.integers(1, 300), st.integers(1, 100))
def test_what_is_left_of_many_is_evenly_spread(number: int, most: int) -> None:
    places = course.spread(number, most)
    assert len(places) == len(set(places)) == min(number, most)
    assert places[0] == 0
    assert places == sorted(places)
    assert most == 1 or places[-1] == number - 1


# --- Feature maps ------------------------------------------------------------------------------------


def test_every_channel_of_the_chosen_image_is_in_the_picture() -> None:
    value = torch.randn(3, 6, 4, 5)
    picture = np.asarray(feature_maps(value, item=1).images[0].get_array().filled(np.nan))
    drawn = picture[np.isfinite(picture)]
    assert sorted(drawn) == pytest.approx(sorted(value[1].flatten().tolist()))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 3, 4, 5), (1, 1), (1, 1, 1, 1)])
def test_batch_and_channel_may_be_missing(shape: tuple[int, ...]) -> None:
    channels = 1 if len(shape) == 2 else shape[-3]
    noun = "channel" if channels == 1 else "channels"
    title = feature_maps(torch.randn(shape)).get_title()
    assert title == f"{channels} {noun} of {shape[-2]} x {shape[-1]}"


def test_a_layer_stands_for_its_first_call_and_a_nested_value_for_its_first_tensor(
    acts: Recording,
) -> None:
    assert feature_maps(acts["conv1"]).get_title() == "8 channels of 16 x 16"
    assert feature_maps(({"map": acts["conv1"][0]},)).get_title() == "8 channels of 16 x 16"


def test_of_many_channels_some_are_drawn_and_the_title_says_so() -> None:
    ax = feature_maps(torch.randn(1, 100, 3, 3), most=10)
    assert ax.get_title() == "10 of 100 channels of 3 x 3"
    assert ax.get_yticklabels()[0].get_text() == "0"
    assert len(ax.get_xticks()) == 0  # the channels in a row are not neighbours
    assert feature_maps(torch.randn(1, 100, 3, 3), most=1).get_title().startswith("1 of 100")


def test_zero_is_white_if_there_are_negative_numbers() -> None:
    image = feature_maps(torch.tensor([[-1.0, 3.0]]).repeat(8, 8)).images[0]
    assert image.get_cmap().name == "RdBu_r"
    assert image.get_clim() == (-3, 3)
    image = feature_maps(torch.rand(8, 8)).images[0]
    assert image.get_cmap().name == "viridis"
    assert feature_maps(torch.rand(8, 8), cmap="gray").images[0].get_cmap().name == "gray"


@pytest.mark.parametrize("values", [[-100.0], [100.0], [-100.0, 100.0]])
def test_a_few_outliers_do_not_darken_the_rest(values: list[float]) -> None:
    maps = torch.rand(100, 100)
    maps[0, : len(values)] = torch.tensor(values)
    assert feature_maps(maps).images[0].get_clim()[1] < 2


def test_each_map_can_be_scaled_by_itself() -> None:
    value = torch.stack([torch.rand(9, 9), 1000 * torch.rand(9, 9)])
    ax = feature_maps(value, each=True)
    assert ax.images[0].get_clim() == (0, 1)
    assert len(ax.figure.axes) == 1  # no bar: there is no common scale


@pytest.mark.parametrize(
    "value", [torch.full((2, 4, 4), 3.0), torch.full((4, 4), float("nan")), torch.eye(40)]
)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_maps_without_contrast_can_be_drawn(value: torch.Tensor, each: bool) -> None:
    assert isinstance(feature_maps(value, each=each), Axes)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
def test_feature_maps_of_any_dtype(dtype: torch.dtype) -> None:
    assert isinstance(feature_maps(torch.ones(2, 3, 4).to(dtype)), Axes)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.ones(3), r"a tensor of shape \(3,\)"),
        (torch.ones(1, 1, 1, 1, 1), r"a tensor of shape \(1, 1, 1, 1, 1\)"),
        (torch.ones(0, 2, 2), r"a tensor of shape \(0, 2, 2\)"),
        (torch.ones(2, 2, device="meta"), r"a tensor of shape \(2, 2\) without data"),
        (torch.eye(3).to_sparse(), r"a tensor of shape \(3, 3\)"),
        ("text", "no tensor"),
    ],
)
def test_what_is_no_image_is_an_error(value: Any, found: str) -> None:
    with pytest.raises(OptionError, match=found):
        feature_maps(value)


def test_an_image_that_is_not_there_is_an_error() -> None:
    for item in (2, -3, 0.5, "a"):
        with pytest.raises(OptionError, match=rf"\(item={item!r}\): the batch has 2 images"):
            feature_maps(torch.ones(2, 1, 3, 3), item=item)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="nothing was recorded of layer 'a'"):
        feature_maps(made(a=[])["a"])


@pytest.mark.parametrize("draw", [distributions, drift, similarity])
@pytest.mark.parametrize("given", [made(a=[torch.ones(2, 2)])["a"], None], ids=type)
def test_what_is_no_recording_is_an_error(draw: Any, given: Any) -> None:
    with pytest.raises(OptionError, match=rf"{draw.__name__}\(\): expected a recording, .*got "):
        draw(given)


def test_maps_of_nothing_but_nan_are_drawn_without_a_warning() -> None:
    ax = feature_maps(torch.full((1, 2, 3, 3), torch.nan))
    assert ax.get_title() == "2 channels of 3 x 3"


@pytest.mark.parametrize("most", [0, -1])
def test_a_picture_of_nothing_is_an_error(most: int) -> None:
    with pytest.raises(OptionError, match=r"feature_maps\(most="):
        feature_maps(torch.ones(2, 2), most=most)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 300))
def test_a_grid_has_room_for_all(number: int, height: int, width: int) -> None:
    rows, columns = grid._grid(number, height, width)
    assert (rows - 1) * columns < number <= rows * columns


# --- Distributions -----------------------------------------------------------------------------------


def test_layers_are_drawn_in_execution_order(acts: Recording) -> None:
    labels = [label.get_text() for label in distributions(acts).get_yticklabels()]
    assert labels == acts.execution_order


def test_lines_are_percentiles() -> None:
    values = torch.arange(101.0)
    ax = distributions(made(a=[values]))
    thin, thick = (lines.get_segments()[0][:, 0].tolist() for lines in ax.collections)
    assert thin == [1, 99]
    assert thick == [25, 75]
    assert ax.lines[-1].get_xdata() == [50]


def test_a_sample_stands_for_large_layers() -> None:
    values = torch.randn(700_000, generator=torch.Generator().manual_seed(0))
    ax = distributions(made(a=[values, values]))
    thin = ax.collections[0].get_segments()[0][:, 0]
    assert thin == pytest.approx(np.percentile(values, [1, 99]), abs=0.1)


def test_not_a_number_and_infinity_are_left_out() -> None:
    nothing = torch.tensor([float("nan"), float("inf")])
    odd = torch.cat([nothing, torch.arange(101.0)])
    ax = distributions(made(a=[odd], b=[nothing], c=[torch.empty(0)], d=["text"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a"]


def test_layers_of_other_magnitudes_get_a_logarithmic_axis() -> None:
    small = [torch.linspace(-1, 1, 100)]
    assert distributions(made(a=small, b=small)).get_xscale() == "linear"
    large = [1000 * small[0]]
    assert distributions(made(a=small, b=small, c=large)).get_xscale() == "symlog"
    assert distributions(made(a=[torch.zeros(3)])).get_xscale() == "linear"


# --- Drift -------------------------------------------------------------------------------------------


def test_drift_draws_the_statistics_of_each_call() -> None:
    calls = [torch.tensor([0.0, float(i)]) for i in range(4)]
    mean, std, zeros = drift(made(a=calls))
    assert mean.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert mean.lines[0].get_ydata().tolist() == [0, 0.5, 1, 1.5]
    assert std.lines[0].get_ydata() == pytest.approx([call.std().item() for call in calls])
    assert zeros.lines[0].get_ydata().tolist() == [1, 0.5, 0.5, 0.5]


def test_drift_draws_some_of_very_many_calls() -> None:
    line = drift(made(a=[torch.ones(1)] * 1000))[0].lines[0]
    assert len(line.get_xdata()) == course.MOST_CALLS
    assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0, 999)


def test_few_layers_have_a_legend_and_many_a_bar(acts: Recording, many: Recording) -> None:
    figure = drift(acts)[0].figure
    assert [text.get_text() for text in figure.legends[0].get_texts()] == acts.execution_order
    figure = drift(many)[0].figure
    assert not figure.legends
    assert figure.axes[-1].get_ylabel() == "layer, in execution order"


# --- Similarity --------------------------------------------------------------------------------------


def linear_cka(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """As it is written in the paper."""
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return float(norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))


def matrix(ax: Axes) -> np.ndarray[Any, Any]:
    return np.asarray(ax.images[0].get_array())


def test_it_is_the_linear_cka_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(50, 4, 3).double(), torch.randn(50, 7).double()
    acts = made(x=list(x.split(20)), y=list(y.split(20)))
    expected = linear_cka(x.flatten(1).numpy(), y.numpy())
    assert matrix(similarity(acts)) == pytest.approx(np.array([[1, expected], [expected, 1]]))
    monkeypatch.setattr(cka, "_GRAM_BLOCK", 100)  # two features at a time
    assert matrix(similarity(acts)) == pytest.approx(np.array([[1, expected], [expected, 1]]))


def test_it_does_not_see_rotations_scales_and_shifts() -> None:
    x = torch.randn(50, 6).double()
    rotation = torch.linalg.qr(torch.randn(6, 6).double()).Q
    assert matrix(similarity(made(x=[x], y=[3 * x @ rotation + 5]))) == pytest.approx(1)


def test_a_sample_is_the_same_for_all_layers_and_every_time() -> None:
    x = torch.randn(1000, 6)
    acts = made(x=[x], y=list(x.split(64)))
    ax = similarity(acts, most=100)
    assert ax.get_title() == "linear CKA of 100 samples"
    assert matrix(ax) == pytest.approx(1)
    z = made(x=[x], y=[torch.randn(1000, 6)])
    assert np.array_equal(matrix(similarity(z, most=100)), matrix(similarity(z, most=100)))


def test_layers_that_cannot_be_compared_are_left_out_and_counted() -> None:
    x = torch.randn(10, 4)
    acts = made(
        x=[x],
        y=[x * 2],
        fewer=[x[:5]],
        ragged=[torch.ones(5, 2), torch.ones(5, 3)],
        text=["text"],
        numbers=[torch.tensor(1.0)],
        featureless=[torch.ones(10, 0)],
        never=[],
        complex=[x + 1j],
        nested=[(x, x)],
    )
    ax = similarity(acts)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y", "complex", "nested"]
    assert ax.get_title() == "linear CKA of 10 samples; 6 layers left out"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_and_those_without_data_are_left_out() -> None:
    x = torch.randn(10, 4)
    ragged = [x, x[:5]]
    acts = made(
        x=[x],
        y=[x],
        strided=[torch.nested.nested_tensor(ragged, layout=torch.strided)],
        jagged=[torch.nested.nested_tensor(ragged, layout=torch.jagged)],
        meta=[x.to("meta")],
    )
    assert similarity(acts).get_title() == "linear CKA of 10 samples; 3 layers left out"


def test_a_layer_that_is_the_same_for_all_samples_has_no_similarity() -> None:
    acts = made(x=[torch.randn(10, 4)], same=[torch.ones(10, 4)])
    assert np.isnan(matrix(similarity(acts))[1]).all()


def test_drift_of_one_pass_is_refused() -> None:
    twice = ListLayer("a", [torch.ones(1)] * 2)
    twice._passes = [0, 0]
    with pytest.raises(
        OptionError, match=r"no layer has calls in two passes.*distributions\(acts\)"
    ):
        drift(made(a=twice))


def test_pictures_say_what_they_left_out() -> None:
    acts = made(a=[torch.ones(1)] * 1000, b=[], c=[torch.full((1,), torch.nan)] * 2)
    assert (
        drift(acts)[0].get_title()
        == "256 of up to 1,000 calls of each layer; 1 layer left out, never called"
    )
    assert distributions(acts).get_title() == "2 layers left out, without a finite element"
    assert drift(made(a=[torch.ones(1)] * 2))[0].get_title() == ""
    assert distributions(made(a=[torch.ones(1)])).get_title() == ""


@pytest.mark.parametrize(("samples", "most"), [(1, 256), (4, 256), (10, 1)])
def test_few_samples_are_too_few(samples: int, most: int) -> None:
    with pytest.raises(
        OptionError, match=r"similarity\(\): [14] samples? to compare. It needs 8 or more"
    ):
        similarity(made(x=[torch.ones(samples, 2)]), most=most)


def test_a_transformer_can_be_drawn_in_every_way() -> None:
    model = TinyTransformer()
    with record(model, [nn.Linear, nn.LayerNorm]) as acts:
        model(model.example(batch=4))
        model(model.example(batch=4))
    for draw in (distributions, drift, similarity):
        assert np.size(draw(acts))


def test_a_layer_alone_is_told_how_it_is_drawn() -> None:
    with pytest.raises(OptionError, match=r"got ListLayer\. Write drift\(acts\.select\('a'\)\)\."):
        drift(acts=ListLayer("a", [torch.ones(2)], "Linear"))  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [distributions, drift, similarity])
def test_layers_after_a_recording_are_told_how_they_are_drawn(draw: Any) -> None:
    fix = rf"{draw.__name__}\(acts\.select\('conv\*'\)\)\."
    with pytest.raises(OptionError, match=rf"{draw.__name__}\(\): expected only a .* Write {fix}"):
        draw(made(conv1=[torch.ones(2)]), "conv*")


@pytest.mark.parametrize("most", [0, -1, "a", 2.5, None])
def test_a_most_that_is_no_number_of_things_is_refused(most: Any) -> None:
    acts = made(a=[torch.ones(10, 2)])
    with pytest.raises(OptionError, match=rf"similarity\(most={most!r}\): expected a whole number"):
        similarity(acts, most=most)
    with pytest.raises(OptionError, match=rf"feature_maps\(most={most!r}\): expected a whole"):
        feature_maps(acts["a"], most=most)


def test_a_call_of_which_no_sample_was_chosen_is_read_once(monkeypatch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    layer: ListLayer[Any] = ListLayer(
        "a", [torch.randn(1, 4, generator=generator) for _ in range(40)], "Linear"
    )
    read: list[int] = []
    item = ListLayer.__getitem__
    monkeypatch.setattr(
        ListLayer, "__getitem__", lambda self, index: read.append(index) or item(self, index)
    )
    assert "linear CKA of 8 samples" in similarity({"a": layer}, most=8).get_title()
    assert len({*read}) == len(read) == 8
