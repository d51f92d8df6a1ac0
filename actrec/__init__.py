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

from actrec._calls.recorder import Recorder
from actrec._recordings.compare import compare
from actrec._recordings.comparison import Comparison
from actrec._recordings.layer import Layer
from actrec._recordings.recording import Recording
from actrec._recordings.stats import Stats
from actrec._text import own_version
from actrec._values.stand_ins import Opaque

from ._attention import attention
from ._layers import Layers, layers
from ._record import record
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
    import os

    from . import data as data
    from . import plot as plot
    from . import store as store
    from . import testing as testing
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
_IN_THE_STORE = ("load", "save", "verify")


def __getattr__(name: str) -> Any:
    """Import what is not always needed when it is first asked for: the store is half of what importing actrec takes."""
    if name in _MODULES:
        return import_module(f"actrec.{name}")
    if name in _IN_THE_STORE:
        return getattr(import_module("actrec.store"), name)
    if name == "__version__":
        return own_version()
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def _write(recording: Recording[Any], path: str | os.PathLike[str], *, overwrite: bool) -> None:
    import_module("actrec.store").save(recording, path, overwrite=overwrite)


# A recording can write itself, though it knows nothing of the store.
Recording._write = staticmethod(_write)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__", "errors"])
