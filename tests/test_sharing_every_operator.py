"""Sharing memory copy-on-write with the model breaks no operator of PyTorch, forward or backward.

A kernel that takes a writable pointer of shared memory inside a parallel loop fails. This runs every
operator in PyTorch's own database on tensors that are shared as ``record()`` shares them. If a version of
PyTorch adds a kernel that fails, ``_snapshot.twin`` has to leave out its tensors, too.

A kernel that takes such a pointer and only reads is right, but copies the tensor first: that is noticed as well.

The ordinary tests run some operators, and those that fail; ``nox -s sweeps`` runs all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from actrec._values.memory import address

from .sweep import some

if TYPE_CHECKING:
    from collections.abc import Iterator

KNOWN = {
    # The only one that fails, and the reason why vectors are not shared.
    ("nn.functional.ctc_loss", "backward"),
    ("nn.functional.channel_shuffle", "a copy"),
}


def shareable(values: Any) -> list[Tensor]:
    """The tensors that can have a copy-on-write twin, vectors among them."""
    return [
        tensor
        for tensor in tree_leaves(values)
        if type(tensor) is Tensor and tensor.layout is torch.strided and fills_its_memory(tensor)
    ]


def twins_of(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach()._lazy_clone() for tensor in tensors]  # type: ignore[attr-defined]


def places(tensors: list[Tensor]) -> list[tuple[Tensor, object, int]]:
    """Where tensors are that ``record()`` would share, and how often they were written to."""
    return [(tensor, address(tensor), tensor._version) for tensor in tensors if tensor.dim() > 1]


def is_copied(before: list[tuple[Tensor, object, int]]) -> bool:
    """Whether one of them is elsewhere now, although nobody has written to it."""
    return any(address(t) != place and t._version == version for t, place, version in before)


def fills_its_memory(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    whole = storage.nbytes() == tensor.nbytes > 0
    return whole and storage.resizable() and tensor.is_cpu and not tensor.is_quantized


def breaks(call: Any) -> tuple[bool, Any]:
    """Whether a call fails because of shared memory, and what it returns."""
    try:
        return False, call()
    except Exception as error:  # many samples of the database cannot run, shared or not
        return "ParallelGuard" in str(error) or "COW" in str(error), None


def failures(op_db: list[Any]) -> Iterator[tuple[str, str]]:
    """Every operator and stage that cannot work on shared memory."""
    known = {name for name, _ in KNOWN}
    others = some((op for op in op_db if op.name not in known), 30)
    for op in [*others, *(op for op in op_db if op.name in known)]:
        if torch.float32 not in op.dtypes:
            continue
        samples = breaks(
            lambda: list(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd))
        )[1]
        for sample in (samples or [])[:8]:
            tensors = shareable((sample.input, sample.args, sample.kwargs))
            twins, before = twins_of(tensors), places(tensors)
            broken, out = breaks(lambda: op(sample.input, *sample.args, **sample.kwargs))
            if broken:
                yield op.name, "forward"
            elif is_copied(before):
                yield op.name, "a copy"
            outs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            if outs and breaks(lambda: _backward(outs, twins))[0]:
                yield op.name, "backward"


def _backward(outs: list[Tensor], twins: list[Tensor]) -> None:
    grads = [torch.ones_like(t) for t in outs]
    twins += twins_of(shareable((outs, grads)))
    torch.autograd.backward(outs, grads)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # the samples try every deprecated corner of PyTorch
def test_no_operator_breaks_on_memory_that_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported here: it takes the time of importing PyTorch twice.
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo import core

    # For every sample it looks for a unittest on the stack, which takes minutes where much is imported.
    monkeypatch.setattr(core, "extract_test_fn", lambda: None)
    assert set(failures(op_db)) == KNOWN
