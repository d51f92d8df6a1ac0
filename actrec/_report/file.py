"""The file of a report: where it may be written, and how it is written atomically."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from actrec.errors import OptionError, RecordingExistsError, WriteError

#: The beginning of every report: a file that does not begin so is never overwritten.
MARK: Final = '<!doctype html><meta charset="utf-8"><meta name="generator" content="actrec">'


def checked(path: str | os.PathLike[str]) -> Path:
    """Return the path to which a report will be written.

    Raises:
        OptionError: a report cannot be written there.
        RecordingExistsError: a file that is not a report is there.
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
        message = f"{call}: a report is an HTML page. Write {str(found) + '.html'!r}."
        raise OptionError(message)
    if not found.parent.is_dir():
        message = f"{call}: there is no folder {str(found.parent)!r}. Make it first."
        raise OptionError(message)
    if found.exists() and not _is_report(found):
        message = f"{call}: that file exists, and is not a report of actrec. It was not changed: choose another path."
        raise RecordingExistsError(message)
    return found


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def write(path: Path, text: str) -> None:
    """Write a file next to its place, and then move it there: at any time, the new page is there completely, or the old one."""
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
