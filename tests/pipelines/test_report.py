"""One report in four forms that say the same, and a page that trusts no text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from pipelines.report import Column, Plot, Report, Table, Text, markdown, plots

ATTACK = "<script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>"
COLUMNS = (Column("model", "Model"), Column("calls", "Calls"), Column("nats", "Nats", ".3f"))
ROWS = [
    {"model": "a|b", "calls": 12, "nats": 1.23456, "nats_stderr": 0.0123},
    {"model": "plain", "calls": 7, "nats": 2.0, "nats_stderr": math.nan},
    {"model": "none", "nats": math.nan},
    {"model": ATTACK, "skipped": "cannot walk this path, for a reason longer than its column"},
]


@pytest.fixture
def report() -> Report:
    table = Table(title="Numbers & <b>", note=ATTACK, columns=COLUMNS, rows=ROWS)
    return Report(
        title=ATTACK,
        subtitle="of <i>",
        facts={"models": {"a": {"loss": math.inf}}},
        tables={"numbers": table},
        plots=[Plot("one", f"caption {ATTACK}", b"\x89PNG")],
        texts=[Text("a & b", f"text $title {ATTACK}")],
    )


def test_a_cell_shows_its_error_where_it_has_one(report: Report) -> None:
    cells = report.tables["numbers"].cells()
    assert cells[0] == ["Model", "Calls", "Nats"]
    assert cells[1] == ["a|b", "12", "1.235 ± 0.012"]
    assert cells[2] == ["plain", "7", "2.000"]
    assert cells[3] == ["none", "–", "–"]
    assert cells[4] == [ATTACK, ROWS[3]["skipped"]]


def test_markdown_is_aligned_and_a_reason_spans_the_rest(report: Report) -> None:
    rows = [row for row in ROWS if row["model"] != ATTACK] + [{"model": "x", "skipped": "why"}]
    table = Table(title="", note="", columns=COLUMNS, rows=rows)
    lines = markdown(table).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "a\\|b" in lines[2]
    assert re.fullmatch(r"\| x +\| why +\|", lines[-1])


def test_json_holds_the_plain_rows_and_no_word_that_json_lacks(report: Report) -> None:
    content = json.loads(report.json(), parse_constant=lambda word: pytest.fail(word))
    assert content["numbers"][0]["nats"] == 1.23456
    assert content["numbers"][2]["nats"] is None
    assert content["models"] == {"a": {"loss": None}}


def test_the_page_needs_nothing_and_runs_nothing(report: Report) -> None:
    page = Page()
    page.feed(report.html())
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "b", "i"}
    assert all(value.startswith("data:image/png;base64,") for value in page.references)
    assert len(page.references) == 1
    assert not page.handlers
    assert "default-src 'none'" in page.policy
    # What was escaped is there to be read, and a $ in a text is no placeholder.
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert "text $title <script>" in page.text


def test_the_files_are_all_there_is_to_keep(report: Report) -> None:
    files = report.files()
    assert set(files) == {"evaluation.json", "evaluation.md", "one.png", "report.html"}
    assert b"](one.png)" in files["evaluation.md"]


class Page(HTMLParser):
    """What a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.policy = self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.references += [given[name] for name in ("src", "href", "srcset") if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_plot_is_a_png() -> None:
    journal = [{"step": s, "loss": 2.0 / s} for s in range(1, 9)] + [{"step": 9}]
    journal[5]["validation/loss"] = 1.0
    walked = [
        {"model": m, "path": "p", "calls": c, "words": 0.4, "words_stderr": 0.1}
        for m in "ab"
        for c in (8, 32)
    ]
    states = [
        {"model": "a", "gamma": g, "nats": 1 / g, "squared_error": 1 / g}
        | {"nats_stderr": 0.1, "squared_error_stderr": math.nan}
        for g in (1.0, 2.0)
    ]
    drawn = (
        plots.losses({"one": journal, "two": journal}),
        plots.quality(walked, {"unigram": 0.2, "real": math.nan}),
        plots.errors_by_snr(states),
    )
    assert all(png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000 for png in drawn)
