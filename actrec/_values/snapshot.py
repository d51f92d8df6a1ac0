"""One tensor, kept as it is now: independent, detached, compact, and where possible free.

The usual ``out.detach().cpu()`` is an alias on CPU, so the next in-place operation rewrites what was
"saved". A ``clone()`` is right and costs a pass over memory. :func:`snapshot` shares the memory
copy-on-write instead, with ``torch._lazy_clone``: nothing is copied unless somebody writes to either
side, and then the writer's side moves to fresh memory.

Copy-on-write is private API and wrong for some tensors, so it stands behind an allow-list, here and
nowhere else. A tensor is shared only if all of this holds, and is cloned otherwise:

* it has two dimensions or more: a clone of less costs as little;
* it is a plain CPU tensor: no subclass, and not quantized. (Sparse, mkldnn and nested tensors, and the
  wrappers of ``torch.func``, have no storage, or no such kernel, and say so. Its dispatch keys would tell
  all that at once, but PyTorch takes a microsecond to make a Python object of them.)
* it fills its storage, so that a slice never keeps a larger storage alive;
* its storage is resizable, which ``Tensor.numpy()`` and ``from_numpy`` end: a NumPy array that shares
  the memory writes past the copy-on-write;
* nobody frees the storages of weights, as FSDP does, and allocates them again: a tensor may lie in one.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, is_inference_mode_enabled, strided
from torch.nn import Parameter

from actrec._torch import InferenceMode, is_batch, is_wrapped, lazy_clone
from actrec.errors import CaptureError

from .dtensor import cloned, detached, is_distributed
from .fsdp import refuse_freed
from .modes import normal_mode, normal_mode_unseen

_OFF: Final = False
#: The types of tensors that are that and nothing more.
PLAIN: Final = frozenset({Tensor, Parameter})


def twin(tensor: Tensor, *, detach: bool = True) -> Tensor | None:
    """Return a copy of ``tensor`` that shares its memory copy-on-write, or ``None`` if there can be none.

    It is a normal tensor, and with ``detach=False`` part of the autograd graph. Anything but a tensor has none. One
    function, because it runs for every value, and a call of a function costs as much as a question.
    """
    # One of PyTorch's 700 operators cannot read shared memory: the backward of ctc_loss, of the losses
    # that it returned, one for each sample. So vectors are not shared.
    if (
        type(tensor) is not Tensor
        or tensor.dim() < 2  # noqa: PLR2004  # see above
        or not tensor.is_cpu
        or lazy_clone is None
        or tensor.is_quantized
    ):
        return None
    # The mode ends when this is made, until it is gone; "with" would only add time.
    guard = InferenceMode(_OFF) if is_inference_mode_enabled() else None
    try:
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.nbytes and storage.resizable():
            return lazy_clone(tensor.detach() if detach and tensor.requires_grad else tensor)
    except RuntimeError:
        pass  # there is no storage, or it is not the allocator's own: shared, foreign
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
        with normal_mode():
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
    """A clone that is as small as its content: dimensions that were expanded stay expanded."""
    if is_distributed(tensor):
        return cloned(tensor)
    if tensor.layout is strided and not tensor.is_nested and 0 in tensor.stride():
        stored = tensor[tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())]
        return stored.clone().expand(tensor.shape)
    return tensor.clone()


# --- What goes wrong ---------------------------------------------------------------------------------


_RESIZED: Final = (
    "A tensor that a recorded layer returned was made larger in place, by resize_() or out=, and PyTorch cannot write "
    "to it any more, for actrec shares its memory copy-on-write. Let the layer return a clone() of it"
)


def explain(error: BaseException) -> None:
    """Say on an error of PyTorch's what it is about: it cannot write to shared memory that was made larger."""
    is_new = _RESIZED not in getattr(error, "__notes__", ())  # a module inside has not said it yet
    if "ctx != nullptr INTERNAL ASSERT" in str(error) and is_new:
        error.add_note(_RESIZED)


def check(tensor: Tensor) -> None:
    """Raise ``CaptureError`` for a tensor that means nothing outside of a ``torch.func`` transform."""
    if is_wrapped(tensor):
        message = (
            "inside torch.func (vmap, grad, jvp) a tensor stands for many, or for a step of a derivative, and cannot "
            "be kept. Record a call of the model outside of it"
        )
        raise CaptureError(message)
    if is_batch(tensor):
        message = (
            "it is a batch of gradients at once (is_grads_batched=True, jacobian(vectorize=True)), and cannot be kept. "
            "Take them one by one, or outside of the block"
        )
        raise CaptureError(message)
