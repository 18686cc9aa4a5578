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
    row = {"model": model, "path": path, "budget": calls, "headline_ar": bits, **ends, **more}
    return row | {"headline_ar_interval": "whatever"}


ROWS = [
    {"model": "real", "headline_ar": 2.0, "headline_ar_interval": "1.9 to 2.1"},
    {"model": "dsl", "path": "hybrid", "budget": 16, "reached": "no"},
    head("more", "masked", 16, 3.0),
    head("more", "remask", 16, 2.9),
    head("dsl", "masked", 16, 2.8, ahead_ar_interval="0.0 to 0.2"),
    head("dsl", "hybrid", 16, 2.5, split=[8, 8], ahead_ar_interval="0.300 to 0.500"),
    head("dsl", "masked", 32, 2.4) | {"headline_ar_high": float("inf")},
]


def test_the_best_walk_of_each_model_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "small-evaluation/report/evaluation.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"headline": ROWS}))
    config = claim.ClaimConfig(
        out=str(tmp_path / "claim.png"), evaluations=(str(tmp_path / "small-evaluation"),)
    )
    claim.execute(config)
    head_line, rule, *lines = capsys.readouterr().out.splitlines()
    assert head_line.count("|") == rule.count("|") == lines[0].count("|")
    assert lines == [
        "| small | ar | 16 | more, remask | 2.90 [2.80, 3.00] "
        "| dsl, hybrid 8 + 8 | 2.50 [2.40, 2.60] | 0.300 to 0.500 |",
        "| small | ar | – | real text | 2.00 | | | |",
    ]
    assert (tmp_path / "claim.png").read_bytes().startswith(b"\x89PNG")


def test_a_walk_without_an_interval_is_not_taken() -> None:
    assert ("dsl", 32) not in claim.best(ROWS, "ar")


@pytest.mark.parametrize("tables", [{}, {"headline": []}])
def test_an_evaluation_without_a_headline_is_one_message(tmp_path: Path, tables: Any) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report/evaluation.json").write_text(json.dumps(tables))
    with pytest.raises(DataError, match="has no headline"):
        claim.read(str(tmp_path))
