"""A browser for tests: headless Chromium, driven over chromedriver's HTTP interface."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # W3C WebDriver: how an element is named
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
KEYS = {"Enter": "\ue007", "Tab": "\ue004", "Escape": "\ue00c", "Left": "\ue012", "Up": "\ue013"}
KEYS |= {"Right": "\ue014", "Down": "\ue015", "Home": "\ue011", "End": "\ue010"}


class Browser:
    """One window. Errors of the driver, such as those of a script, raise RuntimeError."""

    def __init__(self, address: str, profile: Path):
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._address = address
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._address = f"{address}/session/{made['sessionId']}"

    def _send(self, method: str, path: str, values: dict | None = None):
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self._address + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=90) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")[:2000]) from error

    def open(self, path: Path, anchor: str = "") -> None:
        self._send("POST", "/url", {"url": path.resolve().as_uri() + anchor})

    def run(self, script: str, *args):
        """What the body of a function returns."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(args)})

    def until(self, script: str, *args, seconds: float = 20):
        """Waits until the body of a function returns something true, and returns that."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *args)):
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {script}")
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        found = self._send("POST", "/element", {"using": "css selector", "value": selector})
        centre = "arguments[0].scrollIntoView({block: 'center', inline: 'center'})"
        self.run(centre, found)  # the driver's own scrolling may leave it under a sticky bar
        self._send("POST", f"/element/{found[_ELEMENT]}/click", {})

    def press(self, *keys: str) -> None:
        """Presses keys one after the other, wherever the focus is."""
        actions = []
        for key in keys:
            value = KEYS.get(key, key)
            actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self._send("POST", "/actions", {"actions": [source]})

    def window(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the page, narrower than a real window can be, and its colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        for command, values in (
            ("Emulation.setDeviceMetricsOverride", size),
            ("Emulation.setEmulatedMedia", {"features": [scheme]}),
        ):
            self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def complaints(self) -> list[str]:
        """What the console of the page has said since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._send("GET", "/screenshot")))

    def quit(self) -> None:
        self._send("DELETE", "")


@contextlib.contextmanager
def browser(folder: Path):
    """A Browser whose profile is in `folder`; skips the test where there is no Chromium (fails it
    under NPR_REQUIRE_CHROMIUM=1)."""
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        message = "chromium and chromedriver are not installed"
        required = os.environ.get("NPR_REQUIRE_CHROMIUM") == "1"
        pytest.fail(message) if required else pytest.skip(message)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        found = Browser(address, folder / "profile")
        try:
            yield found
        finally:
            found.quit()
    finally:
        process.terminate()
        process.wait(10)
