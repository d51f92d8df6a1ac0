"""Masks: which positions of a layer's tensors count, such as those that are no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from actrec._values.join import joined
from actrec._values.spec import leaves
from actrec.errors import AlignmentError, OptionError, UnknownLayerError

from .layer import Layer
from .pass_numbers import RankPass, calls_of

#: A layer or its name, perhaps with indices of what is in its values, or a function of the stored values of a pass.
Mask: TypeAlias = str | Layer[Any] | tuple[Any, ...] | Callable[[Mapping[str, Any]], Tensor]

#: For each call, by the paths of its tensors, which positions count; a tensor that is not in the dict counts in full.
Kept: TypeAlias = list[dict[str, Tensor]]


class Masks:
    """The masks of a recording.

    Args:
        call: the calling function, for messages.
        recording: the recording that has the mask.
        raised: its passes that raised, which may have no mask.
        mask: what the user gave.

    Raises:
        OptionError: ``mask`` is neither a layer nor a function.
        UnknownLayerError: nothing with that name was recorded.
    """

    def __init__(
        self,
        call: str,
        recording: Mapping[str, Layer[Any]],
        raised: AbstractSet[RankPass],
        mask: Mask,
    ) -> None:
        named, *steps = mask if isinstance(mask, tuple) and mask else (mask,)
        self._call = f"{call}(mask={mask!r})" if isinstance(mask, str) else f"{call}(mask=...)"
        if isinstance(named, str):
            if named not in recording:
                message = f"{self._call}: nothing with that name was recorded. Add it to each pass: acts.add({named!r}, attention_mask)."
                raise UnknownLayerError(message)
            named = recording[named]
        self._layer = named if isinstance(named, Layer) else None
        if self._layer is None and (steps or not callable(named)):
            message = (
                f"{call}(mask={mask!r}): expected the name of a mask that was recorded or added, a layer such as acts.inputs[''], a "
                "tuple of either and the index of a tensor in its values, or a function that makes a mask."
            )
            raise OptionError(message)
        self._make, self._steps = named, steps
        self._stored = Stored(recording if self._layer is None else {self._layer.name: self._layer})
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
                    self._fits |= layer is not self._layer
                    break
        return found

    def check(self) -> None:
        """Raise ``AlignmentError`` if none of the layers has had the positions of the mask."""
        if not self._fits:
            message = (
                f"{self._call}: no layer has the positions of the mask, which are (batch, tokens) in each "
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
            if self._layer is None:
                values: list[Any] = [self._make(PassValues(self._stored, rank_pass))]
            else:
                values = self._stored.values(self._layer.name, rank_pass)
        except MissingError as error:
            if rank_pass in self._raised:
                return None
            message = (
                f"{self._call}: pass {rank_pass[1]} has no {error.args[0]!r}. Add it to each pass."
            )
            raise AlignmentError(message) from None
        return [self._checked(value, rank_pass[1]) for value in values]

    def _checked(self, value: Any, number: int) -> Tensor:
        """Return the mask in a value of pass ``number``, as bools."""
        for step in self._steps:
            try:
                value = value[step]
            except (LookupError, TypeError):
                message = f"{self._call}: the value of pass {number} has no [{step!r}]."
                raise AlignmentError(message) from None
        if not isinstance(value, Tensor) or value.dim() != 2:  # noqa: PLR2004
            shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            what = shape or type(value).__name__
            message = (
                f"{self._call}: the mask of pass {number} is {what}, not a tensor (batch, tokens)."
            )
            raise AlignmentError(message)
        return (value.detach() != 0).cpu()


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


def first_columns(mask: Sequence[int], tokens: Sequence[int]) -> list[int | None] | None:
    """Return the column of the mask that each call of a pass begins with; ``None`` for a call whose tokens all count.

    >>> first_columns([5, 6, 7], [5, 1, 1])  # a mask for each step, which also covers the cached tokens
    [0, 5, 6]
    >>> first_columns([7], [5, 1, 1])  # one mask for the whole pass
    [0, 5, 6]
    >>> first_columns([5], [5, 1, 1])  # the mask of a prompt, as generate() gets it: all generated tokens count
    [0, None, None]

    Args:
        mask: the number of columns of each mask in the pass: one mask for each call of the layer, or a single one.
        tokens: the number of tokens of each call of the layer.

    Returns:
        ``None`` if the mask does not belong to these tokens.
    """
    if len(mask) == len(tokens):
        firsts = [many - own for many, own in zip(mask, tokens, strict=True)]
        return None if min(firsts) < 0 else [*firsts]
    ends = [*accumulate(tokens, initial=0)]
    if len(mask) != 1 or mask[0] not in ends[1:]:
        return None
    covered = ends.index(mask[0], 1)
    # After a prompt come steps of one token. A decoder begins with one token, and its encoder's mask does not apply to it.
    is_prompt = set(tokens[covered:]) <= {1} and (covered == 1 or tokens[0] > 1)
    if not is_prompt:
        return None
    return [begin if end <= mask[0] else None for begin, end in pairwise(ends)]


# --- The values of a pass ------------------------------------------------------------------------------


class MissingError(KeyError):
    """A layer has no call in a pass."""


class Stored:
    """The calls of each pass, by layer."""

    def __init__(self, recording: Mapping[str, Layer[Any]]) -> None:
        self.recording = recording
        self._calls: dict[str, dict[RankPass, list[int]]] = {}

    def values(self, name: str, rank_pass: RankPass) -> list[Any]:
        """Return the values of a layer's calls in a pass; ``MissingError`` if it has none."""
        layer = self.recording[name]
        if name not in self._calls:
            self._calls[name] = calls_of(layer._rank_passes())
        calls = self._calls[name]
        numbers = calls.get(rank_pass) or calls.get((None, rank_pass[1]))
        if numbers is None:
            raise MissingError(name)
        return [layer[number] for number in numbers]


class PassValues(Mapping[str, Any]):
    """The values of a pass, read on access; those of several calls are joined along dimension 1, the tokens."""

    def __init__(self, stored: Stored, rank_pass: RankPass) -> None:
        self._stored = stored
        self._rank_pass = rank_pass

    @override
    def __getitem__(self, name: str) -> Any:
        values = self._stored.values(name, self._rank_pass)
        return values[0] if len(values) == 1 else joined(values, "cat", 1, f"values[{name!r}]")

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.recording)

    @override
    def __len__(self) -> int:
        return len(self._stored.recording)
