"""The page: well-formed, self-contained, and trusting no text."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from pipelines.report import Column, Plot, Report, Table, Text, plots

BROWSERS = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "google-chrome",
    "google-chrome-stable",
)
ATTACK = "\"'><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>$title"
VOID = {"meta", "img"}


@pytest.fixture(scope="module")
def report() -> Report:
    columns = (Column("model", "Model"), Column(ATTACK, ATTACK, ".2f"), Column("x", "X"))
    rows = [{"model": ATTACK, ATTACK: 1.0}, {"model": "a", "skipped": ATTACK}]
    table = Table(title=f"Numbers & {ATTACK}", note=ATTACK, columns=columns, rows=rows)
    png = plots.losses({"one": [{"step": step, "loss": 2.0 / step} for step in (1, 2, 3)]})
    assert png
    return Report(
        name="page",
        title=ATTACK,
        subtitle="of <i>",
        facts={"models": {ATTACK: {"loss": 1.5}}, "seed": ATTACK},
        tables={"numbers": table, ATTACK: table},
        plots=[Plot("one", f"caption {ATTACK}", png), Plot(ATTACK, "", png)],
        texts=[Text("a & b", ATTACK), Text("a & b", "\n  indented\n"), Text(ATTACK, "")],
    )


class Page(HTMLParser):
    """What is on a page, what a browser would load or run, and what is not well-formed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.faults: list[str] = []
        self.policy = self.text = ""
        self.feed(content)
        self.close()
        self.faults += [f"<{tag}> is left open" for tag in self.open]
        self.faults += [
            f"id {name} twice" for name, times in Counter(self.ids).items() if times > 1
        ]
        self.faults += [f"{link} leads nowhere" for link in self.links if not self._leads(link)]

    def _leads(self, link: str) -> bool:
        return link.startswith("#") and {link[1:], unquote(link[1:])} & set(self.ids) != set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.faults += [f"attribute twice in <{tag}>"] if len(given) < len(attrs) else []
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.loaded += [given[name] for name in ("src", "srcset", "data") if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.faults.append(f"</{tag}> inside {self.open}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_and_runs_nothing(report: Report) -> None:
    page = Page(report.html())
    allowed = "html head meta title style body h1 h2 h3 p nav ul li a section div table thead tbody"
    assert set(page.tags) <= {
        *allowed.split(),
        *["tr", "th", "td", "figure", "img", "figcaption", "pre"],
    }
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert len(page.loaded) == 2
    assert not page.handlers
    assert page.policy.startswith("default-src 'none'")


def test_what_was_escaped_is_there_to_be_read(report: Report) -> None:
    page = Page(report.html())
    places = {"titles": 2, "tables": 10, "links": 3, "captions": 1, "texts": 2, "facts": 2}
    assert page.text.count(ATTACK) == sum(places.values())


def test_the_page_is_well_formed_for_a_parser_and_for_a_browser(
    report: Report, tmp_path: Path
) -> None:
    written = Page(report.html())
    assert written.faults == []
    assert len(written.links) == len(written.ids) == 2 + 2 + 2
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        file = tmp_path / "report.html"
        file.write_text(report.html(), encoding="utf-8")
        read, log = _opened(browser, file, tmp_path / "profile")
        assert read.tags == written.tags  # nothing was mended
        assert read.text.split() == written.text.split()
        assert "CONSOLE" not in log  # nothing was refused


def _opened(browser: str, file: Path, profile: Path) -> tuple[Page, str]:
    """The page as a browser read it, and what that had to say."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={profile}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Page(done.stdout), done.stderr


def test_what_there_is_nothing_of_has_no_part_in_the_page(report: Report) -> None:
    bare = replace(report, tables={}, plots=[], texts=[], facts={})
    page = Page(bare.html())
    assert page.faults == []
    assert not {"section", "li", "table"} & set(page.tags)


def test_texts_of_one_heading_stand_together_and_keep_their_spaces(report: Report) -> None:
    content = report.html()
    assert content.count("<h3>") == 2
    # The first line feed is what a browser drops.
    assert "<pre>\n\n  indented\n</pre>" in content


def test_facts_are_on_the_page_by_dotted_name(report: Report) -> None:
    page = Page(replace(report, facts={"a": {"b": {"c": 3.5}}, "d": [1, 2]}).html())
    assert "a.b.c3.5" in page.text
    assert "d[1, 2]" in page.text
