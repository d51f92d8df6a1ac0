"""What is stored comes back: every kind of value and dtype, bit for bit, and nothing is run for it."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import math
import pickle
import tempfile
import warnings
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import actrec
from actrec import CaptureError, Opaque, load, record
from actrec.store import (
    Fields,
)
from actrec.store import (
    decoding as _decoding,
)
from actrec.store import (
    encoding as _encoding,
)
from actrec.store import (
    format as _format,
)
from actrec.store import (
    new_shard as _new_shard,
)
from actrec.store import (
    safetensors as _container,
)
from actrec.store import (
    shard as _shard,
)
from actrec.store.call import Call
from tests.made import made
from tests.stored import assert_same, opened_shards, same

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [dtype for dtype, _ in _format.DTYPES.values()]


def there_and_back(*values: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        made(x=list(values)).save(folder + "/run")
        assert actrec.verify(folder + "/run") == []
        return list(load(folder + "/run")["x"])


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits, among them NaNs of every kind; a bool has only two values."""
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    data = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


# --- Tensors -----------------------------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    values = [
        random(dtype, *shape) for shape in [(3, 4), (2, 4), (5,), (), (0, 4), (0,), (2, 1, 3)]
    ]
    found = there_and_back(*values)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in values]
    assert all(map(same, found, values))


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    values = {str(dtype).removeprefix("torch."): random(dtype, 3, 5) for dtype in DTYPES}
    made(**{name: [value, value.flip(0)] for name, value in values.items()}).save(tmp_path / "r")
    found = load_file(tmp_path / "r/rank-00000/000000.safetensors")
    about = json.loads((tmp_path / "r/rank-00000/rank.json").read_text())
    for number, layer in enumerate(about["layers"]):
        value, name = values[layer["name"]], layer["name"]
        joined = torch.cat([value.view(torch.uint8), value.flip(0).view(torch.uint8)])
        tensor = found[f"output.{number:05d}.0.0"]
        assert same(tensor.reshape(6, -1).view(torch.uint8), joined), name


def test_every_tensor_is_aligned_to_its_elements_or_else_reading_complex128_ends_the_process(
    tmp_path: Path,
) -> None:
    values = {str(dtype): random(dtype, 3) for dtype in [*DTYPES, *reversed(DTYPES)]}
    made(**{name: [value, value[:1]] for name, value in values.items()}).save(tmp_path / "r")
    found = load(tmp_path / "r")
    for name, value in values.items():
        for call, expected in enumerate((value, value[:1])):
            assert not found[name][call].data_ptr() % expected.element_size(), name
            assert same(found[name][call], expected)


def test_a_tensor_that_a_file_has_at_an_odd_place_is_copied_to_where_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _new_shard._data
    monkeypatch.setattr(
        _new_shard, "_data", lambda *args: dataclasses.replace(data(*args), alignment=1)
    )
    values = [
        random(torch.complex128, rows) for rows in (3, 70_000, 1)
    ]  # one is read, one is mapped
    made(x=values).save(tmp_path / "r")
    monkeypatch.undo()
    (shard,) = opened_shards(load(tmp_path / "r"))
    assert shard.container.tensors["output.00000.0.0"].begin % 16 == 8
    found = load(tmp_path / "r")["x"]
    assert [tensor.data_ptr() % 16 for tensor in found] == [0, 0, 0]
    assert all(map(same, found, values))
    assert same(found.cat(), torch.cat(values))


def test_the_most_absurd_memory_layouts_come_back() -> None:
    base = torch.randn(6, 4, 8, 8)
    values = [
        base[1:3],
        base[:, 2],
        base.transpose(0, 3),
        base.contiguous(memory_format=torch.channels_last),
        base.permute(3, 1, 0, 2)[::2],
        torch.randn(1, 8).expand(1000, 8),
        torch.randn(3, 1, 2).expand(3, 50, 2),
        torch.randn(1).expand(4, 5),
        torch.randn(1, 3).expand(1, 3),
        torch.randn(1, 3).expand(0, 3),
        torch.as_strided(torch.randn(10), (4, 3), (2, 1)),
        torch.randn(3, 4, dtype=torch.complex64).conj(),
        torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        nn.Parameter(torch.randn(3)),
    ]
    found = there_and_back(*values)
    assert all(same(a, b.detach()) for a, b in zip(found, values, strict=True))


