"""The file of a report: where it may go, and how it gets there in one step."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from actrec.errors import OptionError, RecordingExistsError, WriteError

#: What every report begins with: a file that does not is never written over.
MARK: Final = '<!doctype html><meta charset="utf-8"><meta name="generator" content="actrec">'


def checked(path: str | os.PathLike[str]) -> Path:
    """Return where a report is going to be written.

    Raises:
        OptionError: it cannot be written there.
        RecordingExistsError: there is another file.
    """
    given: object = path
    call = f"acts.report({str(path) if isinstance(given, os.PathLike) else path!r})"
    if not isinstance(given, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        message = f"{call}: expected the path of a file, such as 'run.html'."
        raise OptionError(message)
    if "://" in os.fspath(path):
        message = f"{call}: a report is a file on disk. Write 'run.html', and upload that."
        raise OptionError(message)
    found = Path(path).expanduser()
    if found.is_dir():
        message = f"{call}: that is a folder. Name a file in it: {str(found / 'run.html')!r}."
        raise OptionError(message)
    if found.suffix.lower() not in {".html", ".htm"}:
        message = f"{call}: a report is a page of HTML. Write {str(found) + '.html'!r}."
        raise OptionError(message)
    if not found.parent.is_dir():
        message = f"{call}: there is no folder {str(found.parent)!r}. Make it first."
        raise OptionError(message)
    if found.exists() and not _is_report(found):
        message = f"{call}: that file is there, and is no report of actrec. It stays as it is: choose another path."
        raise RecordingExistsError(message)
    return found


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def write(path: Path, text: str) -> None:
    """Write a file beside its place, and then put it there, so that a page is there whole, or the one before it."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with new.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        message = f"acts.report({str(path)!r}): it could not be written: {error}."
        raise WriteError(message) from error
    finally:
        with suppress(OSError):
            new.unlink()
