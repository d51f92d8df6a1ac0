"""The pages about speed, made of what was measured: ten rows, a chart of them, and the log of all rows.

``python tests/benchmarks/run.py NAME --keep`` measures, keeps the rows in ``measured.json`` beside this file, and writes the
pages anew. ``python -m tests.benchmarks.page`` writes them of what was kept before.
"""

from __future__ import annotations

import json
import os
from dataclasses import astuple
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import machine, table
from .timing import Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MEASURED = Path(__file__).with_name("measured.json")
DOCS = Path(__file__).parents[2] / "docs"

#: The ten rows: what a reader wants to know, the benchmark and the row that say it (a wildcard), and what 1 stands for. They
#: were chosen before they were measured, and stay the same whatever comes of it.
SHOWN = (
    ("a transformer, every layer kept", "networks", "forward: kept / unrecorded, GPT shape, 12 layers of 512, 4x256, no_grad", "without recording"),
    ("the same, every layer pooled", "networks", "forward: pooled / unrecorded, GPT shape, 12 layers of 512, 4x256, no_grad", "without recording"),
    ("a ResNet-50, every layer kept", "networks", "forward: kept / unrecorded, ResNet-50 shape, nothing in place, 32x3x64x64, no_grad", "without recording"),
    ("the same", "networks", "forward: kept / clone hook, ResNet-50 shape, nothing in place, 32x3x64x64, no_grad", "hooks that clone"),
    ("the same, every layer pooled", "networks", "forward: pooled / unrecorded, ResNet-50 shape, nothing in place, 32x3x64x64, no_grad", "without recording"),
    ("50 tiny layers", "networks", "forward: kept / clone hook, 50 linear layers with ReLUs, 8x16, no_grad", "hooks that clone"),
    ("a step of training, values and gradients pooled", "gradients", "training step, ResNet shape, every block: values and gradients, pooled / unrecorded", "without recording"),
    ("a forward that stops after a quarter", "stopping", "stop_early after 12 of 48 blocks / the whole forward", "the whole forward"),
    ("recording to the disk", "storing", "writing 3 GiB in values of 4,096 KiB: actrec / os.write", "os.write and fsync"),
    ("stats() of a stored recording", "reading", "stats() of a stored recording of * / reading its files once", "reading its files once"),
)  # fmt: skip

Kept = dict[str, Any]  # by benchmark: the machine, the day, and the rows as lists


def keep(name: str, rows: Iterable[Row]) -> None:
    """Keep the rows of a benchmark in place of those that it had, and write the pages."""
    kept = load() if MEASURED.exists() else {}
    day = datetime.now(UTC).date().isoformat()
    load_average = round(os.getloadavg()[0], 1)
    rows = [astuple(row) for row in rows]
    kept[name] = {"machine": machine(), "day": day, "load": load_average, "rows": rows}
    MEASURED.write_text(json.dumps(kept, indent=1) + "\n")
    write(kept)


def load() -> Kept:
    return json.loads(MEASURED.read_text())


def write(kept: Mapping[str, Any]) -> None:
    for path, text in pages(kept).items():
        path.write_text(text)


def pages(kept: Mapping[str, Any]) -> dict[Path, str]:
    """Return the text of each page that is made of what was measured."""
    shown = list(_shown(kept))
    return {
        DOCS / "benchmarks.md": _ten(shown, kept),
        DOCS / "_static" / "speed.svg": chart([(_bar(*each), each[1]) for each in shown]),
        DOCS / "why" / "log.md": _log(kept),
    }


def rows_of(kept: Mapping[str, Any], name: str) -> list[Row]:
    return [Row(*row) for row in kept[name]["rows"]]


def _shown(kept: Mapping[str, Any]) -> Iterator[tuple[str, Row, str]]:
    for says, name, wanted, one in SHOWN:
        (row,) = (row for row in rows_of(kept, name) if fnmatchcase(row.name, wanted))
        yield says, row, one


def _bar(says: str, _: Row, one: str) -> str:
    """Say what a bar is: over what, unless it is the work alone."""
    return says if one == "without recording" else f"{says} / {one}"


