"""Takes values apart into JSON, with a number in place of each tensor, and tensors. ``decoding.py`` is the reverse."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, UserList, deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from actrec._values.constants import Constant, is_array
from actrec._values.containers import Container, Value
from actrec._values.dtensor import is_distributed
from actrec._values.spec import flatten
from actrec._values.stand_ins import Fields, qualified
from actrec.errors import CaptureError

from .constants import node_of, refused
from .decoding import TENSOR_ALONE, TOO_DEEP, decode, may_be_set
from .dtensor import local, spread
from .format import MAX_DIMS, MAX_NODES, MAX_STRUCTURE, STORED, Defect

_ENTRIES: Final = 512  # bytes that a tensor takes in the header of a shard, at most
_TOO_LARGE: Final = "it has too many parts. Many numbers are better stored as one tensor"


def encode(value: Value, *, parts: bool = False) -> tuple[str, list[Tensor]]:
    """Return ``value`` as JSON and tensors; ``CaptureError`` if something in it cannot be stored.

    With ``parts``, this rank's local shard of a ``DTensor`` is stored, and its placement.
    """
    if type(value) is Tensor:
        return TENSOR_ALONE, [storable(value)]
    found, spec = flatten(value, unknown=_refuse)
    if len(spec.steps) > MAX_NODES:
        raise CaptureError(_TOO_LARGE)
    leaves = _leaves(found, parts=parts)
    node = spec.fold(leaves.__getitem__, _constant, _container).content
    structure, tensors = _numbered(node)
    if len(structure) + _ENTRIES * len(tensors) > MAX_STRUCTURE:
        raise CaptureError(_TOO_LARGE)
    try:
        decode(structure)
    except Defect as defect:
        message = f"it could not be read again: {defect}"
        raise CaptureError(message) from None
    return structure, [storable(tensor) for tensor in tensors]


def _numbered(node: Any) -> tuple[str, list[Tensor]]:
    """Return the JSON of a node that contains tensors, with numbers in their place, and these tensors, each once."""
    tensors: list[Tensor] = []
    numbers: dict[int, int] = {}

    def number(tensor: Tensor) -> int:
        if id(tensor) not in numbers:
            numbers[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return numbers[id(tensor)]

    try:
        structure = json.dumps(node, default=number, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise CaptureError(TOO_DEEP) from None
    return structure, tensors


def _refuse(value: object) -> NoReturn:
    raise refused(value)


class _Node(NamedTuple):
    """A node of the structure, which contains the tensors themselves."""

    content: Any
    has_data: bool = True  # whether there is a tensor or an array in it


# --- Tensors -----------------------------------------------------------------------------------------


def _leaves(tensors: list[Tensor], *, parts: bool) -> list[_Node]:
    """Return the nodes of the tensors of a value."""
    nodes = []
    meshes = set()
    for tensor in tensors:
        if parts and is_distributed(tensor):
            found = spread(tensor)
            meshes.add(found.ranks)
            nodes.append(_Node({"dtensor": local(tensor), **found.node()}))
        else:
            nodes.append(_Node({"tensor": tensor}))
    if len(meshes) > 1:
        message = "its tensors are spread over different ranks. Let a transform take one of them"
        raise CaptureError(message)
    return nodes


def storable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as a plain one, which can be written; ``CaptureError`` if that is impossible."""
    if type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        tensor = tensor.as_subclass(Tensor)  # the subclass does not change its data
    found = _unplain(tensor)
    if found is not None:
        what, fix = found
        message = f"a {what} cannot be stored. Let a transform make a plain tensor of it{fix}"
        raise CaptureError(message)
    if not tensor.is_cpu:  # pragma: no cover  # needs another device
        tensor = tensor.cpu()
    # Checked first: each call makes a new tensor, also where nothing has to change.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor


