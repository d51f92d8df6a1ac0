"""What the calls of a layer are reduced to while they are recorded, in place of keeping them.

``record(model, {"layer*": actrec.reduce.Moments()})``, and with a path for ``into`` on the disk. Several of one kind, of other
batches or other ranks, are one by ``merge()``; ``state()`` is a dict of tensors and numbers, of which ``of()`` makes it again.
"""

from .histogram import Histogram
from .moments import Moments
from .norms import Norms
from .reduction import Reduction
from .top import TopK

__all__ = ["KINDS", "Histogram", "Moments", "Norms", "Reduction", "TopK"]

#: By the names that they have in a stored recording.
KINDS: dict[str, type[Reduction]] = {
    kind.__name__: kind for kind in (Histogram, Moments, Norms, TopK)
}
