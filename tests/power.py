"""A disk that loses power: what a run does to its folder is recorded call by call, and what a power loss may leave is made.

``kill -9`` leaves all that was written in the memory of the system. A power loss leaves what ``fsync`` covers, and of the
rest any part: of the data, of the sizes, and of the names. :class:`Journal` records each call of :mod:`os` that changes a
folder. :meth:`Journal.disk` makes, in another folder, one of the disks that may be found after a cut between two calls.

What is taken to be true of a disk is what POSIX promises, and no more:

- The data of a file is certain after an ``fsync`` of the file. Before it, each block has what it ever had since the ``fsync``
  before, or zeros, or anything, if it was behind the end; the size is any that the file had.
- A name is certain after an ``fsync`` of its folder; before it, each change may be there or not, whatever became of others.
  Within a folder, a renaming is one change. Between two, the new name never comes after the old one has gone.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import random
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Choice", "Fault", "Journal", "contents"]

ROOT: Final = 0  # the number of the folder that is watched
BLOCK: Final = 512  # what a disk writes whole or not at all


class Name(NamedTuple):
    """A name in a folder leads to a node from now on, or to none."""

    folder: int
    name: str
    node: int | None


class Data(NamedTuple):
    """A file has this at an offset."""

    node: int
    offset: int
    data: bytes


class Size(NamedTuple):
    """A file ends here."""

    node: int
    size: int


class Sync(NamedTuple):
    """All that was done to a node is certain."""

    node: int


#: What one call does.
Step: TypeAlias = tuple[Name | Data | Size | Sync, ...]


class Fault(NamedTuple):
    """Call number ``call`` fails: before it is done, or after it was done."""

    call: int
    after: bool


class Choice(NamedTuple):
    """What is left of that which no ``fsync`` covers: for each change and block, drawn by ``seed``, or all alike."""

    names: bool
    sizes: bool
    data: bool
    seed: int | None = None


class _Open(NamedTuple):
    """An open file or folder."""

    node: int
    path: str


class Journal:
    """Records what is done to a folder, as long as it is watched; one call of it may fail."""

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root = root
        self.steps: list[Step] = []
        self.calls: list[str] = []  # their names, also of those that change nothing
        self.failed: str | None = None
        self._fault = fault
        self._folders: set[int] = {ROOT}
        self._count = 0  # of nodes
        self._names: dict[tuple[int, str], int] = {}
        self._open: dict[int, _Open] = {}
        self._lock = threading.RLock()
        self._real: dict[str, Any] = {}
        before = [*self._found(ROOT, root)]
        self.steps += [tuple(before), *((Sync(node),) for node in range(self._count + 1))]
        self.begin = len(self.steps)  # what was there before is certain

    # --- Recording -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self) -> Iterator[Journal]:
        """Record what this process does to the folder."""
        self._real = {name: getattr(os, name) for name in _CALLS if hasattr(os, name)}
        opened = io.open
        for name, real in self._real.items():
            setattr(os, name, self._watched(name, real))
        io.open = builtins.open = self._opening(opened)  # type: ignore[assignment]
        try:
            yield self
        finally:
            for name, real in self._real.items():
                setattr(os, name, real)
            io.open = builtins.open = opened

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._is_mine(args):
                return real(*args, **kwargs)
            assert not kwargs.keys() & {"dir_fd", "src_dir_fd", "dst_dir_fd"}
            with self._lock:  # so that the calls are recorded in the order in which they are done
                self.calls.append(name)
                fails = self._fault is not None and len(self.calls) - 1 == self._fault.call
                if fails:
                    self.failed = name
                if fails and not (self._fault and self._fault.after):
                    if name == "close":  # a file is closed also where that fails
                        self._open.pop(args[0], None)
                        real(*args)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                result = _CALLS[name](self, real, *args, **kwargs)
                if fails:
                    if name == "open":  # nobody has it who could close it
                        self._open.pop(result)
                        self._real["close"](result)
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return result

        return call

    def _opening(self, opened: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if not self._is_mine((file,)) or not set(mode) & set("wxa+"):
                return opened(file, mode, buffering, *args, **kwargs)
            assert set(mode) <= set("wxb"), (
                f"a file is opened as {mode!r}: teach this to {__file__}"
            )
            flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if "x" in mode else os.O_TRUNC)
            raw = _Raw(os.open(file, flags, 0o666))
            return raw if buffering == 0 else io.BufferedWriter(raw)

        return call

    def _is_mine(self, args: tuple[Any, ...]) -> bool:
        if isinstance(args[0], int):
            return args[0] in self._open
        return any(isinstance(arg, (str, os.PathLike)) and self._inside(arg) for arg in args[:2])

    def _inside(self, path: Any) -> bool:
        return Path(path).absolute().is_relative_to(self.root)

    def _parts(self, path: Any) -> tuple[str, ...]:
        return Path(path).absolute().relative_to(self.root).parts

    def _node(self, path: Any) -> int:
        node = ROOT
        for part in self._parts(path):
            node = self._names[node, part]
        return node

    def _entry(self, path: Any) -> tuple[int, str]:
        return self._node(Path(path).absolute().parent), Path(path).name

    def _new(self, *, folder: bool = False) -> int:
        self._count += 1
        if folder:
            self._folders.add(self._count)
        return self._count

    def _step(self, *effects: Name | Data | Size | Sync) -> None:
        for effect in effects:
            if isinstance(effect, Name) and effect.node is None:
                self._names.pop(effect[:2], None)
            elif isinstance(effect, Name):
                self._names[effect.folder, effect.name] = effect.node
        self.steps.append(effects)

    def _found(self, folder: int, path: Path) -> Iterator[Name | Data]:
        """What is in a folder when recording begins."""
        for entry in sorted(path.iterdir()):
            node = self._new(folder=entry.is_dir())
            self._names[folder, entry.name] = node
            yield Name(folder, entry.name, node)
            if entry.is_dir():
                yield from self._found(node, entry)
            else:
                yield Data(node, 0, entry.read_bytes())

    # Each of these does a call, and records what it has done.

    def _do_open(self, real: Any, path: Any, flags: int, *args: Any) -> int:
        existed = os.path.lexists(path)
        fd: int = real(path, flags, *args)
        effects: list[Name | Size] = []
        if not existed:
            effects.append(Name(*self._entry(path), self._new()))
        elif flags & os.O_TRUNC:
            effects.append(Size(self._node(path), 0))
        if effects:
            self._step(*effects)
        self._open[fd] = _Open(self._node(path), str(path))
        return fd

    def _do_close(self, real: Any, fd: int) -> None:
        del self._open[fd]  # before somebody else is given the number
        real(fd)

    def _do_write(self, real: Any, fd: int, data: Any) -> int:
        many: int = real(fd, data)
        end = self._real["lseek"](fd, 0, os.SEEK_CUR)
        self._step(Data(self._open[fd].node, end - many, bytes(memoryview(data).cast("B")[:many])))
        return many

    def _do_pwrite(self, real: Any, fd: int, data: Any, offset: int) -> int:
        many: int = real(fd, data, offset)
        self._step(Data(self._open[fd].node, offset, bytes(memoryview(data).cast("B")[:many])))
        return many

    def _do_lseek(self, real: Any, fd: int, *args: Any) -> int:
        return real(fd, *args)  # type: ignore[no-any-return]

    def _do_fsync(self, real: Any, fd: int) -> None:  # this disk needs none
        self._step(Sync(self._open[fd].node))

    def _do_truncate(self, real: Any, path: Any, size: int) -> None:
        real(path, size)
        self._step(Size(self._open[path].node if isinstance(path, int) else self._node(path), size))

    def _do_link(self, real: Any, path: Any, name: Any) -> None:
        real(path, name)
        self._step(Name(*self._entry(name), self._node(path)))

    def _do_replace(self, real: Any, path: Any, name: Any) -> None:
        real(path, name)
        self._step(Name(*self._entry(name), self._node(path)), Name(*self._entry(path), None))

    def _do_unlink(self, real: Any, path: Any) -> None:
        real(path)
        self._step(Name(*self._entry(path), None))

    def _do_mkdir(self, real: Any, path: Any, *args: Any) -> None:
        real(path, *args)
        self._step(Name(*self._entry(path), self._new(folder=True)))

    # --- What is left ----------------------------------------------------------------------

    def disk(self, cut: int, choice: Choice, into: Path) -> Path:
        """Make, in a folder that is new, what may be found if the power goes after so many steps."""
        draw = None if choice.seed is None else random.Random(choice.seed)  # noqa: S311  # not for secrets
        names = self._kept_names(cut, choice, draw)
        files = self._kept_files(cut, choice, draw)
        self._make(ROOT, into, names, files)
        return into

    def killed(self, cut: int, into: Path) -> Journal:
        """Make what is there after a ``kill -9``; what was not certain before is not certain then."""
        self.disk(cut, Choice(names=True, sizes=True, data=True), into)
        killed = Journal.__new__(Journal)
        killed.__dict__.update(self.__dict__, root=into, steps=[], calls=[], _names={}, _open={})
        killed._folders = {*self._folders}
        for step in self.steps[:cut]:
            killed._step(*step)
        killed.begin = cut
        return killed

    def _kept_names(
        self, cut: int, choice: Choice, draw: random.Random | None
    ) -> dict[int, dict[str, int]]:
        steps = self.steps[:cut]
        certain: dict[int, int] = {}  # for each folder, the steps before this one
        for at, step in enumerate(steps):
            certain.update({effect.node: at for effect in step if isinstance(effect, Sync)})
        share = 0.0 if draw is None else draw.choice([0.1, 0.5, 0.9])
        found: dict[int, dict[str, int]] = defaultdict(dict)
        for at, step in enumerate(steps):
            names = [effect for effect in step if isinstance(effect, Name)]
            covered = {name.folder for name in names if at < certain.get(name.folder, -1)}
            # Where it is certain that an old name has gone, the new one is certain, too.
            whole = any(name.folder in covered and name.node is None for name in names)
            kept = choice.names if draw is None else draw.random() < share
            for folder, name, node in names:
                if not (kept or whole or folder in covered):
                    continue
                if node is None:
                    found[folder].pop(name, None)
                else:
                    found[folder][name] = node
        return found

    def _kept_files(self, cut: int, choice: Choice, draw: random.Random | None) -> dict[int, bytes]:
        files: dict[int, _File] = defaultdict(_File)
        for step in self.steps[:cut]:
            for effect in step:
                if isinstance(effect, Data):
                    files[effect.node].write(effect.offset, effect.data)
                elif isinstance(effect, Size):
                    files[effect.node].resize(effect.size)
                elif isinstance(effect, Sync):
                    files[effect.node].sync()
        return {node: file.left(choice, draw) for node, file in sorted(files.items())}

    def _make(
        self, node: int, path: Path, names: dict[int, dict[str, int]], files: dict[int, bytes]
    ) -> None:
        path.mkdir()
        for name, child in names[node].items():
            if child in self._folders:
                self._make(child, path / name, names, files)
            else:
                (path / name).write_bytes(files.get(child, b""))


#: The calls that are recorded. One that is missing shows when the disk that nothing is missing of is compared with the folder.
_CALLS: Final[dict[str, Callable[..., Any]]] = {
    "open": Journal._do_open,
    "close": Journal._do_close,
    "write": Journal._do_write,
    "pwrite": Journal._do_pwrite,
    "lseek": Journal._do_lseek,
    "fsync": Journal._do_fsync,
    "fdatasync": Journal._do_fsync,
    "truncate": Journal._do_truncate,
    "ftruncate": Journal._do_truncate,
    "link": Journal._do_link,
    "rename": Journal._do_replace,
    "replace": Journal._do_replace,
    "unlink": Journal._do_unlink,
    "remove": Journal._do_unlink,
    "mkdir": Journal._do_mkdir,
    "rmdir": Journal._do_unlink,
}


@dataclass
class _File:
    """The data of a file: what is certain, and what it had since."""

    versions: list[bytes] = field(default_factory=lambda: [b""])  # the first of them is certain

    def write(self, offset: int, data: bytes) -> None:
        now = self.versions[-1].ljust(offset, b"\0")
        self.versions.append(now[:offset] + data + now[offset + len(data) :])

    def resize(self, size: int) -> None:
        self.versions.append(self.versions[-1][:size].ljust(size, b"\0"))

    def sync(self) -> None:
        del self.versions[:-1]

    def left(self, choice: Choice, draw: random.Random | None) -> bytes:
        """What a power loss leaves of it."""
        first, last = self.versions[0], self.versions[-1]
        if len(self.versions) == 1:
            return first
        if draw is None:
            size = len(last if choice.sizes else first)
            return (last if choice.data else first)[:size].ljust(size, b"\0")
        size = len(draw.choice(self.versions))
        if draw.random() < 0.3:
            size = draw.randint(min(map(len, self.versions)), max(map(len, self.versions)))
        blocks = []
        for begin in range(0, size, BLOCK):
            end = min(begin + BLOCK, size)
            had = [version[begin:end] for version in self.versions]
            if len(first) < end:
                had += [b"", draw.randbytes(BLOCK)]
            blocks.append(draw.choice(had)[: end - begin].ljust(end - begin, b"\0"))
        return b"".join(blocks)


class _Raw(io.RawIOBase):
    """A file that :func:`open` opens for writing, by way of the functions of :mod:`os`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._fd, data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: the data of files, and ``None`` for folders."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
