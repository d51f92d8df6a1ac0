"""Tables in notebooks: self-contained, escaped, a tree where there is much, plain text where HTML is taken away."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from torch import Tensor, nn

from actrec import Opaque, Recording, UnusedLayerWarning, _text, record
from actrec._recordings import layer_view
from actrec._recordings.in_memory import ListLayer
from actrec._tables.html import as_html
from actrec._tables.table import Column, Table
from actrec._tables.tree import tree
from actrec._values.shapes import Summary, shape_of
from actrec._values.spec import leaves, tensors
from tests.made import made, made_of

if TYPE_CHECKING:
    from collections.abc import Iterable

X = torch.ones(2, 4)
VOID = {"br", "col", "img", "wbr"}


class Page(HTMLParser):
    """What a browser would see: elements, whether they nest, the text of each cell."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.folds: list[bool] = []
        self.summaries: list[str] = []
        self.pre = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag == "details":
            self.folds.append(("open", None) in attrs)
        if tag == "summary":
            self.summaries.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "pre" in self.open:
            self.pre += data
        if "summary" in self.open:
            self.summaries[-1] += data


class Block(nn.Module):
    """Six layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Deep(nn.Module):
    """A stem, many equal blocks, a head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*[Block() for _ in range(blocks)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def recorded(model: nn.Module, layers: Any = None, x: Tensor = X) -> Any:
    with record(model, layers) as acts:
        model(x)
    return acts


def alike(names: Iterable[str], values: Iterable[Any] = (X,), kind: str = "Linear") -> Recording:
    values = list(values)
    return made_of(dict.fromkeys(names, values), kind)


# --- What is shown -----------------------------------------------------------------------------------


def test_a_recording_shows_a_row_for_each_layer() -> None:
    acts = recorded(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    page = Page(acts._repr_html_())
    assert page.rows == [
        ["layer", "type", "calls", "shape", "dtype", "memory"],
        ["0", "Linear", "1", "(2, 3)", "float32", "24 B"],
        ["1", "ReLU", "1", "(2, 3)", "float32", "24 B"],
    ]


def test_the_plain_text_is_inside_for_places_that_strip_html() -> None:
    acts = recorded(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    page = Page(acts._repr_html_())
    assert page.pre == repr(acts)
    # Without the style sheet the text is what is seen: the table is hidden where it stands.
    assert ("style", "display:none") in page.attributes
    assert "display: block !important" in acts._repr_html_()


def test_a_layer_shows_its_line_and_a_row_for_each_shape() -> None:
    x, y = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0], [4.0]])
    layer = ListLayer("a", [x, (x, {"h": y}), x], "Linear")
    page = Page(layer._repr_html_())
    assert page.pre.startswith(repr(layer))
    rows = [[row[0], row[1], row[2], *row[4:]] for row in page.rows]
    assert rows == [
        ["value", "shape", "calls", "min", "mean", "max"],
        ["call", "(1, 2)", "2", "1", "2", "3"],
        ["[0]", "(1, 2)", "1", "1", "2", "3"],
        ["[1]['h']", "(2, 1)", "1", "2", "3", "4"],
    ]
    assert page.tags.count("svg") == 3


def test_a_layer_reads_the_first_calls_alone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_view, "MOST", 20)
    layer = ListLayer("a", [X] * 5, "Linear")
    page = Page(layer._repr_html_())
    assert page.pre.splitlines()[0] == f"{layer!r}; the first 3 calls"
    assert page.rows[1][2] == "3"


def test_images_are_seen() -> None:
    images = torch.linspace(0, 1, 8 * 50 * 60).view(1, 8, 50, 60)
    images[0, 0, 0, 0] = float("nan")
    html = ListLayer("a", [images])._repr_html_()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    picture = plt.imread(io.BytesIO(base64.b64decode(data)))
    assert picture.shape == (25, 3 * 31)  # every third channel, every second pixel, a line between
    assert 'alt="3 of 8 channels"' in html
    assert picture[0, 0] == 0
    assert (np.diff(picture[:, 2]) > 0).all()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1, 1, 2, 2),
        torch.zeros(0, 1, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.complex64),
        torch.zeros(1, 1, 8, 8, device="meta"),
        torch.full((1, 1, 8, 8), float("nan")),
        torch.nested.nested_tensor([torch.zeros(2, 8, 8)] * 2, layout=torch.jagged),
        3,
    ],
    ids=["small", "none", "complex", "meta", "NaN", "nested", "no tensor"],
)
def test_what_is_no_image_has_no_picture(value: Any) -> None:
    html = ListLayer("a", [value])._repr_html_()
    assert "<img" not in html
    Page(html)


