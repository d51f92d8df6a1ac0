"""The parts of a value that are compared, by their paths: tensors, numbers and arrays as tensors, and texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, TypeAlias

from torch import Tensor

from actrec._values.constants import Constant, as_tensor
from actrec._values.spec import Spec, flatten

#: A tensor; or a text, or an integer that is too large for a tensor, which can only be equal or not.
Leaf: TypeAlias = Tensor | str | bytes | int

#: The path of the type that :class:`~actrec._values.stand_ins.Fields` have.
_OF_STAND_IN: Final = "._type"


def comparable(value: Any) -> dict[str, Leaf]:
    """Return the parts of a value that are compared, by their paths: the index as one writes it after the value."""
    if isinstance(value, Tensor):
        return {"": value}
    tensors, spec = flatten(value)
    found: list[Leaf] = [*tensors]
    steps = [*spec.steps]
    for at, step in enumerate(steps):
        leaf = _leaf(step.value) if isinstance(step, Constant) else None
        if leaf is not None:
            steps[at] = len(found)
            found.append(leaf)
    paths = Spec((*steps,), len(found)).paths
    return {path: found[number] for path, number in paths if not path.endswith(_OF_STAND_IN)}


def _leaf(value: Any) -> Leaf | None:
    leaf = as_tensor(value)
    is_text = isinstance(value, (str, bytes, int)) and not isinstance(value, Enum)
    return value if leaf is None and is_text else leaf


def shapes(leaves: Mapping[str, Leaf]) -> dict[str, object]:
    """Return the shape of each tensor that has one."""
    tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return {path: tensor.shape for path, tensor in tensors.items() if not tensor.is_nested}


# --- Paths in loaded values -----------------------------------------------------------------------------

_ITEM: Final = re.compile(r"\['([^\W\d]\w*)'\]")
_KEY: Final = re.compile(r"\[(?:<class '|Opaque\('|<)([\w.]+)(?:'>|'\)|: [^>]*>)\]")


def with_names_of(xs: Mapping[str, Leaf], ys: dict[str, Leaf]) -> dict[str, Leaf]:
    """Return ``ys`` under the paths of ``xs``, of which one may have been loaded.

    A loaded value has other paths in two cases: a field of a dataclass is loaded as an item of a dict, and a key that is an
    enum member or a class as an ``Opaque``.
    """
    if xs.keys() == ys.keys():
        return ys
    known = {_plain(path): path for path in xs}
    return {path if path in xs else known.get(_plain(path), path): ys[path] for path in ys}


def _plain(path: str) -> str:
    path = _KEY.sub(lambda key: f"[{'.'.join(key[1].split('.')[-2:])}]", path)
    return _ITEM.sub(r".\1", path)
