"""The views of recordings in a real browser: wide and narrow, light and dark, nothing cut, readable, opened by keyboard.

Pictures are left in ``tests/browser/pictures``, to be looked at.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import actrec
from tests.browser.chromium import LOOK, READABLE

if TYPE_CHECKING:
    from actrec import Recording
    from tests.browser.chromium import Browser

PICTURES = Path(__file__).parent / "pictures"

PROBE = """() => {LOOK
  const cells = [...document.querySelectorAll(".actrec td, .actrec th, .actrec span, .actrec small")].filter(shown);
  const boxes = [...document.querySelectorAll(".actrec td")].filter(shown);
  return {
    plain: [...document.querySelectorAll("pre.actrec-text")].filter(shown).length,
    contrast: Math.min(...cells.map(e => contrast(e))),
    cut: boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText),
    pictures: [...document.querySelectorAll(".actrec svg")].filter(shown).length,
    width: innerWidth,
    pageWidth: document.documentElement.scrollWidth,
  };
}""".replace("LOOK", LOOK)
CLOSED = "() => document.querySelectorAll('details:not([open])').length"


def views() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *[nn.Conv2d(8, 8, 1) for _ in range(24)])
    other = copy.deepcopy(model)
    assert isinstance(other[20], nn.Conv2d)
    with torch.no_grad():
        other[20].weight[0, 0] = float("nan")

    def recorded(one: nn.Module) -> Recording:
        with actrec.record(one, inputs=True) as acts:
            one(torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
        return acts

    a, b = recorded(model), recorded(other)
    return {
        "recording": a,
        "inputs": a.inputs,
        "stats": b.stats(),
        "comparison": actrec.compare(a, b),
        "layer": a["0"],
        "layers": actrec.layers(model),
    }


VIEWS = views()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_can_be_read(
    browser: Browser, name: str, width: int, theme: str, tmp_path: Path
) -> None:
    colours = {"light": "#fff; color: #000", "dark": "#111; color: #eee"}[theme]
    page = tmp_path / "view.html"
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="background: {colours}; font-family: sans-serif">'
        f"{VIEWS[name]._repr_html_()}"
    )
    browser.open(page, width, theme)
    browser.picture(PICTURES / f"view-{name}-{width}-{theme}.png")
    seen = browser.found(PROBE)
    assert seen["plain"] == 0, "the text is hidden where HTML is shown"
    assert seen["contrast"] >= READABLE
    assert seen["cut"] == []
    assert seen["pageWidth"] <= seen["width"] == width, "what is too wide scrolls inside"
    assert (seen["pictures"] > 0) == (name in {"stats", "layer"})


def test_the_folds_of_a_long_table_open_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {f"part{i}": nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]) for i in range(4)}
    )
    page = tmp_path / "view.html"
    page.write_text(f'<meta charset="utf-8">{actrec.layers(model)._repr_html_()}')
    browser.open(page, 420, "light")
    closed = browser.found(CLOSED)
    assert closed >= 3
    while not browser.found(
        "() => document.activeElement.matches('details:not([open]) > summary')"
    ):
        browser.press("Tab")
    browser.press("Enter")
    assert browser.found(CLOSED) == closed - 1


#: Of a report: everything that has a text of its own.
REPORT = f"""() => {{
  {LOOK}
  const own = element => [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  const texts = [...document.querySelectorAll("main *")].filter(e => shown(e) && own(e) && !e.closest("svg"));
  return {{
    faint: texts.filter(e => contrast(e) < {READABLE}).map(e => e.innerText.slice(0, 60)),
    small: texts.filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.innerText.slice(0, 60)),
    width: innerWidth,
    pageWidth: document.documentElement.scrollWidth,
    pictures: [...document.querySelectorAll("#distributions svg, #drift svg, #similarity svg")]
      .map(e => e.getBoundingClientRect()).filter(box => box.width > 60 && box.height > 10).length,
  }};
}}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_a_report_can_be_read(browser: Browser, width: int, theme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with actrec.record(model) as acts:
        for number in range(12):
            x = torch.randn(9, 8)
            x[0, 0] = float("nan") if number == 7 else 0
            model(x)
    acts.report(tmp_path / "run.html")
    browser.open(tmp_path / "run.html", width, theme)
    browser.picture(PICTURES / f"report-{width}-{theme}.png")
    seen = browser.found(REPORT)
    assert seen["faint"] == []
    assert seen["small"] == []
    assert seen["pageWidth"] <= seen["width"] == width, "what is too wide scrolls inside"
    assert seen["pictures"] == 3 + 3 + 3