def test_small_and_large_pieces_keep_their_order(monkeypatch: Any) -> None:
    monkeypatch.setattr(_new_shard, "_SMALL", 100)
    monkeypatch.setattr(_container, "_CHUNK", 150)
    values = [torch.randn(n) for n in (3, 20, 100, 1, 24, 24, 24, 30, 2)]
    assert all(map(same, there_and_back(*values), values))


def test_a_large_transposed_tensor_is_written_a_few_rows_at_a_time(monkeypatch: Any) -> None:
    monkeypatch.setattr(_new_shard, "_PIECE", 100)
    value = torch.randn(50, 30).t()
    assert same(*there_and_back(value), value)


def test_expanded_tensors_and_shared_memory_come_back_and_take_the_bytes_of_their_elements(
    tmp_path: Path,
) -> None:
    big, row = torch.randn(64, 64), torch.randn(1, 64)
    values = {
        "a": [big, big],
        "b": [big, row.expand(1000, 64)],
        "c": [(big, big.view(-1), row), big],
        "d": [big.view(torch.int32)],
    }
    made(**values).save(tmp_path / "r")
    found = load(tmp_path / "r")
    assert_same(found, made(**values))
    assert found.nbytes == 7 * big.nbytes + 1001 * row.nbytes
    assert found["b"].nbytes == big.nbytes + 1000 * row.nbytes


UNSTORABLE = {
    "sparse": (
        lambda: torch.eye(3).to_sparse(),
        r"a sparse_coo tensor cannot be stored. .* to_dense\(\)",
    ),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "a sparse_csr tensor cannot be stored"),
    "meta": (lambda: torch.empty(3, device="meta"), "a tensor on the meta device"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        r"dtype torch.qint8 .* dequantize\(\)",
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        r"a nested tensor .* to_padded_tensor\(0.0\)",
    ),
    "bits": (lambda: torch.empty(2, dtype=torch.uint4), "dtype torch.uint4"),
    "set": (lambda: {1, 2}, "a value of type set cannot be stored"),
    "object": (lambda: [object()], "a value of type object cannot be stored"),
    "array": (lambda: np.array(["text"]), "a NumPy array of dtype <U4 cannot be stored"),
    "masked array": (lambda: np.ma.masked_array([1.0, 2.0], [True, False]), "a masked NumPy array"),
    "slice": (lambda: slice(object(), 1), "a value of type object cannot be stored"),
    "many": (lambda: [0] * 70_000, "it has too many parts"),
    "long": (lambda: "long" * 2_000_000, "it has too many parts"),
    "fields": (lambda: _WIDE(*range(1001)), "a named tuple does not have as many values as fields"),
    "no size": (lambda: torch.Size([-1, 3]), r"a size\[0\] is -1"),
    "equal keys": (lambda: {_class(): 1, _class(): 2}, "two keys are equal once they are read"),
    "dimensions": (lambda: torch.zeros([1] * 65), "a tensor of 65 dimensions cannot be stored"),
    "complex": (lambda: torch.zeros([1] * 64).to(torch.complex128), "a tensor of 64 dimensions"),
}
_WIDE = namedtuple("_WIDE", [f"f{number}" for number in range(1001)])  # type: ignore[misc]  # noqa: PYI024


def _class() -> type:
    return type("Modality", (), {})


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantiz")
@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    make, told = UNSTORABLE[name]
    with pytest.raises(CaptureError, match=told) as caught:
        made(x=[torch.ones(1), make()]).save(tmp_path / "r")
    assert "save(): call 1 of 'x' cannot be stored" in str(caught.value)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["fields", "no size", "equal keys", "dimensions", "complex"])
