"""Chromium driven over a pipe: one browser for many pages, of any width, light or dark, with keys that are pressed.

It speaks the DevTools protocol: a message is JSON and a null byte, on two file descriptors that Chromium is started with.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

__all__ = ["LARGE", "LOOK", "READABLE", "Browser"]

READABLE = 4.5  # the contrast of text that WCAG 2 asks for at level AA,
LARGE = 3.0  # and of what is drawn

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    # Without these it asks for its maker's servers.
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

#: What probes look with: whether an element is shown, the colour behind it, and the contrast of its text.
LOOK = """
  const shown = element => element.getClientRects().length > 0 && getComputedStyle(element).visibility !== "hidden";
  const numbers = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const behind = element => {
    const layers = [];
    for (let node = element; node; node = node.parentElement) layers.push(numbers(getComputedStyle(node).backgroundColor));
    return layers.reverse().reduce((below, [r, g, b, a = 1]) =>
      below.map((part, i) => part + ([r, g, b][i] - part) * a), [255, 255, 255]);
  };
  const luminance = rgb => rgb.map(p => p / 255)
    .map(p => p <= 0.03928 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4)
    .reduce((sum, p, i) => sum + p * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (element, colour) => {
    const background = behind(element), [r, g, b, a = 1] = numbers(colour || getComputedStyle(element).color);
    const opacity = a * getComputedStyle(element).opacity;
    const text = [r, g, b].map((part, i) => background[i] + (part - background[i]) * opacity);
    const [light, dark] = [luminance(text), luminance(background)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
"""

#: Keys by name: what else a key event says of them.
KEYS = {
    "Tab": {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9},
    "Enter": {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
}


class Browser:
    """One page at a time: open it, ask it, press keys, take its picture."""

    def __enter__(self) -> Self:
        program = shutil.which("chromium")
        assert program, "these tests need Chromium: apt-get install chromium"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # Chromium reads from descriptor 3 and writes to 4. A shell puts them there.
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        options = [*OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command, "bash", program, *options, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._read = os.fdopen(self._in, "rb")
        self._rest, self._number, self._session = b"", 0, ""
        self._events: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._call("Page.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._out)  # Chromium ends when its pipe does
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._read.close()
        self._profile.cleanup()

    def open(self, page: Path, width: int, theme: str, height: int = 800) -> None:
        """Open a file, and wait until it is loaded."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        self._call("Emulation.setEmulatedMedia", media="screen", features=scheme)
        self._events.clear()
        self._call("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._note(self._next())

    def found(self, probe: str) -> Any:
        """Return what a JavaScript function returns in the page."""
        answer = self._call("Runtime.evaluate", expression=f"({probe})()", returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let it go, wherever the focus is."""
        self._call("Input.dispatchKeyEvent", type="keyDown", **KEYS[key])
        self._call("Input.dispatchKeyEvent", type="keyUp", **KEYS[key])

    def picture(self, file: Path, most: int = 6000) -> None:
        """Write a picture of the page, from its top down to ``most`` pixels."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], most)}
        shot = self._call(
            "Page.captureScreenshot", clip={**clip, "scale": 1}, captureBeyondViewport=True
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _note(self, message: Any) -> None:
        self._events.append(message.get("method", ""))

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
