"""A real browser, for one page at a time: what a script finds in the page, and a picture of it.

Chromium is asked to print the page as it stands after it was loaded. A script at the end of the page has left
its findings there by then, as JSON. So nothing has to drive the browser, and nothing has to wait.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["found", "screenshot"]

WIDTH = 1024

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    # Without these it asks for its maker's servers.
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

_PROBE = """
<script>
addEventListener("load", () => {{
  const probe = {probe};
  const found = document.createElement("meta");
  found.id = "found";
  found.content = btoa(unescape(encodeURIComponent(JSON.stringify(probe()))));
  document.head.append(found);
}});
</script>
"""


def found(page: str, probe: str, folder: Path, width: int = WIDTH) -> Any:
    """What a JavaScript function returns in a page that is loaded."""
    dom = _chromium(page + _PROBE.format(probe=probe), folder, "--dump-dom", width=width)
    match = re.search(r'id="found" content="([^"]*)"', dom)
    assert match, f"the page did not get as far as its probe:\n{dom[-2000:]}"
    return json.loads(base64.b64decode(match[1]))


def screenshot(page: str, folder: Path, picture: Path, height: int, width: int = WIDTH) -> None:
    """Write a picture of the first ``height`` pixels of a page."""
    _chromium(page, folder, f"--screenshot={picture}", height=height, width=width)


def _chromium(page: str, folder: Path, *options: str, height: int = 768, width: int = WIDTH) -> str:
    program = shutil.which("chromium")
    assert program, "these tests need Chromium: apt-get install chromium"
    file, profile = folder / "page.html", folder / "profile"
    file.write_text(page)
    shutil.rmtree(profile, ignore_errors=True)
    size = (f"--window-size={width},{height}", f"--user-data-dir={profile}")
    run = subprocess.run(
        [program, *OPTIONS, *size, *options, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
