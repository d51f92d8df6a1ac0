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

from actrec._text import own_version

from .errors import (
    ActrecError,
    AlignmentError,
    CaptureError,
    CorruptRecordingError,
    IncompleteLayerWarning,
    JoinError,
    MissingGradientWarning,
    MissingUnitsError,
    OptionError,
    OverflowWarning,
    ReadError,
    RecordingExistsError,
    RecordingNotFoundError,
    ResumeError,
    ResumeWarning,
    SelectionError,
    TransformError,
    UnknownLayerError,
    UnlockedWarning,
    UnsupportedModelError,
    UnusedLayerWarning,
    WriteError,
)

if TYPE_CHECKING:
    from actrec._calls.recorder import Recorder
    from actrec._recordings.compare import compare
    from actrec._recordings.comparison import Comparison
    from actrec._recordings.layer import Layer
    from actrec._recordings.recording import Recording
    from actrec._recordings.stats import Stats
    from actrec._values.stand_ins import Opaque

    from . import data as data
    from . import plot as plot
    from . import reduce as reduce
    from . import store as store
    from . import testing as testing
    from ._attention import attention
    from ._layers import Layers, layers
    from ._record import record
    from .store import load, save, verify

    __version__: str

__all__ = [
    "ActrecError",
    "AlignmentError",
    "CaptureError",
    "Comparison",
    "CorruptRecordingError",
    "IncompleteLayerWarning",
    "JoinError",
    "Layer",
    "Layers",
    "MissingGradientWarning",
    "MissingUnitsError",
    "Opaque",
    "OptionError",
    "OverflowWarning",
    "ReadError",
    "Recorder",
    "Recording",
    "RecordingExistsError",
    "RecordingNotFoundError",
    "ResumeError",
    "ResumeWarning",
    "SelectionError",
    "Stats",
    "TransformError",
    "UnknownLayerError",
    "UnlockedWarning",
    "UnsupportedModelError",
    "UnusedLayerWarning",
    "WriteError",
    "attention",
    "compare",
    "layers",
    "load",
    "record",
    "save",
    "verify",
]

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
