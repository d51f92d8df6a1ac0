"""Pictures of recordings, with matplotlib: feature maps, distributions, drift, similarity.

>>> import torch
>>> from actrec import plot, record
>>> model = torch.nn.Conv2d(1, 8, 3)
>>> with record(model, "") as acts:
...     output = model(torch.randn(4, 1, 16, 16))
>>> axes = plot.feature_maps(acts[""][0])

Install it with ``pip install actrec[plot]``. Every function returns the ``Axes`` that it has drawn on (or
an array of them) and never shows a figure: a notebook does that, elsewhere call ``plt.show()`` or
``axes.figure.savefig(...)``. Recordings are only read, at most a few calls at a time. If there is more
than a picture can show, a sample is drawn, always the same one, without using PyTorch's global generators.
"""

from typing import TYPE_CHECKING, Any

from actrec._recordings.instead import no_name

try:
    from .cka import similarity
    from .course import drift
    from .grid import feature_maps
    from .percentiles import distributions
except ImportError as error:
    message = f"actrec.plot needs matplotlib ({error}). Install it with: pip install actrec[plot]"
    raise ImportError(message) from error

__all__ = ["distributions", "drift", "feature_maps", "similarity"]

if not TYPE_CHECKING:  # hidden from type checkers, which then report missing attributes

    def __getattr__(name: str) -> Any:
        raise no_name(__name__, name, __all__)
