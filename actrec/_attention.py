"""Attention maps, computed from the inputs of fused attention: PyTorch's kernels return only the mixed values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from .errors import OptionError

#: So many elements of a map are computed at a time.
BLOCK: Final = 1 << 22
#: By how many roundings of its dtype an output may differ from the one that the map gives.
_ROUNDINGS: Final = 16


@torch.no_grad()
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    output: Tensor | None = None,
) -> Tensor:
    r"""Return the attention map of a call of ``scaled_dot_product_attention``, computed from its arguments.

    >>> import torch, actrec
    >>> class Attention(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> model = Attention()
    >>> name = ":scaled_dot_product_attention"
    >>> with actrec.record(model, name, inputs=True) as acts:
    ...     output = model(torch.randn(2, 4, 5, 8))
    >>> received = acts.inputs[name][0]
    >>> weights = actrec.attention(**received, output=acts[name][0])
    >>> weights.shape
    torch.Size([2, 4, 5, 5])
    >>> weights[0, 0, 0]  # the first token sees only itself
    tensor([1., 0., 0., 0., 0.])

    The parameters are those of the function, so recorded arguments can be passed directly. The map is computed in blocks over
    batch and heads, which need a few megabytes besides the map, or the keys and values of one head in ``float32``. If the maps
    are too large to be kept, reduce each one in a transform of the inputs while the model runs:
    ``record(model, (), inputs={"**:scaled_dot_product_attention": lambda given: actrec.attention(**given).mean(1)})``.

    Args:
        query: :math:`(*, H, L, E)`.
        key: :math:`(*, H, S, E)`, or fewer heads with ``enable_gqa=True``.
        value: :math:`(*, H, S, E_v)`. Needed only to check ``output``.
        attn_mask: :math:`(*, H, L, S)` or a shape that broadcasts to it: boolean, true where a key is seen, or added to the
            scores.
        dropout_p: must be 0, because it is unknown which weights were dropped.
        is_causal: whether query :math:`i` sees the keys up to :math:`i`.
        scale: the factor of the scores; :math:`1/\sqrt{E}` by default.
        enable_gqa: whether several heads of the queries share one of the keys.
        output: the output of the call. If it is given, ``weights @ value`` must agree with it, up to rounding.

    Returns:
        A new tensor of shape :math:`(*, H, L, S)`, on the device of ``query``: ``float32``, or ``float64`` if ``query`` is. It is
        not part of a graph. A query that sees no key has zeros.

    Raises:
        OptionError: there was dropout, or the shapes do not fit, or ``output`` differs from the result of these weights:
            attention was computed in another way, or the arguments are of different calls.
    """
    if dropout_p:
        message = (
            f"attention(dropout_p={dropout_p}): which weights were dropped is not known. Record the model after "
            "model.eval()."
        )
        raise OptionError(message)
    if is_causal and attn_mask is not None:
        message = "attention(is_causal=True, attn_mask=...): PyTorch takes only one of the two."
        raise OptionError(message)
    if output is not None and value is None:
        message = "attention(output=...): give the values too, to check it: attention(query, key, value, output=...)."
        raise OptionError(message)
    _check_shapes(query, key, value, attn_mask, output, enable_gqa=enable_gqa)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lead = query.shape[:-2], key.shape[:-2]
    heads = query.shape[:-2] if enable_gqa else torch.broadcast_shapes(*lead)  # type: ignore[no-untyped-call]
    weights = query.new_empty((*heads, query.shape[-2], key.shape[-2]), dtype=dtype)
    mask = None if attn_mask is None else attn_mask.expand(weights.shape)
    of_queries: list[Any] = [weights, mask, _expanded(query, heads), _expanded(output, heads)]
    of_keys: list[Any] = [key, value]
    if enable_gqa:  # the heads that share one of the keys, in a dimension of their own
        groups = (key.shape[-3], -1)
        of_queries = [None if one is None else one.unflatten(-3, groups) for one in of_queries]
        of_keys = [None if one is None else one.unsqueeze(-3) for one in of_keys]
        heads = of_queries[0].shape[:-2]
    for block in _blocks([*of_queries, *(_expanded(one, heads) for one in of_keys)]):
        _compute(block, scale=scale, is_causal=is_causal)
    return weights


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None,
    output: Tensor | None,
    *,
    enable_gqa: bool,
) -> None:
    """Raise ``OptionError`` unless these shapes fit: tried on the device that has no data."""
    given = [one for one in (query, key, value, attn_mask) if one is not None]
    try:
        queries, keys, values = map(_without_data, (query, key, key if value is None else value))
        if enable_gqa:
            shared = queries.shape[-3] // keys.shape[-3]
            keys, values = (one.repeat_interleave(shared, -3) for one in (keys, values))
        scores = queries @ keys.mT
        if attn_mask is not None:
            _without_data(attn_mask).expand_as(scores)
        mixed = scores @ values
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
    else:
        if output is None or output.shape == mixed.shape:
            return
        reason = f"the output is {tuple(output.shape)}, and should be {tuple(mixed.shape)}"
    shapes = ", ".join(str(tuple(one.shape)) for one in given)
    message = f"attention(): tensors of shapes {shapes} do not fit: {reason}. Are they of one call?"
    raise OptionError(message)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, device="meta")


def _expanded(tensor: Tensor | None, heads: torch.Size) -> Tensor | None:
    """Return the tensor expanded to all heads, as a view."""
    return None if tensor is None else tensor.expand(*heads, *tensor.shape[-2:])


def _blocks(tensors: list[Any]) -> Iterator[list[Any]]:
    """Split tensors along batch and heads, until all are small, or there is one head."""
    first = tensors[0]
    is_small = all(tensor is None or tensor.numel() <= BLOCK for tensor in tensors)
    if is_small or first.dim() == 2:  # noqa: PLR2004  # a map
        yield tensors
        return
    for at in range(len(first)):
        yield from _blocks([None if tensor is None else tensor[at] for tensor in tensors])


def _compute(block: list[Any], *, scale: float, is_causal: bool) -> None:
    """Compute a block of the map, some queries at a time."""
    weights, mask, query, output, key, value = block
    keys = key.shape[-2]
    key = key.to(weights.dtype)
    rows = max(1, BLOCK * query.shape[-2] // max(1, weights.numel()))
    for at in range(0, query.shape[-2], rows):
        some = slice(at, at + rows)
        scores = query[..., some, :].to(weights.dtype) @ key.mT * scale
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask[..., some, :], -torch.inf)
        elif mask is not None:
            scores += mask[..., some, :]
        if is_causal:
            seen = torch.ones(scores.shape[-2], keys, dtype=torch.bool, device=scores.device)
            scores.masked_fill_(~seen.tril(at), -torch.inf)
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        part = weights[..., some, :]
        part.copy_(scores.softmax(-1).masked_fill_(blind, 0))
        if output is not None and value is not None:
            _check(part, value, output[..., some, :].masked_fill(blind, 0))


def _check(weights: Tensor, value: Tensor, output: Tensor) -> None:
    """Raise ``OptionError`` unless the weights give the output, up to rounding of its dtype."""
    wide = value.to(weights.dtype)
    off = (weights @ wide - output).abs()
    eps = max(torch.finfo(one.dtype).eps for one in (value, output))
    allowed = _ROUNDINGS * eps * (weights @ wide.abs() + eps)
    if bool((off > allowed).any() or (off.isnan() & ~output.isnan()).any()):
        message = (
            f"attention(output=...): weights @ value differs from the output by up to {off.max().item():.3g}, and rounding explains "
            f"{allowed.max().item():.3g}. Are both of one call, and recorded without dtype=? Or the model computes attention in another "
            "way: with dropout, a cap on the scores, or attention sinks."
        )
        raise OptionError(message)
