"""A headless Chromium, driven by its own protocol."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from conftest import require

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")


class Tab:
    def __init__(self, socket):
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors: list[str] = []

    def call(self, method: str, **given) -> dict:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": given}))
        while True:
            found = json.loads(self._socket.recv(timeout=60))
            if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(found["params"]))
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    def value(self, script: str):
        """What a JavaScript expression comes to."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 20.0):
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < end, (script, self.errors, self.value("document.body.innerText"))
            time.sleep(0.05)
        return found

    def write(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9}[key]
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)


@contextlib.contextmanager
def tab(url: str, profile: Path, *, width: int = 1000) -> Iterator[Tab]:
    """A tab with the page, whose names are looked up nowhere. Skips the test where there is no browser."""
    from websockets.sync.client import connect

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        require("browser", f"none of {', '.join(BROWSERS)} is installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    command = [browser, *flags, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        port = next(found[1] for line in process.stderr if (found := re.search(r"ws://127\.0\.0\.1:(\d+)/", line)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:
            opened = Tab(socket)
            for domain in ("Page", "Runtime", "Log"):
                opened.call(f"{domain}.enable")
            opened.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
            )
            opened.call("Page.navigate", url=url)
            opened.until("document.readyState === 'complete'")
            yield opened
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