def test_what_no_reader_would_take_is_not_written_and_nothing_before_it_is_lost(
    name: str, tmp_path: Path
) -> None:
    make, told = UNSTORABLE[name]
    layer = nn.Identity()
    with (
        pytest.raises(CaptureError, match=f"cannot keep call 1 of layer '': .*{told}"),
        record(layer, "", into=tmp_path / "r"),
    ):
        layer(torch.ones(2))
        layer(make())
    assert actrec.verify(tmp_path / "r") == []
    assert len(load(tmp_path / "r")[""]) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_and_tensors_that_are_no_plain_ones_are_refused(tmp_path: Path) -> None:
    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise NotImplementedError

    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (2,))  # type: ignore[attr-defined]
    with pytest.raises(CaptureError, match="a Wrapper cannot be stored"):
        _encoding.storable(wrapper)
    with pytest.raises(CaptureError, match="a nested tensor cannot be stored"):
        _encoding.storable(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def test_a_subclass_without_a_mind_of_its_own_comes_back_as_the_tensor_that_it_is() -> None:
    class Image(Tensor):
        pass

    (found,) = there_and_back(torch.ones(2, 3).as_subclass(Image))
    assert same(found, torch.ones(2, 3))


@pytest.mark.parametrize("depth", [70, 20_000])
def test_values_nested_too_deep_are_refused(depth: int) -> None:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = [value]
    with pytest.raises(CaptureError, match="nested more than 64 deep"):
        _encoding.encode(value)


# --- Structures --------------------------------------------------------------------------------------

CONSTANTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(allow_nan=True),
    st.text(st.characters()),
    st.binary(),
    st.sampled_from([
        torch.float8_e5m2, torch.device("cuda", 3), torch.sparse_csr, torch.channels_last, ..., slice(1, None, -2),
        range(0, -(2**70), -3), torch.Size([2, 0]), 2**80, -(2**80), -0.0, float("nan"), Opaque("a.B"), "\ud800",
    ]),
)  # fmt: skip
KEYS = st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text()))
TENSORS = st.builds(
    random, st.sampled_from(DTYPES), st.integers(0, 3), st.integers(0, 3)
) | st.builds(random, st.sampled_from(DTYPES))
VALUES = st.recursive(
    TENSORS | CONSTANTS,
    lambda values: st.one_of(
        st.lists(values, max_size=4),
        st.lists(values, max_size=4).map(tuple),
        st.dictionaries(KEYS, values, max_size=4),
        st.dictionaries(KEYS, values, max_size=4).map(OrderedDict),
        st.lists(values, max_size=4).map(lambda items: deque(items, maxlen=4)),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(VALUES, max_size=6))
def test_values_come_back_however_they_are_nested(values: list[Any]) -> None:
    found = there_and_back(*values)
    assert len(found) == len(values)
    assert [i for i, pair in enumerate(zip(found, values, strict=True)) if not same(*pair)] == []


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Output:
    hidden: Any
    rest: Any = None


class Attributes(dict[str, Any]):
    pass


class Colour(enum.IntEnum):
    RED = 1


class Names(list[Any]):
    pass


def test_named_tuples_come_back_with_their_names() -> None:
    (found,) = there_and_back(Pair(torch.ones(2), {"a": 1}))
    assert type(found).__name__ == "Pair"
    assert found._fields == ("left", "right")
    assert same(found.left, torch.ones(2))
    assert found.right == {"a": 1}
    odd = namedtuple("odd", ["class", "x"], rename=True)(1, 2)  # noqa: PYI024
    (found,) = there_and_back(odd)
    assert found == odd
    assert found._fields == odd._fields


def test_the_tuples_of_pytorch_come_back_as_themselves() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.zeros(2)])
    top = torch.randn(3, 4).max(0)
    found_packed, found_top = there_and_back(packed, top)
    assert type(found_packed) is nn.utils.rnn.PackedSequence
    assert same(*(nn.utils.rnn.pad_packed_sequence(p)[0] for p in (packed, found_packed)))
    assert type(found_top) is torch.return_types.max
    assert same(found_top.values, top.values)
    assert same(found_top.indices, top.indices)


def test_named_tuples_can_be_sent_to_other_processes_and_copied() -> None:
    pair = namedtuple("pair", ["left", "right"])  # noqa: PYI024
    (found,) = there_and_back(pair(torch.ones(2), 3))
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), copy.copy(found)):
        assert type(again).__name__ == "pair"
        assert same(again.left, found.left)
        assert again.right == 3
        assert type(again) is type(found)


