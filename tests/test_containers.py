"""Whatever container a layer returns, every tensor in it is recorded, in memory and on disk.

Values are generated: containers of every kind in containers of every other, with tensors that stand in several
places. What is in them is known from how they were made, not from taking them apart.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from actrec import CaptureError, IncompleteLayerWarning, Opaque, load, record
from actrec._values.constants import Constant
from actrec._values.spec import leaves
from actrec.store import Fields

LAW = settings(derandomize=True, max_examples=60, deadline=None, database=None)


# --- Containers --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


class Items(tuple):  # noqa: SLOT001
    """A tuple with another constructor than tuple's, and an attribute."""

    def __new__(cls, first: Any, second: Any) -> Self:
        items = super().__new__(cls, [first])
        items.second = second
        return items


class Slots(list):
    """A list with an attribute in a slot."""

    __slots__ = ("second", "unset")

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__([first])
        self.second = second


class Named(dict):
    """A dict that cannot be made without an argument, and has an attribute."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__(first=first)
        self.second = second


class Batch(UserDict):
    """As the ``BatchEncoding`` of transformers: items, and attributes besides."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__({"first": first})
        self.encodings = second


@dataclasses.dataclass(frozen=True)
class Plain:
    first: Any
    second: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    first: Any
    second: Any


class Attrs:
    """As attrs makes them."""

    __slots__ = ("first", "second")
    __attrs_attrs__ = (SimpleNamespace(name="first"), SimpleNamespace(name="second"))

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


