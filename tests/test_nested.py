"""Whatever nesting a layer returns is rebuilt with its types, and nothing of the model's own is kept."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from actrec import Opaque, load, record
from actrec._values.spec import rebuild

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# That a layer returned nothing but an object is told, and not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::actrec.IncompleteLayerWarning")

X = torch.arange(6.0).reshape(2, 3)


class Returns(nn.Module):
    """Returns whatever it is told to make."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def recorded(make: Callable[[Tensor], Any], **options: Any) -> tuple[Any, Any]:
    """What is recorded of a layer that returns ``make(x)``, and what it did return."""
    model = Returns(make)
    with record(model, "", **options) as acts:
        returned = model(X.clone())
    assert "\n" not in repr(acts[""])
    return acts[""][0], returned


# --- What is rebuilt ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Any = None


class Items(tuple):  # noqa: SLOT001
    """A tuple with another constructor than tuple's, and an attribute."""

    def __new__(cls, *items: Any) -> Self:
        return super().__new__(cls, items)


class Named(dict):
    """A dict that cannot be made without an argument, and has an attribute."""

    def __init__(self, label: str, **items: Any) -> None:
        super().__init__(**items)
        self.label = label


class Loud(dict):
    """A dict whose own methods must not be used: they count."""

    reads = 0

    def __getitem__(self, key: Any) -> Any:
        type(self).reads += 1
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("nobody may write here")


class Stack(list):
    """A list with an attribute."""

    depth = 0


@dataclasses.dataclass
class Plain:
    hidden: Tensor
    label: str = "plain"


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    more: tuple[Tensor, ...] = ()


@dataclasses.dataclass(slots=True)
class Slotted:
    hidden: Tensor
    doubled: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.doubled = self.hidden * 2


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotted:
    hidden: Tensor


@dataclasses.dataclass
class Strict:
    """Would not accept what stands in the place of a tensor."""

    hidden: Tensor
    made: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.made += 1


@dataclasses.dataclass
class KeywordOnly(Plain):
    """Has a field with ``InitVar``, one that only keywords give, and an attribute besides."""

    scale: dataclasses.InitVar[float] = 1.0
    extra: Tensor | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self, scale: float) -> None:
        self.scaled = self.hidden * scale


def _tuple_with_attribute(x: Tensor) -> Items:
    items = Items(x, x * 2)
    items.label = "two"
    return items


def _stack(x: Tensor) -> Stack:
    stack = Stack([x])
    stack.depth = 3
    return stack


NESTED: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, x * 2),
    "empty tuple": lambda x: (),
    "list": lambda x: [x, [x * 2]],
    "named tuple": lambda x: Pair(x, (x * 2, None)),
    "tuple subclass": _tuple_with_attribute,
    "list subclass": _stack,
    "dict": lambda x: {"hidden": x, 7: x * 2, ("a", 1): None},
    "ordered dict": lambda x: OrderedDict(b=x, a=x * 2),
    "default dict": lambda x: defaultdict(list, {"hidden": [x]}),
    "counter": lambda x: Counter("abca"),
    "dict subclass": lambda x: Named("name", hidden=x),
    "deque": lambda x: deque([x, x * 2], maxlen=5),
    "dataclass": Plain,
    "frozen dataclass": lambda x: Frozen(x, (x * 2,)),
    "dataclass with slots": Slotted,
    "frozen dataclass with slots": FrozenSlotted,
    "dataclass with post-init": Strict,
    "dataclass with more": lambda x: KeywordOnly(x, "label", 3.0, extra=x * 2),
    "max": lambda x: torch.max(x, dim=1),
    "svd": torch.linalg.svd,
    "model output": lambda x: BaseModelOutputWithPast(last_hidden_state=x, hidden_states=(x, x * 2)),
    "none": lambda x: None,
    "numbers and words": lambda x: (1, 2.5, True, 1j, "word", b"bytes", slice(1, 2), range(3), ...),
    "torch's constants": lambda x: (x.shape, x.dtype, x.device, x.layout, torch.channels_last),
    "types": lambda x: (int, nn.Linear),
}  # fmt: skip


