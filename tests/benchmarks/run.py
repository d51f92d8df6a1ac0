"""Measure what recording costs, and print the table: ``python tests/benchmarks/run.py [NAME ...]``.

Every number is a ratio of times that were taken in turn, with garbage collection off; only entry and exit
has microseconds too, and reading a recording megabytes, because their targets have. PyTorch gets one thread
(``torch.set_num_threads(1)``): with more, the threads' waiting for each other drowns what a hook costs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file, beside one with a name that PyTorch imports: cuda
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from tests.benchmarks import (
    calls,
    compiled,
    dataset,
    entry,
    functions,
    gradients,
    importing,
    instructions,
    loading,
    looking,
    memory_pages,
    networks,
    opening,
    page,
    ranks,
    reading_statistics,
    report,
    stopping,
    storing,
)

BENCHMARKS = {
    "calls": calls.measure,
    "instructions": instructions.measure,
    "networks": networks.measure,
    "dataset": dataset.measure,
    "functions": functions.measure,
    "compiled": compiled.measure,
    "gradients": gradients.measure,
    "stopping": stopping.measure,
    "memory_pages": memory_pages.measure,
    "entry": entry.measure,
    "import": importing.measure,
    "reading": reading_statistics.measure,
    "storing": storing.measure,
    "opening": opening.measure,
    "ranks": ranks.measure,
    "loading": loading.measure,
    "looking": looking.measure,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure what recording costs, as ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--markdown", action="store_true", help="print as Markdown")
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows, and write the pages about speed anew"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if options.keep and options.quick:
        parser.error("what --quick measures is not to be kept")
    measured = {
        name: _measured(name, quick=options.quick) for name in options.names or list(BENCHMARKS)
    }
    if options.keep:
        for name, found in measured.items():
            page.keep(name, found)
    rows = [row for found in measured.values() for row in found]
    command = " ".join(["python tests/benchmarks/run.py", *arguments])
    show = report.markdown if options.markdown else report.text
    print(show(rows, command))


def _measured(name, *, quick):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        return list(BENCHMARKS[name](quick=quick))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main(sys.argv[1:])