def _unplain(tensor: Tensor) -> tuple[str, str] | None:
    """Return what kind of tensor it is, and how a transform can make it plain; ``None`` if it can be written."""
    dtype = tensor.dtype
    if tensor.is_nested:
        return "nested tensor", ", with to_padded_tensor(0.0) say"
    if tensor.layout is not torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')} tensor", ", with to_dense() say"
    if dtype not in STORED:
        return f"tensor of dtype {dtype}", ", with dequantize() say" * tensor.is_quantized
    if type(tensor) is not Tensor:
        return type(tensor).__name__, ", with to_local() say" * is_distributed(tensor)
    if tensor.is_meta:
        return "tensor on the meta device", ""
    fits = tensor.dim() + STORED[dtype].pair <= MAX_DIMS
    return None if fits else (f"tensor of {tensor.dim()} dimensions", "")


def _constant(constant: Constant) -> _Node:
    value = constant.value
    return _Node(_array(value)) if is_array(value) else _Node(node_of(value), has_data=False)


def _array(value: Any) -> dict[str, Tensor]:
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.ma.MaskedArray):  # its mask would be lost
        message = "a masked NumPy array cannot be stored"
        raise CaptureError(message)
    try:
        tensor = torch.from_numpy(numpy.array(value))
    except (TypeError, ValueError) as error:
        message = f"a NumPy array of dtype {value.dtype} cannot be stored"
        raise CaptureError(message) from error
    return {"array" if isinstance(value, numpy.ndarray) else "scalar": tensor}


# --- Containers --------------------------------------------------------------------------------------


def _container(container: Container, children: list[_Node]) -> _Node:
    many = _items(container)
    nodes = [child.content for child in children]
    has_data = any(child.has_data for child in children)
    plain = None
    if not any(child.has_data for child in children[many:]):
        plain = _plain_node(container, nodes[:many])
    return _Node(plain or _object_node(container, many, nodes), has_data)


def _items(container: Container) -> int:
    """Return how many of the children of a container are stored as items; the others are attributes."""
    kind = container.type
    if issubclass(kind, tuple) and not container.items:
        return len(getattr(kind, "_fields", ()))
    if issubclass(kind, (tuple, list, deque, UserList, Mapping)):
        return container.items
    # An object with attributes and no items is read as Fields, whose items they are.
    return len(container.keys)


def _plain_node(container: Container, nodes: list[Any]) -> dict[str, Any] | None:
    """Return the node of a standard sequence or dict; ``None`` for a container of another kind."""
    kind = container.type
    if issubclass(kind, tuple):
        return _tuple_node(container, nodes)
    if issubclass(kind, deque):
        return {"deque": nodes, "maxlen": container.maxlen}
    if issubclass(kind, (list, UserList)):
        return {"list": nodes}
    if kind is dict or kind is OrderedDict or kind.__name__ == "defaultdict":
        pairs = [[_key(key), node] for key, node in zip(container.keys, nodes, strict=False)]
        return {"ordered_dict" if kind is OrderedDict else "dict": pairs}
    return None


def _tuple_node(container: Container, nodes: list[Any]) -> dict[str, Any]:
    kind = container.type
    if kind is PackedSequence:
        return {"packed_sequence": nodes}
    if kind.__module__ == "torch.return_types":
        return {"return_type": nodes, "name": kind.__name__}
    if not container.items and nodes:
        names = list(container.keys[: len(nodes)])
        return {"named_tuple": nodes, "name": kind.__name__, "fields": names}
    return {"tuple": nodes}


def _object_node(container: Container, many: int, nodes: list[Any]) -> dict[str, Any]:
    """Return the node of a container with attributes, which is read as Fields."""
    kind, keys = container.type, container.keys
    pairs = [[_key(key), node] for key, node in zip(keys[:many], nodes[:many], strict=True)]
    attributes = dict(zip(keys[many:], nodes[many:], strict=True))
    name = attributes.pop("_type") if kind is Fields else qualified(kind)
    # An attribute that Fields cannot have is left out, with its tensors.
    more = [[k, n] for k, n in attributes.items() if k not in keys[:many] and may_be_set(k)]
    return {"object": pairs, "name": name, "more": more}


def _key(key: object) -> Any:
    """Return the node of a key of a dict."""
    tensors, spec = flatten(key, unknown=_refuse)
    if tensors:
        message = "a dict with a tensor for a key cannot be stored"
        raise CaptureError(message)
    no_tensors: list[_Node] = []
    return spec.fold(no_tensors.__getitem__, _constant, _container).content
