"""The table and the plot of the finding say what the evaluations say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.errors import DataError
from pipelines.examples import claim


def head(model: str, path: str, calls: int, bits: float, **more: Any) -> dict[str, Any]:
    ends = {"headline_ar_low": bits - 0.1, "headline_ar_high": bits + 0.1}
    row = {"model": model, "path": path, "budget": calls, "headline_ar": bits} | ends | more
    return row | {"headline_ar_interval": "whatever"}


def ahead(value: float) -> dict[str, float]:
    return {"ahead_ar": value, "ahead_ar_low": value - 0.1, "ahead_ar_high": value + 0.1}


REAL = {"model": "real", "headline_ar": 2.0, "headline_ar_interval": "1.9 to 2.1"}
ROWS = [
    REAL,
    {"model": "more", "path": "conf", "budget": 16, "reached": "no"},
    head("more", "masked", 16, 3.0),
    head("more", "remask", 16, 2.9),
    head("dsl", "masked", 16, 2.8, **ahead(0.1)),
    head("dsl", "hybrid", 16, 2.5, split=[8, 8], **ahead(0.4)),
    head("dsl", "masked", 32, 2.4) | {"headline_ar_high": float("inf")},
]


def written(folder: Path, rows: list[dict[str, Any]], **more: Any) -> str:
    """The run directory of an evaluation with this headline."""
    facts = {"data": {"digest": "d", "references": "any"}, "models": {"more": {}, "dsl": {}}}
    (folder / "report").mkdir(parents=True)
    (folder / "report/evaluation.json").write_text(json.dumps({**facts, "headline": rows, **more}))
    return str(folder)


def said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *seeds: list[dict[str, Any]]
) -> list[str]:
    """The lines of the table for evaluations with these headlines."""
    runs = tuple(written(tmp_path / str(number), rows) for number, rows in enumerate(seeds))
    claim.execute(claim.ClaimConfig(out=str(tmp_path / "new/a.png"), evaluations={"small": runs}))
    head_line, rule, *lines = capsys.readouterr().out.splitlines()
    assert head_line.count("|") == rule.count("|") == lines[0].count("|")
    assert (tmp_path / "new/a.png").read_bytes().startswith(b"\x89PNG")
    return lines


def test_the_best_walk_of_each_model_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(tmp_path, capsys, ROWS) == [
        "| small | ar | 16 | more, remask | 2.90 [2.80, 3.00] "
        "| dsl, hybrid 8 + 8 | 2.50 [2.40, 2.60] | 0.300 to 0.500 |",
        "| small | ar | – | real text | 2.00 | | | |",
    ]


def test_over_several_seeds_it_is_the_best_on_average_with_an_interval_over_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masked is the best walk of DSL by the second seed alone, and hybrid on average. The ends are
    those of Student's t with one degree of freedom, whose 97.5 % quantile is 12.706."""
    second = [
        REAL,
        head("more", "masked", 16, 3.1),
        head("more", "remask", 16, 2.92),
        head("dsl", "masked", 16, 2.5, **ahead(0.42)),
        head("dsl", "hybrid", 16, 2.52, split=[8, 8], **ahead(0.42)),
    ]
    # Means 2.91, 2.51, .41; standard errors .01 each.
    assert said(tmp_path, capsys, ROWS, second) == [
        "| small | ar | 16 | more, remask | 2.91 [2.78, 3.04] "
        "| dsl, hybrid 8 + 8 | 2.51 [2.38, 2.64] | 0.283 to 0.537 |",
        "| small | ar | – | real text | 2.00 | | | |",
    ]


@pytest.mark.parametrize("seeds", [[ROWS], [ROWS, ROWS]])
def test_a_walk_without_an_interval_is_not_taken(seeds: list[list[dict[str, Any]]]) -> None:
    assert ("dsl", 32) not in claim.best(seeds, "headline_ar")


@pytest.mark.parametrize("shift", [-0.2, 0.2])
def test_an_interval_beside_its_value_is_drawn(shift: float) -> None:
    """Quantiles of resamples may both lie on one side of the texts as they are."""
    ends = {"headline_ar_low": 2.9 + shift, "headline_ar_high": 3.1 + shift}
    rows = [REAL, head("more", "masked", 16, 3.0, **ends)]
    assert claim.draw({"small": [rows]}).startswith(b"\x89PNG")


