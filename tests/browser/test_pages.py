"""The pages as they are built, in a real browser: wide and narrow, light and dark; nothing clipped, all readable, folds open by keyboard.

``nox -s browser`` builds them first where they are not there. A picture of every page is left in ``tests/browser/pictures``, to be looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.chromium import LARGE, LOOK, READABLE

if TYPE_CHECKING:
    from tests.browser.chromium import Browser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HTML = DOCS / "_build" / "html"
PICTURES = Path(__file__).parent / "pictures"

WIDTHS = (1280, 420)
THEMES = ("light", "dark")
PAGES = sorted(
    str(page.relative_to(DOCS).with_suffix(""))
    for page in DOCS.rglob("*.md")
    if "_build" not in page.parts and not page.name.startswith("benchmarks")
)
#: Pages that people meet first: there no code is cut at the usual width, and on the front page not on a telephone either.
FIRST = ("index", "tutorial", "cookbook", "how-to/index", "why/speed")

PROBE = (
    """() => {LOOK
  const own = element => [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  const article = document.querySelector("article");
  const all = selector => [...article.querySelectorAll(selector)].filter(shown);
  const prose = all("p, li, td, th, h1, h2, h3, h4, a, code, dt, dd, small, span").filter(own);
  const pale = prose.map(e => [contrast(e), e]).filter(([c]) => c < LIMIT)
    .map(([c, e]) => `${c.toFixed(1)} ${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 30)}`);
  const scrolls = element => { for (let node = element.parentElement; node && node !== article; node = node.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(node).overflowX)) return true; return false; };
  const figures = all("svg[role=img]");
  return {
    width: innerWidth,
    pageWidth: document.documentElement.scrollWidth,
    background: luminance(behind(document.body)),
    cutCode: all(".highlight pre").filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60)),
    beyond: all("p, li, h1, h2, h3, img, svg, dt").filter(e => !scrolls(e) && e.getBoundingClientRect().right > innerWidth + 1)
      .map(e => `${e.tagName} ${e.textContent.slice(0, 40)}`),
    underlined: all(".highlight span").filter(e => getComputedStyle(e).textDecorationLine.includes("underline")).map(e => e.innerText),
    pale: [...new Set(pale)].slice(0, 8),
    images: all("img").map(e => ({name: e.src.split("/").pop(), loaded: e.complete && e.naturalWidth > 0, alt: e.alt})),
    figures: figures.length,
    cutFigures: figures.flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
      const [inner, outer] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
      return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
    }).map(text => text.textContent)),
    paleFigures: figures.flatMap(svg => [...svg.querySelectorAll("text")].filter(t => contrast(t, getComputedStyle(t).fill) < LARGE).map(t => t.textContent)),
    tables: all(".actrec-table").length,
    plain: all(".actrec-text").length,
    drawn: all(".actrec svg").length,
  };
}""".replace("LOOK", LOOK)
    .replace("LIMIT", str(READABLE))
    .replace("LARGE", str(LARGE))
)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read(browser: Browser, page: str, width: int, theme: str) -> None:
    browser.open(HTML / f"{page}.html", width, theme)
    browser.picture(PICTURES / f"page-{page.replace('/', '-')}-{width}-{theme}.png")
    faults = faults_of(browser.found(PROBE), width, theme, page)
    assert faults == {}


def faults_of(seen: Any, width: int, theme: str, page: str) -> dict[str, Any]:
    """What is wrong with a page, by the name of the fault."""
    code_fits = page == "index" or (page in FIRST and width == max(WIDTHS))
    checks = {
        "width": [] if seen["width"] == width >= seen["pageWidth"] else [seen["pageWidth"]],
        "theme": [] if (seen["background"] > 0.5) == (theme == "light") else [seen["background"]],
        "clipped code": seen["cutCode"] if code_fits else [],
        "beyond the page": seen["beyond"],
        "underlined code": seen["underlined"],
        "contrast": seen["pale"],
        "pictures": [i["name"] for i in seen["images"] if not (i["loaded"] and i["alt"])],
        "clipped figures": seen["cutFigures"],
        "pale figures": seen["paleFigures"],
        "text beside its table": [seen["plain"]] if seen["plain"] else [],
    }
    return {name: found for name, found in checks.items() if found}


@pytest.mark.parametrize(
    ("page", "what"), [("why/speed", "figures"), ("how-to/statistics", "drawn")]
)
def test_what_is_drawn_on_a_page_is_there(browser: Browser, page: str, what: str) -> None:
    browser.open(HTML / f"{page}.html", max(WIDTHS), "light")
    assert browser.found(PROBE)[what] > 0


def test_a_fold_opens_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<article><details><summary>more</summary><p>hidden</p></details></article>")
    browser.open(page, 420, "light")
    is_open = "() => document.querySelector('details').open"
    assert not browser.found(is_open)
    browser.press("Tab")
    assert browser.found("() => document.activeElement.tagName") == "SUMMARY"
    browser.press("Enter")
    assert browser.found(is_open)


# --- Would it be seen? ---------------------------------------------------------------------------------

SHEET = """<meta charset="utf-8"><body style="margin: 0; background: {background}; color: {color}"><article>
<p style="width: {wide}px">text</p><p style="color: {pale}">pale</p>
<div class="highlight"><pre style="width: 200px; overflow-x: auto"><span style="text-decoration: {line}">{code}</span></pre></div>
<img src="{image}" alt="{alt}"><svg role="img" viewBox="0 0 100 20" width="100"><text x="{x}" y="15" fill="{fill}">label</text></svg>
<div class="actrec"><pre class="actrec-text" style="display: {plain}">text</pre></div></article>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
GOOD = {
    "background": "#fff", "color": "#222", "wide": 300, "pale": "inherit", "line": "none", "code": "x = 1", "image": PIXEL, "alt": "a dot",
    "x": 10, "fill": "#222", "plain": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"wide": 2000}, "width"),
        ({"background": "#111", "color": "#eee", "fill": "#eee"}, "theme"),
        ({"code": "x = 1 " * 30}, "clipped code"),
        ({"line": "underline"}, "underlined code"),
        ({"pale": "#aaa"}, "contrast"),
        ({"image": "missing.png"}, "pictures"),
        ({"alt": ""}, "pictures"),
        ({"x": 80}, "clipped figures"),
        ({"fill": "#ddd"}, "pale figures"),
        ({"plain": "block"}, "text beside its table"),
    ],
)
def test_a_fault_of_a_page_is_noticed(
    browser: Browser, change: Any, fault: str | None, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(SHEET.format(**GOOD | change))
    browser.open(page, 1280, "light")
    faults = faults_of(browser.found(PROBE), 1280, "light", "index")
    assert set(faults) >= ({fault} if fault else set())
    assert bool(faults) == bool(fault)
