"""Everything actrec raises or warns about, as one tree.

.. code-block:: text

    ActrecError                     catch this one to catch them all
    ├── UnsupportedModelError       also TypeError: hooks cannot run inside this model
    ├── OptionError                 also ValueError: an argument that a call cannot work with
    ├── SelectionError              also ValueError: a query that selects nothing that can be recorded
    ├── UnknownLayerError           also KeyError: a name that is not in the recording
    ├── TransformError              also RuntimeError: the user's transform raised
    ├── CaptureError                also RuntimeError: a value that cannot be kept
    ├── JoinError                   also ValueError: calls that do not fit together
    ├── AlignmentError              also ValueError: layers whose rows do not line up
    ├── RecordingExistsError        also FileExistsError: a path that is taken, and stays as it is
    ├── RecordingNotFoundError      also FileNotFoundError: a path without a recording
    ├── ResumeError                 also ValueError: a recording or loader that cannot go on like this
    ├── WriteError                  also OSError: what was recorded could not be written
    ├── ReadError                   also OSError: an object store that could not be read
    └── CorruptRecordingError       also ValueError: a stored recording that is damaged

    UnusedLayerWarning              a chosen layer of which nothing was recorded
    IncompleteLayerWarning          a chosen layer of which calls are missing, or may be other than it returned
    MissingGradientWarning          a chosen layer that no gradient can reach, or none that is known to be right
    OverflowWarning                 values that the dtype they were cast to cannot hold

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
    "OptionError",
    "OverflowWarning",
    "ReadError",
    "RecordingExistsError",
    "RecordingNotFoundError",
    "ResumeError",
    "SelectionError",
    "TransformError",
    "UnknownLayerError",
    "UnlockedWarning",
    "UnsupportedModelError",
    "UnusedLayerWarning",
    "WriteError",
]


class ActrecError(Exception):
    """The root of everything that actrec raises on its own account."""


class UnsupportedModelError(ActrecError, TypeError):
    """The model is not a module, or a form of one whose layers run no hooks."""


class OptionError(ActrecError, ValueError):
    """An argument that cannot be meant, found before anything has happened."""


class SelectionError(ActrecError, ValueError):
    """A layer query that selects nothing, or nothing that is ever called."""


class UnknownLayerError(ActrecError, KeyError):
    """A name that is not in the recording."""

    @override
    def __str__(self) -> str:
        # KeyError would show the message in quotes, with its newlines escaped.
        return str(self.args[0])


class TransformError(ActrecError, RuntimeError):
    """The user's transform raised; the original error is the ``__cause__``."""


class CaptureError(ActrecError, RuntimeError):
    """A value that cannot be kept, such as one inside a ``torch.func`` transform."""


class JoinError(ActrecError, ValueError):
    """Calls of a layer that cannot be joined into one tensor."""


class AlignmentError(ActrecError, ValueError):
    """Layers that cannot be cut into rows that belong together; the message names the call."""


class RecordingExistsError(ActrecError, FileExistsError):
    """There is something at the path already. It was not touched."""


class RecordingNotFoundError(ActrecError, FileNotFoundError):
    """There is no recording at the path."""


class ResumeError(ActrecError, ValueError):
    """What is there, a stored recording or a state, is of other layers or options; the message says which."""


class WriteError(ActrecError, OSError):
    """What was recorded could not be written; the original error is the ``__cause__``.

    What was committed before is on disk, and stays.
    """


class ReadError(ActrecError, OSError):
    """An object store could not be reached, or refused; the original error is the ``__cause__``."""


class CorruptRecordingError(ActrecError, ValueError):
    """A stored recording is damaged; the message names the file and the defect."""


class IncompleteLayerWarning(UserWarning):
    """Not every call of a chosen layer was recorded, or not surely as it returned; the message says why."""


class MissingGradientWarning(UserWarning):
    """No gradient can reach a layer, or none that is known to be right, though gradients were asked for; the message says why."""


class OverflowWarning(UserWarning):
    """Finite values are too large for the dtype that they were cast to; the message says of which layers."""


class UnusedLayerWarning(UserWarning):
    """Nothing was recorded of a chosen layer; the message says why that may be."""


class UnlockedWarning(UserWarning):
    """A folder that is recorded into cannot be locked, so another run may record there at the same time."""