def children(value: Any) -> dict[Any, Any]:
    """What is in a container, by key, index or name."""
    found: dict[Any, Any] = {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found |= {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if type(value).__module__ == __name__:
        found |= getattr(value, "__dict__", {})
    if isinstance(value, (tuple, list, deque)):
        found |= dict(enumerate(value))
    return found | value if isinstance(value, dict) else found


def leaves(value: Any) -> Iterator[Any]:
    """All that is in a nested value, with the types and keys on the way, as something to compare."""
    yield type(value)
    inside = children(value)
    if not inside:
        yield value.tolist() if isinstance(value, Tensor) else value
    for key, item in inside.items():
        yield key
        yield from leaves(item)


def containers(value: Any) -> list[Any]:
    """Every mutable container in a value, itself included."""
    found = [value] if isinstance(value, (list, dict, deque)) else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, deque)):
        found += [inner for item in value for inner in containers(item)]
    return found


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED)
def test_a_nested_value_is_recorded_with_its_types_and_contents(
    make: Callable[[Tensor], Any],
) -> None:
    value, returned = recorded(make)
    assert list(leaves(value)) == list(leaves(returned))
    theirs = {id(container) for container in containers(returned)}
    assert not [container for container in containers(value) if id(container) in theirs]


def test_the_parts_of_special_containers_work_as_they_did() -> None:
    value, _ = recorded(lambda x: defaultdict(list, {"hidden": x}))
    assert value["missing"] == []
    value, _ = recorded(lambda x: deque([x], maxlen=2))
    value.extend([1, 2])
    assert list(value) == [1, 2]
    value, _ = recorded(lambda x: torch.max(x, dim=1))
    assert value.values.tolist() == [2.0, 5.0]
    assert value.indices.tolist() == [2, 2]
    value, _ = recorded(Pair)
    assert value._replace(second=1).second == 1
    value, _ = recorded(Frozen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.hidden = 1


def test_the_models_own_methods_are_not_called_to_take_a_value_apart() -> None:
    value, _ = recorded(lambda x: Loud(hidden=x))
    assert type(value) is Loud
    assert Loud.reads == 0
    value, _ = recorded(Strict)
    assert value.made == 1, "__post_init__ ran in the model, and not again"


class Namespace(dict[Any, Any]):
    """A dict whose items are its attributes."""

    def __init__(self, items: dict[Any, Any]) -> None:
        super().__init__(items)
        self.__dict__ = self


@pytest.mark.also_compiled
def test_a_dict_whose_items_are_its_attributes_stays_one(tmp_path: Path) -> None:
    model = Returns(lambda x: Namespace({"hidden": x, 0: x * 2}))
    with record(model, "") as acts:
        model(X)
    value = acts[""][0]
    assert type(value) is Namespace
    assert list(value) == ["hidden", 0]
    value.late = 1
    assert value["late"] == 1
    del value["late"]
    assert value.hidden is value["hidden"]
    assert [row.leaf for row in acts.stats()] == ["['hidden']", "[0]"]
    acts.save(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run")[""][0][0], X * 2)


def test_a_field_that_was_never_set_stays_unset() -> None:
    def make(x: Tensor) -> Slotted:
        value = Slotted(x)
        del value.doubled
        return value

    value, _ = recorded(make)
    assert value.hidden.tolist() == X.tolist()
    assert not hasattr(value, "doubled")


def test_a_model_output_can_be_read_in_every_way() -> None:
    value, _ = recorded(
        lambda x: BaseModelOutputWithPast(last_hidden_state=x, hidden_states=(x, x * 2))
    )
    assert type(value) is BaseModelOutputWithPast
    assert list(value) == ["last_hidden_state", "hidden_states"]
    assert value.attentions is None
    assert value[0] is value["last_hidden_state"] is value.last_hidden_state
    assert value.hidden_states[0] is value.last_hidden_state
    assert torch.equal(value.to_tuple()[1][1], X * 2)


def test_a_packed_sequence_is_one_and_can_be_padded() -> None:
    lstm = nn.LSTM(3, 4, batch_first=True)
    sequences = [torch.randn(length, 3) for length in (2, 5, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    with record(lstm, "", inputs=True, dtype=torch.float64) as acts:
        out, (hidden, cell) = lstm(packed)
    value, states = acts[""][0]
    assert type(value) is PackedSequence
    assert value.batch_sizes.dtype == value.sorted_indices.dtype == torch.int64
    assert states[0].dtype == torch.float64
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    expected, _ = pad_packed_sequence(out, batch_first=True)
    assert torch.equal(padded, expected.double())
    assert lengths.tolist() == [2, 5, 3]
    assert torch.equal(states[0], hidden.double())
    assert torch.equal(states[1], cell.double())
    assert torch.equal(acts.inputs[""][0]["input"].data, packed.data.double())


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU])
def test_recurrent_layers_are_recorded_as_they_return(cell: Callable[..., nn.Module]) -> None:
    layer = cell(3, 4)
    with record(layer, "") as acts:
        out, hidden = layer(X)
    assert torch.equal(acts[""][0][0], out)
    assert torch.equal(acts[""][0][1], hidden)


# --- What is not taken apart -------------------------------------------------------------------------


class Cache:
    """An object of the model's own, which it goes on changing."""

    def __init__(self, x: Tensor) -> None:
        self.keys = [x]


class Mode(Enum):
    FAST = 1


OPAQUE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "object": (Cache, f"{__name__}.Cache"),
    "set": (lambda x: {x, 1}, "set"),
    "frozen set": (lambda x: frozenset([x]), "frozenset"),
    "function": (lambda x: lambda: x, "function"),
    "module": (lambda x: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "iterator": (lambda x: iter([x]), "list_iterator"),
    "bytearray": (lambda x: bytearray(b"ab"), "bytearray"),
    "fraction": (lambda x: Fraction(1, 2), "fractions.Fraction"),
    "distribution": (
        lambda x: torch.distributions.Normal(x, x + 1),
        "torch.distributions.normal.Normal",
    ),
    "cache of transformers": (
        lambda x: DynamicCache(),
        "transformers.cache_utils.DynamicCache",
    ),
}


@pytest.mark.parametrize(("make", "name"), OPAQUE.values(), ids=OPAQUE)
def test_an_object_of_another_kind_becomes_a_placeholder_that_names_it(
    make: Callable[[Tensor], Any], name: str
) -> None:
    value, _ = recorded(make)
    assert value == Opaque(name)
    assert repr(value) == f"Opaque({name!r})"
    (inner, x), _ = recorded(lambda x: (make(x), x))
    assert inner == Opaque(name)
    assert torch.equal(x, X)


@pytest.mark.eager_only("the compiler makes another type of it")
def test_a_generator_is_not_consumed() -> None:
    value, generator = recorded(lambda x: (x * i for i in range(3)))
    assert value == Opaque("generator")
    assert len(list(generator)) == 3


@pytest.mark.eager_only("the compiler keeps it")
def test_an_object_is_not_kept_alive_by_its_placeholder() -> None:
    value, returned = recorded(Cache)
    ref = weakref.ref(returned)
    del returned
    assert value == Opaque(f"{__name__}.Cache")
    assert ref() is None


def test_a_placeholder_can_be_compared_and_stand_in_a_set() -> None:
    assert {Opaque("a"), Opaque("a"), Opaque("b")} == {Opaque("a"), Opaque("b")}
    value, _ = recorded(lambda x: Opaque("of the model's own"))
    assert value == Opaque("of the model's own")


def test_a_cache_inside_an_output_is_replaced_and_the_rest_is_there() -> None:
    cache = DynamicCache()

    def make(x: Tensor) -> BaseModelOutputWithPast:
        cache.update(x[None, None], x[None, None], 0)
        return BaseModelOutputWithPast(x, cache)

    value, returned = recorded(make)
    assert value[1] == Opaque("transformers.cache_utils.DynamicCache")
    assert torch.equal(value.last_hidden_state, X)
    assert returned[1] is cache


def test_what_a_transform_made_is_kept_whatever_it_is() -> None:
    fraction = Fraction(1, 2)
    value, _ = recorded(lambda x: x, transform=lambda t: (fraction, {1, 2}, t))
    assert value[:2] == (fraction, {1, 2})
    assert torch.equal(value[2], X)


def test_members_of_an_enum_stay_themselves() -> None:
    value, _ = recorded(lambda x: (Mode.FAST, x))
    assert value[0] is Mode.FAST


# --- NumPy -------------------------------------------------------------------------------------------


@pytest.mark.eager_only("the compiler makes another type of it")
def test_numpy_arrays_are_copied() -> None:
    value, returned = recorded(lambda x: {"array": np.ones(3), "scalar": np.float32(2), "x": x})
    returned["array"][:] = 7
    assert value["array"].tolist() == [1, 1, 1]
    assert type(value["scalar"]) is np.float32
    assert value["scalar"] == 2


@pytest.mark.eager_only("the compiler refuses it")
def test_a_structured_array_is_copied() -> None:
    value, returned = recorded(lambda x: np.zeros(2, dtype=[("a", int), ("b", float)]))
    returned["a"] = 5
    assert value["a"].tolist() == [0, 0]


# --- Identity ----------------------------------------------------------------------------------------


def _list_in_itself(x: Tensor) -> Any:
    value: list[Any] = [x]
    value.append(value)
    return value


def _dict_in_itself(x: Tensor) -> Any:
    value: dict[str, Any] = {"x": x}
    value["self"] = [value]
    return value


def _tuple_in_itself(x: Tensor) -> Any:
    inner: list[Any] = []
    value = (x, inner)
    inner.append(value)
    return value


def _object_in_itself(x: Tensor) -> Any:
    value = Plain(x)
    value.label = value  # type: ignore[assignment]
    return value


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (_list_in_itself, lambda v: (v[0], v[1], "list")),
        (_dict_in_itself, lambda v: (v["x"], v["self"][0], "dict")),
        (_tuple_in_itself, lambda v: (v[0], v[1][0], "tuple")),
        (_object_in_itself, lambda v: (v.hidden, v.label, f"{__name__}.Plain")),
    ],
    ids=["list", "dict", "tuple", "dataclass"],
)
def test_where_a_container_contains_itself_a_placeholder_ends_the_circle(
    make: Callable[[Tensor], Any], path: Callable[[Any], tuple[Any, ...]]
) -> None:
    value, _ = recorded(make)
    tensor, inner, name = path(value)
    assert torch.equal(tensor, X)
    assert inner == Opaque(name)


