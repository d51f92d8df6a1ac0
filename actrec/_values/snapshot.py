"""One tensor, kept as it is now: independent, detached, compact, and where possible without a copy.

The usual ``out.detach().cpu()`` is an alias on CPU, so the next in-place operation overwrites what was
"saved". A ``clone()`` is right and costs a pass over memory. :func:`snapshot` shares the memory
copy-on-write instead, with ``torch._lazy_clone``: nothing is copied until one of the two is
written to, and then that one moves to new memory.

Copy-on-write is private API and wrong for some tensors, so it is used only here, for an allow-list of tensors.
A tensor is shared only if all of this holds, and is cloned otherwise:

* it has two dimensions or more: cloning a smaller one costs no more;
* it is a plain CPU tensor: not of a subclass, and not quantized. (Sparse, mkldnn and nested tensors, and the
  wrappers of ``torch.func``, raise, because they have no storage or no such kernel. Dispatch keys would
  tell all that at once, but PyTorch takes a microsecond to make a Python object of them.)
* it occupies its whole storage, so that a slice never keeps a larger storage alive;
* its storage is resizable, which it is not after ``Tensor.numpy()`` and ``from_numpy``: a NumPy array that
  shares the memory bypasses copy-on-write;
* no mode of the user's is on, which would see the operation, and could change its result;
* the storages of weights are not freed and reallocated, as by FSDP: a tensor may be in one.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, is_inference_mode_enabled, strided
from torch.nn import Parameter

from actrec._torch import (
    InferenceMode,
    count_dispatch_modes,
    count_function_modes,
    is_batch,
    is_wrapped,
    lazy_clone,
)
from actrec.errors import CaptureError

from .dtensor import cloned, detached, is_distributed
from .fsdp import refuse_freed
from .modes import is_seen, normal_mode_unseen

_OFF: Final = False
#: The types of plain tensors.
PLAIN: Final = frozenset({Tensor, Parameter})


def twin(tensor: Tensor, *, detach: bool = True) -> Tensor | None:
    """Return a copy of ``tensor`` that shares its memory copy-on-write, or ``None`` if it cannot be shared.

    It is a normal tensor, and with ``detach=False`` part of the autograd graph. For anything but a tensor the result is
    ``None``. This is one function because it runs for every value, and a function call costs as much as a check.
    """
    # One of PyTorch's 700 operators cannot read shared memory: the backward of ctc_loss, which reads its
    # losses, a vector. So vectors are not shared.
    if (
        type(tensor) is not Tensor
        or tensor.dim() < 2  # noqa: PLR2004  # see above
        or not tensor.is_cpu
        or lazy_clone is None
        or tensor.is_quantized
        or ((count_dispatch_modes() or count_function_modes()) and is_seen())
    ):
        return None
    # Leaves the mode as long as the guard exists; "with" would only add time.
    guard = InferenceMode(_OFF) if is_inference_mode_enabled() else None
    try:
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.nbytes and storage.resizable():
            return lazy_clone(tensor.detach() if detach and tensor.requires_grad else tensor)
    except RuntimeError:
        pass  # there is no storage, or it is not from PyTorch's allocator
    finally:
        del guard
    return None


def snapshot(tensor: Tensor, *, detach: bool = True, share: bool = True) -> Tensor:
    """Return ``tensor`` as it is now, whatever is written to it later.

    The result has the same values, shape, dtype and device. It is a normal tensor (never an inference
    tensor), holds no more memory than its content, and never aliases ``tensor``: writing to either
    leaves the other as it was. With ``detach=False`` it is part of the autograd graph. With ``share=False``
    it is a clone, for models of which :func:`frees_weights` is true.
    """
    if detach and type(tensor) is not Tensor:
        with normal_mode_unseen():
            tensor = detached(tensor)
    if share:
        copy = twin(tensor, detach=detach)
        if copy is not None:
            return copy
    else:
        refuse_freed(tensor)
    check(tensor)
    with normal_mode_unseen():
        return _clone(tensor.detach() if detach and tensor.requires_grad else tensor)


def _clone(tensor: Tensor) -> Tensor:
    """Return a clone without copies of equal elements: expanded dimensions stay expanded."""
    if is_distributed(tensor):
        return cloned(tensor)
    if tensor.layout is strided and not tensor.is_nested and 0 in tensor.stride():
        stored = tensor[tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())]
        return stored.clone().expand(tensor.shape)
    return tensor.clone()


# --- What goes wrong ---------------------------------------------------------------------------------


_RESIZED: Final = (
    "A tensor that a recorded layer returned was made larger in place, by resize_() or out=, and PyTorch cannot write "
    "to it any more, because actrec shares its memory copy-on-write. Let the layer return a clone() of it"
)


def explain(error: BaseException) -> None:
    """Add a note to a certain error of PyTorch: it cannot write to shared memory that was made larger."""
    is_new = _RESIZED not in getattr(error, "__notes__", ())  # not added for a module inside
    if "ctx != nullptr INTERNAL ASSERT" in str(error) and is_new:
        error.add_note(_RESIZED)


def check(tensor: Tensor) -> None:
    """Raise ``CaptureError`` for a tensor that is meaningless outside of a ``torch.func`` transform."""
    if is_wrapped(tensor):
        message = (
            "inside torch.func (vmap, grad, jvp) a tensor represents many, or a step of a derivative, and cannot "
            "be kept. Record a call of the model outside of it"
        )
        raise CaptureError(message)
    if is_batch(tensor):
        message = (
            "it is a batch of gradients at once (is_grads_batched=True, jacobian(vectorize=True)), and cannot be kept. "
            "Take them one by one, or outside of the block"
        )
        raise CaptureError(message)