def test_what_was_stored_is_compared_with_itself_in_memory_field_by_field(tmp_path: Path) -> None:
    value = Output(torch.ones(2), {"left": Output(torch.ones(3)), "right": torch.ones(1)})
    memory = made(x=[value, value])
    memory.save(tmp_path / "r")
    stored = load(tmp_path / "r")
    for one, other in ((memory, stored), (stored, memory)):
        result = actrec.compare(one, other)
        assert [(row.calls, row.equal, row.note) for row in result] == [(2, True, "")] * 3


def test_what_enum_members_and_classes_lead_to_is_compared_with_what_was_stored(
    tmp_path: Path,
) -> None:
    layer = nn.Identity()
    value = {Colour.RED: torch.ones(2), int: torch.zeros(3), Pair: [{Colour.RED: torch.ones(1)}]}
    with record(layer, "") as acts:
        layer(value)
    acts.save(tmp_path / "r")
    for result in (
        actrec.compare(acts, load(tmp_path / "r")),
        actrec.compare(load(tmp_path / "r"), acts),
    ):
        assert [row.equal for row in result] == [True] * 3


def test_objects_with_fields_come_back_as_fields_with_the_name_of_their_type() -> None:
    output = BaseModelOutput(last_hidden_state=torch.ones(2))  # type: ignore[arg-type]
    attributes = Attributes(a=1)
    attributes.more = (2, torch.ones(1))  # type: ignore[attr-defined]
    attributes.keys = "hides a method"  # type: ignore[assignment,method-assign]
    found = there_and_back(Output(torch.ones(3)), output, attributes)
    assert all(type(value) is Fields for value in found)
    plain, model, attribute = found
    assert same(plain.hidden, torch.ones(3))
    assert plain["rest"] is plain.rest is None
    assert list(model) == ["last_hidden_state"]
    assert model.hidden_states is None
    assert attribute.more[0] == 2
    assert list(attribute.keys()) == ["a"]
    assert repr(model).startswith("BaseModelOutput({'last_hidden_state'")
    with pytest.raises(AttributeError, match="has no 'other'; it has 'hidden', 'rest'"):
        _ = plain.other
    assert all(map(same, there_and_back(*found), found)), "and can be stored again"
    assert there_and_back(*found)[1].hidden_states is None
    assert "Fields(hidden: (3,), rest: None)" in repr(made(x=[plain])["x"])


def test_other_kinds_of_containers_come_back_as_what_they_are_kinds_of() -> None:
    values = [
        defaultdict(list, a=1),
        Names([1]),
        Colour.RED,
        Opaque("a.Cache"),
        (torch.float8_e5m2, torch.device("cuda", 3), torch.sparse_csr, torch.channels_last),
        int,
        Output,
        np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1],
        np.float32(2.5),
        np.float64(2.5),
    ]
    found = there_and_back(*values)
    assert found[0] == {"a": 1}
    assert type(found[0]) is dict
    assert type(found[1]) is list
    assert found[2] == Opaque("tests.test_store_values.Colour.RED")
    assert found[3] == Opaque("a.Cache")
    assert found[4] == values[4]
    assert found[5] == Opaque("int")
    assert found[6] == Opaque("tests.test_store_values.Output")
    assert same(found[7], values[7].copy())
    assert type(found[8]) is np.float32
    assert found[8] == 2.5
    assert type(found[9]) is np.float64


def test_a_tensor_that_stands_in_two_places_comes_back_as_one() -> None:
    tensor = torch.ones(3)
    (found,) = there_and_back([tensor, {"again": tensor}])
    assert found[0] is found[1]["again"]


# --- Names -------------------------------------------------------------------------------------------

NAMES = [
    "../../x",
    "",
    "x" * 10_000,
    "größe/体積\n\0",
    "/etc/passwd",
    "a.b",
    "__metadata__",
    "\ud800",
]


