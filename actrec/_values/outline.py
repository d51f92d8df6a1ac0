r"""The structure of nested values with the shapes in it, as text: ``(8, 12, 96), ((4, 8, 48) x 2)``.

An outline is such a text with ``#`` for each size, so that values that differ only in sizes have the same one. Control
characters mark the items of containers; successive equal items are merged when the outline is shown.

>>> import torch
>>> from actrec._values.spec import flatten
>>> tensors, spec = flatten((torch.zeros(2, 3), {"h": torch.zeros(4)}))
>>> template, sizes = outline(spec, [tensor.shape for tensor in tensors])
>>> drawn(template, sizes, sizes), drawn(template, sizes, (9, 9, 9))
('(2, 3), {h: (4,)}', '(2-9, 3-9), {h: (4-9,)}')
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Final, TypeAlias

from actrec._text import shown

from .constants import Constant, is_array
from .containers import Container
from .spec import Spec

_SIZE: Final = "#"
_OPEN, _NEXT, _CLOSE = "\1", "\2", "\3"
_MARKS: Final = re.compile(f"([{_SIZE}{_OPEN}{_NEXT}{_CLOSE}])")
#: A longer outline is replaced by the kind of the value: "tuple of 1000".
LONGEST: Final = 2000

#: An outline, and the sizes for it.
_Sized: TypeAlias = "tuple[str, tuple[int, ...]]"


def outline(spec: Spec, shapes: Sequence[Sequence[int | str]]) -> _Sized:
    """Return the outline of a value, and the sizes of its tensors in the order of the outline."""
    template, sizes = spec.fold(
        lambda number: outline_of_shape(shapes[number]), _constant, _container
    )
    last = spec.steps[-1]
    if len(template) > LONGEST:  # for its names
        return _name(spec.kind)[:LONGEST], ()
    if isinstance(last, Container) and last.type is tuple and template.startswith(f"({_OPEN}"):
        template = template[1:-1]
    return template, sizes


def outline_of_shape(shape: Sequence[int | str]) -> _Sized:
    """Return the outline of a tensor, and its sizes; a dimension that is a name stays one."""
    texts = [_SIZE if isinstance(size, int) else _name(size) for size in shape]
    text = f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
    return text, tuple(size for size in shape if isinstance(size, int))


def _constant(constant: Constant) -> _Sized:
    if is_array(constant.value) and constant.value.shape:
        text, sizes = outline_of_shape(constant.value.shape)
        return f"{_name(constant.kind)}{text}", sizes
    return "None" if constant.value is None else _name(constant.kind), ()


def _container(container: Container, children: list[_Sized]) -> _Sized:
    many = container.items or len(children)
    texts = [text for text, _ in children[:many]]
    kind = container.type
    if texts and not container.paths:  # an array in a file
        return f"{_name(kind.__name__)}{texts[0]}", children[0][1]
    if not texts or sum(map(len, texts)) > LONGEST:
        return _name(container.kind), ()
    if not issubclass(kind, (list, tuple)):
        keys = (key if isinstance(key, str) else repr(key) for key in container.keys)
        texts = [f"{_name(key)}: {text}" for key, text in zip(keys, texts, strict=False)]
    items = f"{_OPEN}{_NEXT.join(texts)}{_CLOSE}"
    if kind is tuple:
        text = f"({items})" if texts[1:] else f"({texts[0]},)"
    elif kind is list:
        text = f"[{items}]"
    else:
        text = f"{{{items}}}" if kind is dict else f"{_name(kind.__name__)}({items})"
    return text, tuple(size for _, sizes in children[:many] for size in sizes)


def _name(name: str) -> str:
    return shown(name).replace(_SIZE, "?")


def drawn(template: str, low: Sequence[int], high: Sequence[int]) -> str:
    """Return an outline with its sizes, or their ranges; ``ValueError`` if their number is wrong."""
    if not template.count(_SIZE) == len(low) == len(high):
        message = "the number of sizes is wrong"
        raise ValueError(message)
    sizes = (str(a) if a == b else f"{a}-{b}" for a, b in zip(low, high, strict=True))
    open_lists = [[""]]
    for piece in _MARKS.split(template):
        if piece == _OPEN:
            open_lists.append([""])
        elif piece == _NEXT:
            open_lists[-1].append("")
        elif piece == _CLOSE:
            items = _joined(open_lists.pop())
            if not open_lists:
                message = "a list ends that has not begun"
                raise ValueError(message)
            open_lists[-1][-1] += items
        else:
            open_lists[-1][-1] += next(sizes) if piece == _SIZE else piece
    return "".join(text for texts in open_lists for text in texts)


def _joined(texts: list[str]) -> str:
    """Join items, with successive equal ones merged."""
    runs = ((text, len([*group])) for text, group in groupby(texts))
    return ", ".join(text if many == 1 else f"{text} x {many}" for text, many in runs)
