"""A headless Chromium, driven through its debugging pipe: no driver, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
# a browser reads from 3 and writes to 4
START = """
import os, sys
for to, of in zip((100, 101, 3, 4), (int(sys.argv[1]), int(sys.argv[2]), 100, 101)):
    os.dup2(of, to)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page. What it writes to its console, and what goes wrong on it, stands in `errors`."""

    def __init__(self, width: int = 1200, height: int = 1000) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, self.to = os.pipe()
        self.of, write = os.pipe()

        words = [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder.name}", f"--window-size={width},{height}"]
        words = [sys.executable, "-c", START, str(read), str(write), *words, "about:blank"]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(words, pass_fds=(read, write), stdout=null, stderr=null)
        os.close(read)
        os.close(write)
        self.numbers, self.rest, self.errors, self.loads = itertools.count(1), b"", [], 0
        self.session: dict[str, str] = {}
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        about = {"targetId": target["targetId"], "flatten": True}
        self.session = {"sessionId": self.ask("Target.attachToTarget", **about)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.of)
        self.folder.cleanup()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; what happens meanwhile is noted."""
        number = next(self.numbers)
        os.write(
            self.to, json.dumps({"id": number, "method": method, "params": params, **self.session}).encode() + b"\0"
        )
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            data = os.read(self.of, 1 << 20)
            assert data, "the browser has gone"
            self.rest += data
        raw, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(raw)
        what, about = message.get("method"), message.get("params", {})
        self.loads += what == "Page.loadEventFired"
        if what == "Runtime.exceptionThrown" or what == "Log.entryAdded":
            self.errors.append(json.dumps(about)[:500])
        if what == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(about["args"])[:500])
        return message

    def run(self, script: str) -> Any:
        """What an expression of the page is, once it is settled."""
        how = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.ask("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        """Go there, and wait until it is read."""
        before = self.loads
        self.ask("Page.navigate", url=url)
        while self.loads == before:
            self._next()

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key of the keyboard. 2 is Ctrl."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, **about)

    def emulate(self, dark: bool) -> None:
        """What the system wishes."""
        value = "dark" if dark else "light"
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])
