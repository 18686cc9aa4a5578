"""One report in several forms that say the same."""

from __future__ import annotations

import json
import math
import re

import pytest

from pipelines.report import Column, Plot, Report, Table, Text, markdown

COLUMNS = (Column("model", "Model"), Column("calls", "Calls"), Column("nats", "Nats", ".3f"))
ROWS = [
    {"model": "a|b", "calls": 12, "nats": 1.23456, "nats_stderr": 0.0123},
    {"model": "plain", "calls": 7, "nats": 2.0, "nats_stderr": math.nan},
    {"model": "none", "nats": math.nan},
    {"model": "skipped", "skipped": "cannot walk this path, for a reason longer than its column"},
]


@pytest.fixture
def report() -> Report:
    table = Table(title="Numbers", note="A note.", columns=COLUMNS, rows=ROWS)
    return Report(
        name="numbers",
        title="Title",
        subtitle="Subtitle",
        facts={"models": {"a": {"loss": math.inf}}},
        tables={"numbers": table},
        plots=[Plot("one", "caption", b"\x89PNG")],
        texts=[Text("heading", "text")],
    )


def test_a_cell_shows_its_error_where_it_has_one(report: Report) -> None:
    cells = report.tables["numbers"].cells()
    assert cells[0] == ["Model", "Calls", "Nats"]
    assert cells[1] == ["a|b", "12", "1.235 ± 0.012"]
    assert cells[2] == ["plain", "7", "2.000"]
    assert cells[3] == ["none", "–", "–"]
    assert cells[4] == ["skipped", ROWS[3]["skipped"]]


def test_a_whole_number_is_not_rounded_to_significant_digits() -> None:
    """A seed of eight digits is another one if it loses four."""
    assert Column("seed", "Seed", ".4g").cell({"seed": 20260217}) == "20260217"
    assert Column("lr", "Rate", ".4g").cell({"lr": 0.000123456}) == "0.0001235"
    assert Column("nats", "Nats", ".3f").cell({"nats": 2}) == "2.000"


def test_a_bound_says_so_and_only_where_there_is_a_value() -> None:
    column = Column("bits", "Bits", ".2f")
    assert column.cell({"bits": 1.4, "bits_stderr": 0.01, "bits_bound": True}) == "≤ 1.40 ± 0.01"
    assert column.cell({"bits": 1.4, "bits_bound": False}) == "1.40"
    assert column.cell({"bits": None, "bits_bound": True}) == "–"


def test_markdown_is_aligned_and_a_reason_spans_the_rest(report: Report) -> None:
    rows = [row for row in ROWS if "skipped" not in row] + [{"model": "x", "skipped": "why"}]
    table = Table(title="", note="", columns=COLUMNS, rows=rows)
    lines = markdown(table).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "a\\|b" in lines[2]
    assert re.fullmatch(r"\| x +\| why +\|", lines[-1])


def test_a_line_feed_does_not_end_a_row_of_markdown() -> None:
    table = Table(title="", note="", columns=(Column("a", "A"),), rows=[{"a": "one\ntwo"}])
    assert markdown(table).splitlines()[-1] == "| one two |"


def test_json_holds_the_plain_rows_and_no_word_that_json_lacks(report: Report) -> None:
    content = json.loads(report.json(), parse_constant=lambda word: pytest.fail(word))
    assert content["numbers"][0]["nats"] == 1.23456
    assert content["numbers"][2]["nats"] is None
    assert content["models"] == {"a": {"loss": None}}


def test_the_files_are_all_there_is_to_keep(report: Report) -> None:
    files = report.files()
    assert set(files) == {"numbers.json", "numbers.md", "one.png", "report.html"}
    assert b"](one.png)" in files["numbers.md"]
