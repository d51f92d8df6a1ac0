"""The gradient of a view that is written in place.

``nn.Linear`` of ``(batch, tokens, width)``, an instance norm, a slice return a view: a tensor that shares the memory
of another one, its base. When a view is written in place, or anything else that shares its memory, autograd gives it
a new node in the graph. The node that it had when its layer returned, and a hook on that node, get only the gradient
of the uses before the write.

The gradients of all uses, before the write and after it, are added up at the node of the base. The part of that gradient
at the view's elements is the gradient of the view, if nothing but the view has used that part of the base.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from actrec._torch import (
    base_of,
    is_writable_view,
    next_number,
    number_of,
    owners,
    owners_of_one_view,
    version,
)
from actrec._values.containers import Value
from actrec._values.modes import unseen
from actrec._values.snapshot import check
from actrec._values.spec import tensors

_FROM_PYTHON, _FROM_ANYWHERE = owners_of_one_view()

#: If a layer made more nodes than this after the base, they are not searched.
_MOST = 64


# --- Geometry -----------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """The arguments of ``as_strided`` that make a view from its base."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, base: Tensor) -> _Cut | None:
        """Return ``None`` if no part of the gradient of the base is exactly the gradient of ``tensor``."""
        if not (_is_plain(tensor) and _is_plain(base) and tensor.dtype == base.dtype):
            return None
        cut = cls(
            tensor.shape, tensor.stride(), int(tensor.storage_offset() - base.storage_offset())
        )
        within = 0 <= cut.offset <= cut.offset + cut.extent() <= base.numel()
        whole = cls(base.shape, base.stride(), 0)
        is_dense = whole.is_injective() and whole.extent() == base.numel()
        return cut if within and is_dense and cut.is_injective() else None

    def extent(self) -> int:
        """Return the number of elements from the first to the last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    def is_injective(self) -> bool:
        """Whether no two elements share memory, as those of an expanded dimension do."""
        reach = 0
        for step, n in sorted(zip(self.stride, self.size, strict=True)):
            if n > 1 and step <= reach:
                return False
            reach += (n - 1) * step
        return True


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested
    return plain and not (tensor.is_conj() or tensor.is_neg())


# --- Views ------------------------------------------------------------------------------------------------


class View:
    """A view as its layer returned it."""

    __slots__ = ("_alone", "_base", "_cut", "_direct", "_others", "_probe", "_version")

    def __init__(
        self, tensor: Tensor, probe: Tensor, base: Tensor, others: Collection[Tensor]
    ) -> None:
        self._base = base.shape, base.stride()
        self._cut = _Cut.of(tensor, base)
        self._others = [_Cut.of(other, base) for other in others]
        self._alone = False
        self._direct: Tensor | None = None
        self._probe, self._version = probe, version(tensor)

    @classmethod
    def of(cls, tensor: Tensor, output: Collection[Tensor], kept: Value) -> View | None:
        """Return the view ``tensor``, of the ``output`` of a call; ``None`` if a hook on it gets the gradients of all uses.

        ``kept`` is the recorded output: it may be part of the graph, too.
        """
        base = base_of(tensor)
        if base is None or base.is_leaf or not tensor.numel():
            return None
        # PyTorch forbids writes to some views (one of several outputs of an operation, or one from a custom autograd
        # Function): then nothing can use it after a write.
        if not is_writable_view(tensor):
            return None
        try:
            with unseen():
                probe = tensor.detach()  # shares the count of the writes,
                probe.data = tensor.new_empty(0)  # and none of the memory
        except RuntimeError:  # a kind of tensor that cannot be empty, such as a nested one
            return None
        views = [other for other in output if base_of(other) is base]
        view = cls(tensor, probe, base, [other for other in views if other is not tensor])
        if owners(base) == (_FROM_PYTHON, _FROM_ANYWHERE + len(view._others)):
            view._alone = _is_read_by_nothing_else(base, views, [*output, *tensors(kept)])
        return view

    def is_written(self) -> bool:
        """Whether the view, or anything else that shares its memory, was written in place since the layer returned it."""
        return version(self._probe) != self._version

    def uses(self, grad: Tensor) -> None:
        """Note ``grad``, the gradient of the uses before a write, in a backward."""
        self._direct = grad

    def gradient(self, grad: Tensor) -> Tensor | None:
        """Return the gradient of all uses, made of ``grad``, which reached the base; ``None`` if they cannot be separated."""
        check(grad)
        direct, self._direct = self._direct, None
        if self._cut is None or not _is_plain(grad):
            return None
        size, stride = self._base
        if grad.stride() != stride:
            grad = grad.new_empty_strided(size, stride).copy_(grad)
        offset = grad.storage_offset() + self._cut.offset
        part = grad.as_strided(self._cut.size, self._cut.stride, offset)
        if self._alone and not self._overlaps():
            return part
        # If all of it comes from the uses before the write, there are no other uses of the view or of this part of its base.
        if direct is None or part.is_meta:
            return None
        return part if torch.allclose(part, direct, rtol=0, atol=0, equal_nan=True) else None

    def _overlaps(self) -> bool:
        """Whether the call has returned the same elements in another view, too."""
        assert self._cut is not None  # noqa: S101  # for the type checker
        if not self._others:
            return False
        size, _ = self._base
        marks = torch.zeros(size.numel(), dtype=torch.uint8, device="cpu")
        for other in self._others:
            if other is None:
                return True
            marks.as_strided(*other).fill_(1)
        return bool(marks.as_strided(*self._cut).any())


def _is_read_by_nothing_else(
    base: Tensor, views: Collection[Tensor], results: Collection[Tensor]
) -> bool:
    """Whether no operation since the one that made ``base`` has read it, except to make ``views``.

    The nodes of the operations are found on the paths from ``results``, and their sequence numbers show whether one is missing.
    """
    made: Any = base.grad_fn
    numbers = range(number_of(made) + 1, next_number())
    if len(numbers) > _MOST:
        return False
    inner: set[tuple[Node | None, int]] = {(made, base.output_nr)}  # only the views may read these
    chains: set[Node | None] = set()
    for view in views:
        node: Any = view.grad_fn
        while node is not made and node not in chains:
            if number_of(node) not in numbers:  # older, or of another thread
                return False
            chains.add(node)
            inner.add(node.next_functions[0])
            node = node.next_functions[0][0]
    missing = set(numbers)
    ways: list[Any] = [tensor.grad_fn for tensor in results]
    ways += [node for node, _ in made.next_functions]  # views that were written get new nodes late
    while ways:
        node = ways.pop()
        if node is None or number_of(node) not in missing:
            continue
        missing.discard(number_of(node))
        if node not in chains and not inner.isdisjoint(node.next_functions):
            return False
        ways += [node for node, _ in node.next_functions]
    return not missing
