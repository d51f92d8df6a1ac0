"""The ways to the tensors of a value, where what was loaded has another one for the same tensor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["named_alike"]

_ITEM: Final = re.compile(r"\['([^\W\d]\w*)'\]")
_KEY: Final = re.compile(r"\[(?:<class '|Opaque\('|<)([\w.]+)(?:'>|'\)|: [^>]*>)\]")


def named_alike(xs: Mapping[str, Tensor], ys: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return ``ys`` under the names that ``xs`` has, where what was loaded has another name for the same.

    A field of a dataclass is an item there as well, and for a key that is an enum member or a class there is an ``Opaque``.
    """
    if xs.keys() == ys.keys():
        return ys
    known = {_plain(path): path for path in xs}
    return {path if path in xs else known.get(_plain(path), path): ys[path] for path in ys}


def _plain(path: str) -> str:
    path = _KEY.sub(lambda key: f"[{'.'.join(key[1].split('.')[-2:])}]", path)
    return _ITEM.sub(r".\1", path)
