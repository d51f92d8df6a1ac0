"""Make ``docs/tutorial.ipynb`` of ``docs/tutorial.md``: ``python docs/examples/notebook.py``.

A cell of code becomes a cell of code, and the text between becomes Markdown. Links to other pages become their titles,
because a notebook that was downloaded has no pages beside it. Outputs are left out: who runs the notebook makes their own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.ipynb"

CELL = re.compile(
    r"^```\{code-cell\} ipython3\n(?:---\n.*?^---\n)?(.*?)^```$\n?", re.DOTALL | re.MULTILINE
)
ROLE = re.compile(r"\{download\}`([^<`]+?) <[^>]+>`")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://)[^)]+\)")


def notebook(page: str) -> str:
    """Return a page of MyST as the text of a notebook."""
    _, body = page.split("\n---\n", 1)
    cells = []
    for number, part in enumerate(CELL.split(body)):
        kind = ("markdown", "code")[number % 2]
        source = (
            part.strip() if kind == "code" else LINK.sub(r"\1", ROLE.sub(r"`\1`", part.strip()))
        )
        if source:
            cells.append(_cell(kind, f"cell-{len(cells)}", source))
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    made = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, name: str, source: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": name, "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell | {"source": source.splitlines(keepends=True)}


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(PAGE.read_text()))
