"""Files of a recording, while rows are read from them: each is opened once, and few at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from actrec.store.format import Defect, corrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from actrec.store.place import Place, Reading

__all__ = ["File", "Files"]

#: Files that are open at a time. Rows come in the order in which they lie, so those before are read to their end.
_MOST: Final = 16


@dataclass(frozen=True, eq=False)
class File:
    """A file of a recording; it is sent to another process as its name alone."""

    place: Place
    name: str
    head: bytes = field(repr=False)  #: what it began with when the recording was opened


class Files(AbstractContextManager["Files"]):
    """The files that are open."""

    def __init__(self) -> None:
        self._open: dict[File, Reading] = {}  # the one used last is the last

    @override
    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    @contextmanager
    def opened(self, file: File) -> Iterator[Reading]:
        """Read parts of a file; what is wrong with it is a ``CorruptRecordingError``."""
        try:
            yield self._opened(file)
        except Defect as defect:
            raise corrupt(file.place.shown(file.name), defect) from None

    def announce(self, file: File, begin: int, nbytes: int) -> None:
        """Say that a part of a file will be read soon."""
        try:
            self._opened(file).announce(begin, nbytes)
        except Defect:
            return  # reading it says what is wrong

    def _opened(self, file: File) -> Reading:
        found = self._open.pop(file, None)
        if found is None:
            found = file.place.reading(file.name, file.head)
        self._open[file] = found
        if len(self._open) > _MOST:
            self._open.pop(next(iter(self._open))).close()
        return found
