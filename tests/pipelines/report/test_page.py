"""The page: well-formed, self-contained, trusting no text, and never wider than the screen."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines.report import Column, Plot, Report, Table, Text, plots
from tests.pipelines import browser

ATTACK = "\"'><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>$title"
VOID = {"meta", "img", "input"}
FILM = {
    "title": {ATTACK: ATTACK},
    "texts": {"0": ATTACK, "1": "b"},
    "given": [[0, 1]],
    "calls": [0, 4, 9],
    "frames": [
        {"tokens": [[1, 0]], "gamma": [[gamma, None]], "sure": [[sure, 100]]}
        for gamma, sure in ((0, 10), (9.5, 60), (None, 100))
    ],
}


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
        facts={"models": {ATTACK: {"loss": 1.5}}, "seed": ATTACK, "shown in a table": 7},
        tables={"numbers": table, ATTACK: table},
        plots=[Plot("one", f"caption {ATTACK}", png), Plot(ATTACK, "", png)],
        texts=[Text("a & b", ATTACK), Text("a & b", "\n  indented\n"), Text(ATTACK, "")],
        verdict=f"Better. {ATTACK}",
        film=FILM,
        topics={ATTACK: {ATTACK}, "nothing": {"absent"}},
        told=("shown in a table",),
    )


class Page(HTMLParser):
    """What is on a page, what a browser would load or run, and what is not well-formed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.faults: list[str] = []
        self.scripts: list[str] = []
        self.policy = self.text = ""
        self.feed(content)
        self.close()
        self.faults += [f"<{tag}> is left open" for tag in self.open]
        self.faults += [
            f"id {name} twice" for name, times in Counter(self.ids).items() if times > 1
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.faults += [f"attribute twice in <{tag}>"] if len(given) < len(attrs) else []
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        self.ids += [given["id"]] if "id" in given else []
        self.loaded += [given[name] for name in ("src", "srcset", "data", "href") if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.faults.append(f"</{tag}> inside {self.open}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data


def test_the_page_needs_nothing_and_runs_its_own_script_alone(report: Report) -> None:
    page = Page(report.html())
    allowed = "html head meta title style body main h1 h2 h3 p section div table thead tbody tr th"
    more = "td figure img figcaption pre details summary dl button input output script noscript"
    assert set(page.tags) <= {*allowed.split(), *more.split()}
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert len(page.loaded) == 2
    assert not page.handlers
    film, script = page.scripts
    assert "<" not in film
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.policy.startswith("default-src 'none'")
    assert page.policy.endswith(f"script-src 'sha256-{digest}'")


def test_what_was_escaped_is_there_to_be_read(report: Report) -> None:
    page = Page(report.html())
    places = {"titles": 2, "verdict": 1, "tables": 10, "topics": 1, "captions": 1, "texts": 2}
    places |= {"facts": 2}
    assert page.text.count(ATTACK) == sum(places.values())


def test_the_order_is_verdict_film_what_no_topic_names_and_the_topics(report: Report) -> None:
    page = report.html()
    found = [re.search(p, page) for p in ("class=.verdict", "<section", "<figure", "<details")]
    places = [match.start() for match in found if match]
    assert len(places) == len(found)
    assert places == sorted(places)
    assert page.count("<details") == 3  # one topic with content, the texts and the facts
    assert page.count("<table") == 2 + 1
    assert page.index("<table") < places[-1] < page.rindex("<figure")


def test_the_page_is_well_formed(report: Report) -> None:
    assert Page(report.html()).faults == []


def test_a_browser_reads_the_page_as_it_is_written(report: Report, tmp_path: Path) -> None:
    silent = replace(report, film=None)  # a film adds to the page
    (tmp_path / "report.html").write_text(silent.html(), encoding="utf-8")
    dumped, console = browser.dump(tmp_path / "report.html", tmp_path / "profile")
    written, read = Page(silent.html()), Page(dumped)
    assert read.tags == written.tags  # nothing was mended
    assert read.text.split() == written.text.split()
    assert console == []  # nothing was refused


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(report: Report, tmp_path: Path, width: int) -> None:
    """What would be wider scrolls by itself, says so, and can be reached by the keyboard."""
    wide = Table(
        title="Wide",
        note="",
        columns=tuple(Column(f"c{i}", f"Column {i}") for i in range(30)),
        rows=[{f"c{i}": 12345 for i in range(30)}],
    )
    asked = """({
      width: view.innerWidth, needed: page.documentElement.scrollWidth,
      boxes: [...page.querySelectorAll(".wide")].map(box => [box.scrollWidth > box.clientWidth,
        !box.previousElementSibling.hidden, box.tabIndex === 0])
    })"""
    whole = replace(report, tables={**report.tables, "wide": wide})
    answer, console = browser.ask(whole.html(), tmp_path, width=width, asked=asked)
    assert console == []
    assert answer["width"] == width
    assert answer["needed"] <= width
    assert [True] * 3 in answer["boxes"]
    assert all(len(set(box)) == 1 for box in answer["boxes"])


def test_the_slider_shows_the_film(report: Report, tmp_path: Path) -> None:
    """It begins in the middle; the slider goes to any frame; texts are shown as they are."""
    asked = """(() => {
      const [slider, shown] = ["call", "shown"].map(id => page.getElementById(id));
      const seen = () => [shown.value, page.querySelector(".reel").textContent,
        page.querySelector(".reel span").title];
      const middle = seen();
      slider.value = 2;
      slider.dispatchEvent(new view.Event("input"));
      return [middle, seen()];
    })()"""
    answer, console = browser.ask(report.html(), tmp_path, width=390, asked=asked)
    assert console == []
    assert answer == [
        ["call 4 of 9", "b" + ATTACK, "SNR 9.5, confidence 60 %"],
        ["call 9 of 9", "b" + ATTACK, "SNR ∞, confidence 100 %"],
    ]


def test_without_its_script_the_page_shows_nothing_that_needs_it(report: Report) -> None:
    """No hint beside what fits, and no button that does nothing."""
    page = report.html()
    assert page.count('<p class="hint faint" hidden>') == page.count('class="wide') > 0
    assert re.search("<noscript><p>The film.+</noscript>\n<section class=.film.+ hidden>", page)


def test_what_there_is_nothing_of_has_no_part_in_the_page(report: Report) -> None:
    nothing = {"tables": {}, "plots": [], "texts": [], "facts": {}, "verdict": "", "film": None}
    page = Page(replace(report, **nothing).html())
    assert page.faults == []
    assert not {"section", "details", "table"} & set(page.tags)


def test_texts_of_one_heading_stand_together_and_keep_their_spaces(report: Report) -> None:
    content = report.html()
    assert content.count("<h3>") == 2
    # The first line feed is what a browser drops.
    assert "<pre>\n\n  indented\n</pre>" in content


def test_facts_are_on_the_page_by_dotted_name_unless_a_table_tells_them(report: Report) -> None:
    facts = {"a": {"b": {"c": 3.5}}, "d": [1, 2], "e": "hidden"}
    page = Page(replace(report, facts=facts, told=("e",)).html())
    assert "a.b.c3.5" in page.text
    assert "d[1, 2]" in page.text
    assert "hidden" not in page.text
