"""Statistics without padding: which positions of a layer's tensors a mask keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from actrec._values.spec import leaves
from actrec.errors import AlignmentError, OptionError, UnknownLayerError

from .covering import first_columns
from .layer import Layer
from .pass_numbers import RankPass, calls_of
from .pass_values import MissingError, PassValues, Stored

#: The name of a mask, or a function that makes one from the stored values of a pass.
Mask: TypeAlias = str | Callable[[Mapping[str, Any]], Tensor]

#: For each call, by the paths of its tensors, which positions count; a tensor that is not in the dict counts in full.
Kept: TypeAlias = list[dict[str, Tensor]]


class Masks:
    """The masks of a recording.

    Args:
        call: the calling function, for messages.
        recording: the recording that has the mask.
        raised: its passes that raised, which may have no mask.
        mask: the name of the mask, or a function that makes it.

    Raises:
        OptionError: ``mask`` is neither a name nor a function.
        UnknownLayerError: nothing with that name was recorded.
    """

    def __init__(
        self,
        call: str,
        recording: Mapping[str, Layer[Any]],
        raised: AbstractSet[RankPass],
        mask: Mask,
    ) -> None:
        given: object = mask
        if not (isinstance(given, str) or callable(given)):
            message = f"{call}(mask={mask!r}): expected the name of a mask that was recorded or added, or a function that makes one."
            raise OptionError(message)
        if isinstance(mask, str) and mask not in recording:
            message = f"{call}(mask={mask!r}): nothing with that name was recorded. Add it to each pass: acts.add({mask!r}, attention_mask)."
            raise UnknownLayerError(message)
        self._call = call
        self._mask = mask
        self._stored = Stored(recording)
        self._raised = raised
        self._known: dict[RankPass, list[Tensor] | None] = {}
        self._fits = False

    def of(self, layer: Layer[Any]) -> Kept:
        """Return which positions of each call count, for the tensors that have the positions of the mask in all calls."""
        passes = calls_of(layer._rank_passes())
        shapes: dict[str, dict[int, Tensor]] = {}
        for number, value in enumerate(layer):
            for path, tensor in leaves(value):
                shapes.setdefault(path, {})[number] = _outline(tensor)
        found: Kept = [{} for _ in range(len(layer))]
        for path, outlines in shapes.items():
            for tokens_of in (_tokens, _merged):
                kept = self._kept(passes, outlines, tokens_of)
                if kept is not None:
                    for number, one in kept.items():
                        found[number][path] = one
                    self._fits |= layer.name != self._mask
                    break
        return found

    def check(self) -> None:
        """Raise ``AlignmentError`` if none of the layers has had the positions of the mask."""
        if not self._fits:
            message = (
                f"{self._call}(mask={self._mask!r}): no layer has the positions of the mask, which are (batch, tokens) in each "
                "pass. Layers have them as (batch, tokens, ...) or (batch * tokens, ...)."
            )
            raise AlignmentError(message)

    def _kept(
        self,
        passes: Mapping[RankPass, list[int]],
        outlines: Mapping[int, Tensor],
        tokens_of: Callable[[Tensor, int], int | None],
    ) -> dict[int, Tensor] | None:
        """Return which positions of a tensor count in each call; ``None`` if it does not have those of the mask."""
        found: dict[int, Tensor] = {}
        most = 0
        for rank_pass, calls in passes.items():
            own = [number for number in calls if number in outlines]
            masks = self._masks(rank_pass)
            if masks is None:  # a pass that raised, without a mask: it does not count
                found |= {
                    number: torch.zeros(outlines[number].shape[:1], dtype=torch.bool, device="cpu")
                    for number in own
                }
                continue
            if not own:
                continue
            samples = {len(mask) for mask in masks}
            tokens = [tokens_of(outlines[number], len(masks[0])) for number in own]
            known = [many for many in tokens if many is not None]
            firsts = _firsts([mask.shape[1] for mask in masks], known)
            if len(samples) > 1 or len(known) < len(own) or firsts is None:
                return None
            most = max(most, *known)
            for step, (number, first, many) in enumerate(zip(own, firsts, known, strict=True)):
                mask = masks[step if len(masks) > 1 else 0]
                part = torch.ones_like(mask[:, :1]).expand(-1, many)
                part = part if first is None else mask[:, first : first + many]
                found[number] = part.flatten() if tokens_of is _merged else part
        # With one position for each sample, such as a pooled vector, it has no tokens.
        return found if most > 1 else None

    def _masks(self, rank_pass: RankPass) -> list[Tensor] | None:
        """Return the masks of a pass, (batch, tokens) each; ``None`` if it has none because it raised."""
        if rank_pass not in self._known:
            self._known[rank_pass] = self._read(rank_pass)
        return self._known[rank_pass]

    def _read(self, rank_pass: RankPass) -> list[Tensor] | None:
        try:
            if callable(self._mask):
                values: list[Any] = [self._mask(PassValues(self._stored, rank_pass))]
            else:
                values = self._stored.values(self._mask, rank_pass)
        except MissingError as error:
            if rank_pass in self._raised:
                return None
            message = f"{self._call}(mask=...): pass {rank_pass[1]} has no {error.args[0]!r}. Add it to each pass."
            raise AlignmentError(message) from None
        for value in values:
            if not isinstance(value, Tensor) or value.dim() != 2:  # noqa: PLR2004
                what = (
                    f"of shape {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                message = f"{self._call}(mask=...): the mask of pass {rank_pass[1]} is {what}, not a tensor (batch, tokens)."
                raise AlignmentError(message)
        return [(value.detach() != 0).cpu() for value in values]


def left_in(tensor: Tensor, kept: Tensor | None) -> Tensor:
    """Return the positions of a tensor that count, as a copy: ``(*positions, *) -> (count, *)``."""
    return tensor if kept is None else tensor.detach()[kept.to(tensor.device)]


def _outline(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype without data; without a shape if positions cannot be selected in it."""
    is_plain = tensor.layout is torch.strided and not (
        tensor.is_nested or tensor.is_quantized or tensor.is_meta
    )
    return torch.empty(tensor.shape if is_plain else (), dtype=tensor.dtype, device="meta")


def _is_vector(tensor: Tensor) -> bool:
    """Whether a tensor has one vector for each sample, or for each token of all samples."""
    return tensor.dim() == 2 and (tensor.is_floating_point() or tensor.is_complex())  # noqa: PLR2004


def _tokens(tensor: Tensor, samples: int) -> int | None:
    """Return how many tokens a tensor (samples, tokens, ...) has."""
    is_other = tensor.dim() < 2 or len(tensor) != samples or _is_vector(tensor)  # noqa: PLR2004
    return None if is_other else tensor.shape[1]


def _merged(tensor: Tensor, samples: int) -> int | None:
    """Return how many tokens of each sample a tensor (samples * tokens, ...) has."""
    is_other = not tensor.dim() or not samples or len(tensor) % samples
    return None if is_other else len(tensor) // samples


def _firsts(mask: list[int], tokens: list[int]) -> list[int | None] | None:
    """Like ``first_columns``, but a mask may be longer than its call only if it covers all tokens so far, or the call has one."""
    if len(mask) == len(tokens):
        pairs = zip(mask, tokens, accumulate(tokens), strict=True)
        if any(many not in {own, before} and own != 1 for many, own, before in pairs):
            return None
    return first_columns(mask, tokens)
