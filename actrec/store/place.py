"""Where a recording is: a folder on disk, or a prefix in an object store."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.request import url2pathname

from actrec.errors import OptionError

from . import disk as _disk
from .blocks import CACHE_BYTES, Blocks
from .bucket import Bucket
from .disk import Disk
from .folder import Folder
from .objects import Object

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://(.*)", re.DOTALL)


#: A folder, or a prefix in an object store. Both have the same methods, which do everything that the store does to files.
Place: TypeAlias = Disk | Bucket
#: A file of which parts are read. Both raise ``CorruptRecordingError`` if something is wrong.
Reading: TypeAlias = _disk.Reading | Object


def place(
    path: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    cache_bytes: float = CACHE_BYTES,
) -> Place:
    """Return the place of ``path``: in an object store for a URL, else on disk. A ``pathlib.Path`` is never a URL."""
    folder = Folder.of(path)
    url = _URL.match(text := folder.__fspath__())
    if url is None:
        return Disk(_expanded(text) if text.startswith("~") else text)
    if url[1].lower() in {"file", "local"}:
        return Disk(_path_of(text, url[2]))
    if not url[2].strip("/"):
        message = f"{text!r}: there is nothing after the ://. Name a bucket and a folder, as in 's3://bucket/run'."
        raise OptionError(message)
    options = {**(folder.storage_options or {}), **(storage_options or {})}
    return Bucket(text, options, folder.spool, Blocks(cache_bytes))


def _expanded(text: str) -> str:
    """Return the path with ``~`` replaced by the home directory."""
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        message = f"{text!r}: that home directory does not exist. Write a folder whose name begins with ~ as './~'."
        raise OptionError(message) from None


def _path_of(url: str, rest: str) -> str:
    """Return the path of a ``file://`` URL. After two slashes comes a host, which must be empty or ``localhost``."""
    path = rest.removeprefix("localhost")
    if not path.startswith("/"):
        message = (
            f"{url!r}: a file URL has three slashes and then the whole path, as in 'file:///runs/a'. Write a relative path "
            "without file://."
        )
        raise OptionError(message)
    # From Python 3.14 on, url2pathname() drops what follows # or ?, and takes // for a host.
    path = "/" + path.lstrip("/").replace("#", "%23").replace("?", "%3F")
    return url2pathname(path)
