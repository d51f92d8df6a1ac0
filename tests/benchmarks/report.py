"""The table, for people and for the documentation."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .timing import Row

NUMBERS = ("median", "quartiles", "target")
HEADER = ("what", "median", "quartiles", "target", "met", "exact")


def text(rows: Iterable[Row], command: str) -> str:
    """Return the rows as aligned plain text."""
    cells = _without_empty_columns([HEADER, *map(_cells, rows)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_aligned(row, widths).rstrip() for row in cells]
    return "\n".join([command, machine(), "", *lines])


def markdown(rows: Iterable[Row], command: str) -> str:
    """Return the rows as a Markdown table."""
    return "\n".join([f"`{command}`", "", machine(), "", *table(rows)])


def table(rows: Iterable[Row]) -> list[str]:
    """Return the lines of a Markdown table of the rows."""
    header, *others = _without_empty_columns([HEADER, *map(_cells, rows)])
    rules = ["---:" if name in NUMBERS else "---" for name in header]
    return [f"| {' | '.join(row)} |" for row in (header, rules, *others)]


def machine() -> str:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, 1 thread, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def _without_empty_columns(cells: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Leave out what no row has: targets, or who is exact."""
    columns = [column for column in zip(*cells, strict=True) if any(column[1:])]
    return list(zip(*columns, strict=True))


def _cells(row: Row) -> tuple[str, ...]:
    digits = 3 if row.unit == "x" else 1
    target = "" if row.target is None else f"<= {row.target:g} {row.unit}"
    return (
        row.name,
        f"{row.median:.{digits}f} {row.unit}",
        f"{row.low:.{digits}f} - {row.high:.{digits}f}",
        target,
        {None: "", True: "yes", False: "no"}[row.met],
        row.exact,
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = (
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([name, *numbers])