def test_inputs_and_gradients_say_so_in_their_titles() -> None:
    model = nn.Linear(4, 3)
    with record(model, "", inputs=True, grads=True) as acts:
        model(X)
    assert repr(acts).startswith("recorded Linear:")
    assert repr(acts.inputs).startswith("recorded inputs of Linear: 1 layer")
    assert repr(acts.grads).startswith("recorded gradients of Linear: 1 layer")
    assert repr(acts.select("").inputs).startswith("recorded inputs of Linear")
    assert repr(acts.inputs.select("")).startswith("recorded inputs of Linear")


def test_it_needs_nothing_from_elsewhere_and_names_no_colour_but_grey_and_amber() -> None:
    html = recorded(Deep(12))._repr_html_()
    assert not {"script", "img", "link", "iframe", "a"} & set(Page(html).tags)
    assert not re.search(r"url\(|@import|https?:|javascript:|\son\w+=", html)
    colours = set(re.findall(r"rgba?\([^)]*\)|#[0-9a-f]{3,6}", html))
    assert {colour.rpartition(",")[0] for colour in colours} == {
        "rgba(128, 128, 128",
        "rgba(255, 160, 0",
    }
    assert set(re.findall(r"(?<!-)\bcolor: (\w+)", html)) == {"inherit"}


def test_the_title_says_whether_it_is_recording_recorded_or_partial() -> None:
    model = nn.Linear(4, 3)
    with record(model, "") as acts:
        model(X)
        assert "recording Linear: 1 layer, 1 pass" in acts._repr_html_()
        assert repr(acts).startswith("recording Linear: 1 layer, 1 pass")
    assert "recorded Linear: 1 layer, 1 pass" in acts._repr_html_()
    with pytest.raises(KeyError), record(model, "") as acts:
        model(X)
        raise KeyError
    assert "recorded Linear (interrupted, partial): 1 layer" in acts._repr_html_()
    assert repr(acts).startswith("recorded Linear (interrupted, partial): 1 layer")


def test_a_note_is_there_only_where_something_needs_attention() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(UnusedLayerWarning), record(model) as acts:
        assert Page(acts._repr_html_()).rows[1][-1] == "no call yet"
        model[0](X)
    first, second = Page(acts._repr_html_()).rows[1:]
    assert (first[-1], second[-1]) == ("", "never called")
    assert repr(acts).splitlines()[1].endswith("note")
    assert repr(acts).splitlines()[3].endswith("never called")


def test_layers_that_an_interrupted_pass_did_not_reach_are_noted() -> None:
    class Boom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                raise ValueError
            return x

    model = nn.Sequential(nn.Linear(4, 4), Boom(), nn.ReLU())
    with pytest.raises(ValueError), record(model, [nn.Linear, nn.ReLU]) as acts:  # noqa: PT011
        model(X)
        model(X[:1])
    assert [row[-1] for row in Page(acts._repr_html_()).rows[1:]] == ["", "not in the last pass"]


def test_there_is_a_device_column_where_something_is_not_on_the_cpu() -> None:
    acts = alike(["a"], [torch.empty(2, device="meta")])
    assert Page(acts._repr_html_()).rows[1][5] == "meta"
    assert repr(acts).splitlines()[1:] == [
        "layer  type    calls  shape  dtype    device  memory",
        "a      Linear      1  (2,)   float32  meta       0 B",
    ]


