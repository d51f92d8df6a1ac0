"""Which columns of a mask belong to the tokens of a call, if the calls of a pass continue the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


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
