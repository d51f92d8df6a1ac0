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
from tests.browser.chromium import found, screenshot

if TYPE_CHECKING:
    from actrec import Recording

PICTURES = Path(__file__).parent / "pictures"
READABLE = 4.5  # the contrast of text that WCAG 2 asks for at level AA

PROBE = """() => {
  const shown = element => element.getClientRects().length > 0;
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const behind = element => {
    const layers = [];
    for (let node = element; node; node = node.parentElement) layers.push(numbers(getComputedStyle(node).backgroundColor));
    return layers.reverse().reduce((below, [r, g, b, a = 1]) =>
      below.map((part, i) => part + ([r, g, b][i] - part) * a), [255, 255, 255]);
  };
  const luminance = rgb => rgb.map(p => p / 255)
    .map(p => p <= 0.03928 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4)
    .reduce((sum, p, i) => sum + p * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = element => {
    const background = behind(element), rgb = numbers(getComputedStyle(element).color).slice(0, 3);
    const opacity = getComputedStyle(element).opacity;
    const text = rgb.map((part, i) => background[i] + (part - background[i]) * opacity);
    const [light, dark] = [luminance(text), luminance(background)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
  const cells = [...document.querySelectorAll(".actrec td, .actrec th, .actrec span, .actrec small")].filter(shown);
  const boxes = [...document.querySelectorAll(".actrec td")].filter(shown);
  const first = document.querySelector("details:not([open]) > summary");
  if (first) { first.focus(); first.click(); }
  return {
    plain: [...document.querySelectorAll("pre.actrec-text")].filter(shown).length,
    contrast: Math.min(...cells.map(contrast)),
    cut: boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText),
    wide: document.querySelector(".actrec").getBoundingClientRect().right
      > document.querySelector("#room").getBoundingClientRect().right + 1,
    pictures: [...document.querySelectorAll(".actrec svg")].filter(shown).length,
    opened: !first || (document.activeElement === first && first.parentElement.open),
  };
}"""


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
def test_a_view_can_be_read(name: str, width: int, theme: str, tmp_path: Path) -> None:
    colours = {"light": "#fff; color: #000", "dark": "#111; color: #eee"}[theme]
    page = (
        f'<!doctype html><meta charset="utf-8"><body style="background: {colours}; font-family: sans-serif">'
        f'<div id="room" style="width: {width - 40}px">{VIEWS[name]._repr_html_()}</div>'
    )
    seen = found(page, PROBE, tmp_path, 1280)
    assert seen["plain"] == 0, "the text is hidden where HTML is shown"
    assert seen["contrast"] >= READABLE
    assert seen["cut"] == []
    assert not seen["wide"], "what is too wide scrolls inside"
    assert seen["opened"], "a fold opens and keeps the focus"
    assert (seen["pictures"] > 0) == (name in {"stats", "layer"})
    PICTURES.mkdir(exist_ok=True)
    picture = PICTURES / f"view-{name}-{width}-{theme}.png"
    screenshot(page, tmp_path, picture, 700, width)
    assert picture.stat().st_size > 0