class Own(Mapping[str, Any]):
    """A mapping that makes what is in it when it is asked."""

    def __init__(self, first: Any, second: Any) -> None:
        self._pairs = {"first": (first,), "second": [second]}

    def __getitem__(self, key: str) -> Any:
        return list(self._pairs[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


class Node:
    """Registered with PyTorch's pytree, and with a list that is no child of it."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second, self.notes = first, second, ["note"]


class Keyed(Node):
    """Registered with the keys of its children."""


class Halves(Node):
    """Registered with children that it makes when it is asked."""


def _of(kind: type[Node]) -> Callable[[Any, Any], Node]:
    def unflatten(children: Any, notes: Any) -> Node:
        node = kind(*(child[0] if kind is Halves else child for child in children))
        node.notes = notes
        return node

    return unflatten


def _pair(node: Node) -> tuple[list[Any], list[str]]:
    return [node.first, node.second], node.notes


def _keyed(node: Node) -> tuple[list[tuple[Any, Any]], list[str]]:
    children, notes = _pair(node)
    return list(zip(map(pytree.MappingKey, ("one", "two")), children, strict=True)), notes


pytree.register_pytree_node(Node, _pair, _of(Node))
pytree.register_pytree_node(Keyed, _pair, _of(Keyed), flatten_with_keys_fn=_keyed)
pytree.register_pytree_node(
    Halves, lambda node: ([[node.first], [node.second]], node.notes), _of(Halves)
)


class Refuses(Node):
    """Registered, but not put together without a fuss."""


def _refuse(*_: Any) -> Any:
    raise ValueError


pytree.register_pytree_node(Refuses, _pair, _refuse)


class Turns(Node):
    """Registered, but put together as something else; what it holds besides is an object."""


pytree.register_pytree_node(
    Turns, lambda node: ([node.first, node.second], object()), lambda children, _: list(children)
)

#: How each is made of two values, and the type of what is recorded.
CONTAINERS: dict[str, tuple[Callable[[Any, Any], Any], type]] = {
    "tuple": (lambda a, b: (a, b), tuple),
    "list": (lambda a, b: [a, b], list),
    "dict": (lambda a, b: {"a": a, 7: b}, dict),
    "ordered dict": (lambda a, b: OrderedDict(b=a, a=b), OrderedDict),
    "default dict": (lambda a, b: defaultdict(list, a=a, b=b), defaultdict),
    "deque": (lambda a, b: deque([a, b], maxlen=2), deque),
    "named tuple": (Pair, Pair),
    "tuple subclass": (Items, Items),
    "list with slots": (Slots, Slots),
    "dict subclass": (Named, Named),
    "dataclass": (Plain, Plain),
    "dataclass with slots": (Slotted, Slotted),
    "attrs": (Attrs, Attrs),
    "namespace": (lambda a, b: SimpleNamespace(a=a, b=b), SimpleNamespace),
    "user dict": (lambda a, b: UserDict(a=a, b=b), UserDict),
    "user dict with attributes": (Batch, Batch),
    "user list": (lambda a, b: UserList([a, b]), UserList),
    "proxy of a dict": (lambda a, b: MappingProxyType({"a": a, "b": b}), Fields),
    "chain of mappings": (lambda a, b: ChainMap({"b": b}, {"a": a}), Fields),
    "mapping": (Own, Fields),
    "pytree node": (Node, Node),
    "pytree node with keys": (Keyed, Keyed),
    "pytree node with children of the moment": (Halves, Halves),
    "pytree node that refuses": (Refuses, Fields),
    "pytree node that turns into another": (Turns, Fields),
}  # fmt: skip


class Returns(nn.Module):
    """Returns whatever it is told to make."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self) -> Any:
        return self.make()


@dataclasses.dataclass
class Made:
    """A generated value, and the tensors that went into it, in order."""

    value: Any
    tensors: list[Tensor]


@st.composite
def values(draw: st.DrawFn) -> Made:
    """Draw a value: a tree of containers with tensors, some in several places, and constants in its leaves."""
    known: list[Tensor] = []

    def leaf() -> Made:
        kind = draw(st.sampled_from(["new", "new", "again", "constant"]))
        if kind == "constant":
            return Made(draw(st.sampled_from([None, 1, "word"])), [])
        if kind == "new" or not known:
            known.append(torch.full((2, 2), float(len(known) + 1)))
        tensor = known[-1] if kind == "new" else draw(st.sampled_from(known))
        return Made(tensor, [tensor])

    def tree(depth: int) -> Made:
        if not depth or draw(st.integers(0, 3)) == 0:
            return leaf()
        make, _ = CONTAINERS[draw(st.sampled_from(list(CONTAINERS)))]
        first = tree(depth - 1)
        second = first if draw(st.integers(0, 5)) == 0 else tree(depth - 1)
        return Made(make(first.value, second.value), first.tensors + second.tensors)

    return tree(draw(st.integers(1, 4)))


def found(value: Any) -> list[Tensor]:
    """The tensors of what was recorded, in order, in every place where they stand."""
    return [tensor for _, tensor in leaves(value)]


def numbers(tensors: list[Tensor]) -> list[float]:
    return [tensor.flatten()[0].item() for tensor in tensors]


def once(numbers: list[float]) -> list[float]:
    """Without order, which a chain of mappings has of its own, and without repetition."""
    return sorted(set(numbers))


@LAW
@given(made=values())
def test_every_tensor_is_recorded_whatever_the_containers(made: Made) -> None:
    model = Returns(lambda: made.value)
    expected = numbers(made.tensors)
    with record(model, "") as acts:
        model()
        for tensor in {id(tensor): tensor for tensor in made.tensors}.values():  # the model goes on
            tensor.neg_()
        acts.add("added", made.value)
        model()
    first, second = acts[""]
    assert once(numbers(found(first))) == once(expected)
    assert once(numbers(found(second))) == once([-number for number in expected])
    assert once(numbers(found(acts["added"][0]))) == once(numbers(found(second)))
    theirs = {id(tensor) for tensor in made.tensors}
    ours = [tensor for value in (first, second, acts["added"][0]) for tensor in found(value)]
    assert not [tensor for tensor in ours if id(tensor) in theirs]
    assert len({id(t) for t in found(first)}) == len(set(expected)), "what is one tensor stays one"
    with TemporaryDirectory() as folder:
        acts.save(Path(folder) / "run")
        stored = load(Path(folder) / "run")
        for name in acts:
            for value, kept in zip(stored[name], acts[name], strict=True):
                assert once(numbers(found(value))) == once(numbers(found(kept)))
    if expected:
        joined = acts[""].cat()
        assert [tuple(t.shape) for t in found(joined)] == [(4, 2)] * len(found(first))


@pytest.mark.parametrize(("make", "kind"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_keeps_its_type_or_has_a_stand_in_with_the_same_keys(
    make: Callable[[Any, Any], Any], kind: type
) -> None:
    model = Returns(lambda: make(torch.ones(2), [torch.zeros(3), "word"]))
    with record(model, "", transform=lambda value: value) as same:
        returned = model()
    with record(model, "") as acts:
        model()
    value = acts[""][0]
    assert type(value) is kind
    assert type(same[""][0]) is kind, "also where a transform returns it"
    for name, item in returned.items() if isinstance(returned, Mapping) else {}.items():
        assert type(value[name]) is type(item)
    for name in ("first", "second"):
        if name in getattr(returned, "__dict__", {}):
            assert type(getattr(value, name)) is type(getattr(returned, name))


def test_a_transform_is_given_a_mapping_of_a_kind_of_its_own_as_it_is() -> None:
    model = Returns(lambda: Own(torch.ones(2), Refuses(torch.zeros(3), 1)))
    with record(model, "", transform=lambda value: (type(value), value["first"][0])) as acts:
        model()
    assert acts[""][0][0] is Own
    assert torch.equal(acts[""][0][1], torch.ones(2))


def test_what_a_pytree_node_holds_besides_its_children_is_not_the_models_own() -> None:
    model = Returns(lambda: Node(torch.ones(2), 1))
    with record(model, "") as acts:
        model().notes.append("written by the caller")
    assert acts[""][0].notes == ["note"]


class Broken(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise OSError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(["key"])

    def __len__(self) -> int:
        return 1


class Bad(Node):
    pass


pytree.register_pytree_node(Bad, _refuse, _of(Bad))


@pytest.mark.parametrize("make", [Broken, lambda: Bad(1, 2)])
def test_a_container_that_cannot_be_read_has_a_placeholder(make: Callable[[], Any]) -> None:
    model = Returns(lambda: (torch.ones(2), make()))
    with record(model, "") as acts:
        model()
    assert acts[""][0][1] == Opaque(f"{__name__}.{type(make()).__name__}")


def test_gradients_of_a_container_are_nested_as_it_is() -> None:
    for name, (make, _) in CONTAINERS.items():
        x = torch.ones(2, requires_grad=True)
        model = Returns(lambda make=make, x=x: make(x * 1, x * 3))
        with record(model, "", grads=True) as acts:
            sum(tensor.sum() for tensor in found(model())[:1]).backward()
        assert [g.tolist() for g in found(acts.grads[""][0])] == [[1.0, 1.0]], name


# --- Depth -------------------------------------------------------------------------------------------


def deep(tensor: Tensor, depth: int) -> Any:
    value: Any = tensor
    for _ in range(depth):
        value = [value]
    return value


def test_no_depth_is_too_much_in_memory_and_the_disk_says_that_it_is(tmp_path: Path) -> None:
    model = Returns(lambda: deep(torch.ones(2, 3), 3000))
    with record(model, "", transform=lambda value: value) as acts:
        model()
        model()
    assert acts[""].nbytes == 48
    assert torch.equal(found(acts[""].cat())[0], torch.ones(4, 3))
    assert len(acts.stats()) == 1
    assert "1 layer, 2 passes, 48 B" in repr(acts)
    with pytest.raises(CaptureError, match="nested more than 64 deep"):
        acts.save(tmp_path / "run")


# --- Placeholders ------------------------------------------------------------------------------------


class Cache:
    """An object that is not taken apart."""

    def __init__(self, tensor: Tensor) -> None:
        self.keys = tensor


LOST: dict[str, Callable[[Tensor], Any]] = {
    "object": Cache,
    "distribution": lambda t: torch.distributions.Normal(t, 1.0),
    "nested": lambda t: (None, {"cache": [Cache(t)], "length": 1}),
}


@pytest.mark.parametrize("into", [list, None], ids=["memory", "disk"])
@pytest.mark.parametrize("make", LOST.values(), ids=LOST)
def test_that_not_one_tensor_was_kept_of_a_layer_is_said_at_the_end(
    make: Callable[[Tensor], Any], into: Any, tmp_path: Path
) -> None:
    model = Returns(lambda: make(torch.ones(2)))
    with (
        pytest.warns(
            IncompleteLayerWarning, match=r"'': its recorded values have no tensor, but Opaque\("
        ),
        record(model, "", into=into or tmp_path / "run"),
    ):
        model()
        model()


@pytest.mark.parametrize(
    "make",
    [
        lambda _: None,
        lambda _: (1, "word"),
        lambda t: (t, Cache(t)),
        lambda t: [Cache(t), [{"t": t}]],
    ],
)
def test_nothing_is_said_of_a_layer_that_has_no_object_or_a_tensor_beside_it(
    make: Callable[[Tensor], Any],
) -> None:
    model = Returns(lambda: make(torch.ones(2)))
    with record(model, "") as acts:
        model()
    assert len(acts[""]) == 1


@pytest.mark.parametrize("first", [Cache, torch.clone])
def test_one_call_with_a_tensor_is_enough(first: Callable[[Tensor], Any]) -> None:
    made = iter([first, *(kind for kind in (Cache, torch.clone) if kind is not first)])
    model = Returns(lambda: next(made)(torch.ones(2)))
    with record(model, "") as acts:
        model()
        model()
    assert {type(value) for value in acts[""]} == {Opaque, Tensor}


def test_nothing_is_said_where_a_transform_took_out_what_is_needed() -> None:
    model = Returns(lambda: Cache(torch.ones(2)))
    with record(model, "", transform=lambda cache: cache.keys.mean().item()) as acts:
        model()
    assert acts[""] == [1.0]


def test_constants_are_equal_if_their_types_and_contents_are() -> None:
    assert Constant(float("nan")) == Constant(float("nan"))
    for one, other in [(1, True), (1, 1.0), (1, 2), (None, False)]:
        assert Constant(one) != Constant(other)
    assert Constant(1) != 1
