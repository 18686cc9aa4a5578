"""Texts that are made to fool the figures: what they are made of, and which figures see through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from pipelines.evaluation import metrics
from pipelines.evaluation.held_out import read
from pipelines.evaluation.questions.adversaries import (
    ADVERSARIES,
    FAMILIES,
    Adversaries,
    Material,
    phrases,
    replaced,
)
from tests.pipelines.evaluation.conftest import Refused, Run

LENGTH, SIZE = 40, 9


@pytest.fixture(scope="module")
def given() -> Material:
    generator = np.random.default_rng(0)
    training_RL = generator.integers(0, SIZE, (50, LENGTH))
    real_NL = generator.integers(0, SIZE, (30, LENGTH))
    return Material(real_NL=real_NL, training_RL=training_RL, size=SIZE)


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
    for percent in (2, 5, 10):
        wrong_N = (made[f"replaced-{percent}"] != real_NL).sum(1)
        assert wrong_N.sum() == real_NL.size * percent // 100
        assert np.ptp(wrong_N) <= 1
    half = LENGTH // 2
    np.testing.assert_array_equal(made["mirrored"][:, :half], made["mirrored"][:, half:])
    for name in ("common", "mirrored", "periodic"):
        assert set(made[name].ravel().tolist()) == set(given.common_K.tolist())


@hypothesis.given(
    share=st.floats(0, 1),
    rows=st.integers(1, 20),
    length=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_the_share_that_is_replaced_is_exact(
    share: float, rows: int, length: int, seed: int
) -> None:
    real_NL = np.random.default_rng(seed).integers(0, SIZE, (rows, length))
    of = Material(real_NL=real_NL, training_RL=real_NL, size=SIZE)
    wrong_N = (replaced(share)(of, np.random.default_rng(seed)) != real_NL).sum(1)
    assert abs(wrong_N.sum() - share * rows * length) <= 0.5 + 1e-9
    assert np.ptp(wrong_N) <= 1


def test_common_tokens_are_as_frequent_as_in_the_training_split() -> None:
    generator = np.random.default_rng(0)
    p_V = np.array([0.04, 0.3, 0.1, 0.5, 0.06])
    training_RL = generator.choice(5, (2000, 10), p=p_V)
    real_NL = np.tile(np.arange(10) % 3, (4000, 1))  # the entropy of three tokens alike
    of = Material(real_NL=real_NL, training_RL=training_RL, size=5)
    assert of.common_K.tolist() == [3, 1, 2]
    made = ADVERSARIES["common"](of, np.random.default_rng(1))
    found_K = np.bincount(made.ravel(), minlength=5)[of.common_K] / made.size
    np.testing.assert_allclose(found_K, p_V[[3, 1, 2]] / 0.9, atol=0.02)
    periodic = ADVERSARIES["periodic"](of, np.random.default_rng(1))
    assert periodic[0].tolist() == [3, 1, 2, 3, 1, 2, 3, 1, 2, 3]


def test_a_period_has_the_entropy_of_real_text_and_comes_twice(given: Material) -> None:
    made = ADVERSARIES["periodic"](given, np.random.default_rng(1))
    healthy = metrics.entropies(given.real_NL).mean()
    assert metrics.entropies(made).mean() == pytest.approx(healthy, abs=0.1)
    short = Material(real_NL=np.arange(8)[None], training_RL=given.training_RL, size=SIZE)
    assert len(short.common_K) == 4


@pytest.mark.parametrize("size", [3, 2**40])
def test_phrases_are_the_most_frequent_of_the_training_split(size: int) -> None:
    known = np.array([[0, 1, 2, 0, 1, 2], [1, 2, 0, 1, 2, 1]]) * (size // 3)
    of = Material(real_NL=np.zeros((40, 12), int), training_RL=known, size=size)
    made_NL = phrases(of, np.random.default_rng(0))
    assert made_NL.shape == (40, 12)
    bank = {tuple(row[place : place + 5]) for row in known.tolist() for place in range(2)}
    drawn = {tuple(row[first : first + 5]) for row in made_NL.tolist() for first in (0, 5)}
    assert drawn == bank
    assert {tuple(row[10:]) for row in made_NL.tolist()} <= {phrase[:2] for phrase in bank}


def test_only_the_most_frequent_phrases_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.evaluation.questions.adversaries.PHRASES", 1)
    known = np.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [4, 3, 2, 1, 0]])
    of = Material(real_NL=np.zeros((3, 10), int), training_RL=known, size=5)
    assert phrases(of, np.random.default_rng(0)).tolist() == [[4, 3, 2, 1, 0] * 2] * 3


def test_a_lower_temperature_is_read_better(given: Material) -> None:
    """By the very model that they are drawn from, which finds each next token likelier."""
    nats = [
        given.model.nats(ADVERSARIES[name](given, np.random.default_rng(1))).mean()
        for name in ("ngram", "ngram-0.8", "ngram-0.6")
    ]
    assert nats[0] > nats[1] > nats[2]


def test_every_adversary_is_in_the_note() -> None:
    note = Adversaries().note(SimpleNamespace(adversaries=True))
    assert all(family.said in note for family in FAMILIES)
    assert {name for family in FAMILIES for name in family.made} == set(ADVERSARIES)
    assert Adversaries().note(SimpleNamespace(adversaries=False)) == ""


def test_a_copier_may_have_to_repeat_itself(given: Material) -> None:
    few = replace(given, training_RL=given.training_RL[:4])
    made = ADVERSARIES["copier"](few, np.random.default_rng(1))
    assert len(made) == len(given.real_NL)
    assert {tuple(row) for row in made.tolist()} == {tuple(row) for row in few.training_RL.tolist()}


def test_they_are_rows_of_the_tables_and_the_copier_is_flagged(
    run: Run, world: Path, tmp_path: Path
) -> None:
    code, made, err = run(
        f"models={{flat: {world / 'flat'}}}",
        "paths={masked: {path: masked, budgets: [1]}}",
        "samples={rows: 40, traced: 0}",
        "adversaries=true",
        "judge={kind: ngram}",
        "memorisation={}",
        "divergence.orders=[2]",
    )
    assert code == 0, err
    tables = json.loads((tmp_path / "judged/report/evaluation.json").read_text())
    rows = {row["model"]: row for row in tables["samples"]}
    assert list(rows) == ["unigram", "real", *ADVERSARIES, "flat"]
    assert [row["model"] for row in tables["divergence"]] == list(rows)

    # The judge likes what is wrong less and less, and what has been copied it does not mind.
    perplexity = {name: row["perplexity"] for name, row in rows.items()}
    assert max(perplexity["copier"], perplexity["real"]) < perplexity["replaced-5"]
    assert perplexity["real"] < perplexity["replaced-2"] < perplexity["replaced-5"]
    assert perplexity["replaced-5"] < perplexity["replaced-10"] < perplexity["shuffled"]
    assert made["metrics"]["copier/perplexity"] == perplexity["copier"]

    # Which of them the judge puts above the one model, whose tokens are as likely as each other.
    above = {row["model"]: "perplexity" in row["above"] for row in tables["fooled"]}
    assert above == {name: perplexity[name] < perplexity["flat"] for name in ADVERSARIES}
    assert above["copier"]
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
