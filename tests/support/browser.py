"""A real headless Chromium, driven over WebDriver (W3C): a few JSON requests, and so no library.

Every element that a test names is named by CSS. Waiting is looking again until something is true, never a pause.
"""

from __future__ import annotations

import base64
import http.client
import json
from pathlib import Path
from typing import Any, Literal, Self

from tests.support import ports
from tests.support.process import START_S, Child, eventually, program

#: The key of an element's reference in WebDriver's JSON (WebDriver § Elements).
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
#: Patience with a page, in seconds. Never a claim about speed.
SEES_S = 20
TAB = "\ue004"
ENTER = "\ue007"


class Refused(AssertionError):
    """The browser could not do it, and said why."""


class Browser(Child):
    """A chromedriver with one window. The page's own errors and blocked content are collected from its console."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._port = ports.take()
        self._profile = scratch / "profile"
        self._session = ""
        super().__init__(
            "chromedriver",
            [program("chromedriver"), f"--port={self._port}", "--log-level=WARNING"],
            scratch / "chromedriver.log",
            {"HOME": str(scratch), "TMPDIR": str(scratch)},
        )

    def __enter__(self) -> Self:
        super().__enter__()
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--disable-dev-shm-usage", "--force-color-profile=srgb", f"--user-data-dir={self._profile}"),
        ]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": program("chromium"), "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"
        return self

    def close(self) -> None:
        """End the browser, then its driver."""
        if self._session and self.is_running:
            self._ask("DELETE", self._session)
            self._session = ""
        super().close()

    def is_ready(self) -> bool:
        """Whether it takes sessions."""
        try:
            return bool(self._ask("GET", "/status")["ready"])
        except OSError:
            return False

    # -- the window -------------------------------------------------------------------------------------------------

    def look(self, width: int = 1280, height: int = 900, *, scheme: Literal["light", "dark"] = "light") -> None:
        """The size of the viewport, and what the person prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def scripts(self, allowed: bool) -> None:
        """Whether pages may run scripts, from the next one on."""
        self._devtools("Emulation.setScriptExecutionDisabled", {"value": not allowed})

    def open(self, url: str) -> None:
        """Go there and wait until it is loaded."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    @property
    def url(self) -> str:
        """Where the window is."""
        return str(self._ask("GET", f"{self._session}/url"))

    @property
    def title(self) -> str:
        """The page's title."""
        return str(self._ask("GET", f"{self._session}/title"))

    def screenshot(self, path: Path) -> None:
        """The viewport as a PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def console(self) -> list[str]:
        """What the console has said since the last time: errors of scripts, blocked content, failed requests."""
        entries = self._ask("POST", f"{self._session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    # -- the page ---------------------------------------------------------------------------------------------------

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns in the page; its `arguments` are these."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, css: str = "main") -> str:
        """The rendered text of the first such element."""
        return str(self._ask("GET", f"{self._session}/element/{self._found(css)}/text"))

    def texts(self, css: str) -> list[str]:
        """The rendered texts of all such elements."""
        found: list[str] = self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", css)
        return found

    def click(self, css: str) -> None:
        """Click it as a person would: it must be visible."""
        self._ask("POST", f"{self._session}/element/{self._found(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        """Type into it, after what is there."""
        self._ask("POST", f"{self._session}/element/{self._found(css)}/value", {"text": text})

    def empty(self, css: str) -> None:
        """Take out what is written in it."""
        self._ask("POST", f"{self._session}/element/{self._found(css)}/clear", {})

    def press(self, keys: str) -> None:
        """Press keys, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self._ask("POST", f"{self._session}/actions", body)

    def sees(self, words: str, css: str = "main") -> None:
        """Wait until the element's text has these words; the page may be on its way to another one meanwhile."""
        eventually(lambda: words in self._shown(css), f"{words!r} in {css}", SEES_S)

    def _shown(self, css: str) -> str:
        try:
            return "".join(self.texts(css)[:1])
        except Refused:
            return ""

    # -- the wire ---------------------------------------------------------------------------------------------------

    def _found(self, css: str) -> str:
        found = self._ask("POST", f"{self._session}/element", {"using": "css selector", "value": css})
        return str(found[_ELEMENT])

    def _devtools(self, command: str, parameters: dict[str, Any]) -> None:
        self._ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=START_S)
        try:
            text = json.dumps(body) if body is not None else None
            connection.request(method, path, text, {"Content-Type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise Refused(f"{method} {path}: {value['error']}: {value['message'][:500]}")
        return value
