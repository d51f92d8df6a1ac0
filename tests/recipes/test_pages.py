"""Every page that says it is run by this session is run, with all of its code."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.recipes.pages import BLOCK, HOW_TO, blocks

RECIPES = [
    page.name
    for page in sorted(HOW_TO.glob("*.md"))
    if "run by `nox -s recipes`" in page.read_text()
]


@pytest.mark.parametrize("page", RECIPES)
def test_all_of_a_page_is_run(page):
    module = import_module(f"tests.recipes.test_{page.removesuffix('.md').replace('-', '_')}")
    run = [block.lstrip("\n") for heading in module.HEADINGS for block in blocks(page, heading)]
    found = BLOCK.findall((HOW_TO / page).read_text())
    assert page == module.PAGE
    assert run == [code for language, code in found if language == "python"]
