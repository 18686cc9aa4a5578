"""What an evaluation's report shows, and what it says in MLflow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsl.vocabulary import Vocabulary
from infra.journal import METRIC
from infra.storage import Folder
from pipelines.evaluation import pages
from pipelines.evaluation.conditions import AtSNR
from pipelines.evaluation.parts import Parts, texts
from pipelines.evaluation.survey import Survey
from pipelines.report import Column, Table

WALK = {"model": "a", "view": "v", "state": "s", "path": "hybrid", "split": [2, 6], "budget": 8}
WALK |= {"p": 0.9, "temperature": 0.8}


def figures(*rows: dict[str, object]) -> dict[str, float]:
    columns = tuple(Column(key, key) for key in (*WALK, "bits", "said"))
    return pages.figures({"any": Table(title="", note="", columns=columns, rows=rows)})


def test_a_figure_is_named_by_all_that_tells_rows_apart() -> None:
    assert figures(WALK | {"bits": 2}) == {"a/v/s/hybrid/2-6/8/0.9/0.8/bits": 2.0}


def test_a_figure_of_a_great_snr_has_a_name_that_mlflow_takes() -> None:
    view, state = "hybrid_bound_1e+06", AtSNR(snr=1e6).name
    (name,) = figures({"model": "a", "view": view, "state": state, "bits": 2})
    assert METRIC.fullmatch(name)


@pytest.mark.parametrize("label", WALK)
def test_rows_that_differ_in_one_label_are_two_figures(label: str) -> None:
    other = {**WALK, label: [4, 4] if label == "split" else "other"}
    assert sorted(figures(WALK | {"bits": 1.0}, other | {"bits": 2.0}).values()) == [1.0, 2.0]


def test_what_is_no_finite_number_is_no_figure() -> None:
    nothing = ({"bits": value} for value in (None, math.nan, math.inf))
    assert figures(*nothing, {"said": "a word"}, {"model": "a"}) == {}


def test_as_many_texts_are_shown_however_few_are_in_a_part(tmp_path: Path) -> None:
    parts, vocabulary, none = Parts(Folder.at(str(tmp_path))), Vocabulary.char(), Any
    rows = vocabulary.encode(["one", "two", "six"])
    for first, row in enumerate(rows):
        parts.write("samples/real", first, texts(np.array([row]), first, vocabulary), {})
    survey = Survey(config=none, parts=parts, held_out=none, subjects=(), readers=())
    assert survey.texts("real", 2) == ["one", "two"]
