"""The code of the how-to pages that only the ``recipes`` session runs: it stands there, and nowhere else."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any
from unittest import mock

import actrec

HOW_TO = Path(__file__).parents[2] / "docs/how-to"
BLOCK = re.compile("^```(\\w+)\\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, heading: str | None, language: str = "python") -> list[str]:
    """The blocks of code in a section of a page, or above the first section, on the lines where they stand."""
    text = (HOW_TO / page).read_text()
    start = text.index(f"\n## {heading}\n") + 1 if heading else 0
    end = text.find("\n## ", start)
    found = BLOCK.finditer(text, start, end if end > 0 else len(text))
    return ["\n" * text.count("\n", 0, b.start(2)) + b[2] for b in found if b[1] == language]


def run(page: str, code: list[str], folder: Path, **of_actrec: Any) -> dict[str, Any]:
    """Run blocks in a folder, one after the other, with something else for what they import from actrec."""
    names: dict[str, Any] = {"__name__": "recipe"}
    with contextlib.chdir(folder), mock.patch.dict(vars(actrec), of_actrec):
        for block in code:
            # Empty lines in front: a traceback shows the line of the page.
            exec(compile(block, HOW_TO / page, "exec", dont_inherit=True), names)  # noqa: S102
    return names
