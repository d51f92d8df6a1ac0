"""Everything actrec raises or warns about, as one tree.

.. code-block:: text

    ActrecError                     catch this one to catch them all
    ├── UnsupportedModelError       also TypeError: a model that hooks cannot run in
    ├── OptionError                 also ValueError: an invalid argument
    ├── SelectionError              also ValueError: a query without a layer that can be recorded
    ├── UnknownLayerError           also KeyError: a name that is not in the recording
    ├── TransformError              also RuntimeError: the user's transform raised
    ├── CaptureError                also RuntimeError: a value that cannot be recorded or stored
    ├── MissingUnitsError           also LookupError: a stored recording lacks units that were asked for
    ├── JoinError                   also ValueError: calls that cannot be joined
    ├── AlignmentError              also ValueError: layers that cannot be cut into the same rows
    ├── RecordingExistsError        also FileExistsError: a path that is not empty
    ├── RecordingNotFoundError      also FileNotFoundError: a path without a recording
    ├── ResumeError                 also ValueError: a recording or state of other layers or options
    ├── WriteError                  also OSError: writing a recording failed
    ├── ReadError                   also OSError: an object store could not be read
    └── CorruptRecordingError       also ValueError: a stored recording is damaged

    UnusedLayerWarning              nothing was recorded of a chosen layer
    IncompleteLayerWarning          calls of a chosen layer are missing, or may differ from what it returned
    ResumeWarning                   a run is resumed by the number of passes, and a pass may be only a part of a work item
    MissingGradientWarning          a gradient of a chosen layer cannot arrive, or is not defined
    OverflowWarning                 values overflowed in the cast to ``dtype``
    UnlockedWarning                 a folder that is recorded into cannot be locked

Every message names the call, the offending value, what was observed and the nearest fix.
"""

from __future__ import annotations

from typing_extensions import override

__all__ = [
    "ActrecError",
    "AlignmentError",
    "CaptureError",
    "CorruptRecordingError",
    "IncompleteLayerWarning",
    "JoinError",
    "MissingGradientWarning",
    "MissingUnitsError",
    "OptionError",
    "OverflowWarning",
    "ReadError",
    "RecordingExistsError",
    "RecordingNotFoundError",
    "ResumeError",
    "ResumeWarning",
    "SelectionError",
    "TransformError",
    "UnknownLayerError",
    "UnlockedWarning",
    "UnsupportedModelError",
    "UnusedLayerWarning",
    "WriteError",
]


class ActrecError(Exception):
    """The base class of all errors that actrec raises."""


class UnsupportedModelError(ActrecError, TypeError):
    """The model is not a module, or is of a kind whose layers run no hooks, such as a TorchScript module."""


class OptionError(ActrecError, ValueError):
    """An invalid argument. Raised before any side effect."""


class SelectionError(ActrecError, ValueError):
    """A layer query selects nothing, or only modules that are never called; the message names close matches."""


class UnknownLayerError(ActrecError, KeyError):
    """A name is not in the recording; the message names close matches."""

    @override
    def __str__(self) -> str:
        # KeyError would show the message in quotes, with its newlines escaped.
        return str(self.args[0])


class TransformError(ActrecError, RuntimeError):
    """The user's transform raised; the original error is the ``__cause__``."""


class CaptureError(ActrecError, RuntimeError):
    """A value cannot be recorded, such as one inside a ``torch.func`` transform, or cannot be stored."""


class JoinError(ActrecError, ValueError):
    """Calls of a layer cannot be joined: their structures, dtypes or shapes differ, or there are none."""


class MissingUnitsError(ActrecError, LookupError):
    """A stored recording lacks units that were asked for; the message names the first, ``missing`` has all their keys."""

    #: The keys, in the order in which they were asked for.
    missing: list[int | str]

    def __init__(self, message: str, missing: list[int | str]) -> None:
        super().__init__(message, missing)
        self.missing = missing

    @override
    def __str__(self) -> str:
        return str(self.args[0])


class AlignmentError(ActrecError, ValueError):
    """Layers cannot be cut into rows that correspond; the message names the call that differs."""


class RecordingExistsError(ActrecError, FileExistsError):
    """There is something at the path already. It was not changed."""


class RecordingNotFoundError(ActrecError, FileNotFoundError):
    """There is no recording at the path."""


class ResumeError(ActrecError, ValueError):
    """A stored recording, or the state of a dataset, has other layers or options; the message says which."""


class WriteError(ActrecError, OSError):
    """Writing a recording failed; the original error is the ``__cause__``. Committed passes stay on disk."""


class ReadError(ActrecError, OSError):
    """An object store could not be reached, or refused a request; the original error is the ``__cause__``."""


class CorruptRecordingError(ActrecError, ValueError):
    """A file of a stored recording is damaged; the message names the file and the defect."""


class IncompleteLayerWarning(UserWarning):
    """Calls of a chosen layer were not recorded, or may differ from what it returned; the message says why."""


class MissingGradientWarning(UserWarning):
    """With ``grads=True``, a gradient of a layer cannot arrive, or is not defined; the message says why."""


class OverflowWarning(UserWarning):
    """Finite values overflowed in the cast to ``dtype``; the message names the layers."""


class ResumeWarning(UserWarning):
    """A run is resumed by the number of passes, and a pass seems to be only a part of a work item."""


class UnusedLayerWarning(UserWarning):
    """Nothing was recorded of a chosen layer; the message gives the likely cause."""


class UnlockedWarning(UserWarning):
    """A folder that is recorded into cannot be locked, so another run could record there too."""
