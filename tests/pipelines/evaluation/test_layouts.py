"""Layouts say what the rows say, and keep the papers' numbers apart from ours."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from pipelines.evaluation import layouts
from pipelines.evaluation.layouts import OURS, THEIRS, Published, published_table
from pipelines.evaluation.questions.likelihood import bits
from pipelines.evaluation.settings import MERITS, QUALITY
from pipelines.report import Row, markdown

BY_KEY = {merit.key: merit for merit in MERITS}
MAUVE, PERPLEXITY, WORDS, ENTROPY = map(
    BY_KEY.__getitem__, ("mauve", "perplexity", "words", "entropy")
)
REASON = "mdlm was not trained on finite SNR"
TEXTS: list[Row] = [
    {"model": "unigram", "mauve": 0.01, "words": 0.2},
    {"model": "real", "mauve": 0.97, "mauve_stderr": 0.01, "words": 1.0},
    {"model": "mdlm", "path": "masked", "budget": 64, "calls": 63.5, "mauve": 0.2},
    {"model": "mdlm", "path": "masked", "budget": 16, "calls": 16.0, "mauve": 0.1}
    | {"mauve_stderr": 0.05, "words": 0.5},
    {"model": "mdlm", "path": "sde", "skipped": REASON},
    {"model": "mdlm", "path": "hybrid", "skipped": REASON},
    {"model": "dsl", "path": "sde", "budget": 16, "mauve": None},
    {"model": "dsl", "path": "hybrid", "budget": 48, "split": [16, 32], "calls": 47.5}
    | {"mauve": 0.6, "mauve_stderr": 0.01, "words": 0.9},
]
LIKELIHOOD: list[Row] = [
    {"model": "unigram", "view": "exact", "bits_per_byte": 4.1, "perplexity": 17.0},
    {"model": "dsl", "view": "endpoint_bound", "bits_per_byte": 1.5, "bits_per_byte_stderr": 0.01}
    | {"perplexity": 2.8},
    {"model": "dsl", "view": "path_integral", "bits_per_byte": 1.3, "perplexity": 2.5},
    {"model": "dsl", "view": "hybrid_bound_30", "bits_per_byte": 1.4, "perplexity": 2.6},
]


def test_a_line_for_each_model_and_path_and_a_column_for_each_budget() -> None:
    table = layouts.by_budget(TEXTS, MAUVE, published_table("owt_mauve"))
    head, *lines = table.cells()
    assert head[:4] == ["Model", "Path", "T=16", "T=64"]
    assert [line[:4] for line in lines[:3]] == [
        ["mdlm", "masked", "0.100 ± 0.050", "0.200"],
        ["mdlm", "sde", REASON],
        ["dsl", "sde", "–", "–"],
    ]
    assert "unigram 0.010, real 0.970 ± 0.010" in table.note
    alone = layouts.by_budget(TEXTS[2:], MAUVE, published_table("owt_mauve"))
    assert alone.note.startswith("T: denoiser calls. Published, not run here: ")


@pytest.mark.parametrize("order", [1, -1])
def test_a_path_that_is_walked_at_some_budgets_is_not_skipped(order: int) -> None:
    some: list[Row] = [
        {"model": "ar", "path": "order", "budget": 8, "skipped": "too few calls"},
        {"model": "ar", "path": "order", "budget": 64, "mauve": 0.5},
    ]
    table = layouts.by_budget(some[::order], MAUVE, published_table("owt_mauve"))
    assert table.cells()[1][:3] == ["ar", "order", "0.500"]


def test_published_rows_stand_below_ours_and_say_so() -> None:
    table = layouts.by_budget(TEXTS, MAUVE, published_table("owt_mauve"))
    head, *lines = table.cells()
    assert head == ["Model", "Path", "T=16", "T=64", "T=128", "T=256", "T=512", "T=1024", "Source"]
    assert [line[-1] for line in lines] == [OURS, REASON, OURS] + 7 * [THEIRS]
    assert lines[-1] == [
        "DSL-FT",
        "ReMDM-loop",
        "–",
        "–",
        "0.639",
        "0.661",
        "0.651",
        "0.722",
        THEIRS,
    ]
    assert "Published, not run here" in table.note
    assert "5,000 texts" in table.note


def test_hybrid_paths_have_a_line_for_each_split() -> None:
    table = layouts.hybrid_splits(TEXTS, QUALITY, published_table("owt_hybrid_mauve"))
    head, *lines = table.cells()
    metrics = ["MAUVE ↑", "Words in corpus ↑"]
    assert head == ["Model", "Path", "T_cont", "T_MDM", "NFE", *metrics, "Source"]
    assert lines[0] == ["mdlm", "hybrid", REASON]
    assert lines[1] == ["dsl", "hybrid", "16", "32", "47.5", "0.600 ± 0.010", "0.900", OURS]
    assert lines[-1] == ["DSL-FT", "hybrid", "32", "48", "80", "0.724", "–", THEIRS]


def test_bits_have_their_bounds_marked_and_estimates_left_out() -> None:
    head, *lines = bits(LIKELIHOOD).cells()
    assert head == ["Model", "View", "BPC ↓", "PPL ↓", "Source"]
    assert lines[:3] == [
        ["unigram", "exact", "4.100", "17.00", OURS],
        ["dsl", "endpoint_bound", "≤ 1.500 ± 0.010", "≤ 2.80", OURS],
        ["dsl", "hybrid_bound_30", "≤ 1.400", "≤ 2.60", OURS],
    ]
    assert lines[4] == ["DSL, continuous diffusion", "–", "≤ 1.45", "–", THEIRS]
    assert len(lines) == 3 + 14


def test_a_layout_is_made_only_where_the_papers_rows_are_asked_for() -> None:
    assert layouts.of_texts(TEXTS, MERITS, ()) == {}
    assert set(layouts.of_texts(TEXTS, MERITS, ["owt_mauve"])) == {"mauve_by_budget"}
    every = layouts.of_texts(TEXTS, MERITS, get_args(Published))
    assert set(every) == {"mauve_by_budget", "hybrid_splits"}
    assert all(map(markdown, every.values()))


def test_every_table_can_be_shown_without_rows_of_ours() -> None:
    alone = layouts.of_texts([], MERITS, get_args(Published)) | {"bits": bits([])}
    assert {name: len(table.rows) for name, table in alone.items()} == {
        "mauve_by_budget": 7,
        "hybrid_splits": 6,
        "bits": 14,
    }


def test_no_published_value_is_a_number_that_could_be_counted_in() -> None:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [value]

    for name in get_args(Published):
        table = published_table(name)
        assert table.source.startswith(("000", "003"))
        for row in table.rows:
            values = {key: value for key, value in row.items() if key != "split"}
            assert all(isinstance(leaf, str) for leaf in leaves(values))
