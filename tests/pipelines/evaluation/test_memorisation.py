"""Copies of training rows are found and flagged; text that is not copied is not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.copies import Copies, share_copied
from pipelines.evaluation.held_out import read
from pipelines.evaluation.questions.memorisation import Memorisation, MemorisationConfig
from tests.pipelines.evaluation.conftest import Refused, Run


@pytest.mark.parametrize(("length", "size"), [(64, 32), (32, 32), (31, 15), (16, 8), (1, 1)])
def test_stretches_fit_into_rows(length: int, size: int) -> None:
    assert MemorisationConfig().size(length) == size


def flagged(share_N: np.ndarray, real_N: np.ndarray) -> dict[str, Any]:
    """What the table says of texts with these shares beside real text."""
    by_source = {"parts/copied/dsl-masked-1": share_N, "parts/copied/real": real_N}
    survey: Any = SimpleNamespace(
        columns=lambda group: {
            "share": by_source[group], "longest": (8 * by_source[group]).astype(int)
        }
    )  # fmt: skip
    return dict(Memorisation().of_source(survey, "dsl-masked-1"))


def test_a_copier_is_flagged_and_chance_is_not() -> None:
    generator = np.random.default_rng(0)
    real_N = (generator.random(200) < 0.05).astype(float)
    copier = flagged(np.ones(200), real_N)
    assert (copier["memorised"], copier["copied"], copier["longest_copy_of_all"]) == ("yes", 1, 8)
    assert flagged(np.ones(9), np.zeros(9))["memorised"] == "yes"
    assert flagged(generator.permutation(real_N), real_N)["memorised"] == "no"
    assert flagged(np.zeros(200), real_N)["memorised"] == "no"


def test_every_source_is_looked_up_in_the_training_split(
    run: Run, world: Path, tmp_path: Path
) -> None:
    argv = [f"models={{flat: {world / 'flat'}}}", "memorisation={stretch: 4}", "corpus_rows=50"]
    code, made, err = run(*argv, "paths={masked: {path: masked, budgets: [1]}}")
    assert code == 0, err
    tables = json.loads((tmp_path / "judged/report/evaluation.json").read_text())
    rows = {row["model"]: row for row in tables["samples"]}
    data = read(str(world / "data/shards"), "validation", 14, corpus_rows=50, seed=0)
    assert len(data.training_RL) == 50
    longest_NL = Copies(data.training_RL).longest(data.rows_NL[8:])
    assert rows["real"]["longest_copy"] == pytest.approx(longest_NL.max(1).mean())
    assert rows["real"]["copied"] == pytest.approx(share_copied(longest_NL, 4).mean())
    assert made["metrics"]["real/copied"] == rows["real"]["copied"] > rows["flat"]["copied"]
    assert {row["memorised"] for row in rows.values()} == {"no"}
    assert (tmp_path / "judged/report/copied_by_calls.png").exists()
    assert (tmp_path / "judged/report/longest_copy_by_calls.png").exists()


def test_a_stretch_of_nothing_is_refused(refused: Refused) -> None:
    refused(["models={a: WORLD/dsl}", "memorisation.stretch=0"], 2, ["memorisation", "at least 1"])
