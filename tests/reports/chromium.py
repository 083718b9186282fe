"""Chromium without a window, driven by its DevTools protocol through two pipes: no driver, port or package is needed.

See https://chromedevtools.github.io/devtools-protocol/. With --remote-debugging-pipe it reads messages from file
descriptor 3 and writes to 4; each is JSON and a zero byte.
"""

import base64
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PROGRAM = "chromium"
# Root has no sandbox, a container little shared memory. Nothing but the page may ask for the network.
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run")
OPTIONS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")


class Tab:
    """A page in Chromium. `problems` are its errors and warnings, `requests` the addresses that it asked for."""

    def __init__(self, write: IO[bytes], read: IO[bytes]) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._write, self._read = write, read
        self._number, self._session = 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._read.read(1)) not in (b"\0", b""):
            message += byte
        assert message, "chromium ended"
        event = json.loads(message)
        content = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(content["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.problems.append(str(content["args"]))
        elif event.get("method") == "Log.entryAdded":
            self.problems.append(content["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        return event

    def open(self, path: Path, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Show a file, at a size in CSS pixels, as somebody sees it whose system is light or dark."""
        phone = width < 500
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, code: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        answer = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, element: str) -> None:
        """Click with the mouse on the middle of the element that an expression gives."""
        self.run(f"({element}).scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.run(f"({element}).getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
        self.run("new Promise(resolve => setTimeout(resolve, 50))")

    def type(self, text: str) -> None:
        """Enter text where the focus is."""
        self.ask("Input.insertText", text=text)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def chromium() -> Iterator[Tab]:
    """A tab of a new Chromium with a profile of its own, which ends with it."""
    to_read, write = os.pipe()
    read, to_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        words = [PROGRAM, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        shell = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *words]
        process = subprocess.Popen(
            shell, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={**os.environ, "HOME": profile},
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        try:
            with os.fdopen(write, "wb") as into, os.fdopen(read, "rb") as out:
                yield Tab(into, out)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