def test_any_name_of_a_layer_is_safe_and_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential()
    for number, name in enumerate(NAMES):
        if name:
            model._modules[name] = nn.Linear(1, 1) if number % 2 else nn.Identity()
    picked = list(model.modules())
    with record(model, picked, into=tmp_path / "deep" / "r") as acts:
        model(torch.ones(1, 1))
        acts.add("../label", 1)
    assert sorted(load(tmp_path / "deep/r")) == sorted([*NAMES, "../label"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "000000.safetensors", "deep", "r", "rank-00000", "rank.json", "writer.lock",
    ]  # fmt: skip
    assert load(tmp_path / "deep/r")["../../x"][0].shape == (1, 1)


def test_a_module_with_two_names_is_found_by_both(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.append(model[0])
    with record(model, ["0", "2"], into=tmp_path / "r"):
        model(torch.ones(1, 2))
    found = load(tmp_path / "r")
    assert list(found) == ["0"]
    assert len(found["2"]) == 2
    assert found["2"] is found["0"]


def test_a_shape_comes_back_as_a_shape(tmp_path: Path) -> None:
    class Shapes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:
            return x, x.shape

    model = Shapes()
    with record(model, "") as acts:
        model(torch.ones(2, 3))
    acts.save(tmp_path / "r")
    shape = load(tmp_path / "r")[""][0][1]
    assert type(shape) is torch.Size
    assert shape == (2, 3)


class Extended(dict[str, Any]):
    """A dict with attributes of its own."""


def test_an_attribute_that_no_stand_in_can_have_is_left_out_with_its_tensor() -> None:
    value = Extended(first=torch.ones(2))
    value.items = torch.zeros(3)  # type: ignore[method-assign,assignment]  # the name of a method
    value.more = torch.full((4,), 2.0)  # type: ignore[attr-defined]
    (found,) = there_and_back(value)
    assert torch.equal(found["first"], torch.ones(2))
    assert torch.equal(found.more, torch.full((4,), 2.0))
    assert callable(found.items)


def test_a_dict_with_a_tensor_for_a_key_is_refused() -> None:
    with pytest.raises(CaptureError, match="a dict with a tensor for a key cannot be stored"):
        _encoding.encode({torch.ones(1): 1})


def test_a_stored_value_has_the_paths_that_it_had() -> None:
    value = {"a": np.ones(3), "h": [torch.ones(2), np.float32(1), torch.ones(3)]}
    spec = _decoding.decode(_encoding.encode(value)[0]).spec
    assert [path for path, _ in spec.paths] == ["['h'][0]", "['h'][2]"]


def test_what_stands_for_an_object_comes_back() -> None:
    value = [torch.ones(2), Opaque("lib.Cache")]
    (found,) = there_and_back(value)
    assert found[1] == Opaque("lib.Cache")


def test_a_structure_that_is_nested_too_deep_is_a_defect() -> None:
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(_container.Defect, match="nested too deep"):
        _shard._json(deep)


# --- What is known of the call before ----------------------------------------------------------------

USUAL = torch.arange(6.0).view(2, 3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
ALIKE = {
    "the usual": USUAL,
    "another": USUAL + 1,
    "another shape": USUAL.view(3, 2),
    "another dtype": USUAL.double(),
    "complex": USUAL * 1j,
    "conjugated": (USUAL * 1j).conj(),
    "negated": torch._neg_view(USUAL),
    "of a graph": USUAL.clone().requires_grad_(),
    "transposed": USUAL.view(3, 2).t(),
    "a parameter": nn.Parameter(USUAL),
    "in a list": [USUAL],
    "sparse": USUAL.to_sparse(),
    "meta": USUAL.to("meta"),
    "nested": NESTED,
    "no tensor": 1.5,
}


def written(value: Any, **more: Any) -> Any:
    """What is written of a value."""
    try:
        call = Call.of(_format.Slot("output", 0, "a", "A"), 0, value, **more)
    except CaptureError as error:
        return str(error)
    plain = all(not (one.requires_grad or one.is_neg() or one.is_conj()) for one in call.tensors)
    numbers = [one.tolist() for one in call.tensors]
    return call.look.structure, call.look.kinds, call.look.size, numbers, plain


@pytest.mark.parametrize("name", ALIKE)
def test_what_the_call_before_looked_like_changes_nothing_of_what_is_written(name: str) -> None:
    slot = _format.Slot("output", 0, "a", "A")
    for before in ("the usual", "complex", "in a list", "no tensor"):
        look = Call.of(slot, 0, ALIKE[before]).look
        assert written(ALIKE[name], before=look) == written(ALIKE[name])
    usual = Call.of(slot, 0, ALIKE["the usual"]).look
    shared = Call.of(slot, 0, ALIKE["another"], before=usual).look
    assert shared is usual
