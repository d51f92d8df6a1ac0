"""The tutorial as its readers meet it: a notebook that is run, and a page in a browser, light and dark.

Pictures of the page are left in ``tests/browser/pictures``, to be looked at.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jupytext
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from tests.browser.chromium import LOOK, READABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbformat import NotebookNode

    from tests.browser.chromium import Browser

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = Path(__file__).parent / "pictures"
WIDTH = 1024

PROBE = """() => {LOOK
  const cells = row => [...row.querySelectorAll("th, td")].filter(shown);
  const table = element => ({
    title: element.querySelector(".actrec-title").innerText,
    rows: [...element.querySelectorAll("tr")].filter(shown).map(row => cells(row).map(c => c.innerText)),
    contrast: Math.min(...[...element.querySelectorAll("th, td")].map(e => contrast(e))),
    cut: element.scrollWidth > element.clientWidth + 1,
    right: element.getBoundingClientRect().right,
  });
  return {
    width: innerWidth,
    pageWidth: document.documentElement.scrollWidth,
    background: luminance(behind(document.querySelector(".jp-Notebook, main, body"))),
    tables: [...document.querySelectorAll(".actrec-table")].filter(shown).map(table),
    texts: [...document.querySelectorAll(".actrec-text")].filter(shown).length,
    images: [...document.images].map(image => ({
      loaded: image.complete && image.naturalWidth > 0,
      described: image.alt,
      right: image.getBoundingClientRect().right,
    })),
    scripts: document.querySelectorAll(".actrec script").length,
    nameless: [...document.links].filter(link => !link.textContent.trim()).map(link => link.href),
  };
}""".replace("LOOK", LOOK)


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    """The tutorial, executed as a notebook. An error in a cell is an error here."""
    read = jupytext.read(DOCS / "tutorial.md", fmt="md:myst")
    client = NotebookClient(read, timeout=300, resources={"metadata": {"path": str(DOCS)}})
    with asyncio.Runner():  # a loop of its own, which nobody else has to close
        return client.execute()


def page_of(notebook: NotebookNode, theme: str) -> str:
    exporter = HTMLExporter(theme=theme, require_js_url="", mathjax_url="", mermaid_js_url="")
    return cast("str", exporter.from_notebook_node(notebook)[0])


@pytest.fixture(scope="module", params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> str:
    return cast("str", request.param)


@pytest.fixture(scope="module")
def page(notebook: NotebookNode, theme: str) -> str:
    return page_of(notebook, theme)


@pytest.fixture(scope="module")
def seen(browser: Browser, page: str, theme: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page)
    browser.open(file, WIDTH, theme)
    browser.picture(PICTURES / f"tutorial-{theme}.png")
    return browser.found(PROBE)


# --- The notebook ------------------------------------------------------------------------------------


def outputs(notebook: NotebookNode) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


def test_every_cell_of_the_tutorial_runs_and_none_warns(notebook: NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 10
    assert all(cell.execution_count for cell in code)
    assert not [out.text for out in outputs(notebook) if out.get("name") == "stderr"]


def test_every_table_is_there_as_plain_text_too(notebook: NotebookNode) -> None:
    tables = [
        o.data
        for o in outputs(notebook)
        if 'class="actrec"' in o.get("data", {}).get("text/html", "")
    ]
    assert len(tables) >= 4
    assert all(
        data["text/plain"].startswith(("7 layers of Net", "recorded Net", "stored Net", "Layer"))
        for data in tables
    )


# --- The page ----------------------------------------------------------------------------------------


def test_the_page_has_the_theme_that_was_asked_for(seen: Any, theme: str) -> None:
    assert seen["width"] == WIDTH
    assert (seen["background"] > 0.5) == (theme == "light")


def test_the_rows_of_a_recording_are_visible(seen: Any) -> None:
    first = seen["tables"][1]  # behind that of the layers
    assert first["title"].startswith("recorded Net: 4 layers, 6 passes")
    assert first["rows"] == [
        ["layer", "type", "calls", "shape", "dtype", "memory"],
        ["conv1", "Conv2d", "6", "(99-100, 8, 8, 8)", "float32", "1.2 MB"],
        ["conv2", "Conv2d", "6", "(99-100, 16, 8, 8)", "float32", "2.5 MB"],
        ["head", "Linear", "6", "(99-100, 10)", "float32", "24.0 kB"],
        ["label", "added", "6", "(99-100,)", "int64", "4.8 kB"],
    ]


def test_every_table_is_visible_and_the_text_behind_it_is_not(seen: Any) -> None:
    assert len(seen["tables"]) >= 4
    assert all(len(table["rows"]) > 1 for table in seen["tables"])
    assert seen["texts"] == 0
    assert seen["scripts"] == 0


def test_every_cell_can_be_read(seen: Any) -> None:
    assert min(table["contrast"] for table in seen["tables"]) >= READABLE


def test_nothing_is_wider_than_the_page(seen: Any) -> None:
    assert seen["pageWidth"] <= WIDTH
    assert not [table["title"] for table in seen["tables"] if table["cut"]]
    assert all(part["right"] <= WIDTH for part in seen["tables"] + seen["images"])


def test_every_image_is_loaded(seen: Any) -> None:
    assert seen["images"]
    assert all(image["loaded"] for image in seen["images"])


def test_every_link_has_a_text(
    seen: Any,
) -> None:  # where only MyST would give it one, it has none here
    assert not seen["nameless"]


# --- Would it be seen? -------------------------------------------------------------------------------

SHEET = """<style>:root {{ color-scheme: light }} body {{ background: {background}; color: {color} }}</style>
<div class="actrec"><pre class="actrec-text" style="display:{text}">text</pre><div class="actrec-table"
 style="display:{display}; width:{width}px; overflow-x:auto"><div class="actrec-title">title</div><table
 style="width:{inner}px"><tr><td>cell</td></tr></table></div></div><img src="{image}"><a href="x">{link}</a>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
GOOD = {
    "background": "#fff", "color": "#222", "text": "none", "display": "block", "width": 600, "inner": 500,
    "image": PIXEL, "link": "link",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "is_seen"),
    [
        ({}, lambda seen: not faults(seen)),
        ({"display": "none"}, lambda seen: not seen["tables"]),
        ({"text": "block"}, lambda seen: seen["texts"] == 1),
        ({"width": 1500}, lambda seen: faults(seen) == ["page"]),
        ({"inner": 900}, lambda seen: faults(seen) == ["cut"]),
        ({"color": "#aaa"}, lambda seen: faults(seen) == ["contrast"]),
        ({"background": "#222"}, lambda seen: faults(seen) == ["contrast"]),
        ({"image": "missing.png"}, lambda seen: faults(seen) == ["image"]),
        ({"link": ""}, lambda seen: faults(seen) == ["link"]),
    ],
    ids=["good", "hidden", "text", "wide", "cut", "pale", "dark on dark", "no image", "no text"],
)
def test_a_page_with_a_fault_is_noticed(
    browser: Browser, change: Any, is_seen: Any, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(SHEET.format(**GOOD | change))
    browser.open(file, WIDTH, "light")
    assert is_seen(browser.found(PROBE))


def faults(seen: Any) -> list[str]:
    tables = seen["tables"]
    return (
        ["page"] * (seen["pageWidth"] > WIDTH)
        + ["cut"] * any(table["cut"] for table in tables)
        + ["contrast"] * any(table["contrast"] < READABLE for table in tables)
        + ["image"] * any(not image["loaded"] for image in seen["images"])
        + ["link"] * bool(seen["nameless"])
    )
