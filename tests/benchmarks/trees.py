"""Rows and loaders of this tree and of another one, in turn: ``python tests/benchmarks/trees.py OTHER_TREE [WORDS]``.

Each tree has a process of its own, which imports its actrec and makes the same recordings. Both are asked in turn, and every
round gives a ratio of processor times. ``where`` is compared with fetching the same rows, in this tree alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import quantiles
from time import process_time

if not __package__:  # the folder of this file has names that PyTorch imports
    sys.path.pop(0)

import torch

ROUNDS = 15


def work(folder: str) -> dict:
    """The pieces of work, each with how often it is done at a time."""
    from actrec import load, record  # of the tree that is measured
    from actrec.data import rows, shuffled

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Identity()
    tokens = torch.randn(64, 8, 64, 96)
    recordings = {}
    for name, batches, into in (
        ("in memory", tokens, list),
        ("on disk", tokens, f"{folder}/run"),
        ("of 2,000 calls", tokens.view(2048, 16, 96)[:2000], f"{folder}/calls"),
    ):
        with torch.no_grad(), record(model, "", into=into) as acts:
            for number, batch in enumerate(batches):
                model(batch)
                acts.add("mask", torch.ones(batch.shape[:-1], dtype=torch.bool))
                acts.add("label", torch.full(batch.shape[:1], number))
        recordings[name] = load(into) if isinstance(into, str) else acts
    pieces = {}
    for name, acts in recordings.items():
        flatten = {"flatten": name != "of 2,000 calls"}
        mask = {"mask": "mask"} if flatten["flatten"] else {}
        dataset = rows(acts, "", "label", **flatten, **mask)
        some = torch.randperm(len(dataset))[:1000]
        pieces |= {
            f"opening rows {name}": (5, lambda a=acts, f=flatten: rows(a, "", "label", **f)),
            f"opening shuffled {name}": (
                5,
                lambda a=acts, f=flatten: shuffled(a, "", "label", batch_size=256, **f),
            ),
            f"an epoch of shuffled {name}": (
                1,
                lambda a=acts, f={**flatten, **mask}: sum(
                    1 for _ in shuffled(a, "", "label", batch_size=256, **f)
                ),
            ),
            f"1,000 rows at random {name}": (5, lambda d=dataset, s=some: d[s]),
            f"256 rows at random {name}": (20, lambda d=dataset, s=some[:256]: d[s]),
        }
        if hasattr(dataset, "where"):
            pieces[f"where of 1,000 rows {name}"] = (5, lambda d=dataset, s=some: d.where(s))
            pieces[f"where of one row {name}"] = (200, lambda d=dataset: d.where(7))
            pieces[f"one row {name}"] = (200, lambda d=dataset: d[7])
    return pieces


def serve() -> None:
    """Do a piece of work for each line that comes, and say how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        pieces = work(folder)
        print("|".join(pieces), flush=True)
        for line in sys.stdin:
            many, piece = pieces[line.strip()]
            start = process_time()
            for _ in range(many):
                piece()
            print((process_time() - start) / many, flush=True)


class Tree:
    """A process with the actrec of a tree."""

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            cwd=tempfile.gettempdir(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pieces = self._answer().split("|")

    def seconds(self, piece: str) -> float:
        assert self.process.stdin is not None
        print(piece, file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def main(other: str, words: str = "") -> None:
    here, there = Tree(Path(__file__).parents[2]), Tree(Path(other).absolute())
    for piece in here.pieces:
        if piece not in there.pieces or words not in piece:
            continue
        here.seconds(piece), there.seconds(piece)
        show(f"{piece}: this tree / the other", piece, (here, piece), (there, piece))
    for piece in here.pieces:
        if piece.startswith("where of ") and words in piece:
            lookup = piece.replace("where of ", "").replace("rows ", "rows at random ")
            show(f"{piece} / fetching", piece, (here, piece), (here, lookup))
    for tree in (here, there):
        tree.process.terminate()


def show(what: str, piece: str, one: tuple[Tree, str], other: tuple[Tree, str]) -> None:
    times = []
    for number in range(ROUNDS):
        order = [one, other] if number % 2 else [other, one]
        took = {id(each): each[0].seconds(each[1]) for each in order}
        times.append((took[id(one)], took[id(other)]))
    low, median, high = quantiles([a / b for a, b in times], method="inclusive")
    seconds = quantiles([a for a, _ in times], method="inclusive")[1]
    print(f"{median:6.2f}  ({low:.2f} to {high:.2f})  {seconds * 1e3:8.3f} ms  {what}")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main(*sys.argv[1:])
