"""Record the activations of any PyTorch model: exact, never silent, nearly free.

>>> import torch
>>> from actrec import record
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
>>> with record(model) as acts:
...     output = model(torch.randn(5, 4))
>>> acts["0"]
Layer '0' (Linear): 1 call, (5, 3) float32, 60 B
"""

from ._nested import Opaque
from ._record import record
from ._recording import Layer, Recorder, Recording
from .errors import (
    ActrecError,
    CaptureError,
    CorruptRecordingError,
    JoinError,
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
    "CaptureError",
    "CorruptRecordingError",
    "JoinError",
    "Layer",
    "Opaque",
    "OptionError",
    "Recorder",
    "Recording",
    "RecordingExistsError",
    "RecordingNotFoundError",
    "ResumeError",
    "SelectionError",
    "TransformError",
    "UnknownLayerError",
    "UnsupportedModelError",
    "UnusedLayerWarning",
    "WriteError",
    "load",
    "record",
    "verify",
]
