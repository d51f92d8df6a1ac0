"""Record the activations of any PyTorch model: exact, never silent, nearly free.

>>> import torch
>>> from actrec import record
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
>>> with record(model) as acts:
...     output = model(torch.randn(5, 4))
>>> acts["0"]
Layer '0' (Linear): 1 call, (5, 3) float32, 60 B
"""

from ._compare import Comparison, compare
from ._nested import Opaque
from ._record import record
from ._recording import Layer, Recorder, Recording
from ._stats import Stats
from .errors import (
    ActrecError,
    AlignmentError,
    CaptureError,
    CorruptRecordingError,
    JoinError,
    MissingGradientWarning,
    OptionError,
    RecordingExistsError,
    RecordingNotFoundError,
    ResumeError,
    SelectionError,
    TransformError,
    UnknownLayerError,
    UnsupportedModelError,
    UnusedLayerWarning,
    WriteError,
)
from .store import load, verify

__all__ = [
    "ActrecError",
    "AlignmentError",
    "CaptureError",
    "Comparison",
    "CorruptRecordingError",
    "JoinError",
    "Layer",
    "MissingGradientWarning",
    "Opaque",
    "OptionError",
    "Recorder",
    "Recording",
    "RecordingExistsError",
    "RecordingNotFoundError",
    "ResumeError",
    "SelectionError",
    "Stats",
    "TransformError",
    "UnknownLayerError",
    "UnsupportedModelError",
    "UnusedLayerWarning",
    "WriteError",
    "compare",
    "load",
    "record",
    "verify",
]
