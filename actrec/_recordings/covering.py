"""Which columns of a mask are those of a call's tokens, where calls of a pass go on with the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def first_columns(mask: Sequence[int], tokens: Sequence[int]) -> list[int | None] | None:
    """Return the column of the mask that each call of a pass begins with; ``None`` for a call whose tokens all count.

    >>> first_columns([5, 6, 7], [5, 1, 1])  # a mask of each step, which counts what is in the cache as well
    [0, 5, 6]
    >>> first_columns([7], [5, 1, 1])  # one mask of the whole pass
    [0, 5, 6]
    >>> first_columns([5], [5, 1, 1])  # that of a prompt, as it is given to generate(): what is generated counts
    [0, None, None]

    Args:
        mask: How many columns the mask has in each of its calls, which are as many as those of the layer, or one.
        tokens: How many tokens each call of the layer has.

    Returns:
        ``None`` where the mask is none of these tokens.
    """
    if len(mask) == len(tokens):
        firsts = [many - own for many, own in zip(mask, tokens, strict=True)]
        return None if min(firsts) < 0 else [*firsts]
    ends = [*accumulate(tokens, initial=0)]
    if len(mask) != 1 or mask[0] not in ends[1:]:
        return None
    covered = ends.index(mask[0], 1)
    # What follows a prompt are steps of one token. A decoder, which begins with one, knows nothing of its encoder's mask.
    is_prompt = set(tokens[covered:]) <= {1} and (covered == 1 or tokens[0] > 1)
    if not is_prompt:
        return None
    return [begin if end <= mask[0] else None for begin, end in pairwise(ends)]
