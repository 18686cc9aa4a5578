"""The verdict says what the rows say, and no more than their errors allow."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.evaluation.gate import Decision, Interval
from pipelines.evaluation.grid import FrontierConfig
from pipelines.evaluation.question import Merit
from pipelines.evaluation.questions.frontier import Frontier
from pipelines.evaluation.questions.judge import Judge
from pipelines.evaluation.settings import MERITS
from pipelines.evaluation.verdict import fooled, leading, ranked, verdict
from pipelines.report import Row

LESS = Merit("perplexity", "Generative perplexity ↓", ".1f", better=-1)
MORE = Merit("words", "Words in corpus ↑", ".3f", better=1)
UNIGRAM: Row = {"model": "unigram", "words": 0.2, "words_stderr": 0.0}


def row(model: str, words: float | None, stderr: float = 0.003, **more: Any) -> Row:
    values = {} if words is None else {"words": words, "words_stderr": stderr}
    return {"model": model, "path": "masked", "budget": 8, "calls": 8.0} | values | more


def first_sentence(*rows: Row) -> str:
    return verdict(rows, [MORE], None).removesuffix(" No gate decided on a champion.")


def test_the_best_walk_is_compared_with_the_best_of_another_model() -> None:
    found = first_sentence(
        UNIGRAM, row("a", 0.5, stderr=0.004), row("b", 0.55), row("a", 0.4),
        row("b", 0.6, path="hybrid", budget=5, split=[2, 3]),
    )  # fmt: skip
    # 1.96 times the square root of .003² + .004² is .0098.
    assert found == (
        "Words in corpus: b along hybrid (2 + 3 calls) ranks first with 0.600 ± 0.003, against "
        "0.500 ± 0.004 of a along masked (8 calls): better by 0.100 [0.090, 0.110] at 95 %."
    )


def test_where_there_is_one_model_it_is_compared_with_another_path_and_then_the_floor() -> None:
    other = row("a", 0.3, path="sde")
    assert "of a along sde (8 calls)" in first_sentence(UNIGRAM, row("a", 0.5), other)
    assert "of unigram: better" in first_sentence(UNIGRAM, row("a", 0.5))
    assert "nothing to compare" in first_sentence(row("a", 0.5))
    assert "worse by -0.100" in first_sentence(UNIGRAM, row("a", 0.1))


@pytest.mark.parametrize("merits", [[MORE], MERITS])
def test_nothing_measured_is_nothing_ranked(merits: list[Merit]) -> None:
    rows = [row("a", None), row("b", math.nan), row("c", None, skipped="why"), UNIGRAM]
    assert leading(rows, merits) is None
    assert verdict(rows, merits, None).startswith("No model has written texts")


def test_a_difference_within_its_error_is_no_victory() -> None:
    found = first_sentence(row("a", 0.5, stderr=0.1), row("b", 0.52, stderr=0.1))
    assert "ahead by 0.020 [-0.257, 0.297] at 95 %, which chance may explain" in found


def test_a_walk_below_the_floor_is_not_called_ahead_where_chance_may_explain_it() -> None:
    found = first_sentence(UNIGRAM, row("a", 0.19, stderr=0.1))
    assert "behind by -0.010 [-0.206, 0.186] at 95 %, which chance may explain" in found


def test_without_errors_there_is_no_interval() -> None:
    found = first_sentence(row("a", 0.5), row("b", 0.52, stderr=math.nan))
    assert "better by 0.020, without an interval" in found
    assert "[" not in found


def test_a_walk_below_the_floor_is_called_worse_also_without_an_interval() -> None:
    found = first_sentence(UNIGRAM, row("a", 0.1, stderr=math.nan))
    assert "against 0.200 ± 0.000 of unigram: worse by -0.100, without an interval" in found


def test_what_has_no_figure_is_no_floor() -> None:
    mute, real = UNIGRAM | {"words": math.nan}, UNIGRAM | {"model": "real", "words": 0.4}
    assert "of real: better by 0.100" in first_sentence(mute, real, row("a", 0.5))
    assert "nothing to compare" in first_sentence(mute, row("a", 0.5))


PAIRED = Merit("bits", "Bits ↓", ".2f", better=-1, ahead="ahead")


def bits(
    model: str, value: float, budget: int = 8, ahead: tuple[float, float] | None = None
) -> Row:
    ends = dict(zip(("ahead_low", "ahead_high"), ahead, strict=True)) if ahead else {}
    errors = {"bits": value, "bits_stderr": 0.5}
    return row(model, None, **errors, **ends) | {"budget": budget}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((bits("more", 3.0), bits("dsl", 2.9, ahead=(0.05, 0.2))), "better by 0.10 [0.05, 0.20]"),
        ((bits("more", 3.0), bits("dsl", 3.1, ahead=(-0.3, -0.1))), "better by 0.10 [0.10, 0.30]"),
        # What is not of this pair: as of independent texts, 1.96 times the square root of .5.
        ((bits("more", 3.0, 16), bits("dsl", 2.9, ahead=(0.05, 0.2))), "0.10 [-1.29, 1.49]"),
        # Of this pair, and unbounded, however small both standard errors are.
        (
            (bits("more", 3.0), bits("dsl", 2.0, ahead=(-math.inf, math.inf))),
            "ahead by 1.00, with an unbounded interval",
        ),
        (
            (bits("b", 3.0, ahead=(0.5, 0.9)), bits("dsl", 2.9, ahead=(0.05, 0.2))),
            "0.10 [-1.29, 1.49]",
        ),
    ],
)
def test_an_interval_of_the_very_pair_is_preferred(rows: tuple[Row, ...], words: str) -> None:
    assert words in verdict(rows, [PAIRED], None)


def test_less_is_better_where_the_merit_says_so() -> None:
    rows = [row(name, None, perplexity=value) for name, value in (("a", 30.0), ("b", 20.0))]
    rows.append(row("c", None, perplexity=math.inf))
    assert [r["model"] for r in ranked(rows, LESS)] == ["b", "a"]
    assert "better by 10.0" in verdict(rows, [MORE, LESS], None)
    assert leading([*rows, row("a", 0.5)], [MORE, LESS]) == MORE


def test_a_judges_figure_alone_leads_at_unmatched_diversity() -> None:
    rows = [row(name, None, perplexity=value) for name, value in (("a", 30.0), ("b", 20.0))]
    said = "Generative perplexity at unmatched diversity: b along masked (8 calls) ranks first"
    assert verdict(rows, [LESS], None).startswith(said)


def test_where_a_frontier_was_asked_for_nothing_else_leads() -> None:
    """Of a model whose texts are all alike, every other figure is the best."""
    asked = SimpleNamespace(frontier=FrontierConfig(), questions=(Judge(),))
    (head,) = Frontier().merits_in(asked)
    rows = [row("a", 0.5, perplexity=1.0), row("b", 0.4, perplexity=20.0)]
    merits = [MORE, LESS, head]
    assert leading(rows, merits) is None
    found = verdict(rows, merits, None)
    assert found.startswith("No walk of the frontier is as diverse as real text, so none ranks")
    assert "widen frontier.temperatures. No gate" in found
    reached = [*rows, row("b", None, headline_judge=2.0)]
    assert leading(reached, merits) == head
    assert "at unmatched" not in verdict(reached, merits, None)


def test_adversaries_fool_the_figures_by_which_they_pass_every_walk() -> None:
    rows = [
        row("a", 0.5, perplexity=20.0),
        row("b", 0.6, perplexity=30.0),
        {"model": "copier", "words": 0.9, "perplexity": 10.0},
        {"model": "shuffled", "words": 0.9, "perplexity": 20.0},
        {"model": "repeated", "perplexity": math.nan, "view": "other"},
    ]
    head = Merit("headline", "Headline ↓", ".3f", better=-1)  # which nobody has
    side = Merit("entropy", "Entropy", ".3f")
    found = fooled(rows, [MORE, LESS, head, side], ["copier", "shuffled", "repeated"])
    words, perplexity = "Words in corpus", "Generative perplexity"
    assert found == [
        {"model": "copier", "above": f"{words}, {perplexity}", "below": "none"},
        {"model": "shuffled", "above": words, "below": perplexity},
        {"model": "repeated", "above": "none", "below": f"{words}, {perplexity}"},
    ]


def test_the_second_sentence_is_the_gates() -> None:
    interval = Interval(metric="m", candidate=1, other=2, difference=1, low=0.5, high=2)
    decision = Decision(
        accepted=True,
        why="a becomes champion over b: better in m",
        candidate="a",
        other="b",
        confidence=0.95,
        metric=interval,
        guards=(),
    )
    found = verdict([row("a", 0.5)], [MORE], decision)
    assert found.endswith(" The gate decided: a becomes champion over b: better in m.")