def test_a_tensor_that_stands_in_several_places_is_one_tensor_and_counted_once() -> None:
    model = Returns(lambda x: (x, [x], {"again": x}))
    with record(model, "") as acts:
        model(X)
    first, (second,), third = acts[""][0]
    assert first is second is third["again"]
    assert acts.nbytes == acts[""].nbytes == X.nbytes


def test_a_container_that_stands_in_several_places_is_one_container() -> None:
    def make(x: Tensor) -> Any:
        inner = [x]
        return inner, inner

    value, returned = recorded(make)
    assert value[0] is value[1]
    assert value[0] is not returned[0]


def test_equal_tensors_are_not_taken_for_one() -> None:
    value, _ = recorded(lambda x: (x, x.clone()))
    assert value[0] is not value[1]
    value[0].zero_()
    assert torch.equal(value[1], X)


# --- Changed afterwards ------------------------------------------------------------------------------


def test_what_the_caller_does_to_a_container_afterwards_is_not_recorded() -> None:
    def change(value: Any) -> None:
        value["list"].append(1)
        value["list"][0] = None
        value["deque"].clear()
        value["object"].hidden = None
        value["dict"]["new"] = value["dict"].pop("old")
        value["tensor"].zero_()

    def make(x: Tensor) -> dict[str, Any]:
        return {
            "list": [x * 1],
            "deque": deque([x * 2]),
            "object": Plain(x * 3),
            "dict": {"old": x * 4},
            "tensor": x * 5,
        }

    value, returned = recorded(make)
    change(returned)
    assert list(leaves(value)) == list(leaves(make(X)))


