"""``python -m actrec show PATH`` prints the table of a stored recording, ``verify PATH`` checks it.

The path may be the URL of an object store, which fsspec has to be able to open without being told more.
"""

from __future__ import annotations

import argparse
import os
import sys
from io import TextIOWrapper
from pathlib import Path

from . import ActrecError, load, verify


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 if there is a problem, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m actrec", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("show", "print the table of a stored recording"),
        ("verify", "check a stored recording, its data included, and list every problem"),
    ):
        commands.add_parser(name, help=text, description=text).add_argument("path")
    options = parser.parse_args(arguments)
    try:
        problems = _show(options.path) if options.command == "show" else _verify(options.path)
    except BrokenPipeError:  # whoever reads has seen enough, as "| head" has
        # Or else what is left would be written at exit, and fail once more.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return 0
    except (ActrecError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)  # noqa: T201
    return 1 if problems else 0


def _show(path: str) -> list[str]:
    print(load(path), flush=True)  # noqa: T201
    return []


def _verify(path: str) -> list[str]:
    problems = verify(path)
    if not problems:
        print(f"{path}: no problems found", flush=True)  # noqa: T201
    return problems


if __name__ == "__main__":  # pragma: no cover  # in a process of its own
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr is: names can have any letters
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
