"""What recording into a path adds to the memory of a process: ``python -m tests.memory --gib 20``.

Two processes run the same model on the same batches, one of them recorded. Their peaks are compared: the most memory
that each has ever had (``VmHWM``; the kernel's ``ru_maxrss`` would count the parent's). The model makes new tensors all the time, faster than any disk takes them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYERS = 12
MIB = 2**20

CHILD = """
import contextlib, json, sys
import torch
from torch import nn
from actrec import record
from actrec.store import Folder

path, passes, layers, budget = json.loads(sys.argv[1])
torch.set_num_threads(1)
model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Tanhshrink(), nn.Hardtanh(inplace=True))))
into = path and Folder(path, budget=budget)
block = record(model, nn.Tanhshrink, into=into) if path else contextlib.nullcontext()
with torch.no_grad(), block:
    for _ in range(passes):
        model(torch.full((1024, 1024), 2.0))  # 4 MiB for each layer, overwritten by the next
lines = open("/proc/self/status").read().splitlines()
print(*(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def peak(path: Path | None, passes: int, budget: int) -> int:
    """The peak of a process in bytes."""
    arguments = json.dumps([path and str(path), passes, LAYERS, budget])
    child: Any = [sys.executable, "-c", CHILD, arguments]
    return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)


def measure(folder: Path, gib: float, budget: int) -> tuple[int, int, int]:
    """Bytes that were stored, the peak of the recorded process, and of the other."""
    passes = round(gib * 1024 / 4 / LAYERS)
    recorded = peak(folder / "r", passes, budget)
    stored = sum(file.stat().st_size for file in (folder / "r").rglob("*"))
    return stored, recorded, peak(None, min(passes, 20), budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=20, help="how much to record")
    parser.add_argument("--budget", type=int, default=1024, help="in MiB; 1024 is the default")
    parser.add_argument("--folder", help="where to write; what was written is deleted")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        stored, recorded, bare = measure(folder, options.gib, options.budget * MIB)
    finally:
        shutil.rmtree(folder)
    for what, size in (
        ("recorded to the disk", stored),
        ("budget", options.budget * MIB),
        ("peak of memory, recorded", recorded),
        ("peak of memory, not recorded", bare),
        ("difference", recorded - bare),
    ):
        print(f"{what:30} {size / MIB:10,.0f} MiB")  # noqa: T201  # it is a script


if __name__ == "__main__":
    main()
