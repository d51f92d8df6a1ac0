"""Record the activations of any PyTorch model: exact, never silent, nearly free.

>>> import torch
>>> from actrec import record
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
>>> with record(model) as acts:
...     output = model(torch.randn(5, 4))
>>> acts["0"]
Layer '0' (Linear): 1 call, (5, 3) float32, 60 B
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors as errors
from ._text import own_version
from .errors import *  # noqa: F403  # an error needs no PyTorch, so all of them are imported at once

if TYPE_CHECKING:  # the names of _HOMES and _MODULES
    from . import data as data
    from . import plot as plot
    from . import reduce as reduce
    from . import store as store
    from . import testing as testing
    from ._attention import attention as attention
    from ._calls.recorder import Recorder as Recorder
    from ._layers import Layers as Layers
    from ._layers import layers as layers
    from ._record import record as record
    from ._recordings.compare import compare as compare
    from ._recordings.comparison import Comparison as Comparison
    from ._recordings.layer import Layer as Layer
    from ._recordings.recording import Recording as Recording
    from ._recordings.stats import Stats as Stats
    from ._values.stand_ins import Opaque as Opaque
    from .store import load as load
    from .store import save as save
    from .store import verify as verify

    __version__: str

_MODULES = ("data", "plot", "reduce", "store", "testing")
#: Names imported on first use, and their modules: so ``actrec --help`` does not wait for PyTorch, nor a recording in memory
#: for the store.
_HOMES = {
    "attention": "_attention",
    "Recorder": "_calls.recorder",
    "compare": "_recordings.compare",
    "Comparison": "_recordings.comparison",
    "Layer": "_recordings.layer",
    "Recording": "_recordings.recording",
    "Stats": "_recordings.stats",
    "Opaque": "_values.stand_ins",
    "Layers": "_layers",
    "layers": "_layers",
    "record": "_record",
    "load": "store",
    "save": "store",
    "verify": "store",
}

if not TYPE_CHECKING:  # hidden from type checkers, which then report missing names
    __all__ = errors.__all__ + list(_HOMES)
    __all__.sort()

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"actrec.{name}")
        if name in _HOMES:
            found = globals()[name] = getattr(import_module(f"actrec.{_HOMES[name]}"), name)
            return found
        if name == "__version__":
            return own_version()
        if name.startswith("_"):  # Python looks for such names itself: nothing is imported for them
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        from actrec._recordings.instead import no_name  # noqa: PLC0415

        raise no_name(__name__, name, __dir__())

    def __dir__() -> list[str]:
        return sorted([*__all__, *_MODULES, "__version__", "errors"])