def test_ragged_dimensions_are_ranges_and_nested_values_say_what_they_are() -> None:
    layers = {
        "ragged": [torch.ones(2, 3), torch.ones(2, 5)],
        "mixed": [torch.ones(2), torch.ones(2, 2)],
        "sometimes": [torch.ones(2), (torch.ones(2),), {"a": 1}],
        "number": [3, 4],
    }
    acts = made_of(layers)
    shapes = [row[3] for row in Page(acts._repr_html_()).rows[1:]]
    assert shapes == ["(2, 3-5)", "(2,) | (2, 2)", "(2,) | ((2,),) | {a: int}", "int"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_described_too() -> None:
    parts = [torch.ones(2, 3), torch.ones(1, 3)]
    strided = torch.nested.nested_tensor(parts, layout=torch.strided)
    assert shape_of(strided) == ("nested",)
    acts = alike(["a"], [strided, torch.ones(2)])
    assert "(nested,) | (2,)" in repr(acts)
    assert shape_of(torch.nested.nested_tensor(parts, layout=torch.jagged)) == (2, "ragged", 3)


def test_a_layer_on_disk_is_shown_without_reading_a_value() -> None:
    class Lazy(ListLayer):
        def __iter__(self) -> Any:
            raise AssertionError

        __getitem__ = __iter__

        def _seen(self) -> tuple[Summary, dict[object, int]]:
            looks = Summary(dtypes={"float32": None})
            looks.add_shape((2, 3), (2, 3))
            return looks, {"a": 24}

        def _per_pass(self) -> tuple[int, int]:
            return 1, 2

    layer = Lazy("a", [1, 2], "Linear")
    assert repr(layer) == "Layer 'a' (Linear): 2 calls, (2, 3) float32, 24 B"
    assert "(2, 3)" in made(a=layer)._repr_html_()


def test_it_costs_no_statistics_and_reads_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = recorded(Deep(12))
    for name in ("item", "tolist", "numpy", "cpu", "min", "max", "sum", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("a value was read"))
    acts._repr_html_()
    repr(acts)


# --- Much --------------------------------------------------------------------------------------------


def test_nested_names_read_as_a_tree_in_which_repeated_blocks_are_folded() -> None:
    page = Page(recorded(Deep(12))._repr_html_())
    assert page.summaries[:3] == ["blocks.*72 layers", "0.body.*6 layers", "1.body.*6 layers"]
    assert page.folds[:4] == [True, True, False, False]
    labels = [row[0] for row in page.rows]
    assert labels[:4] == ["layer", "stem", "0", "1"]
    assert labels[-1] == "head"
    assert ("title", "blocks.11.body.5") in page.attributes  # the key, for who wants to copy it


def test_few_layers_are_a_flat_table_with_whole_names() -> None:
    page = Page(recorded(Deep(2))._repr_html_())
    assert page.summaries == []
    assert page.rows[2][0] == "blocks.0.body.0"


def test_a_folded_note_is_seen_from_outside() -> None:
    model = Deep(12)
    with pytest.warns(UnusedLayerWarning), record(model) as acts:
        model.blocks[3](X)
    page = Page(acts._repr_html_())
    assert page.summaries[0] == "blocks.*72 layers66 notes"
    assert "3.body.*6 layers" in page.summaries


def test_a_recorded_container_stands_before_what_is_in_it() -> None:
    names = [
        "",
        *[f"a.{block}{end}" for block in "xy" for end in ("", *map(".{}".format, range(12)))],
    ]
    page = Page(alike(names)._repr_html_())
    assert [row[0] for row in page.rows][:4] == ["layer", "''", "x", "0"]
    assert page.summaries == ["a.*26 layers", "x.*12 layers", "y.*12 layers"]


def test_very_many_rows_without_structure_fold_in_portions() -> None:
    page = Page(alike(map(str, range(300)))._repr_html_())
    assert page.summaries == ["240 more", "180 more", "120 more", "60 more"]
    assert len(page.rows) == 301
    assert not any(page.folds)


def test_unlike_branches_stay_closed_once_enough_is_open() -> None:
    names = [f"block{block}.layer{layer}" for block in range(30) for layer in range(block + 6)]
    page = Page(alike(names)._repr_html_())
    assert page.folds[0]
    assert not page.folds[-1]


def test_the_text_folds_neighbours_that_are_alike() -> None:
    assert repr(recorded(Deep(12))).splitlines() == [
        "recorded Deep: 74 layers, 1 pass, 2.4 kB",
        "layer            type    calls  shape   dtype    memory",
        "stem             Linear      1  (2, 4)  float32    32 B",
        *[f"blocks.0.body.{i}  Linear      1  (2, 4)  float32    32 B" for i in range(6)],
        "... blocks.1.body to blocks.11.body: 66 more layers, as in the block before ...",
        "head             Linear      1  (2, 2)  float32    16 B",
    ]


def test_the_text_folds_one_neighbour_too_with_the_container_if_it_was_recorded() -> None:
    blocks = [f"{block}{end}" for block in "xy" for end in ("", *map(".{}".format, range(40)))]
    lines = repr(alike([*blocks, "head"])).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["x", "x.0", "x.1"]
    assert lines[-2] == "... y: 41 more layers, as in the block before ..."


def test_the_text_leaves_out_the_middle_of_what_does_not_repeat() -> None:
    lines = repr(alike(map(str, range(300)))).splitlines()
    assert len(lines) == 2 + 61
    assert lines[52] == "... 240 more layers ..."
    assert (lines[51][:2], lines[53][:3]) == ("49", "290")


def test_what_is_left_out_counts_what_was_folded_before() -> None:
    blocks = [f"block{kind}.{i}.{layer}" for kind in range(40) for i in range(3) for layer in "ab"]
    acts = alike([*blocks, *map(str, range(60))])
    text = repr(acts)
    rows = [line for line in text.splitlines()[2:] if "Linear" in line]
    counts = [int(n.replace(",", "")) for n in re.findall(r"(\d[\d,]*) more layer", text)]
    assert len(rows) + sum(counts) == len(acts)


def test_a_tree_keeps_every_name() -> None:
    names = ["a.b.c", "a.b", "", "a..b", ".", "x.y.z.w", "x.y.q"]
    assert sorted(tree(names).names()) == sorted(names)


@given(st.lists(st.text(alphabet="ab.", max_size=8), unique=True), st.integers(1, 5))
def test_a_tree_keeps_every_name_whatever_it_is(names: list[str], smallest: int) -> None:
    root = tree(names, smallest)
    assert sorted(root.names()) == sorted(names)


def test_a_name_with_thousands_of_dots_does_no_harm() -> None:
    acts = alike(["." * 5000, *map(str, range(100))])
    Page(acts._repr_html_())
    assert repr(acts)


# --- Hostile -----------------------------------------------------------------------------------------

hostile = st.text(max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", "</pre></div>", '"><img src=x onerror=alert(1)>', "'", "&lt;",
     "\u202eevil", "a\nb", "\ud800", "<!--", "]]>", "{{7*7}}", "</style>"]
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(hostile, min_size=1, max_size=3), min_size=1, max_size=40), hostile, hostile
)
def test_no_name_can_inject_html(names: list[list[str]], kind: str, model: str) -> None:
    keys = dict.fromkeys(".".join(parts) for parts in names)
    value = type(kind.replace("\0", "") if kind.isprintable() else "T", (dict,), {})(a=X)
    acts = made_of({key: [value] for key in keys}, kind, model)
    html = acts._repr_html_() + acts[next(iter(keys))]._repr_html_()
    html += acts.stats()._repr_html_()
    html.encode()
    page = Page(html)
    allowed = {"div", "style", "pre", "table", "colgroup", "br", "col", "thead", "tbody", "tr", "th", "td",
               "details", "summary", "small", "span", "wbr", "svg", "path"}  # fmt: skip
    assert set(page.tags) <= allowed
    drawn = {"width", "height", "viewbox", "role", "aria-label", "d"}
    assert {name for name, _ in page.attributes} <= {"class", "style", "title", "open"} | drawn
    assert html.count("<style>") == html.count("</style>") == 3


