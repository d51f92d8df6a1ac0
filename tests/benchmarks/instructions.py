"""Instructions and bytecodes of a recorded call, which repeat to a percent on a busy machine, where times scatter.

``nox -s bench -- instructions`` runs this file under ``valgrind --tool=callgrind`` and writes what it counts to
``instructions.txt`` beside it, so that a change that makes a call dearer is seen in review. Where there is no
valgrind, or another processor than x86-64, bytecodes alone are counted.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from actrec import record

from .timing import Row
from .usual import clone_hook, no_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: At most: instructions over those that a hook with detach().clone() adds, and bytecodes themselves.
TARGETS = {
    "instructions": {"a call": 1.2, "a model that is one layer": 1.6},
    "bytecodes": {"a call": 400, "a pass": 480},
}
FILE = Path(__file__).with_suffix(".txt")
LAYERS = 8
HOOKS: dict[str, Any] = {"no hook": no_hook, "clone hook": clone_hook, "actrec": record}
MORE: dict[str, dict[str, Any]] = {
    "transform": {"transform": torch.mean},
    "inputs": {"inputs": True},
    "grads": {"grads": True},
}
REPEATS = 10


def measure(*, quick: bool) -> Iterator[Row]:
    # The client request below is made of machine code.
    can = shutil.which("valgrind") and platform.machine() == "x86_64"
    kinds = {"bytecodes": _bytecodes()}
    if can and not quick:
        kinds["instructions"] = _instructions()
        lines = [f"{kind}: {name}: {n}" for kind, c in kinds.items() for name, n in c.items()]
        FILE.write_text("\n".join([f"torch {torch.__version__}", *lines, ""]))
    for kind, counts in kinds.items():
        yield from _rows(kind, counts)


def _rows(kind: str, counts: dict[str, int]) -> Iterator[Row]:
    added = {}
    for hook in ("clone hook", "actrec"):
        one = counts[f"one layer, {hook}"] - counts["one layer, no hook"]
        eight = counts[f"eight layers, {hook}"] - counts["eight layers, no hook"]
        call = (eight - one) / (LAYERS - 1)
        added[hook] = {"a call": call, "a pass": one - call, "a model that is one layer": one}
    for what, target in TARGETS[kind].items():
        name = f"{kind}: added by {what}"
        if kind == "instructions":
            ratio = added["actrec"][what] / added["clone hook"][what]
            yield Row.of(f"{name}, actrec / clone hook", [ratio], target)
        else:
            yield Row.of(name, [added["actrec"][what]], target, unit="")
    for name, count in counts.items():
        yield Row.of(f"{kind}: {name}", [count], unit="")


# --- What is counted -----------------------------------------------------------------------------------


def _counted(count: Callable[[Callable[[], object]], None]) -> Iterator[str]:
    """Let ``count`` count each piece of work, and yield its name."""
    x = torch.ones(2, 4)
    eight = nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))
    models = {"one layer": nn.Linear(4, 4), "eight layers": eight}
    for name, model in models.items():
        for hook, hooked in HOOKS.items():
            with torch.no_grad(), hooked(model):
                count(partial(model, x))
            yield f"{name}, {hook}"
    for name, options in MORE.items():
        with torch.set_grad_enabled(name == "grads"), record(eight, **options):
            count(partial(eight, x))
        yield f"eight layers, actrec, {name}"
    # Nothing is written while it is counted: that is another thread.
    with TemporaryDirectory() as folder, torch.no_grad(), record(eight, into=Path(folder, "run")):
        count(partial(eight, x))
    yield "eight layers, actrec, to a path"
    adds = nn.Sequential(_Adds())
    of_functions: dict[str, Any] = {
        "no mode": no_hook,
        "an empty mode": lambda _: _Empty(),
        "actrec, the last": partial(record, layers="0:relu"),
        "actrec, all": partial(record, layers="0:*"),
        "actrec, all, inputs": partial(record, layers="0:*", inputs=True),
    }
    for name, mode in of_functions.items():
        with torch.no_grad(), mode(adds):
            count(partial(adds, x))
        yield f"nine functions, {name}"
    with torch.no_grad():
        count(partial(_block, eight, x))
    yield "eight layers, actrec, one forward with entering and leaving"


class _Adds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            x = x + 1
        return x.relu()


class _Empty(TorchFunctionMode):
    """The least that a mode can cost."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs) if kwargs else func(*args)


def _block(model: nn.Module, x: torch.Tensor) -> None:
    with record(model):
        model(x)


# --- Bytecodes -----------------------------------------------------------------------------------------


def _bytecodes() -> dict[str, int]:
    executed: list[int] = []

    def trace(frame: Any, event: str, _: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        executed[-1] += event == "opcode"
        return trace

    def count(work: Callable[[], object]) -> None:
        work()
        executed.append(0)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(before)

    names = list(_counted(count))
    return dict(zip(names, executed, strict=True))


# --- Instructions ----------------------------------------------------------------------------------------

_START = 0x43540004  # of callgrind's requests (callgrind.h): until then it counts nothing, and torch loads faster
_REQUEST = (
    "4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3"  # as valgrind.h makes one
)


def _start_counting() -> None:
    with mmap.mmap(
        -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ) as page:
        page.write(bytes.fromhex(_REQUEST))
        code = ctypes.c_char.from_buffer(page)
        arguments = (ctypes.c_uint64 * 6)(_START)
        ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(ctypes.addressof(code))(
            ctypes.addressof(arguments)
        )
        del code


def _instructions() -> dict[str, int]:
    """Run this file under callgrind, which writes a profile at each call of ``getppid()``, of what came before."""
    with TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-before=getppid"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, "-m", __name__]
        once = {
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        ran = subprocess.run(
            command, env=os.environ | once, capture_output=True, text=True, check=True
        )
        profiles = [Path(folder, f"out.{2 * at + 2}") for at in range(len(ran.stdout.splitlines()))]
        totals = [
            int(line.split()[1])
            for profile in profiles
            for line in profile.read_text().splitlines()
            if line.startswith("totals:")
        ]
        return dict(zip(ran.stdout.splitlines(), [n // REPEATS for n in totals], strict=True))


def _repeat(work: Callable[[], object]) -> None:
    for _ in range(REPEATS):  # until Python has specialized the bytecode
        work()
    os.getppid()
    for _ in range(REPEATS):
        work()
    os.getppid()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # under valgrind, long doubles are not what NumPy expects
    torch.set_num_threads(1)
    gc.disable()
    _start_counting()
    for done in _counted(_repeat):
        print(done)
