"""``acts.report()``: one page about a recording.

The recording is read three times, call by call: for its statistics, for their drift over the passes, and for the
similarity of layers. Only results are kept in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from actrec._progress import showing
from actrec._recordings.course import course, spread
from actrec._recordings.layer import Layer
from actrec._recordings.recording import Recording
from actrec._recordings.similarity import FEWEST, similarity
from actrec._recordings.stats import Row, Stats, stats
from actrec._tables.html import as_html
from actrec._tables.markup import Html, tag, together
from actrec._text import count, own_version, shown

from .charts import STYLE as CHARTS
from .charts import Box, Line, boxes, heat, key, lines
from .file import MARK, checked, write
from .notes import notes

#: At most so many layers, evenly spread, are drawn as lines, or as rows and columns.
_LAYERS: Final = 60
#: At most so many tensors are drawn as rows.
_ROWS: Final = 200
#: At most so many calls of a layer are points of its line.
_POINTS: Final = 128
#: So many samples are compared.
_SAMPLES: Final = 128
_PERCENTILES: Final = (0.01, 0.25, 0.5, 0.75, 0.99)


def report(acts: Recording[Any], path: str | os.PathLike[str], *, progress: bool = False) -> None:
    """Write an HTML page about a recording. See :meth:`actrec.Recording.report`."""
    place = checked(path)
    acts._run.deliver()
    write(place, _page(acts, progress=progress))


def _page(acts: Recording[Any], *, progress: bool) -> str:
    layers = [acts[name] for name in acts._in_order()]
    kept = [layer for layer in layers if layer._is_kept]
    found = stats(kept, progress=progress)
    left_out = [layer for layer in layers if not layer._is_kept]
    drawn = [layer for layer in kept if len(layer)]
    sections = {
        "To know": _list(notes(acts, found, left_out)),
        "Layers": as_html(acts._table()),
        "Values": as_html(found._table()),
        **_beside(acts, progress=progress),
        "Distributions": _distributions(found),
        "Drift": _drift(drawn, progress=progress),
        "Similarity": _similarity(acts, drawn, progress=progress),
        "Load it": _loading(acts, drawn),
    }
    first = found._verdict()
    verdict = getattr(first, "html", tag("span", "no NaN, no infinity", class_="good"))
    title = acts._title()
    made = f"made by actrec {own_version()}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    where = [" from ", tag("code", acts._run.where)] if acts._run.where else []
    links = (tag("a", name, href=f"#{_anchor(name)}") for name in sections)
    body = (
        tag("section", tag("h2", name), html, id=_anchor(name)) for name, html in sections.items()
    )
    page = (
        Html(MARK),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_STYLE + CHARTS)),
        tag(
            "main",
            tag("h1", title),
            tag("p", verdict),
            tag("p", made, *where),
            tag("nav", *links),
            *body,
        ),
    )
    return together(*page, "\n")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _list(sentences: Iterator[str]) -> Html:
    items = [tag("li", sentence) for sentence in sentences]
    if not items:
        return tag("p", "Nothing was warned of, and nothing is missing.")
    return tag("ul", *items)


def _beside(acts: Recording[Any], *, progress: bool) -> dict[str, Html]:
    """Return the statistics of inputs and of gradients, if they were recorded."""
    found = {}
    for part in acts._beside.values():
        kept = [part[name] for name in part._in_order() if part[name]._is_kept]
        found[part._role.capitalize()] = as_html(stats(kept, progress=progress)._table())
    return found


# --- Charts --------------------------------------------------------------------------------------------


def _distributions(found: Stats) -> Html:
    rows = [row for row in found if row.histogram.counts]
    if not rows:
        return tag("p", "No layer has a finite value.")
    some = [rows[at] for at in spread(len(rows), _ROWS)]
    about = "A thin line from the 1st to the 99th percentile, a thick one over the middle half, a dot at the median."
    told = tag("p", about, _some(len(some), len(rows), "tensor"))
    return together(told, boxes([*map(_box, some)]))


def _box(row: Row) -> Box:
    low, lower, median, upper, high = (
        min(max(row.histogram.quantile(share), row.min), row.max) for share in _PERCENTILES
    )
    return Box(shown(row.layer) + row.leaf, (low, lower, median, upper, high))


def _drift(layers: Sequence[Layer[Any]], *, progress: bool) -> Html:
    moving = [layer for layer in layers if len({*layer.passes}) > 1]
    if not moving:
        return tag("p", "No layer has calls in two passes, so there is no course to draw.")
    some = [moving[at] for at in spread(len(moving), _LAYERS)]
    with showing("drift", sum(min(len(one), _POINTS) for one in some), progress=progress) as each:
        points = [(shown(layer.name), course(layer, each, _POINTS)) for layer in some]
    most = max(map(len, some))
    calls = f" Of up to {most:,} calls of each layer {_POINTS} are drawn." if most > _POINTS else ""
    charts = (
        lines(
            what, [Line(name, [(one.number, one[at]) for one in course]) for name, course in points]
        )
        for at, what in enumerate(("mean", "standard deviation", "share of zeros"), 1)
    )
    about = tag("p", f"Each point is one call.{calls}", _some(len(some), len(moving), "layer"))
    return together(about, *charts, key([name for name, _ in points]))


def _similarity(acts: Recording[Any], layers: Sequence[Layer[Any]], *, progress: bool) -> Html:
    some = [layers[at].name for at in spread(len(layers), _LAYERS)]
    with showing("similarity", 2 * len(some), progress=progress) as each:
        found = similarity(acts, some, _SAMPLES, each)
    if not found.matrix:
        why = (
            f"Not drawn: it needs {FEWEST} samples or more that layers have in common, and there are {found.samples}. Of fewer it "
            "is large whatever the layers do."
        )
        return tag("p", why)
    alike = _some(len(found.names), len(layers), "layer")
    about = (
        f"Linear CKA of {count(found.samples, 'sample')}: 1 where layers represent them in the same way, up to rotation and scale; "
        "nothing where a layer has NaN, or the same for all of them."
    )
    return together(tag("p", about, alike), heat([*map(shown, found.names)], found.matrix))


def _some(many: int, total: int, noun: str) -> str:
    """Say what a chart leaves out, if anything."""
    return f" It shows {many:,} of {count(total, noun)}." if many < total else ""


# --- Loading -------------------------------------------------------------------------------------------


def _loading(acts: Recording[Any], layers: Sequence[Layer[Any]]) -> Html:
    """Return code that opens the recording."""
    name = layers[0].name if layers else next(iter(acts), "name")
    lines = ["import actrec", ""]
    where = acts._run.where or "run"
    lines += ['acts.save("run")  # this recording was in memory'] * (not acts._run.where)
    lines += [
        f"acts = actrec.load({where!r})",
        f"acts[{name!r}][0]      # what the first call returned",
        f"acts[{name!r}].cat()   # all calls, joined along the batch",
        "acts.stats()",
    ]
    return tag("pre", "\n".join(lines))


_STYLE: Final = """
:root { color-scheme: light dark; --back: #fff; --fore: #1b1b1b; --line: #8888; --soft: #8881; --blue: rgb(47, 111, 176); --good: #1a7a46; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --fore: #e8e8e8; --blue: #6aa7e0; } }
body { margin: 0; background: var(--back); color: var(--fore); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 12px 16px 48px; }
h1 { font-size: 22px; overflow-wrap: anywhere; margin: 8px 0; } h2 { font-size: 18px; margin: 32px 0 8px; }
h3 { font-size: 14px; margin: 14px 0 0; } p { margin: 6px 0; overflow-wrap: anywhere; }
main > p > span { font-weight: 600; padding: 1px 7px; border-radius: 3px; color: #fff; background: #b83226; }
main > p > span.good { background: var(--good); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; } a { color: var(--blue); }
li { white-space: pre-line; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: 10px 12px; overflow-x: auto; font-size: 13px; }
code { overflow-wrap: anywhere; }
"""