def _ten(shown: Iterable[tuple[str, Row, str]], kept: Mapping[str, Any]) -> str:
    lines = ["| what | takes | times as long as | target |", "| --- | ---: | --- | --- |"]
    for says, row, one in shown:
        met = {
            None: "",
            True: f"{row.target} or less: met",
            False: f"{row.target} or less: not met",
        }
        lines.append(f"| {says} | **{row.median:.2f}** | {one} | {met[row.met]} |")
    names = {name for _, name, *_ in SHOWN}
    machines = sorted({_where({**kept[name], "load": None}) for name in names})
    loads = sorted({kept[name]["load"] for name in names if kept[name].get("load")})
    under = f", under a load average of up to {loads[-1]:g}" if loads else ""
    return "\n".join([*lines, "", f"Measured on {'; on '.join(machines)}{under}.", ""])


def _log(kept: Mapping[str, Any]) -> str:
    names = sorted(kept, key=lambda name: name == "peers")  # other libraries last
    aimed = [row for name in names for row in rows_of(kept, name) if row.target is not None]
    missed = [row for row in aimed if not row.met]
    lines = [
        "# Every benchmark",
        "",
        "All rows of all benchmarks, as they were measured last; this page is written by `nox -s bench -- --keep`.",
        "A ratio below 1 means that actrec took less. The quartiles and the load average say how far to trust a row: the machine is a virtual one, and others",
        "used it too; a load beyond its two cores makes memory dearer, and with it what keeps much of it.",
        "[The short version](speed.md) has ten of them.",
        "",
        "## Targets",
        "",
        f"Of {len(aimed)} rows with a target, {len(aimed) - len(missed)} meet it. These do not; [why](speed.md#what-is-not-reached-and-why):",
        "",
        *table(missed),
        "",
    ]
    for name in names:
        one = kept[name]
        script = "peers.py" if name == "peers" else f"run.py {name}"
        where = f"`python tests/benchmarks/{script}` on {_where(one)}"
        lines += [f"## {name}", "", where, "", *table(rows_of(kept, name)), ""]
    return "\n".join(lines)


def _where(one: Mapping[str, Any]) -> str:
    load_average = f", load average {one['load']:g}" if one.get("load") else ""
    return f"{one['machine']}, {one['day']}{load_average}"


# --- The chart ---------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, STEP = 460, 4, 50, 40
MOST = 1.6  # where the axis ends
STYLE = (
    f"width:100%;max-width:{WIDTH}px;height:auto;font:13px sans-serif;"
    "color:var(--color-foreground-primary,#777)"
)


def chart(shown: Iterable[tuple[str, Row]]) -> str:
    """Return bars of the medians with lines from quartile to quartile, as SVG in the colours of the page around it.

    What a bar is of stands above it, so that the chart is as narrow as a telephone.
    """
    shown = list(shown)
    bottom = STEP * len(shown) + 4

    def x(value: float) -> float:
        return round(LEFT + min(value, MOST) / MOST * (WIDTH - LEFT - RIGHT), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 22}" role="img" style="{STYLE}">',
        "<title>What recording takes, as a multiple of the work that it is compared with</title>",
    ]
    for at, (says, row) in enumerate(shown):
        y, end = STEP * at, max(x(row.median), x(row.high))
        if end < x(1) < end + RIGHT:  # the number would stand on the mark
            end = x(1)
        parts += [
            f'<text x="{LEFT}" y="{y + 14}" fill="currentColor">{escape(says)}</text>',
            f'<rect x="{LEFT}" y="{y + 19}" width="{round(x(row.median) - LEFT, 1)}" height="14" rx="2" fill="#2a7fba"/>',
            f'<path d="M{x(1)} {y + 17}v18" stroke="currentColor" stroke-dasharray="3 2"/>',
            f'<path d="M{x(row.low)} {y + 26}H{x(row.high)}" stroke="currentColor" stroke-width="1.5"/>',
            f'<text x="{end + 6}" y="{y + 31}" fill="currentColor">{row.median:.2f}</text>',
        ]
    parts += [
        f'<text x="{x(1)}" y="{bottom + 16}" text-anchor="middle" fill="currentColor">1</text>',
        "</svg>",
    ]
    return "\n".join([*parts, ""])


if __name__ == "__main__":
    write(load())
