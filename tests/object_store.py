"""What the tests of object stores share: one in memory that fails when it is told to, and an S3 server."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Reader(AbstractBufferedFile):
    """An object that is open for reading; each block is one request."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start=start, end=end)  # type: ignore[no-any-return]


class Stand(MemoryFileSystem):
    """An object store: each operation is atomic, is noted in ``log``, and is let pass by ``plan``, or not."""

    protocol = "stand"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    log: ClassVar[list[tuple[str, str]]] = []
    fetched: ClassVar[list[int]] = []
    #: Is called with the number and kind of an operation, its path, and whether it was done already; may raise.
    plan: ClassVar[Callable[[int, str, str, bool], None]] = staticmethod(lambda *_: None)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("stand://"))

    @classmethod
    def begin(cls, plan: Any = lambda *_: None) -> None:
        """Forget what was logged, and follow another plan."""
        cls.log.clear()
        cls.fetched.clear()
        cls.plan = staticmethod(plan)

    @contextlib.contextmanager
    def _asked(self, kind: str, path: str) -> Iterator[None]:
        self.log.append((kind, path))
        number = len(self.log)
        Stand.plan(number, kind, path, False)
        yield
        Stand.plan(number, kind, path, True)

    def info(self, path: str, **options: Any) -> Any:
        with self._asked("info", path):
            return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        with self._asked("ls", path):
            return super().ls(path, detail, **options)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        with self._asked("cat", path):
            data = super().cat_file(path, start, end, **options)
            self.fetched.append(len(data))
            return data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        with self._asked("put", path):
            super().pipe_file(path, value, mode)

    def put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **options: Any) -> None:
        with self._asked("put", rpath):
            super().pipe_file(rpath, Path(lpath).read_bytes(), mode)

    def rm_file(self, path: str) -> None:
        with self._asked("rm", path):
            super().rm_file(path)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """Read in blocks, as file systems of object stores do."""
        if mode == "rb":
            return _Reader(self, path, mode, **options)
        return super()._open(path, mode, **options)

    def exists(self, path: str, **options: Any) -> bool:
        path = self._strip_protocol(path)
        return path in self.store


fsspec.register_implementation("stand", Stand, clobber=True)


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, Any]]:
    """An S3 server on this machine: the options with which it is reached."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield {
            "key": "AKIDNOBODY",
            "secret": "a-secret-of-nobody",
            "endpoint_url": f"http://{host}:{port}",
        }
    finally:
        server.stop()
