from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser.chromium import Browser

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests, which take turns."""
    with Browser() as browser:
        yield browser
