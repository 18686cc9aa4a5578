"""Texts that are made to fool the figures: what they are made of, and which figures see through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.evaluation.held_out import read
from pipelines.evaluation.questions.adversaries import ADVERSARIES, Material
from tests.pipelines.evaluation.conftest import Refused, Run

LENGTH, SIZE = 40, 9


@pytest.fixture(scope="module")
def given() -> Material:
    generator = np.random.default_rng(0)
    training_RL = generator.integers(0, SIZE, (50, LENGTH))
    return Material(generator.integers(0, SIZE, (30, LENGTH)), training_RL, SIZE)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_as_many_texts_as_real_ones_and_the_same_for_the_same_seed(
    given: Material, name: str
) -> None:
    made, again = (ADVERSARIES[name](given, np.random.default_rng(1)) for _ in range(2))
    assert made.shape == given.real_NL.shape
    assert ((made >= 0) & (made < SIZE)).all()
    np.testing.assert_array_equal(made, again)
    assert (made != given.real_NL).any()


def test_what_they_are_made_of(given: Material) -> None:
    made = {name: make(given, np.random.default_rng(1)) for name, make in ADVERSARIES.items()}
    real_NL, training = given.real_NL, {tuple(row) for row in given.training_RL.tolist()}
    np.testing.assert_array_equal(np.sort(made["shuffled"], 1), np.sort(real_NL, 1))
    assert (made["repeated"] == made["repeated"][0]).all()
    assert tuple(made["repeated"][0].tolist()) in training
    copies = {tuple(row) for row in made["copier"].tolist()}
    assert copies <= training
    assert len(copies) == len(real_NL)
    for percent in (5, 10):
        wrong_NL = made[f"replaced-{percent}"] != real_NL
        assert (wrong_NL.sum(1) == LENGTH * percent // 100).all()


def test_a_copier_may_have_to_repeat_itself(given: Material) -> None:
    few = given._replace(training_RL=given.training_RL[:4])
    made = ADVERSARIES["copier"](few, np.random.default_rng(1))
    assert len(made) == len(given.real_NL)
    assert {tuple(row) for row in made.tolist()} == {tuple(row) for row in few.training_RL.tolist()}


def test_they_are_rows_of_the_tables_and_the_copier_is_flagged(
    run: Run, world: Path, tmp_path: Path
) -> None:
    code, made, err = run(
        f"models={{flat: {world / 'flat'}}}",
        "samples={rows: 40}",
        "adversaries=true",
        "judge={kind: ngram}",
        "memorisation={}",
        "divergence.orders=[2]",
    )
    assert code == 0, err
    tables = json.loads((tmp_path / "judged/report/evaluation.json").read_text())
    rows = {row["model"]: row for row in tables["samples"]}
    assert list(rows) == ["unigram", "real", *ADVERSARIES]
    assert [row["model"] for row in tables["divergence"]] == list(rows)

    # The judge likes what is wrong less and less, and what has been copied it does not mind.
    perplexity = {name: row["perplexity"] for name, row in rows.items()}
    assert max(perplexity["copier"], perplexity["real"]) < perplexity["replaced-5"]
    assert perplexity["replaced-5"] < perplexity["replaced-10"] < perplexity["shuffled"]
    assert made["metrics"]["copier/perplexity"] == perplexity["copier"]
    assert rows["copier"]["copied"] == rows["repeated"]["copied"] == 1
    assert (rows["copier"]["memorised"], rows["repeated"]["memorised"]) == ("yes", "yes")
    assert {rows[name]["memorised"] for name in ("unigram", "real", "shuffled")} == {"no"}
    by_model = {row["model"]: row["js_2"] for row in tables["divergence"]}
    assert by_model["shuffled"] > by_model["replaced-10"] > by_model["real"]
    assert by_model["repeated"] > by_model["copier"]
    training = read(str(world / "data/shards"), "validation", 8, corpus_rows=20_000, seed=0)
    copies = pq.read_table(tmp_path / "judged/samples/copier")["tokens"].to_pylist()
    assert {tuple(row) for row in copies} <= {tuple(r) for r in training.training_RL.tolist()}


def test_no_model_may_have_their_names(refused: Refused) -> None:
    argv = ["models={copier: WORLD/dsl}", "adversaries=true"]
    refused(argv, 2, ["no model may be named copier"])
