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
        if options.command == "show":
            print(load(options.path), flush=True)  # noqa: T201
            return 0
        problems = verify(options.path)
        if not problems:
            print(f"{options.path}: no problems found", flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader has stopped, such as "| head"
        # Otherwise the rest would be written at exit, and fail again.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return 0
    except (ActrecError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":  # pragma: no cover  # in a process of its own
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr does: names can have any characters
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
