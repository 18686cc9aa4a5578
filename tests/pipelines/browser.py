"""Pages in a browser, where one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
# A frame has any width, which a browser's window has not: those are at least 500 pixels wide.
FRAME = """<!doctype html><iframe style="border: 0; width: {width}px; height: 2000px"
srcdoc="{page}"></iframe><output></output><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  for (const topic of page.querySelectorAll("details")) topic.open = true;
  // Its script hears of the open topics first.
  setTimeout(() => {{
    document.querySelector("output").textContent = JSON.stringify({asked});
  }}, 500);
}};
</script>"""


class Opened(NamedTuple):
    """What a browser answered to the question, and what it logged for developers."""

    answer: Any
    console: list[str]


def dump(file: Path, profile: Path) -> tuple[str, list[str]]:
    """A page as the browser has it after its scripts, and what was logged; skips without one."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    # In virtual time, so that a film has played to its end.
    command += ["--virtual-time-budget=20000", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run(
        [*command, file.as_uri()], capture_output=True, text=True, timeout=600, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def ask(page: str, folder: Path, *, width: int, asked: str) -> Opened:
    """Opens the page `width` pixels wide with all topics unfolded, and evaluates a JavaScript
    expression of its `page` (document) and `view` (window)."""
    file = folder / f"frame-{width}.html"
    framed = FRAME.format(width=width, page=html.escape(page), asked=asked)
    file.write_text(framed, encoding="utf-8")
    seen, console = dump(file, folder / f"profile-{width}")
    found = re.search(r"<output>(.+?)</output>", seen, re.DOTALL)
    assert found, f"the page gave no answer: {console}"
    return Opened(json.loads(html.unescape(found[1])), console)
