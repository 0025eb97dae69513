"""A headless Chromium that tests drive over the DevTools protocol's pipe.

Nothing is installed for it: messages are JSON, ended by a zero byte, on two file descriptors
(https://chromedevtools.github.io/devtools-protocol/, `--remote-debugging-pipe`).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NO_CHROMIUM = "no chromium on this machine (Debian: apt-get install chromium)"

_SECONDS = 60.0


class Browser:
    """One browser process; use as a context."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self._folder = tempfile.mkdtemp(prefix="chromium")
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Above the two numbers that the browser expects, so that none overwrites another.
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (commands, answers)]
        self._pid = os.posix_spawn(
            CHROMIUM,
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage",
                "--remote-debugging-pipe", f"--user-data-dir={self._folder}", "about:blank",
            ],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, ours[0], 3),
                (os.POSIX_SPAWN_DUP2, ours[1], 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )  # fmt: skip
        for fd in (commands, answers, *ours):
            os.close(fd)
        self._number = 0
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

    def page(self, url: str, *, width: int = 1440, height: int = 1000) -> Page:
        """Open an address in a fresh tab and wait until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.call("Page.navigate", url=url)
        page.wait_event("Page.loadEventFired")
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events on the way are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + _SECONDS
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def wait(self, found: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Wait for an event, also one that has come already."""
        deadline = time.monotonic() + _SECONDS
        seen = 0
        while not any(found(event) for event in self.events[seen:]):
            seen = len(self.events)
            self._receive(deadline, what)

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            ready = select.select([self._read], [], [], max(0.0, left))[0]
            assert ready, f"the browser did not answer {what} within {_SECONDS:.0f} s"
            data = os.read(self._read, 1 << 20)
            assert data, f"the browser ended before it answered {what}"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


class Page:
    """One tab, and what it has said and fetched."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this tab."""
        return self._browser.call(method, self._session, **params)

    def wait_event(self, method: str) -> None:
        """Wait for an event of this tab, also one that has come already."""
        self._browser.wait(
            lambda e: e["method"] == method and e.get("sessionId") == self._session, method
        )

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def resize(self, width: int, height: int = 1000) -> None:
        """Give the window a size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript condition holds, looking at each animation frame."""
        seconds = _SECONDS * 1000 / 2
        good = self.evaluate(
            "new Promise((done) => { const end = performance.now() + "
            f"{seconds}; const look = () => {{ if ({condition}) done(true); "
            "else if (performance.now() > end) done(false); else requestAnimationFrame(look); "
            "}; look(); })"
        )
        assert good, f"it did not become true in the page: {condition}"

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        return [
            event
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] in methods
        ]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions that nobody caught."""
        said = []
        for event in self._events(
            "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"
        ):
            params = event["params"]
            if "exceptionDetails" in params:
                said.append(json.dumps(params["exceptionDetails"]))
            elif "entry" in params:
                if params["entry"]["level"] in ("warning", "error"):
                    said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            elif params["type"] in ("warning", "error", "assert"):
                said.append(json.dumps(params["args"]))
        return said

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself included; not what it carries in itself."""
        urls = [e["params"]["request"]["url"] for e in self._events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save a picture as PNG, of the whole page or of what the window shows."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> None:
        """Save the page as PDF, as it is printed on A4."""
        done = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(done["data"]))
