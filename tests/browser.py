"""A headless Chromium, Debian's, driven over the WebDriver protocol."""

import base64
import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.debian import unpack

PACKAGES = ("chromium", "chromium-driver", "fonts-dejavu-core")
PATIENCE = 300  # seconds that one answer may take on a loaded machine
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
]
FONTS = "<fontconfig><dir>{system}/usr/share/fonts</dir><cachedir>{root}</cachedir></fontconfig>"
LIST_ELEMENTS = """
return [...document.querySelectorAll(arguments[0])].map(one => {
    const {x, y, width, height} = one.getBoundingClientRect();
    return {text: one.textContent, x, y, width, height};
})"""


class Browser:
    """One window.

    Args:
        root: Folder for all of it.

    Raises:
        OSError: if its packages cannot be had.
    """

    def __init__(self, root: Path) -> None:
        system = root / "system"
        unpack(PACKAGES, system)
        (root / "fonts.conf").write_text(FONTS.format(system=system, root=root / "fonts"))
        libraries = sorted({str(path.parent) for path in system.rglob("*.so*")})
        environment = {"HOME": root, "TMPDIR": root, "FONTCONFIG_FILE": root / "fonts.conf"}
        environment |= {"LD_LIBRARY_PATH": ":".join(libraries)}
        self._driver = subprocess.Popen(
            [system / "usr/bin/chromedriver", "--port=0"],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._driver.stdout is not None
        told = self._driver.stdout.readline()
        while not (port := re.search(r"started successfully on port (\d+)", told)):
            assert told, "chromedriver ended"
            told = self._driver.stdout.readline()
        self._url = f"http://127.0.0.1:{port[1]}/session"
        chromium = {"binary": str(system / "usr/lib/chromium/chromium"), "args": FLAGS}
        wanted = {
            "goog:chromeOptions": chromium | {"browserStartupTimeout": 1000 * PATIENCE},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "timeouts": {"script": 1000 * PATIENCE, "pageLoad": 1000 * PATIENCE},
        }
        answer = self._ask("", capabilities={"alwaysMatch": wanted})
        self._url += f"/{answer['sessionId']}"

    def _ask(self, path: str, method: str = "POST", **words: Any) -> Any:
        content = json.dumps(words).encode() if method == "POST" else None
        request = urllib.request.Request(
            self._url + path, content, {"Content-Type": "application/json"}, method=method
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=PATIENCE + 60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def open(self, path: Path) -> None:
        self._ask("/url", url=path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self._ask("/execute/sync", script=script, args=arguments)

    def find(self, selector: str) -> list[dict[str, Any]]:
        """The text and the place in the window of every element."""
        return self.run(LIST_ELEMENTS, selector)

    def point(self, element: dict[str, Any], *after: str, kind: str = "mouse") -> None:
        """Moves the pointer to the middle of an element; then, as `pointerDown`, what is named."""
        x, y = (element["x"] + element["width"] / 2, element["y"] + element["height"] / 2)
        steps = [{"type": "pointerMove", "x": round(x), "y": round(y)}]
        steps += [{"type": name, "button": 0} for name in after]
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        self._ask("/actions", actions=[pointer | {"actions": steps}])

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other: characters, or those of W3C WebDriver 17.4.2."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("/actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def emulate(self, command: str, **words: Any) -> None:
        """A command of Chromium's Emulation domain."""
        self._ask("/goog/cdp/execute", cmd=f"Emulation.{command}", params=words)

    def screenshot(self) -> bytes:
        return base64.b64decode(self._ask("/screenshot", "GET"))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: `browser` (its console) or `performance`."""
        return self._ask("/se/log", type=kind)

    def stop(self) -> None:
        """Ends the window and its driver."""
        try:
            self._ask("", "DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait(60)
