"""Opens a report in a real headless browser, as a file, and tells what a reader would see and what the browser asked for.

The page lies in a frame of a probe page, which measures it: the page itself allows no script. Requests that leave the file
system go to a proxy that does not exist, and are read from the browser's log.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",  # so that the probe may look into the frame
    "--enable-logging=stderr",
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>",
    "--window-size=2000,2000",
    "--virtual-time-budget=5000",
)
PROBE = """<!doctype html><meta charset="utf-8"><body><script>
const selectors = %(selectors)s;
function shown(element) { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; }
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const seen = {title: page.title, text: page.body.innerText, overflow: root.scrollWidth - root.clientWidth, visible: {}};
  for (const selector of selectors) seen.visible[selector] = [...page.querySelectorAll(selector)].filter(shown).length;
  seen.broken_images = [...page.images].filter(image => !(image.complete && image.naturalWidth)).map(image => image.alt);
  seen.scripts = page.scripts.length;
  seen.background = frame.contentWindow.getComputedStyle(page.body).backgroundColor;
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
}
</script><iframe src="%(page)s" width="%(width)d" height="%(height)d" style="border:0" onload="measure(this)"></iframe></body>
"""


@dataclass(frozen=True)
class Seen:
    """title, text: as a reader sees them. overflow: CSS pixels by which the page is wider than the screen. visible: selector ->
    how many elements have a size. scripts: how many the page holds. background: of the body, as "rgb(...)".
    console: what the browser complained about. requests: what it asked the network for."""

    title: str
    text: str
    overflow: int
    visible: dict[str, int]
    broken_images: list[str]
    scripts: int
    background: str
    console: list[str]
    requests: list[str]


def look(page: Path, *selectors: str, width: int = 390, height: int = 844, dark: bool = False) -> Seen:
    """Opens the file at a phone's width; skips the test, with the reason, where there is no browser."""
    browser = next(filter(None, (shutil.which(name) for name in NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(NAMES)} is on the PATH")
    with tempfile.TemporaryDirectory() as directory:
        probe = Path(directory, "probe.html")
        place = html.escape(page.resolve().as_uri())
        probe.write_text(PROBE % {"selectors": json.dumps(selectors), "page": place, "width": width, "height": height})
        network = Path(directory, "network.json")
        flags = [*FLAGS, f"--log-net-log={network}", f"--user-data-dir={directory}/profile"]
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        dom, log = _run([browser, *flags, "--dump-dom", probe.as_uri()], directory)
        requests = _requests(network)
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, f"the page did not load; the browser said: {log[-2000:]}"
    console = [line for line in log.splitlines() if ":CONSOLE" in line]
    return Seen(**json.loads(html.unescape(found.group(1))), console=console, requests=requests)


def assert_readable(seen: Seen) -> None:
    """What holds for every report: complete, quiet, no wider than the screen, and nobody was asked for anything."""
    assert seen.console == []
    assert seen.requests == []
    assert seen.broken_images == []
    assert seen.scripts == 0
    assert seen.overflow == 0


def _run(command: Sequence[str], directory: str) -> tuple[str, str]:
    environment = {**os.environ, "HOME": directory}
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=True, env=environment)
    return done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def _requests(log: Path) -> list[str]:
    """What the page asked for, from the browser's own log of the network; the browser's own questions have no origin."""
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return [f"{found['method']} {found['url']}" for found in asked if found["initiator"] != "not an origin"]
