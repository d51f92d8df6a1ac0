"""The command line: ``actrec show PATH`` and other commands for stored recordings. ``python -m actrec`` is the same.

A path may be the URL of an object store that fsspec can open without further options.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TypeAlias

import actrec

from ._text import own_version

__all__ = ["main", "run"]

#: Lines to print, each with whether it is a problem.
_Lines: TypeAlias = Iterator[tuple[object, bool]]


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status: 1 if there is a problem, which is printed, or two recordings differ."""
    parser = _parser()
    options = parser.parse_args(arguments)
    found_problem = False
    try:
        for line, is_problem in options.run(options):
            found_problem = found_problem or is_problem
            print(line, file=sys.stderr if is_problem else sys.stdout, flush=True)
    except BrokenPipeError:  # the reader has stopped, such as "| head"
        # Otherwise the rest would be written at exit, and fail again.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return 0
    except (actrec.ActrecError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return int(found_problem)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="actrec", description="Look at recordings that actrec has stored.",
        epilog="A PATH is a folder, or the URL of one in an object store.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"actrec {own_version()}")
    parser.set_defaults(run=lambda _: iter([(parser.format_help().rstrip(), False)]))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], _Lines], text: str, *paths: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        for path in paths:
            added.add_argument(path, metavar=path.upper())
        return added

    show = command("show", _show, "print the table of a recording", "path")
    show.add_argument("--stats", action="store_true", help="print statistics of its values, too")
    stats = command(
        "stats", _stats, "print statistics of every layer: histograms, means, NaN", "path"
    )
    differing = "compare two recordings, layer by layer; exit status 1 if they differ"
    compare = command("compare", _compare, differing, "a", "b")
    for name in ("rtol", "atol"):
        compare.add_argument(
            f"--{name}", type=float, help="tolerance, by default that of the dtypes"
        )
    for masked in (stats, compare):
        masked.add_argument(
            "--mask",
            metavar="NAME",
            help="leave out positions where the mask with that name is 0, such as padding",
        )
    command(
        "verify", _verify, "check a recording, its data included, and list every problem", "path"
    )
    report = command("report", _report, "write an HTML page about a recording, with charts", "path")
    report.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the file, by default the name of the recording and .html",
    )
    return parser


def _watched() -> bool:
    """Whether to show progress: stderr is a terminal."""
    return sys.stderr.isatty()


# --- The commands. PyTorch is imported when one of them runs ---------------------------------------------


def _show(options: argparse.Namespace) -> _Lines:
    acts = actrec.load(options.path)
    yield acts, False
    if options.stats:
        yield "", False
        yield acts.stats(progress=_watched()), False


def _stats(options: argparse.Namespace) -> _Lines:
    yield actrec.load(options.path).stats(mask=options.mask, progress=_watched()), False


def _compare(options: argparse.Namespace) -> _Lines:
    found = actrec.compare(
        actrec.load(options.a),
        actrec.load(options.b),
        rtol=options.rtol,
        atol=options.atol,
        mask=options.mask,
        progress=_watched(),
    )
    yield found, False
    if found.different:
        yield f"{options.a} and {options.b} differ", True


def _verify(options: argparse.Namespace) -> _Lines:
    problems = actrec.verify(options.path, progress=_watched())
    for problem in problems:
        yield problem, True
    if not problems:
        yield f"{options.path}: no problems found", False


def _report(options: argparse.Namespace) -> _Lines:
    name = options.output or f"{Path(options.path).expanduser().resolve().name}.html"
    actrec.load(options.path).report(name, progress=_watched())
    yield name, False


def run() -> None:  # pragma: no cover  # in a process of its own
    """Run a command, and end the process."""
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr does: names can have any characters
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":  # pragma: no cover  # in a process of its own
    run()