@pytest.mark.also_compiled
def test_what_a_layer_receives_in_containers_is_recorded_as_it_came() -> None:
    class Pops(nn.Module):
        def forward(self, items: list[Tensor], *, options: dict[str, Any]) -> Tensor:
            options["seen"] = True
            return items.pop().mul_(2)

    model = Pops()
    with record(model, "", inputs=True) as acts:
        out = model([X * 1, X * 2], options={"scale": 2})
    assert torch.equal(acts[""][0], out)
    given = acts.inputs[""][0]
    assert [t.tolist() for t in given["items"]] == [X.tolist(), (X * 2).tolist()]
    assert given["options"] == {"scale": 2}


def test_a_transform_gets_containers_of_its_own() -> None:
    def transform(value: list[Tensor]) -> Tensor:
        return value.pop()

    value, returned = recorded(lambda x: [x, x * 2], transform=transform)
    assert torch.equal(value, X * 2)
    assert len(returned) == 2


@pytest.mark.also_compiled
def test_options_reach_every_tensor_of_a_nesting() -> None:
    def make(x: Tensor) -> Any:
        return Plain({"a": [x, x > 0]}, x.shape)  # type: ignore[arg-type]

    value, _ = recorded(make, dtype=torch.float16, device="meta")
    floats, bools = value.hidden["a"]
    assert (floats.dtype, bools.dtype) == (torch.float16, torch.bool)
    assert floats.is_meta
    assert bools.is_meta


def test_object_arrays_do_not_smuggle_the_models_tensors() -> None:
    array = np.array([torch.ones(2), 1], dtype=object)
    assert rebuild(array, torch.clone) == Opaque("numpy.ndarray")