def test_names_that_would_upset_a_table_are_quoted() -> None:
    assert _text.shown("conv 1") == "conv 1"
    for name in ("", " a", "a\n", "\u202e", "\ud800", "a\tb"):
        assert _text.shown(name) == repr(name)


def test_long_names_wrap_or_scroll_inside() -> None:
    html = alike(["x" * 500])._repr_html_()
    assert "overflow-wrap: anywhere" in html
    assert "overflow-x: auto" in html
    (width,) = re.findall(r"max-width:(\d+)ch", html)
    assert int(width) < 140


def test_a_table_without_rows_is_a_table_all_the_same() -> None:
    acts = made()
    assert Page(acts._repr_html_()).rows[0][0] == "layer"
    assert repr(acts).splitlines()[0] == "recorded Net: 0 layers, 0 passes, 0 B"
    assert Page(as_html(Table("nothing", [Column("layer")], []))).rows == [["layer"]]


# --- What tables are made of -------------------------------------------------------------------------

nested = st.recursive(
    st.just(None) | st.integers() | st.builds(lambda: torch.zeros(2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(nested)
def test_every_way_leads_to_its_tensor(value: Any) -> None:
    found = list(leaves(value))
    assert all(eval("v" + path, {"v": value}) is tensor for path, tensor in found)  # noqa: S307
    assert list(dict.fromkeys(id(tensor) for _, tensor in found)) == [id(t) for t in tensors(value)]


def test_ways_lead_through_named_tuples_dataclasses_and_model_outputs() -> None:
    from collections import OrderedDict, deque
    from dataclasses import dataclass

    from transformers.modeling_outputs import BaseModelOutput

    @dataclass
    class Pair:
        one: Any
        two: Any

    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    both = torch.ones(1)
    values = [
        packed,
        torch.ones(3).max(0),
        Pair(torch.ones(1), [torch.ones(2)]),
        BaseModelOutput(last_hidden_state=torch.ones(1)),
        OrderedDict(b=torch.ones(1)),
        deque([torch.ones(1)]),
        (both, [both], Pair),
        SimpleNamespace(x=torch.ones(1)),
    ]
    paths = [[path for path, _ in leaves(value)] for value in values]
    assert paths == [
        [".data", ".batch_sizes"],
        ["[0]", "[1]"],
        [".one", ".two[0]"],
        ["['last_hidden_state']"],
        ["['b']"],
        ["[0]"],
        ["[0]", "[1][0]"],
        [".x"],
    ]
    for value in values:
        found = dict.fromkeys(id(tensor) for _, tensor in leaves(value))
        assert list(found) == [id(tensor) for tensor in tensors(value)]


def test_a_container_that_contains_itself_ends() -> None:
    value: list[Any] = [X]
    value.append((value, X))
    assert [path for path, _ in leaves(value)] == ["[0]", "[1][1]"]


def test_a_dataclass_whose_attribute_was_deleted_is_walked_all_the_same() -> None:
    from dataclasses import dataclass

    @dataclass
    class Half:
        one: Any
        two: Any

    value = Half(torch.ones(1), torch.ones(1))
    del value.one
    assert [path for path, _ in leaves(value)] == [".two"]


def test_what_actrec_does_not_take_apart_is_called_by_its_type() -> None:
    looks = Summary()
    looks.add(Opaque("library.caches.Cache"))
    assert looks.what == "Cache"


def test_sizes_are_in_powers_of_a_thousand() -> None:
    assert [_text.size(n) for n in (0, 999, 1000, 999_960, 5 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "1.0 MB", "5.0 TB",
    ]  # fmt: skip


# --- Execution order ---------------------------------------------------------------------------------


def test_layers_are_in_the_order_in_which_their_first_calls_ended() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.early(self.late(self.early(x)))

    model = Net()
    with pytest.warns(UnusedLayerWarning), record(model, ["", "late", "early", "never"]) as acts:
        assert acts.execution_order == []
        model(X)
        acts.add("label", 3)
        model(X)
    assert acts.execution_order == ["early", "late", "", "label"]


def test_inputs_are_in_execution_order_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with record(model, ["1", "0"], inputs=True) as acts:
        model(X)
        acts.add("label", 3)
    assert acts.inputs.execution_order == ["0", "1"]


def test_a_recording_that_knows_no_order_has_that_of_its_keys() -> None:
    assert alike(["b", "a"]).execution_order == ["b", "a"]


def test_a_layer_whose_first_calls_are_skipped_comes_when_it_is_first_kept() -> None:
    calls = iter([None, X])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with record(model, {"0": lambda _: next(calls), "1": None}) as acts:
        model(X)
        model(X)
    assert acts.execution_order == ["1", "0"]


def test_a_layer_with_too_few_layers_in_it_stands_before_them() -> None:
    root = tree(["part", "part.conv", "part.relu", "head"], 5)
    assert list(root.children) == ["part", "part.conv", "part.relu", "head"]
    assert root.children["part"].is_row
    assert not root.children["part"].children
