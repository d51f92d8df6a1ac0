"""Reductions of the calls of a layer while they are recorded, instead of keeping the calls.

``record(model, {"layer*": actrec.reduce.Moments()})``; with a path for ``into``, the result is stored. ``merge()`` combines
reductions of the same kind, of other batches or other ranks. ``state()`` is a dict of tensors and numbers, and ``of()`` makes a
reduction of it again.
"""

from .histogram import Histogram
from .moments import Moments
from .norms import Norms
from .reduction import Reduction
from .top import TopK

__all__ = ["KINDS", "Histogram", "Moments", "Norms", "Reduction", "TopK"]

#: The reductions, by their names in a stored recording.
KINDS: dict[str, type[Reduction]] = {
    kind.__name__: kind for kind in (Histogram, Moments, Norms, TopK)
}