def test_a_walk_that_one_seed_lacks_is_not_taken() -> None:
    lacking = [row for row in ROWS if row.get("split") is None]
    walk, _ = claim.best([ROWS, lacking], "headline_ar")["dsl", 16]
    assert walk.name == "dsl, masked"


def test_without_the_model_to_beat_no_other_takes_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unreached = {"model": "more", "path": "masked", "budget": 16, "reached": "no"}
    others = [head(model, "masked", 16, 2.8, **ahead(0.1)) for model in ("dsl", "other")]
    real = "| small | ar | – | real text | 2.00 | | | |"
    assert said(tmp_path / "some", capsys, [REAL, unreached, *others]) == [real]
    assert said(tmp_path / "none", capsys, [REAL, unreached]) == [real]


def test_a_headline_without_any_walk_says_what_real_text_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(tmp_path, capsys, [REAL]) == ["| small | ar | – | real text | 2.00 | | | |"]


SECOND = [REAL, *(head(model, "masked", 16, 2.0) for model in ("more", "dsl"))]


@pytest.mark.parametrize(
    ("rows", "facts", "words"),
    [
        (ROWS, {}, "says the very same as"),
        (ROWS, {"data": {"digest": "d", "references": "the first 512 of seed 1"}}, "the very same"),
        (SECOND, {"data": {"digest": "e"}}, "its data are e, and those of"),
        (SECOND, {"models": {"dsl": {}, "more": {}}}, "its models are ['dsl', 'more']"),
        (SECOND, {"models": {"more": {}, "other": {}}}, "its models are ['more', 'other']"),
        ([{"model": "real", "headline_x_interval": ""}], {}, "its judges are ['x'], and those of"),
    ],
)
def test_what_does_not_belong_together_is_not_averaged(
    tmp_path: Path, rows: list[dict[str, Any]], facts: dict[str, Any], words: str
) -> None:
    runs = (written(tmp_path / "one", ROWS), written(tmp_path / "two", rows, **facts))
    for order in (runs, (*runs, runs[0])):
        with pytest.raises(DataError) as raised:
            claim.execute(claim.ClaimConfig(out="a.png", evaluations={"small": order}))
        assert words in str(raised.value)
        assert all(run in str(raised.value) for run in runs)


def test_evaluations_of_one_text_may_be_of_other_rows(tmp_path: Path) -> None:
    """Each has made its choice of real text, by its seed."""
    other = {"data": {"digest": "d", "references": "the first 512 of seed 1"}}
    runs = written(tmp_path / "one", ROWS), written(tmp_path / "two", SECOND, **other)
    assert claim.together(runs) == [ROWS, SECOND]


@pytest.mark.parametrize("evaluations", [{}, {"small": ()}])
def test_a_text_has_an_evaluation(evaluations: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        claim.ClaimConfig(out="a.png", evaluations=evaluations)


@pytest.mark.parametrize("tables", [{}, {"headline": []}])
def test_an_evaluation_without_a_headline_is_one_message(tmp_path: Path, tables: Any) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report/evaluation.json").write_text(json.dumps(tables))
    with pytest.raises(DataError, match="has no headline"):
        claim.read(str(tmp_path))


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ([1], "should be an object"),
        ({"headline": [1]}, "headline.0"),
        ({"headline": {"model": "real"}}, "headline"),
        ({"headline": [REAL, {"path": "masked"}]}, "headline.1"),
        ({"headline": [REAL, {"model": "more", "path": "masked"}]}, "headline.1"),
        ({"headline": [REAL, head("more", "masked", 16, 3.0, split=[8])]}, "headline.1"),
        ({"headline": [REAL], "models": ["more"]}, "models"),
        ({"headline": [REAL], "data": "d"}, "data"),
    ],
)
def test_a_report_of_another_shape_is_one_message(tmp_path: Path, report: Any, words: str) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report/evaluation.json").write_text(json.dumps(report))
    with pytest.raises(DataError) as raised:
        claim.read(str(tmp_path))
    assert raised.value.where == str(tmp_path / "report/evaluation.json")
    assert words in raised.value.why
    assert raised.value.fix == "Evaluate again"
