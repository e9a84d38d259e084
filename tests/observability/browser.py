"""Headless Chromium over its DevTools protocol; needs nothing but a Chromium and websockets."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 120.0
T = TypeVar("T")


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0
        self.errors: list[str] = []  # uncaught exceptions and refused loads, as they came
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(TIMEOUT_S))
            self._note(message)
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            if entry["level"] == "error":
                self.errors.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str, *, dark: bool = False, still: bool = False) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === '{url}' && document.readyState === 'complete'")

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, expression: str) -> Any:
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The first true value of a JavaScript expression."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def press(self, key: str) -> None:
        code = {"Tab": 9, "End": 35, "Home": 36}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(data["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with one page, its files under ``profile``."""
    binary = find_chromium()
    assert binary is not None
    flags = [
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={profile}"),
    ]
    log = profile.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen([binary, *flags, "about:blank"], stderr=output)
    try:
        port = _wait_for(lambda: _debugging_port(log), log, process)
        url = _wait_for(lambda: _first_tab(port), log, process)
        with connect(url, max_size=64 << 20, open_timeout=TIMEOUT_S) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


def _debugging_port(log: Path) -> int | None:
    found = re.search(r"DevTools listening on ws://[^:]+:(\d+)/", log.read_text())
    return int(found[1]) if found else None


def _first_tab(port: int) -> str | None:
    """The browser listens before it has its first tab."""
    tabs = httpx.get(f"http://127.0.0.1:{port}/json", timeout=TIMEOUT_S).json()
    return next((tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"), None)


def _wait_for(find: Callable[[], T | None], log: Path, process: subprocess.Popen[bytes]) -> T:
    deadline = time.monotonic() + TIMEOUT_S
    while (found := find()) is None:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return found
